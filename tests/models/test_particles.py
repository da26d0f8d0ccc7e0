# SPDX-License-Identifier: Apache-2.0
"""Which guides make many draws in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.models.particles import runs_in_a_plate
from pyro_flows.models.traces import Call
from tests.common import schools

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


GUIDES: dict[str, Callable[..., Any]] = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoDelta": autoguide.AutoDelta,
    "AutoFlowGuide": AutoFlowGuide,
    "AutoFlowGuide, without an inverse": lambda model: AutoFlowGuide(model, "planar"),
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES.keys())
def test_guides_that_do(make: Callable[..., Any]) -> None:
    guide = make(schools)
    guide(Y)
    assert runs_in_a_plate(guide, Call((Y,), {}), 1)


def test_a_guide_with_another_density_in_a_plate() -> None:
    def guide(locs: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(locs, 1.0).to_event(1))
        pyro.sample("second", dist.Normal(first.mean(), 1.0))

    assert not runs_in_a_plate(guide, Call((torch.zeros(3),), {}), 0)


def test_a_guide_that_fails_in_a_plate() -> None:
    def guide(locs: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(locs, 1.0).to_event(1))
        pyro.sample("second", dist.Normal(torch.ones(2, 3) @ first, 1.0).to_event(1))

    def stubborn(locs: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", dist.Normal(float(first), 1.0))

    assert not runs_in_a_plate(guide, Call((torch.zeros(3),), {}), 0, count=4)
    assert not runs_in_a_plate(stubborn, Call((torch.zeros(3),), {}), 0)


class Rounded(dist.Normal):  # type: ignore[misc]
    """Has no density at positive values that are scored alone, as a flow whose draw was rounded onto an edge."""

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = super().log_prob(value)
        return torch.where(value > 0.0, -torch.inf, found) if value.dim() == 0 else found


def test_draws_without_a_density_are_not_compared() -> None:
    def guide() -> None:
        pyro.sample("z", Rounded(torch.tensor(0.0), 1.0))

    pyro.set_rng_seed(0)
    for _ in range(4):
        assert runs_in_a_plate(guide, Call((), {}), 0)


def test_mini_batches_are_those_of_the_run() -> None:
    """Single runs of the check see the items that the run in a plate saw."""

    def guide() -> None:
        locs = torch.arange(10.0) * 100.0
        with pyro.plate("data", 10, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(locs[index], 1.0))

    assert runs_in_a_plate(guide, Call((), {}), 1)
