# SPDX-License-Identifier: Apache-2.0
"""What the guide refuses, with the site's name and the line to write instead; and that this line works."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide

STRATEGIES = {f.__name__: f for f in (init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_uniform)}
each_strategy = pytest.mark.parametrize("init_loc_fn", STRATEGIES.values(), ids=STRATEGIES)


def trains(model: Callable[..., Any], guide: Any, *args: Any, elbo: Any = None) -> bool:
    svi = SVI(model, guide, Adam({"lr": 1e-3}), elbo or Trace_ELBO())
    return all(math.isfinite(svi.step(*args)) for _ in range(3))


def code_in(message: str) -> list[str]:
    """What the message puts into backticks."""
    return re.findall(r"`([^`]+)`", message)


# Discrete sites


def coin() -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    x = pyro.sample("x", dist.Bernoulli(p))
    pyro.sample("obs", dist.Bernoulli(p * x + (1 - p) * (1 - x)).expand([2]).to_event(1), obs=torch.tensor([1.0, 0.0]))


@each_strategy
def test_discrete_site(init_loc_fn: Callable[..., Any]) -> None:
    guide = AutoFlowGuide(coin, init_loc_fn=init_loc_fn)
    with pytest.raises(ValueError, match="Continuous inference cannot handle discrete sample site 'x'") as caught:
        guide()
    assert "enumeration.html" in str(caught.value)
    assert "config_enumerate" in str(caught.value)
    assert str(caught.value).count("Continuous inference") == 1


@each_strategy
def test_remedy_for_a_discrete_site(init_loc_fn: Callable[..., Any]) -> None:
    def marked() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        x = pyro.sample("x", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Bernoulli(p * x + (1 - p) * (1 - x)), obs=torch.tensor(1.0))

    guide = AutoFlowGuide(marked, init_loc_fn=init_loc_fn)
    assert trains(marked, guide, elbo=TraceEnum_ELBO(max_plate_nesting=0))
    assert set(guide()) == {"p"}
    assert set(AutoFlowGuide(config_enumerate(coin), init_loc_fn=init_loc_fn)()) == {"p"}


def test_config_enumerate_trains_without_further_words() -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        x = pyro.sample("x", dist.Bernoulli(p))
        pyro.sample("obs", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    model = config_enumerate(model)
    assert trains(model, AutoFlowGuide(model), elbo=TraceEnum_ELBO(max_plate_nesting=0))


# Spheres and circles


@each_strategy
def test_sphere(init_loc_fn: Callable[..., Any]) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        y = pyro.sample("y", dist.ProjectedNormal(x))
        pyro.sample("obs", dist.Normal(y, 1.0).to_event(1), obs=torch.tensor([1.0, 0.0, 0.0]))

    with pytest.raises(ValueError, match=r"spherical sample site 'y'.*ProjectedNormalReparam"):
        AutoFlowGuide(model, init_loc_fn=init_loc_fn)()
    model = poutine.reparam(model, {"y": ProjectedNormalReparam()})
    assert trains(model, AutoFlowGuide(model, init_loc_fn=init_loc_fn))


@pytest.mark.parametrize(
    "circular",
    [
        lambda: dist.VonMises(torch.tensor(0.5), 4.0),
        lambda: dist.VonMises(torch.zeros(2), 4.0).to_event(1),
        lambda: dist.SineBivariateVonMises(torch.tensor(0.0), torch.tensor(0.0), 1.0, 1.0, 0.1),
    ],
    ids=["VonMises", "independent", "bivariate"],
)
def test_circle(circular: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"'angle' to live on a line.*VonMises.*ProjectedNormalReparam"):
        AutoFlowGuide(lambda: pyro.sample("angle", circular()))()


def test_remedy_for_a_circle() -> None:
    def circle() -> None:
        pyro.sample("angle", dist.VonMises(torch.tensor(0.5), 4.0))

    with pytest.raises(ValueError, match="angle") as caught:
        AutoFlowGuide(circle)()
    statement, reparam, angle_of = code_in(str(caught.value))

    def model() -> None:
        names = {"pyro": pyro, "dist": dist, "torch": torch, "loc": torch.tensor(0.5), "concentration": 4.0}
        exec(statement, names)
        angle = eval(angle_of, names)
        pyro.sample("obs", dist.Normal(angle, 1.0), obs=torch.tensor(0.3))

    names = {"poutine": poutine, "model": model, "ProjectedNormalReparam": ProjectedNormalReparam}
    model_on_a_plane = eval(reparam, names)
    guide = AutoFlowGuide(model_on_a_plane)
    assert trains(model_on_a_plane, guide)
    trace = poutine.trace(poutine.replay(model_on_a_plane, poutine.trace(guide).get_trace())).get_trace()
    assert trace.nodes["angle"]["value"].norm().item() == pytest.approx(1.0, abs=1e-5)


def test_a_support_without_a_bijection() -> None:
    def model() -> None:
        pyro.sample("s", dist.ImproperUniform(constraints.positive_definite, (), (2, 2)))

    guide = AutoFlowGuide(model, init_loc_fn=init_to_value(values={"s": torch.eye(2)}))
    with pytest.raises(NotImplementedError, match=r"'s' to have a support that biject_to knows"):
        guide()


# Plates


def test_sequential_plate() -> None:
    def model() -> None:
        for i in pyro.plate("steps", 3):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    words = r"does not support sequential pyro.plate.*'z_0'.*'steps'.*with pyro.plate\('steps', 3\)"
    with pytest.raises(NotImplementedError, match=words):
        AutoFlowGuide(model)()

    def by_range() -> None:
        for i in range(3):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    def vectorized() -> None:
        with pyro.plate("steps", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for remedy in (by_range, vectorized):
        assert trains(remedy, AutoFlowGuide(remedy))


# Nothing to do


@pytest.mark.parametrize(
    "model",
    [
        lambda: None,
        lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)),
        lambda: pyro.sample("x", dist.Normal(0.0, 1.0).expand([0]).to_event(1)),
    ],
    ids=["empty", "observed", "no_elements"],
)
def test_no_latents(model: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="found no latent variables") as caught:
        AutoFlowGuide(model)()
    (statement,) = code_in(str(caught.value))
    names: dict[str, Any] = {}
    exec(statement, names)
    assert names["guide"](1, two=2) is None


# Arguments


def one_latent(y: Tensor) -> None:
    pyro.sample("x", dist.Normal(y, 1.0))


@pytest.mark.parametrize("flow", [3, None, ["realnvp"]], ids=str)
def test_flow_of_a_wrong_type(flow: Any) -> None:
    with pytest.raises(TypeError, match="expected flow to be a name, a FlowSpec or a function"):
        AutoFlowGuide(one_latent, flow)


def test_unknown_flow_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'auto'.*'realnvp'.*but got 'glow'"):
        AutoFlowGuide(one_latent, "glow")


@pytest.mark.parametrize("init_scale", [0, -1.0, "0.1", None, True, float("nan")], ids=str)
def test_bad_init_scale(init_scale: Any) -> None:
    with pytest.raises(ValueError, match="init_scale to be a number > 0"):
        AutoFlowGuide(one_latent, init_scale=init_scale)


@pytest.mark.parametrize("num_samples", [0, -1, 2.5], ids=str)
def test_bad_number_of_draws(num_samples: Any) -> None:
    guide = AutoFlowGuide(one_latent).setup(torch.tensor(0.0))
    for method in (
        lambda: guide.sample_posterior(num_samples),
        lambda: guide.median(num_samples=num_samples),
        lambda: guide.quantiles([0.5], num_samples=num_samples),
    ):
        with pytest.raises(ValueError, match="num_samples to be an integer >= 1"):
            method()


@pytest.mark.parametrize("levels", [[-0.1], [0.5, 1.1], [float("nan")], 0.5, [[0.5]]], ids=str)
def test_bad_quantiles(levels: Any) -> None:
    guide = AutoFlowGuide(one_latent).setup(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        guide.quantiles(levels)


@pytest.mark.parametrize("method", ["get_posterior", "get_base_dist", "get_transform", "sample_latent"])
def test_methods_before_setup(method: str) -> None:
    guide = AutoFlowGuide(one_latent)
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args, \*\*kwargs\)"):
        getattr(guide, method)()
    getattr(guide.setup(torch.tensor(0.0)), method)()


def test_a_failed_setup_leaves_the_guide_as_it_was() -> None:
    def model(k: Tensor | None = None) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(0.5), obs=k)

    guide = AutoFlowGuide(model)
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        guide()
    assert set(guide(torch.tensor(1.0))) == {"x"}


def test_wrong_value_of_init_loc_fn() -> None:
    guide = AutoFlowGuide(one_latent, init_loc_fn=init_to_value(values={"x": torch.tensor(float("nan"))}))
    with pytest.raises(ValueError, match=r"'x' to start at finite.*nan.*init_to_value\(values=\{'x'"):
        guide(torch.tensor(0.0))
