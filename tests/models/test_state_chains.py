# SPDX-License-Identifier: Apache-2.0
"""Chains of states: what is read off a model, against the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.sites import read_sites
from pyro_flows.models.state_chains import STATE_CHAINS, ReadStateChain, read_state_chain

T = 8
COUNTS = torch.tensor([1.0, 3.0, 2.0, 0.0, 4.0, 6.0, 2.0, 1.0])


def read(model: Callable[..., object]) -> tuple[Layout, ReadStateChain | None]:
    layout = Layout(read_sites(trace_latents(model, (), {})))
    return layout, read_state_chain(RunRecorder(model, (), {}, layout))


def noise(count: int = T) -> Tensor:
    z: Tensor = pyro.sample("z", dist.Normal(0.0, 1.0).expand([count]).to_event(1))
    return z


def autoregression() -> None:
    """Counts on an autoregression that starts from its own distribution, by a loop."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = noise()
    h = scale * z[0] / (1 - phi**2).sqrt()
    path = [h]
    for t in range(1, T):
        h = phi * h + scale * z[t]
        path.append(h)
    pyro.sample("y", dist.Poisson((mean + torch.stack(path)).exp()).to_event(1), obs=COUNTS)


def day_by_day() -> None:
    """The same with an observation in the loop, and innovations in a plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("days", T):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    h = mean
    for t in pyro.markov(range(T)):
        h = mean + phi * (h - mean) + scale * z[t]
        pyro.sample(f"y_{t}", dist.Poisson(h.exp()), obs=COUNTS[t])


def walk() -> None:
    """A random walk by a cumulative sum, with a drift."""
    drift = pyro.sample("drift", dist.Normal(0.0, 0.1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    path = level + (drift + scale * noise()).cumsum(-1)
    pyro.sample("y", dist.Poisson(path.exp()).to_event(1), obs=COUNTS)


@pytest.mark.parametrize("model", [autoregression, day_by_day, walk])
def test_states_and_what_follows_them_are_the_models(model: Callable[[], None]) -> None:
    """The log joint by the chain is the one of a run of the model, far from where it was recorded; and after a copy."""
    layout, found = read(model)
    assert found is not None and found.chain.rows == layout.slices["z"]
    points = torch.randn(4, layout.latent_dim, generator=torch.Generator().manual_seed(0))
    for again in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        offset, lag, scale = again.chain.read(points)
        z = points[:, found.chain.rows]
        h, states = torch.zeros(4), []
        for t in range(T):
            h = offset[:, t] + lag[:, t] * h * (t > 0) + scale[:, t] * z[:, t]
            states.append(h)
        values = again.likelihood(points, torch.stack(states, -1))
        for point, value in zip(points, values, strict=True):
            sites = RunRecorder(model, (), {}, layout).scored(point.split(layout.sizes))
            expected = sum(node["log_prob"].sum() for name, node in sites.items() if name != "z")
            torch.testing.assert_close(value, torch.as_tensor(expected))


def test_coefficients_are_differentiable() -> None:
    layout, found = read(autoregression)
    assert found is not None
    point = torch.zeros(layout.latent_dim, requires_grad=True)
    _, lag, scale = found.chain.read(point)
    assert lag.shape == scale.shape == (T,)
    (slope,) = torch.autograd.grad(lag[3], point, retain_graph=True)
    assert slope[layout.slices["phi"]].item() == pytest.approx(0.25)  # of a sigmoid at zero
    assert slope[found.chain.rows].abs().max() == 0.0


def of_another_prior() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.StudentT(4.0, torch.zeros(T), 1.0).to_event(1))
    pyro.sample("y", dist.Poisson((scale * z).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def of_two_orders() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Poisson((scale * noise()).cumsum(-1).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def that_reads_a_value() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = noise()
    sign = 1.0 if z[0].item() > 0 else -1.0
    pyro.sample("y", dist.Poisson((sign * scale * z).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def of_a_parameter() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weight = pyro.param("weight", torch.tensor(0.5))
    pyro.sample("y", dist.Poisson((weight * scale * noise()).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def that_is_seen_itself() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = noise()
    pyro.sample("y", dist.Poisson((scale * z).cumsum(-1).exp()).to_event(1), obs=COUNTS)
    pyro.sample("x", dist.Normal(z.square(), 1.0).to_event(1), obs=COUNTS)


def alone() -> None:
    pyro.sample("y", dist.Poisson(noise().cumsum(-1).exp()).to_event(1), obs=COUNTS)


@pytest.mark.parametrize(
    "model", [of_another_prior, of_two_orders, that_reads_a_value, of_a_parameter, that_is_seen_itself, alone]
)
def test_others_have_no_chain(model: Callable[[], None]) -> None:
    assert read(model)[1] is None


def test_few_other_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_flows.models.state_chains.STATE_CHAINS", type(STATE_CHAINS)(max_others=2))
    assert read(autoregression)[1] is None


def switching() -> None:
    """Which states are seen depends on a value, so that another run computes something else."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    path = (scale * noise()).cumsum(-1)
    with torch.no_grad():
        sign = torch.where(torch.rand(()) > 0.5, 1.0, -1.0)
    pyro.sample("y", dist.Poisson((sign * path).exp()).to_event(1), obs=COUNTS)


def test_random_models_have_none() -> None:
    assert read(switching)[1] is None
