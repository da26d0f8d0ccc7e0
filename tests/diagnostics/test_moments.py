# SPDX-License-Identifier: Apache-2.0
"""Moments where draws overflow, and verdicts where the posterior has no mean or no standard deviation."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import diagnose
from pyro_flows.diagnostics.moments import Moments
from pyro_flows.diagnostics.sites import SiteTally
from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.models.draws import GuideSampler
from pyro_flows.models.traces import Call


def test_a_draw_that_overflows_without_density_is_left_out() -> None:
    """It made a moment NaN, and the error of the moment zero."""
    draws, log_weights = torch.randn(1000, dtype=torch.double), 0.1 * torch.randn(1000, dtype=torch.double)
    clean, dirty = Moments(), Moments()
    clean.add(draws, log_weights)
    for part in range(2):
        values = torch.cat([draws[part::2], torch.tensor([math.inf])])
        dirty.add(values, torch.cat([log_weights[part::2], torch.tensor([-math.inf])]))
    torch.testing.assert_close(torch.stack(dirty.weighted), torch.stack(clean.weighted))
    shifted = Moments()
    shifted.add(draws + 1.0, torch.zeros_like(draws))
    assert shifted.errors_against(dirty).shift == pytest.approx(1.0, abs=0.1)


def test_sums_of_two_about_one_center_are_merged() -> None:
    """Also where one has a density only at the other's draws, or weights that would overflow beside the other's."""
    draws, log_weights = torch.randn(1000, 3, dtype=torch.double), torch.randn(1000, 1, dtype=torch.double)
    log_weights[:400] += 1000.0
    none = torch.full_like(log_weights, -math.inf)
    for weights in (log_weights, torch.where(torch.arange(1000)[:, None] < 400, none, log_weights)):
        whole, center = Moments(), draws[:400].median(0).values
        whole.add(draws, weights)
        for order in ((slice(400), slice(400, None)), (slice(400, None), slice(400))):
            first, second = Moments(center), Moments(center)
            for part, where in zip((first, second), order, strict=True):
                part.add(draws[where], weights[where])
            first.merge(second.state)
            torch.testing.assert_close(first.plain, whole.plain)
            torch.testing.assert_close(first.weighted, whole.weighted)
            torch.testing.assert_close(first.errors(), whole.errors())


def test_an_unknown_error_is_infinite_and_that_of_a_constant_zero() -> None:
    overflown, zero = Moments(), Moments()
    overflown.add(torch.tensor([0.0, 1.0, math.inf]), torch.zeros(3))
    zero.add(torch.zeros(3), torch.zeros(3))
    assert all(error > 1e30 for error in overflown.errors())
    assert all(error == 0.0 for error in zero.errors())


def test_constants_have_an_sd() -> None:
    """Zeros and ones of a Cholesky factor made every fit with correlations warn of tails that are too heavy."""
    moments = Moments()
    moments.add(torch.stack([torch.zeros(4000), torch.ones(4000), torch.rand(4000)], -1), torch.zeros(4000, 1))
    assert moments.has_sd(0.05).all()
    heavy = Moments()
    heavy.add(dist.Cauchy(0.0, 1.0).sample((4000, 1)), torch.zeros(4000, 1))
    assert not heavy.has_sd(0.05).any()


def test_an_sd_that_only_weights_determine_is_none() -> None:
    """One draw far out, of which the weights say that it does not count: the sd of the draws is a matter of luck, and
    guides with quantiles as they should be were said to be '54 % off' by every second seed."""

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    torch.manual_seed(0)
    sampler = ImportanceSampler("test", model, model, (), None)
    draws = sampler.draw(4000)
    draws.values["z"][0] = 100.0
    log_weights = torch.zeros(4000, 1, dtype=torch.double)
    log_weights[0] = -50.0
    tally = SiteTally(sampler.structure)
    tally.add(draws, log_weights)
    found = tally.summaries()["z"]
    assert found.sd > 1.5 and abs(found.weighted_sd - 1.0) < 0.05
    assert not found.has_sd
    tally.add_more(GuideSampler(model, Call((), {})), 4000)  # the far draw was one in a million
    found = tally.summaries()["z"]
    assert found.has_sd and found.max_sd_error < 0.15
    # Of a guide whose sd is another, they tell that.
    tally.add_more(GuideSampler(lambda: pyro.sample("z", dist.Normal(0.0, 2.0)), Call((), {})), 4000)
    assert tally.summaries()["z"].max_sd_error > 0.15


@pytest.mark.parametrize("df", [1.0, 1.5])
def test_without_moments_a_guide_is_judged_by_its_bulk(df: float) -> None:
    """A shift was trusted, as no mean was compared."""

    def model(shift: float = 0.0, scale: float = 1.0) -> None:
        pyro.sample("z", dist.StudentT(df, shift, scale).expand([3]).to_event(1))

    exact = diagnose(model, model, seed=0, progress=False)
    assert exact.trustworthy and "quantiles" in exact.reason and not exact.sites["z"].has_sd
    for shift, scale, word in ((0.6, 1.0, "bulk"), (0.0, 0.6, "spread of the bulk")):
        report = diagnose(model, lambda shift=shift, scale=scale: model(shift, scale), seed=0, progress=False)
        assert not report.trustworthy and f"the {word} of 'z'" in report.reason, report.reason


def test_a_site_with_moments_says_nothing_of_quantiles() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    report = diagnose(model, model, seed=0, progress=False)
    assert report.trustworthy and "quantiles" not in report.reason and report.sites["z"].has_sd
