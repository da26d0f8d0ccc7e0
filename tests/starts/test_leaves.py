# SPDX-License-Identifier: Apache-2.0
"""Warm starts of posteriors with leaves, latents that are independent of each other given the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_flows import AutoFlowGuide
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts import leaves as starts
from pyro_flows.transforms import ChainHead, LeafPreconditioner
from tests.common import a_site_a_day, abilities

COUNT = 220
X = torch.linspace(-1.0, 1.0, COUNT)
ANSWERS = torch.bernoulli(torch.full((COUNT, 8), 0.6), generator=torch.Generator().manual_seed(1))


def lines(y: Tensor) -> None:
    """A line with an offset for each observation, all Gaussian."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("points", COUNT):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean + slope * X + offset, 0.5), obs=y)


def funnel(y: Tensor) -> None:
    """Little is known of each ability, so that all of them follow their scale."""
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("students", COUNT):
        ability = pyro.sample("ability", dist.Normal(0.0, sigma))
        pyro.sample("y", dist.Binomial(8, logits=ability), obs=y.sum(-1))


def thousands(y: Tensor) -> None:
    """So many that the head does not know their prior."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, sd))
        pyro.sample("y", dist.Poisson(effect.exp()), obs=y)


def rates(y: Tensor) -> None:
    """A log rate each, and a latent that they do not depend on."""
    pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("cells", COUNT):
        log_rate = pyro.sample("log_rate", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


class Square(torch.autograd.Function):
    """A function without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient


