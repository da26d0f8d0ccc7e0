# SPDX-License-Identifier: Apache-2.0
"""Where a guide starts if the prior says nothing: a first step is finite wherever ``AutoNormal``'s is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible, init_to_value
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, init_to_prior_median
from pyro_flows.models.latents import log_density

Y = [1.0, 2.0, 3.0, 2.5, 1.5]
Number = Callable[[float], Tensor]
PRIORS: dict[str, Callable[[Number], Any]] = {
    "Gamma(0.001, 0.001)": lambda of: dist.Gamma(of(0.001), of(0.001)),
    "InverseGamma(0.001, 0.001)": lambda of: dist.InverseGamma(of(0.001), of(0.001)),
    "HalfCauchy(1e3)": lambda of: dist.HalfCauchy(of(1e3)),
    "Uniform(0, 1e6)": lambda of: dist.Uniform(of(0.0), of(1e6)),
    "LogNormal(0, 100)": lambda of: dist.LogNormal(of(0.0), of(100.0)),
}
# Those whose quartiles are no numbers, or a factor of 20,000 apart.
SILENT = ("Gamma(0.001, 0.001)", "InverseGamma(0.001, 0.001)", "LogNormal(0, 100)")
each_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def of(dtype: torch.dtype) -> Number:
    return lambda value: torch.tensor(value, dtype=dtype)


def measurements(prior: Callable[[Number], Any], dtype: torch.dtype, role: str) -> Callable[[], None]:
    """The scale of five measurements, or their precision."""
    number = of(dtype)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 10.0))
        s = pyro.sample("s", prior(number))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu, s if role == "scale" else s.rsqrt()), obs=torch.tensor(Y, dtype=dtype))

    return model


def groups(prior: Callable[[Number], Any], dtype: torch.dtype) -> Callable[[], None]:
    """The scale of latents."""
    number = of(dtype)

    def model() -> None:
        s = pyro.sample("s", prior(number))
        with pyro.plate("groups", 5):
            theta = pyro.sample("theta", dist.Normal(number(0.0), s))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(Y, dtype=dtype))

    return model


def first_losses(make: Callable[..., Any], model: Callable[[], None], num: int) -> list[float]:
    pyro.clear_param_store()
    guide = make(model)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [float(svi.step()) for _ in range(num)]
    assert all(parameter.isfinite().all() for parameter in guide.parameters())
    return losses


@dtypes
@pytest.mark.parametrize("role", ["scale", "precision", "groups"])
@each_prior
def test_finite_where_auto_normal_is(prior: Callable[[Number], Any], role: str, dtype: torch.dtype) -> None:
    model = groups(prior, dtype) if role == "groups" else measurements(prior, dtype, role)
    theirs = first_losses(AutoNormal, model, 3)
    assert all(map(math.isfinite, theirs))
    assert all(map(math.isfinite, first_losses(AutoFlowGuide, model, 10)))


@dtypes
@pytest.mark.parametrize("name", SILENT)
def test_a_prior_that_says_nothing_is_not_asked(name: str, dtype: torch.dtype) -> None:
    fn = PRIORS[name](of(dtype))
    value = init_to_prior_median({"name": "s", "fn": fn})
    assert torch.equal(value, init_to_feasible({"name": "s", "fn": fn}))
    assert value.dtype == dtype


@dtypes
@pytest.mark.parametrize(("name", "median"), [("HalfCauchy(1e3)", 1e3), ("Uniform(0, 1e6)", 5e5)])
def test_a_wide_prior_with_a_median_is(name: str, median: float, dtype: torch.dtype) -> None:
    value = init_to_prior_median({"name": "s", "fn": PRIORS[name](of(dtype))})
    assert value.item() == pytest.approx(median, rel=1e-4)


def test_members_are_judged_one_by_one() -> None:
    fn = dist.LogNormal(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 100.0])).to_event(1)
    value = init_to_prior_median({"name": "s", "fn": fn})
    torch.testing.assert_close(value, torch.tensor([math.e, 1.0]))


def test_a_vague_prior_on_the_line_has_a_median() -> None:
    """There, a long way is only a long way."""
    fn = dist.Normal(3.0, 1e6)
    assert init_to_prior_median({"name": "z", "fn": fn}).item() == pytest.approx(3.0)
    assert init_to_prior_median({"name": "z", "fn": dist.Cauchy(-2.0, 1e4)}).item() == pytest.approx(-2.0)


# Starts without a density


def overflowing(y: Tensor) -> None:
    """At the prior's median, 60, the mean overflows in single precision; at Pyro's feasible start it does not."""
    z = pyro.sample("z", dist.Normal(60.0, 30.0))
    pyro.sample("y", dist.Normal(z.exp().square(), 1.0), obs=y)


def at_median(y: Tensor) -> None:
    with pyro.poutine.condition(data={"z": torch.tensor(60.0)}), pyro.validation_enabled(False):
        overflowing(y)


def test_a_start_without_density_gives_way_to_a_feasible_one() -> None:
    y = torch.tensor(1.0)
    guide = AutoFlowGuide(overflowing).setup(y)
    assert log_density(at_median, (y,), {}) == -math.inf
    assert guide.median(y)["z"].abs() < 0.1
    assert math.isfinite(SVI(overflowing, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(y))


def test_the_start_is_where_auto_normal_is_if_the_density_is_higher_there() -> None:
    """So that the guide is not below ``AutoNormal`` where an optimizer moves neither of them."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(5.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, tau), obs=y)

    near_zero, near_prior = torch.tensor([0.5, -0.5]), torch.tensor([10.0, 0.0, 5.0])
    start = AutoFlowGuide(model).setup(near_zero).median(near_zero)
    assert (start["z"].item(), start["tau"].item()) == pytest.approx((0.0, 1.0), abs=1e-4)
    start = AutoFlowGuide(model).setup(near_prior).median(near_prior)
    assert (start["z"].item(), start["tau"].item()) == pytest.approx((5.0, 5.0), abs=1e-3)


