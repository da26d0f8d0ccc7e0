# SPDX-License-Identifier: Apache-2.0
"""Moves along a thin, curved ridge, of which a guide covers a part, with importance weights that are constant there."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.distributions import constraints

from pyro_flows import AutoFlowGuide, diagnose
from pyro_flows.diagnostics.moves import Reach, ReachSettings, measure_reach
from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.training.verdict import VerdictSettings, first_verdict

WIDTH, LAST = 0.03, 4.0
NORMAL = dist.Normal(0.0, 1.0)


def crescent() -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(1.0 - b.square(), WIDTH))


class PartOfCrescent(dist.TransformModule):
    """From standard normal noise to draws of the crescent with the lowest values of ``b``, a given share of all; noise
    above ``LAST`` has all other values."""

    domain = codomain = constraints.independent(constraints.real, 1)
    bijective = True

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.last = self._from_noise(torch.tensor(LAST))
        self.slope = self._log_slope(torch.tensor(LAST), self.last).exp()

    def _from_noise(self, x: Tensor) -> Tensor:
        return NORMAL.icdf(self.share * NORMAL.cdf(x))

    def _log_slope(self, x: Tensor, b: Tensor) -> Tensor:
        return math.log(self.share) + NORMAL.log_prob(x) - NORMAL.log_prob(b)

    def _call(self, x: Tensor) -> Tensor:
        noise = x[..., 0]
        b = self._from_noise(noise.clamp_max(LAST)) + self.slope * (noise - LAST).clamp_min(0.0)
        return torch.stack([b, 1.0 - b.square() + WIDTH * x[..., 1]], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        b = y[..., 0]
        inside = (NORMAL.cdf(b) / self.share).clamp_max(NORMAL.cdf(torch.tensor(LAST)))
        noise = torch.where(b < self.last, NORMAL.icdf(inside), LAST + (b - self.last) / self.slope)
        return torch.stack([noise, (y[..., 1] - 1.0 + b.square()) / WIDTH], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(WIDTH) + self._log_slope(x[..., 0].clamp_max(LAST), y[..., 0].clamp_max(self.last))


def guide_of(share: float) -> AutoFlowGuide:
    init = init_to_value(values={"a": torch.tensor(0.0), "b": torch.tensor(0.0)})
    flow = partial(lambda share, input_dim: PartOfCrescent(share), share)
    guide = AutoFlowGuide(crescent, flow=flow, init_loc_fn=init, init_scale=1.0)
    guide.setup()
    return guide


def reach_of(share: float, seed: int, settings: ReachSettings = ReachSettings()) -> tuple[Reach | None, Any]:
    torch.manual_seed(seed)
    guide = guide_of(share)
    sampler = ImportanceSampler("test", crescent, guide, (), None)
    draws = sampler.draw(2000)
    torch.testing.assert_close(draws.log_weights, torch.full((2000, 1), math.log(share)).double(), atol=1e-3, rtol=0.0)
    return measure_reach(sampler, guide, draws, settings), draws


@pytest.mark.parametrize("seed", range(3))
def test_the_missing_end_of_a_crescent_is_within_reach_of_moves(seed: int) -> None:
    """Weights are constant, and noise of any width leads nowhere else. What moves leave is at most what is missing."""
    reach, _ = reach_of(0.7, seed)
    assert reach is not None and reach.is_significant
    assert 0.05 < reach.beyond < 0.3 / 0.7 + 4.0 * reach.error


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_beyond_the_whole_crescent(seed: int) -> None:
    reach, _ = reach_of(1.0, seed)
    assert reach is not None and not reach.is_significant and abs(reach.beyond) < 0.005


def test_a_part_of_a_crescent_is_not_trusted_after_a_fit() -> None:
    """Its gap was called 0.00, and is 0.36."""
    torch.manual_seed(0)
    part, whole = (first_verdict(crescent, guide_of(share), (), {}, VerdictSettings()) for share in (0.7, 1.0))
    assert part is not None and whole is not None
    assert part.verdict == "train longer" and 0.05 < part.gap < -math.log(0.7) + 4.0 * part.log_evidence_se
    assert whole.verdict == "trust it" and abs(whole.gap) < 0.01
    assert diagnose(crescent, guide_of(0.7), search=False, seed=0).verdict == "trust it"  # without any moves


def test_settings_of_reach() -> None:
    usual = ReachSettings()
    assert reach_of(0.7, 0, replace(usual, max_values=1))[0] is None
    assert reach_of(0.7, 0, replace(usual, max_dim=1))[0] is None
    assert [usual.halvings(2, elements) for elements in (2, 10_000, 30_000)] == [6, 1, -1]
    few, _ = reach_of(0.7, 0, replace(usual, num_rounds=1))
    many, _ = reach_of(0.7, 0)
    assert few is not None and many is not None and few.beyond < many.beyond
    strict, _ = reach_of(0.7, 0, replace(usual, min_z_score=1e3))
    assert strict is not None and not strict.is_significant
    lax, _ = reach_of(0.7, 0, replace(usual, ratio=math.inf))
    assert lax is not None and lax.beyond < many.beyond
