# SPDX-License-Identifier: Apache-2.0
"""The directions in which observations see the latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_flows import AutoFlowGuide
from pyro_flows.models.log_joint import LogJoint, PulledBack
from pyro_flows.starts import directions as module
from pyro_flows.starts.directions import observed_directions

X = torch.tensor([[1.0, 0.5, -1.0], [0.2, -2.0, 0.3], [0.0, 0.0, 4.0], [1.0, 1.0, 1.0]])
Y = torch.tensor([1.0, 0.0, 1.0, 0.0])
SCALE = torch.tensor([2.0, 0.5, 1.0])


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def logistic_in_a_loop(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    for i in range(len(x)):
        pyro.sample(f"y_{i}", dist.Bernoulli(logits=x[i] @ w), obs=y[i])


def target(model: Callable[..., Any], *args: Any) -> PulledBack:
    """The log joint in coordinates of other scales."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(model).setup(*args)
    return PulledBack(
        LogJoint(model, guide.posterior.joint.layout, args, {}), lambda z: (z * SCALE, z.new_zeros(len(z)))
    )


@pytest.mark.parametrize("model", [logistic, logistic_in_a_loop])
def test_those_of_a_regression_are_its_rows(model: Callable[..., Any]) -> None:
    found = observed_directions(target(model, X, Y), torch.zeros(3))
    expected = normalize(X * SCALE, dim=-1)
    cosines = (found @ expected.mT).abs()
    assert len(found) == 4
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    assert sorted(cosines.argmax(-1).tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(cosines.max(-1).values, torch.ones(4), atol=1e-3, rtol=0.0)
    assert cosines[0].argmax() == 2  # the largest row first


def test_no_more_than_wanted_and_none_twice_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIRECTIONS", module.DirectionSettings(max_count=2))
    log_joint, state = target(logistic, X, Y), torch.random.get_rng_state()
    found = observed_directions(log_joint, torch.zeros(3))
    assert found.shape == (2, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(module, "DIRECTIONS", module.DirectionSettings(max_entries=6))
    assert observed_directions(target(logistic, X, Y), torch.zeros(3)).shape == (2, 3)  # every second row


def test_none_where_no_likelihood_depends_on_the_latents() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    assert observed_directions(target(model, torch.tensor(1.0)), torch.zeros(3)).shape == (0, 3)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_gradients_at_the_edge_of_the_support_are_left_out() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        seen = torch.cat([(0.2 + x[:1] @ w).sqrt(), x[1:] @ w])
        with pyro.plate("rows", len(x)), pyro.validation_enabled(False):
            pyro.sample("y", dist.Normal(seen, 1.0), obs=y)

    found = observed_directions(target(model, X, Y), torch.zeros(3))
    cosines = (found @ normalize(X * SCALE, dim=-1).mT).abs()
    assert len(found) >= 3
    torch.testing.assert_close(cosines.max(-1).values, torch.ones(len(found)), atol=0.02, rtol=0.0)


def partly_masked(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=torch.arange(len(x)) < 2), pyro.poutine.scale(scale=3.0):
        pyro.sample("y", dist.Normal((x @ w).unsqueeze(-1).expand(-1, 2), 1.0).to_event(1), obs=torch.stack([y, y], -1))
    with pyro.poutine.mask(mask=False):
        pyro.sample("held_out", dist.Normal(1000.0 * w, 1.0).to_event(1), obs=torch.zeros(3))
    pyro.factor("penalty", -w.square().sum())


@pytest.mark.parametrize("model", [logistic, logistic_in_a_loop, partly_masked])
def test_observed_terms_add_up_to_the_log_likelihood(model: Callable[..., Any]) -> None:
    log_joint = target(model, X, Y).log_joint
    draws = torch.randn(5, 3)
    observed = [name for name in log_joint.batched.nodes if name != "w"]
    found = sum(term.reshape(5, -1).sum(-1) for term in log_joint.observed(draws))
    torch.testing.assert_close(found, log_joint(draws) - log_joint.without(observed, draws), rtol=1e-5, atol=1e-4)


def test_masked_observations_have_no_direction() -> None:
    found = observed_directions(target(partly_masked, X, Y), torch.zeros(3))
    cosines = (found @ normalize(X[:2] * SCALE, dim=-1).mT).abs()
    assert len(found) == 5  # two rows of two each, and the penalty
    assert ((cosines.max(-1).values - 1.0).abs() < 1e-3).sum() == 4
