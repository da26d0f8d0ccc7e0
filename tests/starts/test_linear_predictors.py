# SPDX-License-Identifier: Apache-2.0
"""Warm starts of guides that know what the data see of standard normal latents."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.importance.weights import log_weights
from pyro_flows.transforms import LinearPredictorHead

T = 25
PLACES = torch.linspace(0.0, 1.0, T)
Y = 2.0 * (6.0 * PLACES).sin() + 0.3 * torch.randn(T, generator=torch.Generator().manual_seed(0))


def autoregression(noise_scale: float = 0.3) -> None:
    """Of second order."""
    persistence = pyro.sample("persistence", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([T]).to_event(1))
    before, h, path = torch.zeros(()), torch.zeros(()), []
    for t in range(T):
        before, h = h, persistence * h - 0.2 * before + scale * z[t]
        path.append(h)
    with pyro.plate("days", T):
        pyro.sample("y", dist.Normal(torch.stack(path), noise_scale), obs=Y)


def process() -> None:
    """A non-centered Gaussian process of counts."""
    length = pyro.sample("length", dist.LogNormal(-1.5, 0.5))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(T), 1.0).to_event(1))
    covariance = amplitude**2 * (-((PLACES[:, None] - PLACES) ** 2) / (2 * length**2)).exp() + 1e-3 * torch.eye(T)
    f = torch.linalg.cholesky(covariance) @ z
    with pyro.plate("rows", T):
        pyro.sample("y", dist.Poisson(f.exp()), obs=Y.exp().round())


def head_of(guide: AutoFlowGuide) -> LinearPredictorHead:
    head = guide.posterior.only_block.flow.head
    assert isinstance(head, LinearPredictorHead)
    return head


@torch.no_grad()
def test_the_exact_conditional_of_an_autoregression() -> None:
    """z given the others is normal, with the precision I + H^T H / 0.09."""
    guide = AutoFlowGuide(autoregression).warm_start()
    head = head_of(guide)
    assert head.is_full and not head.is_skewed
    noise = torch.zeros(T + 1, T + 2)
    noise[1:, 2:] = torch.eye(T)
    for moved in (torch.zeros(2), torch.tensor([1.0, -1.5])):
        noise[:, :2] = moved
        drawn = head.forward_and_ladj(noise)[0]
        persistence, scale = drawn[0, 0].sigmoid(), drawn[0, 1].exp()
        lags = persistence * torch.ones(T - 1).diag(-1) - 0.2 * torch.ones(T - 2).diag(-2)
        slope = scale * torch.linalg.inv((torch.eye(T) - lags).double())
        precision = torch.eye(T) + slope.mT @ slope / 0.09
        mean = torch.linalg.solve(precision, slope.mT @ Y.double() / 0.09)
        torch.testing.assert_close(drawn[0, 2:].double(), mean, rtol=0.0, atol=5e-3)
        root = (drawn[1:, 2:] - drawn[0, 2:]).mT.double()
        torch.testing.assert_close(root @ root.mT, torch.linalg.inv(precision), rtol=0.0, atol=2e-3)


@pytest.mark.parametrize(("model", "most"), [(autoregression, 0.1), (process, 0.1)])
def test_a_warm_start_leaves_little_of_the_gap(model: Callable[[], None], most: float) -> None:
    """Half the variance of log weights."""
    guide = AutoFlowGuide(model).warm_start()
    assert head_of(guide).is_full
    assert log_weights(model, guide, 4000)[0].var() / 2 < most


def test_it_starts_as_auto_normal() -> None:
    guide = AutoFlowGuide(process, init_scale=0.1).setup()
    assert not head_of(guide).is_full
    draws = guide.sample_posterior(4000)["z"]
    assert draws.std(0).sub(0.1).abs().max() < 0.1 * 4 / 4000**0.5 + 1e-3


def test_a_guide_is_copied_and_loaded() -> None:
    guide = AutoFlowGuide(process).warm_start()
    values = guide.sample_posterior(3)
    expected = guide.log_prob(values)
    other = AutoFlowGuide(process).setup()
    other.load_state_dict(guide.state_dict())
    for same in (copy.deepcopy(guide), other):
        torch.testing.assert_close(same.log_prob(values), expected)


def test_a_state_that_knows_nothing_of_predictors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a guide made before there were any."""
    with monkeypatch.context() as patch:
        patch.setattr("pyro_flows.posterior.joint.read_linear_predictor", lambda *_: None)
        former = AutoFlowGuide(process).warm_start()
    values = former.sample_posterior(3)
    guide = AutoFlowGuide(process).setup()
    head_of(guide)
    guide.load_state_dict(former.state_dict())
    torch.testing.assert_close(guide.log_prob(values), former.log_prob(values))


def test_a_fit_needs_no_wider_flow() -> None:
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(process)
    result = fit(process, guide, progress=False)
    assert result.widening is None
    assert result.gap < 0.03


def test_both_signs_of_a_factor() -> None:
    """The conditional of one mode has a higher ELBO than a normal at each, but lacks log 2 nats for good."""
    generator = torch.Generator().manual_seed(22)
    y = torch.randn(30, 1, generator=generator) * torch.tensor([1.0, 0.6, 0.2, -0.2, -0.6])
    y = y + 0.5 * torch.randn(30, 5, generator=generator)

    def one_factor() -> None:
        loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(y)):
            score = pyro.sample("score", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(score[:, None] * loadings, sigma).to_event(1), obs=y)

    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(one_factor).warm_start()
    head_of(guide)
    share = (guide.sample_posterior(4000)["loadings"][:, 0] > 0.0).float().mean()
    assert abs(share - 0.5) < 0.05 + 4 * 0.5 / 4000**0.5


def test_fewer_data_than_the_guide_was_made_with() -> None:
    def model(y: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        persistence = pyro.sample("persistence", dist.Beta(8.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        path = torch.linalg.cholesky(scale * torch.eye(4) + persistence) @ z
        pyro.sample("y", dist.Normal(path[: len(y)], 0.5).to_event(1), obs=y)

    guide = AutoFlowGuide(model).setup(Y[:4])
    head_of(guide)
    assert guide.warm_start(Y[:3]).log_prob(guide.sample_posterior(2), Y[:3]).isfinite().all()
