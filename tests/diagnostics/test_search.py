# SPDX-License-Identifier: Apache-2.0
"""The search for lost mass: climbs that arrive, masses that are right, items apart, and words where it is off."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_flows import AutoFlowGuide, diagnose
from pyro_flows.diagnostics.moves import measure_drift
from pyro_flows.diagnostics.search import Search
from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.starts.lbfgs import lbfgs_paths, local_factor
from tests.fits import BAD, mixture, mixture_guide, one_mode


def test_climbs_arrive_at_the_maximum_of_an_ill_conditioned_target() -> None:
    curvature = torch.logspace(-2, 4, 6, dtype=torch.double)
    center = torch.arange(6.0, dtype=torch.double)

    def target(z: Tensor) -> Tensor:
        return -0.5 * (curvature * (z - center).square()).sum(-1)

    start = 3.0 * torch.randn(5, 2, 6, dtype=torch.double)
    *_, end = lbfgs_paths(target, start, 90)
    assert target(end).min() > -0.01
    factor = local_factor(target, end)
    expected = curvature.rsqrt().diag().expand(5, 2, 6, 6)
    torch.testing.assert_close(factor, expected, rtol=1e-6, atol=1e-6)


def test_curvature_without_second_derivatives() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return -0.5 * z.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return -gradient * ctx.saved_tensors[0]

    factor = local_factor(lambda z: Square.apply(z).sum(-1), torch.randn(3, 1, 2, dtype=torch.double))
    torch.testing.assert_close(factor, torch.eye(2, dtype=torch.double).expand(3, 1, 2, 2), rtol=1e-6, atol=1e-6)


def test_masses_of_two_modes() -> None:
    regions = Search(ImportanceSampler("test", mixture, mixture_guide, (), None), mixture, (), {}).run(progress=False)
    assert regions is not None
    largest = regions.log_mass[:, 0].argsort()[-2:]
    order = largest[regions.centers[largest, 0, 0].argsort()]
    assert regions.centers[order, 0, 0].tolist() == pytest.approx([-5.0, 5.0], abs=0.01)
    inside = math.log(math.erf(regions.radius / math.sqrt(2)))
    errors = (regions.log_mass[order, 0] - torch.tensor([0.3, 0.7]).log() - inside) / regions.error[order, 0]
    assert errors.abs().max() < 4


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_lost_mode_is_found_and_a_good_guide_is_not_accused(seed: int) -> None:
    lost = diagnose(mixture, partial(one_mode, 5.0), seed=seed, progress=False)
    assert lost.verdict == "start elsewhere"
    assert lost.lost[0].values["z"].item() == pytest.approx(-5.0, abs=0.1)
    # What lies outside of the ellipsoid, a hundredth, is not counted.
    assert abs(lost.log_evidence) < 4 * lost.log_evidence_se + 0.01
    assert diagnose(mixture, mixture_guide, seed=seed, progress=False).trustworthy


def test_a_mirror_image_is_measured_where_the_curvature_is_a_poor_gaussian() -> None:
    """A factor model in 36 dimensions, whose sign is free: the two halves have the same mass."""
    generator = torch.Generator().manual_seed(22)
    true = torch.tensor([1.0, -0.8, 0.5, 0.3, -0.2])
    rows = torch.randn(30, 1, generator=generator) * true + 0.5 * torch.randn(30, 5, generator=generator)

    def model(rows: Tensor) -> None:
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(rows)):
            score = pyro.sample("score", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(score.unsqueeze(-1) * loadings, sigma).to_event(1), obs=rows)

    for seed in range(4):
        pyro.set_rng_seed(seed)
        guide = AutoFlowGuide(model, flow="realnvp").warm_start(rows)
        regions = Search(ImportanceSampler("test", model, guide, (rows,), None), model, (rows,), {}).run(progress=False)
        assert regions is not None
        drawn = guide.sample_posterior(400)["loadings"][:, 0] > 0
        assert drawn.all() or not drawn.any()  # the guide has one of them
        elsewhere = (regions.centers[:, 0, 0] > 0) != drawn[0]
        mass, error = regions.log_mass[elsewhere, 0], regions.error[elsewhere, 0]
        assert error[mass.argmax()] < 0.25  # or it would not be significant
        assert mass.max() > regions.log_mass[~elsewhere, 0].max() - 1.0


def test_a_far_mode_of_little_mass_is_lost_if_it_changes_a_moment() -> None:
    """Of a hundredth of the mass, ten standard deviations away: without it the standard deviation is 30 % too small."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1000.0))
        modes = dist.Normal(torch.tensor([0.0, 10.0]), 1.0).log_prob(z) + torch.tensor([0.99, 0.01]).log()
        pyro.factor("modes", modes.logsumexp(-1))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for seed in range(3):
        found = diagnose(model, guide, seed=seed, progress=False)
        assert not found.trustworthy
        assert found.lost[0].values["z"].item() == pytest.approx(10.0, abs=0.5)


