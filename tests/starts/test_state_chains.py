# SPDX-License-Identifier: Apache-2.0
"""Warm starts of guides that know a chain of states."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.importance.weights import log_weights
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.state_chains import read_state_chain
from pyro_flows.starts.state_chains import ChainTarget, laplace_gaussian
from pyro_flows.transforms import ChainHead

T = 25
Y = 2.0 * (torch.arange(T) / 4.0).sin() + 0.3 * torch.randn(T, generator=torch.Generator().manual_seed(0))

LONG = 2.0 * (torch.arange(100) / 4.0).sin()  # a random walk of fewer than 65 states is pooled as effects


def states(persistence: Tensor, scale: Tensor, count: int) -> Tensor:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([count]).to_event(1))
    h, path = torch.zeros(()), []
    for t in range(count):
        h = persistence * h + scale * z[t]
        path.append(h)
    return torch.stack(path)


def autoregression(y: Tensor = Y) -> None:
    persistence = pyro.sample("persistence", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    path = states(persistence, scale, T)
    pyro.sample("y", dist.Normal(path[: len(y)], 0.3).to_event(1), obs=y)


def sites(y: Tensor) -> None:
    """The same with states that are sites."""
    persistence = pyro.sample("persistence", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    h = torch.zeros(())
    for t in pyro.markov(range(T)):
        h = pyro.sample(f"h_{t}", dist.Normal(persistence * h, scale))
        pyro.sample(f"y_{t}", dist.Normal(h, 0.3), obs=y[t])


def volatility(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    persistence = pyro.sample("persistence", dist.Beta(20.0, 1.5))
    scale = pyro.sample("scale", dist.HalfNormal(0.5))
    path = states(persistence, scale, len(y))
    pyro.sample("y", dist.Normal(0.0, ((mean + path) / 2.0).exp()).to_event(1), obs=y)


def walk(y: Tensor) -> None:
    """Counts on a random walk."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Poisson((level + (scale * z).cumsum(-1)).exp()).to_event(1), obs=y)


def returns(count: int) -> Tensor:
    noise = torch.randn(2, count, generator=torch.Generator().manual_seed(1))
    h, found = torch.zeros(()), []
    for t in range(count):
        h = 0.95 * h + 0.3 * noise[0, t]
        found.append((h / 2.0).exp() * noise[1, t])
    return torch.stack(found)


def head_of(guide: AutoFlowGuide) -> ChainHead:
    head = guide.posterior.only_block.flow.head
    assert isinstance(head, ChainHead)
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
        lag = (torch.arange(T)[:, None] - torch.arange(T)).clamp_min(0)
        slope = (scale * persistence**lag).tril().double()
        precision = torch.eye(T) + slope.mT @ slope / 0.09
        mean = torch.linalg.solve(precision, slope.mT @ Y.double() / 0.09)
        torch.testing.assert_close(drawn[0, 2:].double(), mean, rtol=0.0, atol=5e-3)
        root = (drawn[1:, 2:] - drawn[0, 2:]).mT.double()
        torch.testing.assert_close(root @ root.mT, torch.linalg.inv(precision), rtol=0.0, atol=2e-3)


@torch.no_grad()
def test_sites_have_the_posterior_of_the_states_that_innovations_drive() -> None:
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(sites).warm_start(Y)
    head = head_of(guide)
    assert head.is_full and head.chain.is_centered
    other = AutoFlowGuide(autoregression).setup()
    weights, _ = log_weights(sites, guide, 4000, (Y,))
    assert weights.var() / 2 < 0.25
    pyro.set_rng_seed(0)
    expected, _ = log_weights(autoregression, other.warm_start(), 4000)
    difference = weights.logsumexp(0) - expected.logsumexp(0)  # of log evidences
    assert abs(difference) < 4 * ((weights.var() + expected.var()) / 4000) ** 0.5 + 1e-3


@pytest.mark.parametrize(
    ("model", "y", "most"), [(volatility, returns(400), 0.5), (walk, (LONG + 2.0).exp().round(), 0.3)]
)
def test_a_warm_start_leaves_little_of_the_gap(model: Callable[[Tensor], None], y: Tensor, most: float) -> None:
    """Half the variance of log weights; of the best Gaussian of these returns, it is 2.9, and 0.3 without skewness."""
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model).warm_start(y)
    assert head_of(guide).is_skewed
    assert log_weights(model, guide, 4000, (y,))[0].var() / 2 < most


@torch.no_grad()
def test_the_log_joint_without_a_loop() -> None:
    y = returns(12)
    guide = AutoFlowGuide(volatility).setup(y)
    layout = guide.posterior.only_block.layout
    read = read_state_chain(RunRecorder(volatility, (y,), {}, layout))
    assert read is not None
    log_joint = LogJoint(volatility, layout, (y,), {})
    draws = torch.randn(5, layout.latent_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ChainTarget(read, log_joint)(draws), log_joint(draws))


