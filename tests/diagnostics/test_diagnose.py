# SPDX-License-Identifier: Apache-2.0
"""diagnose: exact evidence, identities, the verdict on fits that are good or bad by construction, refused draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlowGuide, diagnose, fit
from tests.fits import BAD, GOOD, SCHOOLS, eight_schools


@pytest.mark.parametrize("name", GOOD)
def test_good_fits(name: str) -> None:
    fit = GOOD[name]()
    report = diagnose(fit.model, fit.guide, fit.args, seed=0, progress=False)
    print(report)
    # Float32 log densities of a hundred terms are right to 1e-5 each.
    assert abs(report.log_evidence - fit.log_evidence) < 4 * report.log_evidence_se + 1e-3
    assert report.elbo == pytest.approx(report.expected_log_likelihood - report.kl_to_prior, rel=1e-9, abs=1e-9)
    assert report.num_refused == 0 and "refused" not in str(report)
    assert report.trustworthy, str(report)


@pytest.mark.parametrize("name", BAD)
def test_bad_fits(name: str) -> None:
    fit = BAD[name]()
    report = diagnose(fit.model, fit.guide, fit.args, seed=0, progress=False)
    print(report)
    assert not report.trustworthy, str(report)
    assert report.advice and report.reason


def test_a_guide_with_constant_weights_is_trusted_whatever_the_draws() -> None:
    """Its k-hat is that of noise, about 1 here, so its own weights, not those of a wide mixture, judge moments."""
    model, args = eight_schools, SCHOOLS
    guide = AutoFlowGuide(model)
    fit(model, guide, args, num_steps=250, seed=4, progress=False)
    reports = [diagnose(model, guide, args, seed=seed, progress=False) for seed in range(5)]
    assert max(report.khat for report in reports) > 0.5 and min(report.ess for report in reports) > 3960
    assert all(report.trustworthy for report in reports), [report.reason for report in reports]


def prior() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def refusing(limit: float, *, vectorized: bool = True) -> Callable[[], None]:
    """A model that fails beyond a limit, by a Cholesky factorization: the posterior is the prior up to there."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        beyond = z > limit if vectorized else torch.tensor(bool(z > limit))
        torch.linalg.cholesky(torch.where(beyond, -1.0, 1.0)[..., None, None])

    return model


@pytest.mark.parametrize("vectorized", [True, False], ids=["at_once", "one_by_one"])
def test_a_few_refused_draws_are_counted_and_left_out(vectorized: bool) -> None:
    """What is left of the guide is the posterior, so that its ELBO is the evidence and no gap is left."""
    model = refusing(2.33, vectorized=vectorized)
    report = diagnose(model, prior, num_samples=1000, search=False, seed=0, progress=False)
    assert 0 < report.num_refused < 25
    assert report.num_refused == (report.log_weights == -math.inf).sum()
    assert report.elbo == pytest.approx(math.log(1 - report.num_refused / 1000))
    assert report.elbo == pytest.approx(report.expected_log_likelihood - report.kl_to_prior, rel=1e-9, abs=1e-9)
    assert report.gap == pytest.approx(0.0, abs=1e-9)
    assert report.elbo_se == pytest.approx(0.0, abs=1e-9)
    assert math.isfinite(report.sites["z"].log_prior)
    assert f"refused {report.num_refused} of 1000 draws" in str(report)
    assert report.trustworthy, str(report)


def test_many_refused_draws_are_not_hidden() -> None:
    report = diagnose(refusing(0.0), prior, num_samples=1000, search=False, seed=0, progress=False)
    assert report.num_refused == pytest.approx(500, abs=4 * 0.5 * 1000**0.5)
    assert report.elbo == -math.inf and report.verdict == "train longer" and "no density at" in report.reason
    assert f"refused {report.num_refused} of 1000 draws" in str(report)


def test_a_density_of_zero_is_no_refusal() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("zero", torch.where(z > 2.33, -math.inf, 0.0))

    report = diagnose(model, prior, num_samples=1000, search=False, seed=0, progress=False)
    assert report.num_refused == 0
    assert report.elbo == -math.inf and report.verdict == "train longer" and "no density at" in report.reason


def test_refused_draws_of_items() -> None:
    """A draw that is refused costs all of its items, and what they have in common is spread over them."""

    def items() -> pyro.plate:
        return pyro.plate("items", 3)

    def model() -> None:
        with items():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))
        torch.linalg.cholesky(torch.where(z.amax(-1) > 2.0, -1.0, 1.0)[..., None, None])

    def guide() -> None:
        with items():
            pyro.sample("z", dist.Normal(0.0, 0.8))

    report: Any = diagnose(model, guide, num_samples=1000, search=False, seed=0, progress=False)
    assert 0 < report.num_refused < 60
    assert report.items.elbo.sum().item() == pytest.approx(report.elbo, abs=1e-9)
    assert report.items.gap.sum().item() == pytest.approx(report.gap, abs=1e-9)
    assert report.gap > 0


@pytest.mark.parametrize("size", (2, 3))
def test_a_site_that_has_other_dimensions_in_unconstrained_space(size: int) -> None:
    """The Cholesky factor of correlations is a matrix there, and a vector here."""

    def model() -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(size, 2.0))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(size), scale_tril=factor), obs=torch.ones(size))

    guide = AutoFlowGuide(model, "diagonal_normal")
    report = diagnose(model, guide, num_samples=200, search=False, seed=0, progress=False)
    assert math.isfinite(report.elbo) and "factor" in str(report)
