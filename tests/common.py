# SPDX-License-Identifier: Apache-2.0
"""What several test modules need."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide
from pyro_flows.training.trainer import Trainer
from pyro_flows.transforms import FixedParameter, FlowTransform
from pyro_flows.transforms.fixed import look_again
from pyro_flows.transforms.networks import Packed

__all__ = [
    "Killed",
    "abilities",
    "assert_no_graph",
    "assert_same_guides",
    "jacobian",
    "kill_after",
    "randomize_parameters",
    "schools",
    "trained",
]


def schools(y: Tensor) -> None:
    """Eight schools, centered, whose errors are all alike."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def abilities(y: Tensor) -> None:
    """Item response: students, who are leaves, before the items that they answer, ``y`` of a row for each student."""
    students, items = y.shape
    with pyro.plate("students", students):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", items):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    logits = slope * (ability.unsqueeze(-1) - difficulty)
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y)


def a_site_a_day(y: Tensor) -> None:
    """An autoregression with a latent coefficient, whose states are sites, and observations in the loop."""
    lag = pyro.sample("lag", dist.Normal(0.8, 0.1))
    h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
    for t in range(len(y)):
        if t:
            h = pyro.sample(f"h_{t}", dist.Normal(lag * h, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])


def trained(module: nn.Module) -> list[nn.Parameter]:
    """All parameters but those that a warm start sets and training leaves as they are."""
    return [parameter for parameter in module.parameters() if not isinstance(parameter, FixedParameter)]


class Killed(BaseException):
    """Ends a run as the end of its process does."""


def kill_after(monkeypatch: pytest.MonkeyPatch, num_steps: int | None, error: type[BaseException] = Killed) -> None:
    """Raise after so many steps of ``fit``; None never does."""
    step, taken = Trainer._step, 0

    def counted(self: Trainer, rate: float) -> None:
        nonlocal taken
        step(self, rate)
        taken += 1
        if taken == num_steps:
            raise error

    monkeypatch.setattr(Trainer, "_step", counted)


@torch.no_grad()
def randomize_parameters(module: nn.Module, scale: float = 0.3) -> None:
    """Add normal noise of sd ``scale`` to vectors and ``scale / sqrt(fan_in)`` to matrices; starts hide mistakes."""
    for part in module.modules():
        for tensor in part() if isinstance(part, Packed) else part.parameters(recurse=False):
            fan = tensor.shape[-1] if tensor.ndim > 1 else 1
            tensor.add_(torch.randn_like(tensor) * scale / math.sqrt(fan))
    look_again(module)


def assert_same_guides(one: AutoFlowGuide, other: AutoFlowGuide, *args: Any) -> None:
    """The same draws from the same noise, bit for bit, and the same density of them."""
    found = []
    for guide in (one, other):
        pyro.set_rng_seed(5)
        found.append(guide.sample_posterior(4, *args))
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)
    torch.testing.assert_close(one.log_prob(found[0], *args), other.log_prob(found[0], *args), rtol=0.0, atol=0.0)


def jacobian(transform: FlowTransform, x: Tensor, context: Tensor | None = None) -> Tensor:
    """``dy_i / dx_j`` at one point ``(D,)``, from one backward pass: row i of a batch of copies gives row i."""
    rows = x.detach().expand(x.shape[-1], x.shape[-1]).clone().requires_grad_()
    y, _ = transform.forward_and_ladj(rows, context)
    return torch.autograd.grad(y.diagonal().sum(), rows)[0]


def assert_no_graph(module: nn.Module) -> None:
    """Nothing on the module, hidden attributes included, keeps an autograd graph alive."""
    for part in module.modules():
        for name, value in vars(part).items():
            for member in value if isinstance(value, (list, tuple)) else (value,):
                assert not isinstance(member, torch.Tensor) or member.grad_fn is None, f"{type(part).__name__}.{name}"
