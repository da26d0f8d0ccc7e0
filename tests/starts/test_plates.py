# SPDX-License-Identifier: Apache-2.0
"""Warm starts of guides with local latents, next to exact posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.starts import plates as starts
from tests.posterior.test_plate import PARTS, each_model, exact_random_effects, random_effects

COUNT, BATCH = 300, 60


def effects() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sd = 0.5 + torch.rand(COUNT, generator=generator)
    theta = 2.0 + 0.7 * torch.randn(COUNT, generator=generator)
    return theta + sd * torch.randn(COUNT, generator=generator), sd


def plates(y: Tensor, sd: Tensor, index: Tensor) -> pyro.plate:
    return pyro.plate("groups", COUNT, subsample=index)


@pytest.mark.slow
def test_gaussian_random_effects_start_at_their_exact_posterior() -> None:
    """Every group, and the globals, whose posterior is a Gaussian but for a little skewness."""
    pyro.set_rng_seed(0)
    y, sd = effects()
    mean, std, std_mu = exact_random_effects(y, sd)
    guide = AutoFlowGuide(random_effects, create_plates=plates)
    cold = AutoFlowGuide(random_effects, create_plates=plates).setup(y, sd, torch.arange(BATCH))
    calls = [((y, sd, index), {}) for index in torch.randperm(COUNT).split(BATCH)]
    guide.warm_start_on(calls)
    error = (guide.median(num_samples=2000)["theta"] - mean).abs() / std
    assert error.max() < 0.05 < ((cold.median()["theta"] - mean).abs() / std).median()
    draws = guide.sample_posterior(4000)
    # The standard error of a standard deviation is 1.1 % with 4000 draws; the largest of 300 is within four.
    assert ((draws["theta"].std(0) / std).log().abs() < 0.06).all()
    assert (draws["mu"].std() / std_mu).log().abs() < 0.06


def test_a_plate_that_draws_its_own_mini_batches_is_gone_through() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y), subsample_size=8) as index:
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.1), obs=y[index])

    pyro.set_rng_seed(0)
    y = torch.linspace(-5.0, 5.0, 21)
    guide = AutoFlowGuide(model, init_loc_fn=pyro.infer.autoguide.init_to_median).warm_start(y)
    share = 1 / 1.01
    assert torch.allclose(guide.median()["theta"], share * y, atol=0.02)


@pytest.mark.slow
@each_model
def test_every_structure_starts_better(model: Callable[..., None]) -> None:
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=3)
    part = partial(model, PARTS[model.__name__])
    losses = []
    for warm in (False, True):
        pyro.set_rng_seed(0)
        guide = AutoFlowGuide(part).setup()
        if warm:
            guide.warm_start()
        with torch.no_grad():
            losses.append(elbo.loss(part, guide))
    assert losses[1] < losses[0] - 5.0


@pytest.mark.slow
def test_counts_start_near_their_posterior() -> None:
    """Not Gaussian, so not exact: 0.05 nat a group, where the cold start is hundreds of nats away."""
    pyro.set_rng_seed(0)
    counts = torch.poisson(torch.full((100,), 4.0))

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 100):
            theta = pyro.sample("theta", dist.Normal(mu, 0.5))
            pyro.sample("y", dist.Poisson(theta.exp()), obs=counts)

    guide = AutoFlowGuide(model, structure="plates").warm_start()
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    log_evidence = log_evidence_of_counts(counts)
    with torch.no_grad():
        gap = log_evidence + elbo.loss(model, guide)
        cold = log_evidence + elbo.loss(model, AutoFlowGuide(model, structure="plates"))
    assert -0.1 < gap < 5.0 < 100.0 < cold


def log_evidence_of_counts(counts: Tensor) -> float:
    """By quadrature over mu and, for each group, theta."""
    mu = torch.linspace(-1.0, 3.0, 401, dtype=torch.float64)
    theta = torch.linspace(-3.0, 5.0, 801, dtype=torch.float64)
    prior = dist.Normal(mu[:, None], torch.tensor(0.5, dtype=torch.float64)).log_prob(theta)  # (mu, theta)
    likelihood = dist.Poisson(theta.exp()[:, None]).log_prob(counts.double())  # (theta, group)
    groups = (prior.unsqueeze(-1) + likelihood).logsumexp(1).sum(-1) + len(counts) * math.log(0.01)
    log_mu = dist.Normal(torch.zeros((), dtype=torch.float64), 2.0).log_prob(mu)
    return float((groups + log_mu).logsumexp(0) + math.log(0.01))


def test_a_start_that_is_no_better_is_not_taken() -> None:
    """What a likelihood outside the plate says about the items is not theirs alone, and is not seen."""

    def model() -> None:
        with pyro.plate("items", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(), 0.001), obs=torch.tensor(100.0))

    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model, structure="plates", init_scale=1e-3).setup()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    guide.warm_start()
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())


def test_an_error_leaves_the_guide_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Globals are fitted after the items have been."""
    guide = AutoFlowGuide(random_effects, "diagonal_normal", create_plates=plates)
    y, sd = effects()
    arguments = (y, sd, torch.arange(len(y)))
    before = {name: value.clone() for name, value in guide.setup(*arguments).state_dict().items()}
    changed = False

    def fail(*_: object) -> None:
        nonlocal changed
        changed = not guide.is_initial
        raise KeyboardInterrupt

    monkeypatch.setattr(starts, "warm_start_joint", fail)
    with pytest.raises(KeyboardInterrupt):
        guide.warm_start(*arguments)
    assert changed
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())


def test_enumerated_sites_are_refused() -> None:
    @config_enumerate
    def model() -> None:
        with pyro.plate("items", 6, subsample_size=3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=torch.tensor(0.0))

    guide = AutoFlowGuide(model)
    with pytest.raises(NotImplementedError, match="enumerates 'k' to have no scaled"):
        guide.warm_start()
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide))

    @config_enumerate
    def full() -> None:
        with pyro.plate("items", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(NotImplementedError, match="with local latents to have no enumerated sites, but 'k' is one"):
        AutoFlowGuide(full, structure="plates").warm_start()
