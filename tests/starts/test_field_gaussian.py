# SPDX-License-Identifier: Apache-2.0
"""Warm starts of a field, such as a time series, with its hyperparameters: what is left of a Gaussian's gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.models import linear_predictors
from pyro_flows.models.field import field_of
from pyro_flows.models.linear_predictors import LinearPredictorSettings
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts import select
from pyro_flows.starts.field_gaussian import FIELD_GAUSSIAN, field_gaussian
from pyro_flows.starts.gaussian import Gaussian
from pyro_flows.transforms import FullRankPreconditioner, LowRankPreconditioner

DAYS, PERSISTENCE, NOISE = 210, 0.9, 0.5


def series(y: Tensor) -> None:
    """An autoregression, non-centered, written as a loop; everything but its scale is Gaussian."""
    log_scale = pyro.sample("log_scale", dist.Normal(-1.0, 1.0))
    shocks = pyro.sample("shocks", dist.Normal(0.0, 1.0).expand([DAYS]).to_event(1))
    level, levels = torch.zeros(()), []
    for day in range(DAYS):
        level = PERSISTENCE * level + log_scale.exp() * shocks[day]
        levels.append(level)
    with pyro.plate("days", DAYS):
        pyro.sample("y", dist.Normal(torch.stack(levels), NOISE), obs=y)


def factor() -> Tensor:
    """Of the levels' covariance at a scale of 1."""
    days = torch.arange(float(DAYS)).double()
    return (PERSISTENCE ** (days.unsqueeze(-1) - days).clamp_min(0.0)).tril()


class Series(NamedTuple):
    y: Tensor
    log_evidence: float
    mean: float
    sd: float


@cache
def known() -> Series:
    """Data, with the posterior of the scale's logarithm by quadrature."""
    noise = torch.randn(2, DAYS, generator=torch.Generator().manual_seed(1)).double()
    y = 0.4 * factor() @ noise[0] + NOISE * noise[1]
    grid = torch.linspace(-3.0, 1.0, 401).double()
    root, identity = factor(), torch.eye(DAYS).double()
    covariances = ((2 * at).exp() * root @ root.mT + NOISE**2 * identity for at in grid)
    log_p = torch.stack([dist.MultivariateNormal(torch.zeros(DAYS).double(), c).log_prob(y) for c in covariances])
    log_p = log_p + dist.Normal(-1.0, 1.0).log_prob(grid) + math.log(0.01)
    weights = log_p.softmax(0)
    mean = (weights * grid).sum()
    return Series(
        y.float(), log_p.logsumexp(0).item(), mean.item(), (weights * (grid - mean).square()).sum().sqrt().item()
    )


def found(model: Callable[..., Any], *args: Any) -> Gaussian | None:
    """The Gaussian of the field, from the guide's own log joint."""
    guide = AutoFlowGuide(model)
    guide(*args)
    layout = guide.posterior.only_block.layout
    target = LogJoint(model, layout, args, {})
    field = field_of(target.sizes)
    assert field is not None
    return field_gaussian(target, layout.init_loc, field, FIELD_GAUSSIAN.begin_scales[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_scale_is_as_wide_as_its_posterior(seed: int) -> None:
    """Nearly: the covariance of a Gaussian does not follow the scale. Given the shocks that is known much better, which
    is where a mean-field Gaussian ends."""
    pyro.set_rng_seed(seed)
    gaussian = found(series, known().y)
    assert gaussian is not None
    sd = gaussian.factor[0].norm().item()  # its row, whatever the site's place
    assert abs(gaussian.loc[0].item() - known().mean) < 0.4 * known().sd
    assert 0.6 < sd / known().sd < 1.2
    # 128 draws, mirrored.
    error = (gaussian.log_weight_variance / 128) ** 0.5
    assert known().log_evidence - 0.7 < gaussian.elbo < known().log_evidence + 4 * error


def test_a_guide_begins_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ascents, and without Newton steps of sixteen Hessians each."""
    monkeypatch.delattr(select, "ascents")
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(series).warm_start(known().y)
    draws = guide.sample_posterior(4000, known().y)["log_scale"]
    assert abs(draws.mean().item() - known().mean) < 0.4 * known().sd
    assert 0.6 < draws.std().item() / known().sd < 1.2


def test_a_field_whose_prior_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts under the exponential of a trend that wanders: draws of the prior have no density."""
    level = torch.linspace(0.0, 3.0, DAYS)
    counts = torch.poisson(level.exp(), generator=torch.Generator().manual_seed(0))

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(0.1))
        first = pyro.sample("first", dist.Normal(0.0, 2.0))
        shocks = pyro.sample("shocks", dist.Normal(0.0, 1.0).expand([DAYS]).to_event(1))
        with pyro.plate("days", DAYS):
            rate = (first + scale * shocks.cumsum(-1).cumsum(-1)).exp()
            pyro.sample("counts", dist.Poisson(rate, validate_args=False), obs=counts)

    monkeypatch.delattr(select, "ascents")
    few = LinearPredictorSettings(max_dim=DAYS - 1)  # of so few days the head knows what the data see of the shocks
    monkeypatch.setattr(linear_predictors, "LINEAR_PREDICTORS", few)
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model).warm_start()
    draws = guide.sample_posterior(1000)
    trend = draws["first"].unsqueeze(-1) + draws["scale"].unsqueeze(-1) * draws["shocks"].cumsum(-1).cumsum(-1)
    assert (trend.mean(0) - level).abs().max() < 0.5


def test_what_a_field_is() -> None:
    assert field_of([1, 300, 2]) == slice(1, 301)
    assert field_of([300]) is None  # nothing that it depends on
    assert field_of([100, 1]) is None
    assert field_of([300, 300]) is None
    assert field_of([3000, 1]) is None


def test_all_correlations_of_a_field_above_two_thousand_dimensions() -> None:
    """Where other models have a few correlated directions, by which volatility of 2500 days was 59 nats short."""

    def model(num_sites: int) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        prior = dist.Normal(0.0, 1.0).expand([2200 // num_sites]).to_event(1)
        shocks = torch.cat([pyro.sample(f"shocks_{site}", prior) for site in range(num_sites)], -1)
        with pyro.plate("days", 2200):
            pyro.sample("y", dist.Normal(scale * shocks.cumsum(-1), 1.0), obs=torch.zeros(2200))

    for num_sites, kind in ((1, FullRankPreconditioner), (2, LowRankPreconditioner)):
        guide = AutoFlowGuide(model)
        guide(num_sites)
        assert type(guide.posterior.only_block.flow.preconditioner) is kind


def test_a_precision_that_is_not_positive_definite() -> None:
    """Of a field with two modes at each place; the warm start goes on as it does elsewhere."""

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        field = pyro.sample("field", dist.Normal(0.0, 1.0).expand([DAYS]).to_event(1))
        pyro.factor("double", -20.0 * ((field - shift).square() - 1.0).square().sum())

    pyro.set_rng_seed(0)
    gaussian = found(model)
    assert gaussian is None or math.isfinite(gaussian.elbo)
    guide = AutoFlowGuide(model).warm_start()
    assert all(p.isfinite().all() for p in guide.parameters())
