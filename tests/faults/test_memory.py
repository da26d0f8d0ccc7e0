# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out: draws are taken in smaller chunks, and one draw that does not fit is said plainly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_flows import AutoFlowGuide, FitResult, diagnose, fit, importance_resample
from pyro_flows._memory import DoesNotFit
from pyro_flows.export import to_inference_data
from pyro_flows.importance.weights import log_weights
from pyro_flows.training import EstimateSettings, FitSettings, ScheduleSettings, WiderSettings
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective
from tests.common import schools

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])
ERRORS = {
    "GPU": getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)(
        "CUDA out of memory. Tried to allocate 8 GiB"
    ),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Python": MemoryError("Unable to allocate 8. GiB for an array"),
}


class Limited:
    """A model for which memory runs out above a number of draws."""

    def __init__(self, largest: float, error: Exception = ERRORS["CPU"]) -> None:
        self.largest, self.error = largest, error
        self.counts: list[int] = []

    def __call__(self, y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        self.counts.append(loc.numel())
        if loc.numel() > self.largest:
            raise self.error
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 5.0), obs=y)


class LimitedGuide(AutoFlowGuide):
    largest = 300.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        if found["loc"].numel() > self.largest:
            raise ERRORS["CPU"]
        return found


def moments(draws: dict[str, Tensor]) -> None:
    """Of the exact posterior, within five standard errors."""
    variance = 1 / (1 / 100.0 + 4 / 25.0)
    loc = draws["loc"].double()
    assert abs(loc.mean() - variance * 4 / 25.0 * 10.0) < 5 * (variance / len(loc)) ** 0.5


@pytest.fixture
def guide() -> AutoFlowGuide:
    return AutoFlowGuide(Limited(1e9)).warm_start(Y)


@pytest.mark.parametrize("error", ERRORS)
def test_resampling_goes_on_with_fewer_draws(guide: AutoFlowGuide, error: str) -> None:
    model = Limited(300, ERRORS[error])
    moments(importance_resample(model, guide, 1000, (Y,), num_draws=5000, progress=False))
    assert model.counts.count(4096) == 1  # the large chunk is not tried again
    assert max(count for count in model.counts[-10:]) == 256


def test_the_guide_may_run_out_too() -> None:
    guide = LimitedGuide(Limited(1e9)).warm_start(Y)
    moments(importance_resample(Limited(1e9), guide, 1000, (Y,), num_draws=5000, progress=False, seed=0))


def test_diagnose_and_log_weights(guide: AutoFlowGuide) -> None:
    exact = diagnose(Limited(1e9), guide, (Y,), seed=0, progress=False)
    found = diagnose(Limited(20), guide, (Y,), seed=0, progress=False)
    assert found.verdict == exact.verdict == "trust it"
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-3)
    weights, draws = log_weights(Limited(20), guide, 1000, (Y,))
    assert weights.shape == draws["loc"].shape == (1000,)
    assert weights.std() < 0.1


def test_export(guide: AutoFlowGuide) -> None:
    pytest.importorskip("arviz")
    found = to_inference_data(Limited(20), guide, (Y,), num_samples=500, seed=0)
    assert found.log_likelihood["y"].shape == (1, 500, 4)
    assert found.posterior_predictive["y"].shape == (1, 500, 4)


@pytest.mark.parametrize("structure", ["joint", "plates"])
def test_sample_posterior(monkeypatch: pytest.MonkeyPatch, structure: str) -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("items", 3):
            pyro.sample("z", dist.Normal(loc, 1.0))

    guide = AutoFlowGuide(model, structure=structure)
    guide.setup()
    counts = []
    base = type(guide.posterior.joint.flow.base)
    original = base.sample

    def sample(self: Any, like: Tensor, generator: Any = None) -> Tensor:
        counts.append(len(like))
        if len(like) > 100:
            raise ERRORS["GPU"]
        return original(self, like, generator)

    monkeypatch.setattr(base, "sample", sample)
    draws = guide.sample_posterior(1000)
    assert draws["loc"].shape == (1000,)
    assert draws["z"].shape == (1000, 3)
    assert len(set(draws["loc"].tolist())) == 1000
    assert guide.median()["loc"].abs() < 1e-4  # noise remains symmetric


