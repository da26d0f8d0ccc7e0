# SPDX-License-Identifier: Apache-2.0
"""Densities that are NaN or infinite, at some draws, at all draws and from some step on, and models that raise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, VectorizedTrace_ELBO, diagnose, fit, importance_resample
from pyro_flows.compiled import inductor
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.training.estimates import EstimateSettings
from pyro_flows.training.settings import FitSettings

Y = torch.tensor([3.0, 1.0, 2.0, 2.5])


# Warnings of Pyro and of the guide, which say what is injected here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Encountered"),
    pytest.mark.filterwarnings("ignore:AutoFlowGuide. the gradient of a draw was not finite"),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: compiling takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)


class Faulty:
    """A normal model with a fault in its log density at draws below a limit.

    Args:
        fault: Function of the latent that gives a term of the log density.
        limit: Draws below it have the fault; the posterior is about normal(2.1, 0.5).
    """

    def __init__(self, fault: Callable[[Tensor], Tensor], limit: float = -math.inf) -> None:
        self.fault, self.limit = fault, limit

    def __call__(self, y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        with pyro.validation_enabled(False):  # or else a NaN is an exception
            term = 0.0 * loc if self.limit == -math.inf else torch.where(loc < self.limit, self.fault(loc), 0.0 * loc)
            pyro.factor("fault", term)


class After:
    """A function that begins a fault after a number of steps, as it is called in each."""

    def __init__(self, model: Faulty, steps: int) -> None:
        self.model, self.steps = model, steps

    def __iter__(self) -> Any:
        self.steps -= 1
        if self.steps < 0:
            self.model.limit = math.inf
        yield (Y,)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loc: torch.full_like(loc, math.nan),
    "+inf": lambda loc: torch.full_like(loc, math.inf),
    "-inf": lambda loc: torch.full_like(loc, -math.inf),
    "overflow": lambda loc: -((loc.abs() + 1.0) * 1e30).square(),  # and its gradient, at all draws
    "exploding gradient": lambda loc: 1e25 * (loc - loc.detach()),
    "infinite gradient": lambda loc: (loc - loc.detach()).abs().sqrt(),
}


def is_finite(guide: Any) -> bool:
    return all(bool(p.isfinite().all()) for p in guide.parameters())


def location(guide: AutoFlowGuide) -> float:
    return guide.median()["loc"].item()


@pytest.mark.parametrize("cls", [SVI, CompiledSVI])
@pytest.mark.parametrize("fault", FAULTS)
def test_own_loops_keep_parameters_finite(fault: str, cls: Any) -> None:
    """At some of the draws, and then at all of them."""
    model = Faulty(FAULTS[fault])
    guide = AutoFlowGuide(model).warm_start(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svi = cls(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
        for limit in (-math.inf, 1.7, math.inf):
            model.limit = limit
            for _ in range(12):
                svi.step(Y)
    assert is_finite(guide)
    assert abs(location(guide) - 2.1) < 1.0


@pytest.mark.parametrize("fault", ["nan", "+inf", "-inf"])
def test_all_draws_from_the_start_are_an_error_of_fit(fault: str) -> None:
    model = Faulty(FAULTS[fault], math.inf)
    with pytest.raises(RuntimeError, match=r"expected the model to have a finite log density .*'fault'"):
        fit(model, AutoFlowGuide(model), (Y,), progress=False, num_steps=50)


@pytest.mark.parametrize("fault", FAULTS)
def test_fit_keeps_the_last_good_state(fault: str) -> None:
    """All draws have the fault from some step on."""
    model = Faulty(FAULTS[fault])
    guide = AutoFlowGuide(model).warm_start(Y)
    result = fit(model, guide, After(model, 20), progress=False, num_steps=60, num_particles=2, seed=1, compile=False)
    assert is_finite(guide)
    assert abs(location(guide) - 2.1) < 0.5
    assert (result.skipped > 30) == ("not finite" in result.advice) == (fault != "infinite gradient")


@pytest.mark.parametrize("fault", ["nan", "exploding gradient"])
def test_rare_faults_cost_themselves(fault: str) -> None:
    model = Faulty(FAULTS[fault])
    guide = AutoFlowGuide(model).warm_start(Y)
    model.limit = 0.9  # a hundredth of the draws
    result = fit(model, guide, (Y,), progress=False, num_steps=60, num_particles=16, seed=0, compile=False)
    assert is_finite(guide)
    assert math.isfinite(result.elbo)
    assert abs(location(guide) - 2.1) < 0.3


@pytest.mark.parametrize("elbo", [Trace_ELBO, VectorizedTrace_ELBO])
def test_a_model_that_raises_at_some_draws(elbo: Any) -> None:
    """By a Cholesky factorization: SVI raises, with its parameters as before; CompiledSVI leaves the step out; fit
    leaves out the draw."""

    limit = 1.7

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        matrix = torch.eye(2) * torch.where(loc < limit, -1.0, 1.0)[..., None, None]
        pyro.factor("cholesky", 0.0 * torch.linalg.cholesky(matrix).sum((-1, -2)))

    refused = {}
    for cls in (SVI, CompiledSVI):
        guide = AutoFlowGuide(model, init_loc_fn=init_to_value(values={"loc": torch.tensor(2.1)}), init_scale=0.5)
        svi = cls(model, guide, Adam({"lr": 1e-3}), elbo(num_particles=1))
        refused[cls] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(20):
                try:
                    svi.step(Y)
                except torch.linalg.LinAlgError:
                    refused[cls] += 1
        assert is_finite(guide)
    if elbo is Trace_ELBO:
        assert refused[SVI] > refused[CompiledSVI]
    limit = 0.9
    few = FitSettings(estimates=EstimateSettings(num_runs=4, num_particles=100))
    options = {"num_steps": 20, "num_particles": 16, "seed": 0, "compile": False, "settings": few}
    result = fit(model, guide, (Y,), progress=False, **options)
    assert is_finite(guide)
    assert result.skipped < 5


@pytest.mark.parametrize("fault", ["nan", "+inf", "-inf"])
def test_no_usable_weights(fault: str) -> None:
    """One draw was returned a thousand times."""
    model = Faulty(FAULTS[fault])
    guide = AutoFlowGuide(model).warm_start(Y)
    model.limit = math.inf
    with pytest.raises(RuntimeError, match=r"importance_resample: expected (draws of the guide|finite log densities)"):
        importance_resample(model, guide, 1000, (Y,), progress=False)


@pytest.mark.parametrize("limit", [2.1, math.inf])
@pytest.mark.parametrize("fault", ["nan", "+inf", "-inf"])
def test_diagnose_does_not_trust(fault: str, limit: float) -> None:
    model = Faulty(FAULTS[fault])
    guide = AutoFlowGuide(model).warm_start(Y)
    model.limit = limit
    report = diagnose(model, guide, (Y,), progress=False, seed=0, search=False)
    assert not report.trustworthy
    if fault == "nan":
        assert report.num_refused == pytest.approx(4000 if limit == math.inf else 2000, abs=500)


def test_draws_without_weights_are_left_out() -> None:
    model = Faulty(FAULTS["nan"])
    guide = AutoFlowGuide(model).warm_start(Y)
    model.limit = 1.7
    draws = importance_resample(model, guide, 500, (Y,), progress=False, seed=0)
    assert draws["loc"].min() >= model.limit


def normal(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_fit_refuses_mini_batches_of_a_wrong_shape() -> None:
    """In Pyro's own words, as SVI does; only the first mini-batch was checked."""
    with pytest.raises(ValueError, match="invalid log_prob shape"):
        fit(normal, AutoFlowGuide(normal), [(Y,), (Y[:3],), (Y.unsqueeze(-1),)], progress=False, num_steps=30)