def without_curvature(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("points", COUNT):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    pyro.factor("y", -Square.apply(y.sum(-1) - 5.0 - mean - offset).sum())  # type: ignore[no-untyped-call]


def one_by_one(y: Tensor) -> None:
    """Python reads a latent, so that draws cannot share a run."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("points", COUNT):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    scale = 1.0 if float(mean.detach()) > -1e3 else 2.0
    pyro.sample("y", dist.Normal(mean + offset, scale).to_event(1), obs=y.sum(-1) - 5.0)


def started(model: Callable[..., Any], y: Tensor) -> tuple[AutoFlowGuide, LogJoint, LeafPreconditioner]:
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model).warm_start(y)
    block = guide.posterior.only_block
    assert isinstance(block.flow.preconditioner, LeafPreconditioner)
    return guide, LogJoint(model, block.layout, (y,), {}), block.flow.preconditioner


@torch.no_grad()
def log_weights(guide: AutoFlowGuide, log_joint: LogJoint, count: int) -> Tensor:
    """Of draws from fixed noise."""
    torch.manual_seed(1)
    draws = guide.get_posterior().sample((count,))
    return (log_joint(draws) - guide.get_posterior().log_prob(draws)).double()


def test_a_gaussian_posterior_is_the_start() -> None:
    y = 0.7 - 1.2 * X + torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    guide, log_joint, preconditioner = started(lines, y)
    covariance = 1.25 * torch.eye(COUNT) + 4.0 + X.unsqueeze(-1) * X
    evidence = dist.MultivariateNormal(torch.zeros(COUNT), covariance.double().float()).log_prob(y)
    weights = log_weights(guide, log_joint, 200)
    assert (weights - evidence).abs().max() < 0.05
    assert preconditioner.slope.abs().max() > 0.01


@pytest.mark.parametrize("parts", [("bend", "log_scale_slope"), ("skew",)], ids=["bent", "skewed"])
def test_conditionals_of_leaves_are_bent_and_skewed(parts: Sequence[str]) -> None:
    """The ELBO gains what straight and symmetric conditionals leave, by common noise."""
    guide, log_joint, preconditioner = started(abilities, ANSWERS)
    assert guide.posterior.only_block.layout.names[-1] == "ability"
    found = log_weights(guide, log_joint, 4000)
    for name in parts:
        preconditioner.get_parameter(name).data.zero_()
    gain = found - log_weights(guide, log_joint, 4000)
    assert gain.mean() > 5.0 * gain.std() / math.sqrt(4000)


def test_leaves_are_skewed_as_their_posteriors_are() -> None:
    """Of rates that share nothing, log weights vary by what a skewed normal leaves of each."""
    y = torch.poisson(torch.full((COUNT,), 3.0), generator=torch.Generator().manual_seed(4))
    guide, log_joint, preconditioner = started(rates, y)
    skewed = log_weights(guide, log_joint, 4000).var()
    # The third derivative of y z - e^z is that of e^z, in units of a standard deviation of about e^(-z / 2).
    assert (preconditioner.skew < 0.0).all() and -0.3 < preconditioner.skew.mean() < -0.1
    preconditioner.skew.data.zero_()
    assert skewed < 0.2 * log_weights(guide, log_joint, 4000).var()


def test_leaves_follow_their_unknown_scale() -> None:
    """The evidence is an integral over the scale of products of integrals over an ability each."""
    y = torch.distributions.Binomial(8, logits=0.4 * torch.randn(COUNT, generator=torch.Generator().manual_seed(2)))
    pyro.set_rng_seed(3)
    data = torch.cat([y.sample().unsqueeze(-1), torch.zeros(COUNT, 7)], -1)
    guide, log_joint, _ = started(funnel, data)
    log_sigma = torch.linspace(-7.0, 2.0, 400, dtype=torch.float64)
    nodes = torch.linspace(-8.0, 8.0, 401, dtype=torch.float64)
    likelihood = torch.distributions.Binomial(8, logits=log_sigma.exp().unsqueeze(-1) * nodes)
    terms = torch.stack([likelihood.log_prob(torch.tensor(float(k))) for k in range(9)])  # (9, sigma, node)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(nodes) + math.log(16.0 / 400)
    each = (terms + prior).logsumexp(-1)[data.sum(-1).long()].sum(0)  # (sigma,)
    outer = math.log(2 / math.pi) - (2.0 * log_sigma).exp().log1p() + log_sigma + math.log(9.0 / 399)
    evidence = (each + outer).logsumexp(0)
    weights = log_weights(guide, log_joint, 4000)
    gap = (evidence - weights.mean()).item()
    assert gap > -5.0 * weights.std() / math.sqrt(4000)
    assert gap < 0.5  # a mean-field normal is 3 nats away


def test_a_start_is_not_caught_in_a_funnel() -> None:
    """Ascents end at a sd of zero, where all effects are their mean, and where a Gaussian is locally the best."""
    pyro.set_rng_seed(0)
    y = torch.poisson((0.5 + 0.7 * torch.randn(2600)).exp())
    guide, _, _ = started(thousands, y)
    sd = guide.sample_posterior(100, y)["sd"]
    # The posterior is 0.7 +/- 0.02.
    assert 0.6 < sd.mean() < 0.8


@pytest.mark.parametrize("model", [without_curvature, one_by_one])
def test_a_start_without_second_derivatives_or_shared_runs(model: Callable[..., Any]) -> None:
    guide, log_joint, preconditioner = started(model, ANSWERS)
    assert not preconditioner.bend.any()
    weights = log_weights(guide, log_joint, 200)
    assert weights.isfinite().all()
    cold = AutoFlowGuide(model).setup(ANSWERS)
    assert weights.mean() > log_weights(cold, log_joint, 200).mean() + 5.0


def test_many_free_latents_have_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression on more unknowns than values would be noise."""
    monkeypatch.setattr(starts, "SETTINGS", starts.LeafSettings(max_conditionals=40))
    _, _, preconditioner = started(abilities, ANSWERS)
    assert not preconditioner.bend.any()
    assert preconditioner.num_products > 0


def test_a_site_of_few_coordinates_is_no_leaf() -> None:
    """Of more than two hundred sites of one coordinate the first was, and the chain that they are was not seen."""
    block = AutoFlowGuide(a_site_a_day).setup(X).posterior.only_block
    assert block.layout.num_leaves == 0 and block.layout.names[0] == "lag"
    assert isinstance(block.flow.head, ChainHead)
