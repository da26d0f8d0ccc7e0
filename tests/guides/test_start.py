# SPDX-License-Identifier: Apache-2.0
"""Where the guide starts, what its summaries are there, and that it starts where AutoNormal does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible, init_to_median, init_to_sample, init_to_value
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, constraints

from pyro_flows import AutoFlowGuide

FLOWS = ("auto", "diagonal_normal", "full_rank_normal", "site_ordered", "realnvp")
INITS = {
    "x": torch.tensor(3.5),
    "y": torch.tensor([0.5, 7.0]),
    "z": torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]),
}


def model() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Gamma(2.0, torch.ones(2)).to_event(1))
    with pyro.plate("plate", 2):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("obs", dist.Normal(x + z[..., 0], 1.0), obs=torch.tensor([1.0, 2.0]))


def of_inits(site: dict[str, Any]) -> Tensor:
    return INITS[site["name"]]


GUIDES = {"AutoNormal": AutoNormal} | {flow: functools.partial(AutoFlowGuide, flow=flow) for flow in FLOWS}
each_guide = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)


@each_guide
@pytest.mark.parametrize("init_loc_fn", [of_inits, init_to_value(values=INITS)], ids=["function", "init_to_value"])
def test_the_median_is_the_initial_value(make: Callable[..., Any], init_loc_fn: Callable[..., Any]) -> None:
    guide = make(model, init_loc_fn=init_loc_fn)
    guide()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, INITS[name], atol=1e-4, rtol=1e-4)


@each_guide
@pytest.mark.parametrize("init_scale", [0.5, 0.1, 1e-4])
def test_quantiles_have_the_initial_scale(make: Callable[..., Any], init_scale: float) -> None:
    guide = make(model, init_loc_fn=of_inits, init_scale=init_scale)
    guide()
    levels = dist.Normal(0.0, 1.0).cdf(torch.tensor([-1.0, 0.0, 1.0]))
    for name, transform in {"x": biject_to(constraints.real), "y": biject_to(constraints.positive)}.items():
        low, middle, high = transform.inv(guide.quantiles(levels.tolist())[name])
        # Standard error with 4000 draws: sqrt(p (1 - p) / 4000) / density = 2.4 % of the scale; five of them.
        torch.testing.assert_close((high - middle) / init_scale, torch.ones_like(low), atol=0.12, rtol=0)
        torch.testing.assert_close((middle - low) / init_scale, torch.ones_like(low), atol=0.12, rtol=0)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_first_density_is_that_of_auto_normal(flow: str) -> None:
    guide = AutoFlowGuide(model, flow=flow, init_loc_fn=of_inits, init_scale=0.3)
    values = guide.sample_posterior(50)
    expected = torch.zeros(50)
    supports = {"x": constraints.real, "y": constraints.positive, "z": constraints.simplex}
    for name, support in supports.items():
        transform = biject_to(support)
        loc = transform.inv(INITS[name])
        normal = dist.Normal(loc, 0.3)
        unconstrained = transform.inv(values[name])
        log_prob = normal.log_prob(unconstrained).reshape(50, -1).sum(-1)
        ladj = transform.log_abs_det_jacobian(unconstrained, values[name])
        expected += log_prob - ladj.reshape(50, -1).sum(-1)
    torch.testing.assert_close(guide.log_prob(values), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("flow", ["auto", "realnvp"])
def test_the_first_loss_is_that_of_auto_normal(flow: str) -> None:
    losses = []
    for make in (functools.partial(AutoFlowGuide, flow=flow), AutoNormal):
        guide = make(model, init_loc_fn=of_inits)
        guide()
        with torch.no_grad(), pyro.plate("particles", 10_000, dim=-2):
            guide_trace = poutine.trace(guide).get_trace()
            model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
            total = torch.zeros(10_000)
            for trace, sign in ((model_trace, -1), (guide_trace, 1)):
                trace.compute_log_prob()
                for node in trace.nodes.values():
                    if node["type"] == "sample":
                        shape = torch.broadcast_shapes(node["log_prob"].shape, (10_000, 1))
                        total += sign * node["log_prob"].expand(shape).sum(-1)
        losses.append(total)
    difference = losses[0].mean() - losses[1].mean()
    standard_error = math.sqrt(sum(loss.var().item() for loss in losses) / 10_000)
    assert abs(difference.item()) < 3 * standard_error


@pytest.mark.parametrize("dist_fn", [dist.Gamma(2.0, 1.0), dist.Beta(2.0, 3.0), dist.Normal(1.0, 2.0)], ids=str)
def test_summaries_repeat_and_leave_the_random_state_alone(dist_fn: dist.TorchDistribution) -> None:
    guide = AutoFlowGuide(lambda: pyro.sample("x", dist_fn), init_scale=1.0).setup()
    state = torch.get_rng_state()
    median, quantiles = guide.median()["x"], guide.quantiles([0.1, 0.5, 0.9])["x"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(median, quantiles[1])
    assert torch.equal(quantiles, guide.quantiles([0.1, 0.5, 0.9])["x"])
    assert quantiles[0] < quantiles[1] < quantiles[2]
    assert not median.requires_grad


@pytest.mark.parametrize("flow", ["auto", "full_rank_normal"])
def test_quantiles_after_training_agree_with_draws(flow: str) -> None:
    guide = AutoFlowGuide(model, flow=flow)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(30):
        svi.step()
    draws, levels = guide.sample_posterior(20_000), [0.1, 0.5, 0.9]
    for name, quantiles in guide.quantiles(levels, num_samples=20_000).items():
        if name == "z":
            continue  # Coordinates of a simplex have quantiles in unconstrained space only.
        for level, quantile in zip(levels, quantiles, strict=True):
            share = (draws[name] <= quantile).double().mean(0)
            # Both sides are estimates: sqrt(2 p (1 - p) / 20000) is 0.005 at most; five of them.
            torch.testing.assert_close(share, torch.full_like(share, level), atol=0.025, rtol=0)


def test_quantiles_of_a_support_that_is_bounded_above() -> None:
    def bounded() -> None:
        pyro.sample("x", dist.ImproperUniform(constraints.less_than(1.0), (), ()))

    guide = AutoFlowGuide(bounded, init_loc_fn=init_to_value(values={"x": torch.tensor(-1.0)}), init_scale=1.0)
    low, middle, high = guide.quantiles([0.1, 0.5, 0.9])["x"]
    assert low < middle < high < 1.0


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4001])
def test_number_of_draws_for_summaries(num_samples: int) -> None:
    guide = AutoFlowGuide(model, init_loc_fn=of_inits)
    torch.testing.assert_close(guide.median(num_samples=num_samples)["x"], INITS["x"], atol=1e-4, rtol=1e-4)


def test_summaries_set_the_guide_up() -> None:
    def with_data(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(data, 1.0))

    data = torch.randn(3)
    for method in ("median", "setup"):
        getattr(AutoFlowGuide(with_data), method)(data)
    assert AutoFlowGuide(with_data).quantiles([0.5], data)["x"].shape == (1, 3)
    assert AutoFlowGuide(with_data).sample_posterior(2, data)["x"].shape == (2, 3)
    assert AutoFlowGuide(with_data).log_prob({"x": torch.randn(4, 3)}, data).shape == (4,)


def test_the_first_call_may_be_without_gradients() -> None:
    guide = AutoFlowGuide(model)
    with torch.no_grad():
        guide()
    before = [p.clone() for p in guide.parameters()]
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step()
    assert any((p != q).any() for p, q in zip(guide.parameters(), before, strict=True))


def test_a_start_outside_of_the_unconstrained_space() -> None:
    def positive() -> None:
        pyro.sample("rate", dist.Exponential(1.0))

    guide = AutoFlowGuide(positive, init_loc_fn=init_to_value(values={"rate": torch.tensor(0.0)}))
    with pytest.raises(ValueError, match=r"'rate' to start at finite .* but got 0.*init_loc_fn"):
        guide()
    guide = AutoFlowGuide(positive, init_loc_fn=init_to_value(values={"rate": torch.tensor(1)}))
    with pytest.raises(ValueError, match=r"'rate' to start at finite floating-point .*init_to_value"):
        guide()


@pytest.mark.parametrize("init_loc_fn", [init_to_feasible, init_to_median, init_to_sample])
def test_init_loc_fn_is_asked_once_a_site(init_loc_fn: Callable[..., Any]) -> None:
    asked = []

    def count(site: dict[str, Any]) -> Tensor:
        asked.append(site["name"])
        return init_loc_fn(site)

    guide = AutoFlowGuide(model, init_loc_fn=count)
    guide()
    guide()
    assert asked == ["x", "y", "z"]


def test_density_of_auto_normal_by_transformed_normals() -> None:
    # The control of test_the_first_density: what is called AutoNormal's density there is what AutoNormal has.
    guide = AutoNormal(model, init_loc_fn=of_inits, init_scale=0.3)
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    found = sum(node["log_prob_sum"] for name, node in trace.nodes.items() if name.startswith("y"))
    normal = dist.Normal(INITS["y"].log(), 0.3)
    expected = TransformedDistribution(normal, biject_to(constraints.positive)).log_prob(trace.nodes["y"]["value"])
    torch.testing.assert_close(found, expected.sum())
