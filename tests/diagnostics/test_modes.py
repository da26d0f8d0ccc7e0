# SPDX-License-Identifier: Apache-2.0
"""Diagnoses of guides with several modes: which draws are of one, moves within each, a reference as wide as each."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import diagnose
from pyro_flows.diagnostics.modes import Modes
from pyro_flows.diagnostics.moves import MoveSettings, measure_drift
from pyro_flows.diagnostics.reference import sample_reference
from pyro_flows.diagnostics.search import search_regions
from pyro_flows.importance.weights import ImportanceSampler

DIM = 4


def two(scale: float = 0.1, distance: float = 3.0, base: Any = dist.Normal) -> None:
    """Two modes that are narrow beside their distance."""
    locs = distance * torch.tensor([-1.0, 1.0]).unsqueeze(-1).expand(2, DIM)
    components = base(locs, scale).to_event(1)
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), components))


def narrower() -> None:
    """Its weights have a heavy tail that hardly matters."""
    two(scale=0.093)


class Halves(dist.TorchDistribution):
    """The outer half of each mode in the first coordinate, two normals otherwise."""

    support = dist.constraints.real_vector
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__(event_shape=(DIM,), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        sign = 2.0 * torch.bernoulli(torch.full((*sample_shape, 1), 0.5)) - 1.0
        noise = 0.1 * torch.randn(*sample_shape, DIM)
        noise[..., 0] = noise[..., 0].abs()
        return sign * (3.0 + noise)

    def log_prob(self, value: Tensor) -> Tensor:
        away = value * value[..., :1].sign() - 3.0
        found = dist.Normal(0.0, 0.1).log_prob(away).sum(-1)  # twice the density of a half, half of the modes
        return torch.where(away[..., 0] > 0.0, found, -torch.inf)


def outer_halves() -> None:
    pyro.sample("z", Halves())


def ridge(width: float = 0.3) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(x.square() / 4, width))


def searched(model: Any, guide: Any, seed: int = 0) -> tuple[ImportanceSampler, Any, Any, Modes]:
    """Sampler, 1000 draws, regions, and modes."""
    torch.manual_seed(seed)
    sampler = ImportanceSampler("test", model, guide, (), None)
    regions = search_regions(sampler, model, (), {}, enabled=True, progress=False).regions
    draws = sampler.draw(1000)
    return sampler, draws, regions, Modes(sampler, regions, sampler.structure.pack(draws.values))


def test_draws_are_of_the_mode_that_they_are_in() -> None:
    sampler, draws, _, modes = searched(two, two)
    packed = sampler.structure.pack(draws.values)
    numbers, sides = modes.of(packed), packed[:, 0, 0] > 0.0
    assert numbers.shape == (1000, 1)
    above, below = numbers[sides].unique(), numbers[~sides].unique()
    assert len(above) == len(below) == 1 and above != below
    assert modes.within(packed).abs().max() < 1.0


def test_a_curved_ridge_is_one_mode() -> None:
    """There is a dip on a straight line between its ends, but none to a region between them."""
    sampler, draws, _, modes = searched(ridge, ridge)
    packed = sampler.structure.pack(draws.values)
    assert len(modes.of(packed).unique()) == 1
    torch.testing.assert_close(modes.within(packed), packed - packed.median(0).values)


@pytest.mark.parametrize("seed", range(3))
def test_moves_are_as_wide_as_a_mode(seed: int) -> None:
    """With steps as wide as the distance between modes, none was accepted, and halves of modes passed for them."""
    sampler, draws, _, modes = searched(two, two, seed)
    drift = measure_drift(sampler, draws, modes)
    assert drift is not None and not drift.is_significant
    sampler, draws, _, modes = searched(two, outer_halves, seed)
    drift = measure_drift(sampler, draws, modes)
    assert drift is not None and drift.is_significant
    assert measure_drift(sampler, draws) is None  # nothing is accepted, which says nothing


def test_steps_are_as_short_as_a_ridge_is_narrow() -> None:
    """With steps by the width of all draws none was accepted, and nothing was said."""

    def narrow() -> None:
        ridge(0.1)

    torch.manual_seed(0)
    sampler = ImportanceSampler("test", narrow, narrow, (), None)
    drift = measure_drift(sampler, sampler.draw(4000))
    assert drift is not None and not drift.is_significant
    assert measure_drift(sampler, sampler.draw(4000), settings=MoveSettings(num_halvings=0)) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_reference_of_several_modes_is_precise(seed: int) -> None:
    """Its errors were as large as those of means that matter: verdicts went by the seed."""
    sampler, draws, regions, modes = searched(two, narrower, seed)
    reference = sample_reference(sampler, draws, regions, modes=modes)
    assert reference is not None and reference.is_reliable
    assert reference.evidence.ess.min() > 1000
    assert abs(reference.evidence.log_evidence.sum()) < 4 * reference.evidence.error.sum() + 0.01
    assert diagnose(two, narrower, seed=seed, progress=False).trustworthy