def test_lost_modes_of_items() -> None:
    """Each item has two modes, at +-4, of which the guide has one."""

    def model(sign: Tensor) -> None:
        with pyro.plate("items", len(sign)):
            z = pyro.sample("z", dist.Normal(0.0, 5.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.5), obs=torch.full((len(sign),), 4.0))

    def guide(sign: Tensor) -> None:
        with pyro.plate("items", len(sign)):
            pyro.sample("z", dist.Normal(4.0 * sign, 0.5))

    sign = torch.tensor([1.0, -1.0, 1.0])
    report = diagnose(model, guide, (sign,), seed=0, progress=False)
    assert report.verdict == "start elsewhere" and "3 of 3 items" in report.reason
    # log 2 an item, less the hundredth outside.
    assert report.gap == pytest.approx(3 * math.log(2.0), abs=0.1)


def test_amortized_guides_are_judged_item_by_item() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    x = torch.linspace(-2.0, 2.0, 12)
    guide = AutoFlowGuide(model, amortize={"data": lambda x: x.unsqueeze(-1)})
    report = diagnose(model, guide, (x,), seed=0, progress=False)
    assert report.items is not None and report.items.khat.shape == (12,)
    assert report.log_weights.shape == (4000, 12)
    exact = dist.Normal(0.0, 1.5).log_prob(x)
    assert ((report.items.log_evidence - exact) / report.items.log_evidence_se).abs().max() < 4
    assert report.items.gap.sum().item() == pytest.approx(report.gap, abs=1e-6)
    assert not report.trustworthy and "by item of 'data'" in str(report)


def test_improper_priors_are_searched_from_the_guide() -> None:
    """They have no draws; Pyro's error about that ended the diagnosis."""

    def model() -> None:
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", dist.Exponential(1.0 / scale), obs=torch.tensor(1.0))
        pyro.factor("weight", -scale.log() * 3.0)  # evidence: the integral of s**-4 * exp(-1 / s), which is 2

    guide = AutoFlowGuide(model, init_scale=0.5)
    report = diagnose(model, guide, seed=0, progress=False)
    assert report.log_evidence == pytest.approx(math.log(2.0), abs=5 * report.log_evidence_se)
    assert "not looked for" not in report.reason


def test_what_is_not_searched_says_so() -> None:
    fit = BAD["lost the small mode"]()
    off = diagnose(fit.model, fit.guide, fit.args, search=False, seed=0, progress=False)
    assert off.trustworthy and "not looked for, since search is off" in off.reason

    def large() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(300), 1.0).to_event(1))

    report = diagnose(large, AutoNormal(large, init_scale=1.0, init_loc_fn=lambda site: torch.zeros(300)), seed=0)
    assert report.trustworthy and "300 dimensions" in report.reason


def test_moves_see_a_border_among_twenty_dimensions() -> None:
    """A guide that lacks a tenth of the mass: moves of a third of its draws said nothing in half of the runs."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(torch.zeros(60), 1.0), obs=torch.zeros(60))

    def guide() -> None:
        inside = dist.Normal(0.0, 1.0).cdf(torch.tensor(1.25))
        first = dist.Normal(0.0, 1.0).icdf(inside * torch.rand(()))
        z = torch.cat([first.unsqueeze(0), torch.randn(19)])
        pyro.sample("z", dist.Delta(z, dist.Normal(0.0, 1.0).log_prob(z).sum() - inside.log(), event_dim=1))

    pyro.set_rng_seed(0)
    sampler = ImportanceSampler("test", model, guide, (), None)
    assert sampler.structure.elements > 60
    drift = measure_drift(sampler, sampler.draw(4000))
    assert drift is not None and drift.z_score > 2.0 * drift.critical


def test_moves_that_are_never_accepted_say_nothing() -> None:
    """Two far uniforms, of which moves come out: with acceptance rates of e^-400, changes underflow when squared."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.factor("uniforms", torch.where((z.abs() - 1.0).abs() < 1e-5, 0.0, -400.0))

    def guide() -> None:
        value = (1.0 + 1e-5 * (2.0 * torch.rand(()) - 1.0)) * (2.0 * torch.randint(2, ()) - 1.0)
        pyro.sample("z", dist.Delta(value, -torch.tensor(4e-5).log()))

    pyro.set_rng_seed(0)
    sampler = ImportanceSampler("test", model, guide, (), None)
    assert measure_drift(sampler, sampler.draw(1000)) is None