def test_fit_skips_a_mini_batch_that_is_not_finite() -> None:
    guide = AutoFlowGuide(normal)
    result = fit(normal, guide, [(Y,), (Y,), (Y * math.nan,)], progress=False, num_steps=30, seed=0)
    assert (result.skipped, is_finite(guide)) == (10, True)
    assert "Look for data that are not finite" in result.advice


def test_a_support_that_follows_other_latents_is_named() -> None:
    def ordered(y: Tensor) -> None:
        low = pyro.sample("low", dist.Uniform(0.0, 1.0))
        high = pyro.sample("high", dist.Uniform(low, 4.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(low + high, 1.0), obs=y)

    with pytest.raises(RuntimeError, match=r"that of 'high' follows other latents.*pyro.sample\('high_share'"):
        fit(ordered, AutoFlowGuide(ordered), (Y,), num_steps=50, progress=False)


def test_a_model_that_raises_far_away_does_so_while_its_start_is_explained() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        torch.linalg.cholesky((5.0 - loc.square().sum()) * torch.eye(2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc.sum(), 1.0), obs=y)

    guide = AutoFlowGuide(model)
    guide(Y)
    joint = guide.posterior.joint
    assert joint is not None
    log_joint = LogJoint(model, joint.layout, (Y,), {})
    assert "finite ELBO" in log_joint.without_density(joint.layout.init_loc)
