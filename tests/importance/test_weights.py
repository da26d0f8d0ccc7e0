# SPDX-License-Identifier: Apache-2.0
"""Log weights of any guide and model, however they can be run; and what is refused."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

from pyro_flows import AutoFlowGuide, diagnose
from pyro_flows.diagnostics import log_weights
from pyro_flows.importance.weights import ImportanceSampler
from tests.fits import correlated_regression

Y = torch.tensor([1.0, 2.0, 3.0])


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + share[..., 0], 1.0), obs=y)


def guide_list(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["mu", "tau"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, hide=["mu", "tau"])))
    return guide


@pytest.mark.parametrize(
    "make",
    [AutoNormal, AutoMultivariateNormal, AutoIAFNormal, AutoStructured, guide_list, AutoFlowGuide],
    ids=lambda make: make.__name__,
)
def test_the_mean_is_the_elbo_of_pyro(make: Any) -> None:
    guide = make(hierarchy)
    guide(Y)
    weights, values = log_weights(hierarchy, guide, 20_000, (Y,))
    assert weights.dtype == torch.double
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        "mu": (20_000,),
        "tau": (20_000,),
        "share": (20_000, 3),
        "theta": (20_000, 3),
    }
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    error = weights.std().item() * (2 / 20_000) ** 0.5
    assert abs(weights.mean().item() + elbo.loss(hierarchy, guide, Y)) < 4 * error


def by_matmul(x: Tensor, y: Tensor) -> None:
    """Breaks under outer plates."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def by_branch(x: Tensor, y: Tensor) -> None:
    """Breaks under vmap as well."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    loc = x @ w if float(w.reshape(-1)[0]) < 1e9 else x.sum(-1)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize(("model", "run"), [(by_matmul, "_by_vmap"), (by_branch, "_one_by_one")])
def test_models_that_outer_plates_break(model: Any, run: str) -> None:
    fit = correlated_regression()
    sampler = ImportanceSampler("test", model, fit.guide, fit.args, None)
    assert sampler.score.model._run.__name__ == run
    values = sampler.draw(5).values
    expected = ImportanceSampler("test", fit.model, fit.guide, fit.args, None).score(values)
    torch.testing.assert_close(sampler.score(values).log_joint, expected.log_joint, rtol=1e-5, atol=1e-4)


def test_models_that_sum_over_draws_in_silence_are_run_one_by_one() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("all", -z.square().sum())

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 0.5).to_event(1))

    sampler = ImportanceSampler("test", model, guide, (), None)
    assert sampler.score.model._run.__name__ == "_by_vmap"
    # N(0, 1) exp(-z^2) is the normal of sd 1 / sqrt 3, times 3^-1/2 a coordinate.
    weights, _ = log_weights(model, guide, 4000)
    mean = weights.exp().mean().item()
    assert abs(mean - 1 / 3) < 4 * weights.exp().std().item() / 4000**0.5


def test_guides_that_outer_plates_break_are_run_one_by_one() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Normal(torch.full((8,), 0.1 * float(loc)), 0.1).to_event(1))

    fit = correlated_regression()
    sampler = ImportanceSampler("test", fit.model, guide, fit.args, None)
    assert not sampler.draws_at_once and sampler.score.is_vectorized
    assert sampler.draw(7).log_weights.shape == (7, 1)


def test_discrete_sites_are_summed_out() -> None:
    """Draw by draw against the sum over all states by hand, with a plate inside the item plate and out of it."""

    @config_enumerate
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(4.0 * k, 1.0), obs=y)

    guide = AutoFlowGuide(model)
    weights, values = log_weights(model, guide, 50, (Y,))
    p = values["p"].unsqueeze(-1).double()
    both = torch.stack([(1 - p).log() + dist.Normal(0.0, 1.0).log_prob(Y), p.log() + dist.Normal(4.0, 1.0).log_prob(Y)])
    expected = both.logsumexp(0).sum(-1) + dist.Beta(2.0, 2.0).log_prob(values["p"]) - guide.log_prob(values)
    torch.testing.assert_close(weights, expected.double(), rtol=1e-5, atol=1e-5)
    elbo = TraceEnum_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    weights, _ = log_weights(model, guide, 20_000, (Y,))
    assert abs(weights.mean().item() + elbo.loss(model, guide, Y)) < 4 * weights.std().item() * (2 / 20_000) ** 0.5


def test_enumerated_items_fall_apart() -> None:
    @config_enumerate
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + 4.0 * k, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.5))

    report = diagnose(model, guide, (Y,), seed=0, progress=False)
    states = torch.tensor([[0.7], [0.3]]).log() + dist.Normal(torch.tensor([[0.0], [4.0]]), 2.0**0.5).log_prob(Y)
    assert report.items is not None and report.items.plate == "data"
    error = (report.items.log_evidence - states.logsumexp(0)) / report.items.log_evidence_se
    assert error.abs().max() < 4


def test_subsampled_plates_have_an_elbo_and_no_evidence() -> None:
    y = torch.randn(100, generator=torch.Generator().manual_seed(0))

    def plate(y: Tensor) -> pyro.plate:
        return pyro.plate("data", 100, subsample_size=20)

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with plate(y) as i:
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    guide = AutoFlowGuide(model, create_plates=plate)
    report = diagnose(model, guide, (y,), num_samples=2000, seed=0, progress=False)
    assert report.verdict == "not known" and "'data'" in report.reason
    assert report.log_evidence != report.log_evidence and "log evidence" not in str(report)
    elbo = Trace_ELBO(num_particles=1)
    many = -torch.tensor([elbo.loss(model, guide, y) for _ in range(150)], dtype=torch.double)
    assert abs(report.elbo - many.mean().item()) < 4 * (report.elbo_se**2 + many.var().item() / 150) ** 0.5


def test_draws_that_the_model_refuses_weigh_nothing() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, z), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(2.0, 1.0))

    report = diagnose(model, guide, num_samples=200, seed=0, progress=False)
    refused = report.log_weights == -torch.inf
    assert 0 < refused.sum() < 20
    assert report.num_refused == refused.sum() and torch.isfinite(torch.tensor(report.elbo))
    assert not report.trustworthy


def test_what_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"site 'mu' at a point.*poutine\.condition"):
        diagnose(hierarchy, AutoDelta(hierarchy), (Y,))
    with pytest.raises(NotImplementedError, match="draw latent site 'tau'"):
        diagnose(hierarchy, AutoNormal(pyro.poutine.block(hierarchy, hide=["tau"])), (Y,))
    with pytest.raises(TypeError, match=r"args=\(x,\)"):
        diagnose(hierarchy, AutoNormal(hierarchy), Y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples"):
        diagnose(hierarchy, AutoNormal(hierarchy), (Y,), num_samples=10)
