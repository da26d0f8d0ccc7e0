# SPDX-License-Identifier: Apache-2.0
"""Which latents are independent of each other given all others, as the gradient of the log joint tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.transforms import MultilevelHead
from tests.common import abilities

STUDENTS, ITEMS = 220, 6
Y = torch.bernoulli(torch.full((STUDENTS, ITEMS), 0.5), generator=torch.Generator().manual_seed(0))


def of_unknown_scale(y: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    ability = pyro.sample("ability", dist.Normal(torch.zeros(STUDENTS), sigma).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=ability.unsqueeze(-1)).expand([STUDENTS, ITEMS]).to_event(2), obs=y)


def walk(y: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    steps = pyro.sample("steps", dist.Normal(torch.zeros(STUDENTS), sigma).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=steps.cumsum(0).unsqueeze(-1)).expand(y.shape).to_event(2), obs=y)


def regression(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(STUDENTS), 1.0).to_event(1))
    x = torch.arange(20 * STUDENTS).sin().reshape(20, STUDENTS)
    pyro.sample("y", dist.Normal(x @ weights, scale).to_event(1), obs=y.flatten()[:20])


def two_large_sites(y: Tensor) -> None:
    """Neither of two crossed effects leaves few enough others."""
    for name in ("rows", "columns"):
        with pyro.plate(name, 310):
            pyro.sample(f"of_{name}", dist.Normal(0.0, 1.0))


def few(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("students", 100):
        pyro.sample("ability", dist.Normal(0.0, scale))


@pytest.mark.parametrize(
    ("model", "order"),
    [
        (abilities, ("difficulty", "slope", "ability")),
        (of_unknown_scale, ("sigma", "ability")),
        (walk, None),
        (regression, None),
        (two_large_sites, None),
        (few, None),
    ],
)
def test_leaves_come_last(model: Callable[..., Any], order: tuple[str, ...] | None) -> None:
    joint = AutoFlowGuide(model).setup(Y).posterior.joint
    assert joint is not None
    assert joint.layout.num_leaves == (0 if order is None else STUDENTS)
    if order is not None:
        assert joint.layout.names == order


def test_draws_are_in_the_order_of_the_model() -> None:
    guide = AutoFlowGuide(abilities)
    assert list(guide(Y)) == ["ability", "difficulty", "slope"]
    assert guide.sample_posterior(3, Y)["slope"].shape == (3, ITEMS)


def test_scales_of_leaves_are_known_in_any_dimension() -> None:
    """Reading priors takes a run of the model for each latent that may be a parent, and leaves are none."""
    runs = []

    def counted(y: Tensor) -> None:
        runs.append(None)
        of_unknown_scale(y)

    joint = AutoFlowGuide(counted).setup(Y).posterior.joint
    assert joint is not None
    head = joint.flow.head
    assert isinstance(head, MultilevelHead)
    assert head.num_parents == 1  # a draw takes no product with a row for each latent
    assert len(runs) < 60


def test_priors_of_thousands_of_leaves_are_left_to_the_flow() -> None:
    """A head's slopes would take memory as the square of their number."""

    def many(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("points", 2600):
            pyro.sample("x", dist.Normal(0.0, sigma))

    joint = AutoFlowGuide(many).setup(Y).posterior.joint
    assert joint is not None
    assert joint.layout.num_leaves == 2600
    assert not joint.flow.head.is_outermost


@pytest.mark.parametrize("flow", ["realnvp", "diagonal_normal"])
def test_other_families_have_sites_in_order(flow: str) -> None:
    joint = AutoFlowGuide(abilities, flow).setup(Y).posterior.joint
    assert joint is not None
    assert joint.layout.names[0] == "ability"
    assert joint.layout.num_leaves == 0