def test_each_site_starts_where_the_elbo_is_higher() -> None:
    """A vague prior's median is far from data, and an informative one's is near them."""

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(3.0, 0.1))
        z = pyro.sample("z", dist.Normal(500.0, 1000.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, rate), obs=y)

    y = torch.tensor([20.0, -20.0, 5.0])
    start = AutoFlowGuide(model).setup(y).median(y)
    assert (start["z"].item(), start["rate"].item()) == pytest.approx((0.0, math.exp(3.0)), abs=1e-3)


def test_a_start_of_high_density_whose_draws_have_none_is_not_taken() -> None:
    """As of a hierarchy whose members are all alike: the smaller their scale, the higher the density."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(-12.0, 5.0))
        with pyro.plate("groups", len(y)):
            member = pyro.sample("member", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(member, 1.0), obs=y)

    y = torch.tensor([1.0, -1.0, 2.0, 0.5])
    starts = [InitMessenger(init)(model) for init in (init_to_prior_median, init_to_feasible)]
    assert log_density(starts[0], (y,), {}) > log_density(starts[1], (y,), {})
    assert AutoFlowGuide(model).setup(y).median(y)["scale"] == pytest.approx(1.0, abs=1e-3)


def test_a_start_for_which_the_first_guide_is_too_wide_is_taken() -> None:
    """Its ELBO is low, but training narrows the guide soon."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-4.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    y = math.exp(-4.0) * torch.linspace(-1.5, 1.5, 20)
    assert AutoFlowGuide(model).setup(y).median(y)["noise"] == pytest.approx(math.exp(-4.0), abs=1e-5)


def test_the_log_density_is_that_of_unconstrained_latents() -> None:
    def model() -> None:
        pyro.sample("s", dist.LogNormal(torch.zeros(3), 2.0).to_event(1))

    started = InitMessenger(init_to_feasible)(model)
    expected = dist.Normal(0.0, 2.0).log_prob(torch.tensor(0.0)) * 3
    assert log_density(started, (), {}) == pytest.approx(expected.item(), abs=1e-5)


def test_a_start_that_was_asked_for_stays() -> None:
    y = torch.tensor(1.0)
    start = init_to_value(values={"z": torch.tensor(60.0)})
    guide = AutoFlowGuide(overflowing, init_loc_fn=start).setup(y)
    assert guide.median(y)["z"] == pytest.approx(60.0, abs=1e-4)


def test_a_model_without_any_density_starts_at_the_median() -> None:
    """It is for the user to see, in his own first step."""

    def model() -> None:
        pyro.sample("z", dist.Normal(7.0, 1.0))
        pyro.factor("nowhere", torch.tensor(-math.inf))

    with pyro.validation_enabled(False):
        assert AutoFlowGuide(model).setup().median()["z"] == pytest.approx(7.0, abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_log_density_leaves_everything_alone(value: float) -> None:
    def model(factor: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.param("p", torch.ones(2))
        pyro.factor("f", z * 0.0 + factor)

    state = torch.get_rng_state()
    with pyro.validation_enabled(False):
        assert math.isfinite(log_density(model, (1.0,), {}))
        assert log_density(model, (value,), {}) == log_density(lambda _: 1 / 0, (value,), {}) == -math.inf
    assert torch.equal(torch.get_rng_state(), state)
    with pyro.poutine.trace() as seen:
        log_density(model, (1.0,), {})
    assert "z" not in seen.trace.nodes


def test_set_up_draws_the_same_noise_as_without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    states = []
    for check in (True, False):
        pyro.set_rng_seed(0)
        if not check:
            monkeypatch.setattr("pyro_flows.guides.auto.better_start", lambda *_: init_to_prior_median)
        AutoFlowGuide(model).setup()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
