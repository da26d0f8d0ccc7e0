# SPDX-License-Identifier: Apache-2.0
"""Weights of separated modes, which gradients do not find."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.training.batches import Batches
from pyro_flows.training.modes import SETTINGS, weigh_modes
from pyro_flows.training.objective import Objective

WEIGHT = 0.3  # of the mode at -8


def two_modes() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 100.0).expand([2]).to_event(1))
    modes = torch.stack([dist.Normal(loc, 1.0).log_prob(z).sum(-1) for loc in (-8.0, 8.0)], -1)
    pyro.factor("modes", (modes + torch.tensor([WEIGHT, 1.0 - WEIGHT]).log()).logsumexp(-1))


def weight_of_first(guide: AutoFlowGuide) -> Tensor:
    return (guide.sample_posterior(1000)["z"][:, 0] < 0.0).double().mean()


@pytest.fixture(scope="module")
def guide() -> AutoFlowGuide:
    pyro.clear_param_store()
    found = AutoFlowGuide(two_modes)
    result = fit(two_modes, found, seed=0, progress=False)
    assert result.num_modes == 2
    return found


def test_weights_are_those_of_the_posterior(guide: AutoFlowGuide) -> None:
    base = guide.posterior.only_block.flow.base
    wanted, wrong = base.weights, torch.tensor([0.9, 0.1])
    base.set_weights(wrong)
    weigh_modes(Objective(two_modes, guide, Batches((), {})))
    # Of draws from the wrong weights v, importance weights pi / v have a relative variance of sum(pi^2 / v) - 1.
    error = (((wanted.square() / wrong).sum() - 1.0) / SETTINGS.num_draws).sqrt()
    assert (base.weights - wanted).abs().max() < 5 * error


def test_weights_that_are_right_stay_within_their_error(guide: AutoFlowGuide) -> None:
    weigh_modes(Objective(two_modes, guide, Batches((), {})))
    assert abs(float(weight_of_first(guide)) - WEIGHT) < 5 * (WEIGHT * (1 - WEIGHT) / 1000) ** 0.5


def test_other_guides_are_left_alone() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.clear_param_store()
    guide = AutoFlowGuide(model)
    guide()
    before = [p.detach().clone() for p in guide.parameters()]
    weigh_modes(Objective(model, guide, Batches((), {})))
    assert all(torch.equal(one, other) for one, other in zip(before, guide.parameters(), strict=True))