@torch.no_grad()
def test_the_states_are_integrated_out_exactly_where_they_are_normal() -> None:
    """The others' mode is that of the density of the data given these, by a grid of dense matrices."""
    guide = AutoFlowGuide(autoregression).setup()
    layout = guide.posterior.only_block.layout
    read = read_state_chain(RunRecorder(autoregression, (), {}, layout))
    assert read is not None
    pyro.set_rng_seed(0)
    found = laplace_gaussian(read, LogJoint(autoregression, layout, (), {}), head_of(guide))
    assert found is not None
    axes = [found.loc[k] + found.factor[k] * torch.linspace(-0.5, 0.5, 11) for k in range(2)]
    points = torch.cartesian_prod(*axes).double()
    persistence, scale = points[:, 0].sigmoid(), points[:, 1].exp()
    lag = (torch.arange(T)[:, None] - torch.arange(T)).clamp_min(0)
    slope = (scale[:, None, None] * persistence[:, None, None] ** lag).tril()
    density = dist.MultivariateNormal(torch.zeros(T).double(), slope @ slope.mT + 0.09 * torch.eye(T)).log_prob(Y)
    density += dist.Beta(8.0, 2.0).log_prob(persistence) + (persistence * (1.0 - persistence)).log()
    density += dist.Normal(0.0, 0.5).log_prob(points[:, 1])
    assert density.argmax() == 60  # the middle


def of_absolute_errors(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Laplace((scale * z).cumsum(-1), 0.5).to_event(1), obs=y)


def test_a_likelihood_without_curvature() -> None:
    """Its factors are worse than a normal, which is the start then."""
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(of_absolute_errors).warm_start(LONG)
    head_of(guide)
    before = AutoFlowGuide(of_absolute_errors).setup(LONG)
    elbos = [log_weights(of_absolute_errors, one, 1000, (LONG,))[0].mean() for one in (guide, before)]
    assert elbos[0] > elbos[1] + 10.0


def refuse(*_: object) -> None:
    raise RuntimeError("derivative for aten::some is not implemented")


@pytest.mark.parametrize("found", [refuse, lambda *_: None])
def test_where_the_states_cannot_be_integrated_out(found: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is a normal then, as of models without a chain."""
    monkeypatch.setattr("pyro_flows.starts.select.laplace_gaussian", found)
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(autoregression).warm_start()
    assert not head_of(guide).is_full
    before = AutoFlowGuide(autoregression).setup()
    elbos = [log_weights(autoregression, one, 1000)[0].mean() for one in (guide, before)]
    assert elbos[0] > elbos[1] + 10.0


def test_it_starts_as_auto_normal_and_trains_by_plain_svi() -> None:
    guide = AutoFlowGuide(autoregression, init_scale=0.1).setup()
    assert not head_of(guide).is_full
    draws = guide.sample_posterior(4000)["z"]
    assert draws.std(0).sub(0.1).abs().max() < 0.1 * 4 / 4000**0.5 + 1e-3
    pyro.clear_param_store()
    svi = SVI(autoregression, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(300)]
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-50:]) < sum(losses[:50])


def test_a_guide_is_copied_and_loaded() -> None:
    y = returns(30)
    guide = AutoFlowGuide(volatility).warm_start(y)
    values = guide.sample_posterior(3, y)
    expected = guide.log_prob(values, y)
    other = AutoFlowGuide(volatility).setup(y)
    other.load_state_dict(guide.state_dict())
    for same in (copy.deepcopy(guide), other):
        torch.testing.assert_close(same.log_prob(values, y), expected)


def test_a_state_that_knows_nothing_of_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a guide made before there were any."""
    with monkeypatch.context() as patch:
        for name in ("read_state_chain", "read_linear_predictor", "with_effects"):
            patch.setattr(f"pyro_flows.posterior.joint.{name}", lambda *_: None)
        former = AutoFlowGuide(autoregression).warm_start()
    values = former.sample_posterior(3)
    guide = AutoFlowGuide(autoregression).setup()
    head_of(guide)
    guide.load_state_dict(former.state_dict())
    torch.testing.assert_close(guide.log_prob(values), former.log_prob(values))


def test_fewer_data_than_the_guide_was_made_with() -> None:
    guide = AutoFlowGuide(autoregression).setup(Y)
    head_of(guide)
    assert guide.warm_start(Y[:20]).log_prob(guide.sample_posterior(2), Y[:20]).isfinite().all()


def test_a_fit_of_hundreds_of_days() -> None:
    pyro.set_rng_seed(0)
    generator = torch.Generator().manual_seed(2)
    path = 1.0 + (0.2 * torch.randn(400, generator=generator)).cumsum(0)
    y = torch.poisson(path.exp(), generator=generator)
    guide = AutoFlowGuide(walk)
    result = fit(walk, guide, args=(y,), progress=False)
    assert head_of(guide).is_skewed
    assert result.gap < 0.05