def test_fit_estimates_from_fewer_draws() -> None:
    model = Limited(200)
    result = fit(model, AutoFlowGuide(model), (Y,), num_steps=20, num_particles=16, progress=False, seed=0)
    assert result.elbo_se < 0.05


@pytest.mark.parametrize(
    "run",
    [
        lambda model, guide: diagnose(model, guide, (Y,), search=False, progress=False),
        lambda model, guide: importance_resample(model, guide, 1000, (Y,), progress=False),
        lambda model, guide: log_weights(model, guide, 1000, (Y,)),
        lambda model, guide: to_inference_data(model, guide, (Y,)),
    ],
)
def test_a_single_draw_that_does_not_fit(guide: AutoFlowGuide, run: Callable[..., Any]) -> None:
    class Growing(Limited):
        """Runs out for good after the first runs, which look at its structure."""

        def __call__(self, y: Tensor) -> None:
            self.largest = 1e9 if len(self.counts) < 8 else 0
            super().__call__(y)

    with pytest.raises(DoesNotFit, match=r"expected memory for a single draw, but it ran out .*DefaultCPUAllocator"):
        run(Growing(0), guide)


def test_a_step_of_fit_that_does_not_fit(guide: AutoFlowGuide) -> None:
    class Growing(Limited):
        def __call__(self, y: Tensor) -> None:
            self.largest = 0 if torch.is_grad_enabled() and len(self.counts) > 200 else 1e9
            super().__call__(y)

    before = Trace_ELBO(num_particles=200).loss(Limited(1e9), guide, Y)
    model = Growing(0)
    with pytest.raises(DoesNotFit, match=r"expected memory for a (step of 16 particles|single draw)"):
        fit(model, guide, (Y,), num_steps=1000, num_particles=16, compile=False, progress=False, seed=0)
    assert Trace_ELBO(num_particles=200).loss(Limited(1e9), guide, Y) < before + 1.0  # trained so far, and finite


@pytest.mark.parametrize(("error", "first"), [("GPU", 0), ("CPU", 8), ("Python", 0)])
def test_steps_of_a_wider_flow_that_do_not_fit(
    error: str, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyro.clear_param_store()
    settings = FitSettings(
        estimates=EstimateSettings(num_runs=4, num_particles=50),
        schedule=ScheduleSettings(first_cycle=10, max_steps=10, max_gap_of_start=1e-12, min_gain=1e-9),
        wider=WiderSettings(first_cycle=5, max_steps=10),
    )
    gradient, many = Objective.gradient, []

    def limited(self: Objective, elbo: Trace_ELBO, *args: Any) -> float:
        many.extend([elbo.num_particles] if elbo.num_particles > 8 else [])
        if len(many) > first:
            raise ERRORS[error]
        return gradient(self, elbo, *args)

    monkeypatch.setattr(Objective, "gradient", limited)
    guide = AutoFlowGuide(schools)

    def run() -> FitResult:
        # By seed 0 the wider flow's first cycle seems to be all that it can gain.
        options: dict[str, Any] = {"num_particles": 8, "seed": 1, "progress": False, "compile": False}
        return fit(schools, guide, (Y,), target_gap=1e-9, checkpoint=tmp_path / "run.pt", settings=settings, **options)

    result = run()
    assert many == [32] * (first + 1)
    assert result.widening is not None and result.reason == "memory ran out for a step of 32 particles"
    assert result.steps == len(result.losses) == 10 + first
    assert abs(diagnose(schools, guide, (Y,), seed=0, progress=False).elbo - result.elbo) < 0.5
    again = run()
    assert again.losses == result.losses and again.elbo == result.elbo


def test_draws_of_a_wider_flow_are_fewer_where_data_are_many() -> None:
    pyro.clear_param_store()
    guide, settings, counts = AutoFlowGuide(schools).setup(Y), FitSettings(), []
    for size in (4, 10_000, 100_000):
        objective = Objective(schools, guide, Batches((Y,), None))
        objective.num_values = size
        first = settings.num_particles(objective)
        counts.append((first, settings.num_wider_particles(objective, first)))
    assert counts == [(128, 128), (16, 26), (16, 16)]


def test_other_errors_pass() -> None:
    model = Limited(50, RuntimeError("the model's own"))
    guide = AutoFlowGuide(Limited(1e9)).setup(Y)
    with pytest.raises(RuntimeError, match="the model's own"):
        log_weights(model, guide, 1000, (Y,))
