# SPDX-License-Identifier: Apache-2.0
"""importance_resample: moments of the posterior from a guide that is off, and refusal where there is no hope."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import importance_resample
from pyro_flows.importance.psis import pareto_smooth
from pyro_flows.importance.resample import ResampleSettings, _check, _khat
from tests.fits import BAD, correlated_regression, items_fit, regression_posterior


def test_mean_field_draws_become_those_of_a_correlated_regression() -> None:
    fit = correlated_regression()
    draws = importance_resample(fit.model, fit.guide, 20_000, fit.args, seed=0, progress=False)["w"]
    assert draws.shape == (20_000, 8)
    mean, covariance = regression_posterior(*fit.args)
    sd = covariance.diagonal().sqrt()
    mean_field = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert (mean_field / sd).min() < 0.9  # there was something to mend
    # An ESS above 20,000 leaves errors of 0.007 sds.
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.05
    assert (draws.std(0) / sd - 1).abs().max() < 0.05


def test_items_are_resampled_on_their_own() -> None:
    fit = items_fit(1.3)
    draws = importance_resample(fit.model, fit.guide, 5000, fit.args, seed=0, progress=False)["z"]
    assert draws.shape == (5000, 50)
    # Fifty means and sds of ESS 5000 and more: the largest of a hundred errors of 0.014 sds.
    assert ((draws.mean(0) - fit.args[0] / 2) / 0.5**0.5).abs().max() < 0.06
    assert (draws.std(0) / 0.5**0.5 - 1).abs().max() < 0.06


def test_heavy_tails_are_warned_of_and_hopeless_ones_refused() -> None:
    fit = BAD["light tails"]()
    with pytest.warns(UserWarning, match="k-hat is"):
        importance_resample(fit.model, fit.guide, 10, fit.args, seed=1, progress=False)
    fit = BAD["wrong likelihood scale"]()
    with pytest.raises(RuntimeError, match=r"weights with a mean.*NUTS"):
        importance_resample(fit.model, fit.guide, 10, fit.args, seed=0, progress=False)


def test_subsampled_plates_are_refused() -> None:
    y = torch.zeros(10)

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5) as i:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[i])

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 0.3))

    with pytest.raises(NotImplementedError, match="'data' is subsampled"):
        importance_resample(model, guide, 10, (y,))


def test_weights_that_are_nearly_constant_have_no_tail_to_speak_of() -> None:
    generator = torch.Generator().manual_seed(0)
    # A bump of 2 % on one draw in thousands: k-hat is far above 1, and every draw counts.
    log_weights = 1e-4 * torch.randn(10_000, generator=generator, dtype=torch.double)
    log_weights[:20] += 0.02 * torch.rand(20, generator=generator, dtype=torch.double) ** -0.8
    smoothed = pareto_smooth(log_weights)
    assert smoothed.khat > 1.0
    _check(torch.tensor([_khat(smoothed)]), 10_000, ResampleSettings())
    heavy = pareto_smooth(log_weights * 300.0)
    with pytest.raises(RuntimeError, match="weights with a mean"):
        _check(torch.tensor([_khat(heavy)]), 10_000, ResampleSettings())
