# SPDX-License-Identifier: Apache-2.0
"""What ``fit`` does where the flow leaves a gap: a wider one goes on from there, and the result says so."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_flows import AutoFlowGuide, FitResult, _files, diagnose, fit
from pyro_flows.training import (
    EstimateSettings,
    FitProgress,
    FitSettings,
    ScheduleSettings,
    Widening,
    WiderSettings,
)
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective
from pyro_flows.training.schedule import Schedule
from pyro_flows.training.wider import widened
from tests.common import Killed, kill_after, schools

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])
SHORT = FitSettings(
    estimates=EstimateSettings(num_runs=4, num_particles=50),
    schedule=ScheduleSettings(first_cycle=10, max_steps=10, max_gap_of_start=1e-12, min_gain=1e-9),
    wider=WiderSettings(first_cycle=5, max_steps=10),
)
OPTIONS: dict[str, Any] = {"seed": 0, "progress": False, "compile": False, "settings": SHORT}


def products(y: Tensor) -> None:
    """Only the product of each weight and its scale is seen; it is no effect that the guide knows the prior of."""
    with pyro.plate("columns", len(y)):
        scales = pyro.sample("scales", dist.HalfCauchy(1.0))
        weights = pyro.sample("weights", dist.Normal(0.1, 1.0))
        pyro.sample("y", dist.Normal(scales * weights, 0.3), obs=y)


@pytest.mark.slow
def test_the_gap_of_weights_and_their_scales() -> None:
    y = torch.tensor([0.5, -0.8, 1.2, 2.0, -0.4, 0.9])
    pyro.clear_param_store()
    guide = AutoFlowGuide(products)
    settings = FitSettings(
        schedule=ScheduleSettings(max_steps=250), wider=WiderSettings(first_cycle=500, max_steps=1000)
    )
    options = {**OPTIONS, "settings": settings, "num_particles": 32}
    result = fit(products, guide, (y,), target_gap=0.005, **options)
    assert result.widening is not None and result.widening.kept and result.kept == "flow"
    assert result.widening.gain > 4 * result.widening.gain_se
    report = diagnose(products, guide, (y,), seed=1, progress=False)
    assert abs(report.elbo - result.elbo) < 4 * (report.elbo_se + result.elbo_se)
    assert str(result.widening) in str(result)


@pytest.mark.parametrize("is_in_a_loop", [False, True])
def test_layers_begin_along_the_directions_of_the_observations(is_in_a_loop: bool) -> None:
    def logistic(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        if is_in_a_loop:
            for i in range(len(x)):
                pyro.sample(f"y_{i}", dist.Bernoulli(logits=x[i] @ w), obs=y[i])
        else:
            pyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)

    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(6, 4)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    objective = Objective(logistic, AutoFlowGuide(logistic).setup(x, y), Batches((x, y), None))
    joint = widened(objective).guide.posterior.joint
    directed = joint.flow.transform.inserted["0"].parts[1]
    found = directed.packed()[0]
    expected = x / x.norm(dim=-1, keepdim=True)
    for weight, inputs in zip(found[:, : len(x)], directed._inputs(), strict=True):
        distances = torch.cdist(torch.cat([weight, -weight]) / 3.0, expected[:, inputs])
        assert distances.min(0).values.max() < 0.01


@pytest.mark.parametrize("target_gap, rates", [(1e-9, [1.0, 0.5]), (None, [1.0, 1.0])])
def test_a_cycle_in_vain_is_followed_by_one_at_a_lower_rate(target_gap: float | None, rates: list[float]) -> None:
    seen: list[FitProgress] = []
    in_vain = ScheduleSettings(first_cycle=2, max_steps=100, patience=1, min_gain=0.02, target_gap=target_gap)
    options = {**OPTIONS, "settings": replace(SHORT, schedule=replace(in_vain, max_gap_of_start=1e-12))}
    pyro.clear_param_store()
    fit(schools, AutoFlowGuide(schools), (Y,), callback=seen.append, target_gap=math.inf, learning_rate=1e-6, **options)
    assert [progress.learning_rate for progress in seen][:2] == [1e-6 * rate for rate in rates]
    assert (len(seen) > 2) == (target_gap is not None)


def refusing(y: Tensor) -> None:
    """A draw in two thousand has no density."""
    a, b, c = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "abc")
    pyro.sample("z", dist.Normal(0.0, 1.0 + 0.0 * (3.2 - c).sqrt()), obs=torch.tensor(0.0))
    pyro.sample("y", dist.Normal(3.0 * a * b + a**2 - b**2, 0.05), obs=y[:1].sum())


def with_offset(y: Tensor) -> None:
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
    pyro.sample("y", dist.Normal(3.0 * a * b + a**2 - b**2 + 0.1 * offset, 0.05), obs=y[:1].sum())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, hidden", [(refusing, []), (with_offset, ["offset"])])
def test_a_flow_is_trained_to_its_end_where_no_wider_one_can_follow(
    monkeypatch: pytest.MonkeyPatch, model: Callable[..., Any], hidden: list[str]
) -> None:
    """Its gap is not known: it was taken for infinite, or raised."""
    monkeypatch.setattr(Schedule, "_is_worth_more", lambda *args: True)
    short = ScheduleSettings(first_cycle=10, max_steps=40, patience=5, max_gap_of_start=1e-12, min_gain=1e-9)
    settings = replace(SHORT, schedule=short, estimates=EstimateSettings())
    pyro.clear_param_store()
    guide = AutoFlowGuide(poutine.block(model, hide=hidden))
    result = fit(model, guide, (torch.ones(1),), **{**OPTIONS, "settings": settings}, learning_rate=1e-4)
    assert result.steps == 40 and result.widening is None


@pytest.mark.parametrize("target_gap, steps", [(1e-9, 10), (math.inf, 40)])
def test_a_flow_that_will_leave_a_gap_is_not_trained_to_its_end(
    monkeypatch: pytest.MonkeyPatch, target_gap: float, steps: int
) -> None:
    """Most of a run's steps, and a compilation, went to a flow that a wider one replaced anyway."""
    monkeypatch.setattr(Schedule, "_is_worth_more", lambda *args: True)
    slow = ScheduleSettings(first_cycle=5, max_steps=40, patience=5, max_gap_of_start=1e-12, min_gain=1e-9)
    options = {**OPTIONS, "settings": replace(SHORT, schedule=slow), "learning_rate": 1e-4}
    pyro.clear_param_store()
    result = fit(schools, AutoFlowGuide(schools), (Y,), target_gap=target_gap, **options)
    assert result.steps - (result.widening.steps if result.widening else 0) == steps
    assert (result.widening is None) == (target_gap == math.inf)


def test_no_wider_flow_for_a_guide_of_some_of_the_latents() -> None:
    def model(y: Tensor) -> None:
        location = pyro.sample("location", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.StudentT(2.0, location.sum() + offset, 1.0), obs=y)

    pyro.clear_param_store()
    guide = AutoFlowGuide(poutine.block(model, hide=["offset"]))
    with pytest.warns(UserWarning, match="does not draw 'offset'"):
        result = fit(model, guide, (Y,), **OPTIONS, num_particles=8)
    assert math.isfinite(result.elbo) and result.widening is None


def test_the_report_counts_the_whole_run() -> None:
    seen: list[FitProgress] = []
    options = {**OPTIONS, "num_particles": 8, "seed": 1}  # by seed 0, the first cycle seems to be all
    result = fit(schools, AutoFlowGuide(schools), (Y,), target_gap=1e-9, callback=seen.append, **options)
    assert result.widening is not None
    assert [(now.cycle, now.step) for now in seen] == [(1, 10), (2, 15), (3, 20)]
    assert result.steps == len(result.losses) == 20
    assert result.widening.steps == 10 and result.widening.num_particles == 4 * 8
    first = fit(schools, AutoFlowGuide(schools), (Y,), target_gap=100.0, **options)
    assert first.start_elbo == result.start_elbo
    assert first.losses == result.losses[:10]


def test_a_later_call_goes_on_with_the_wider_flow() -> None:
    guide = AutoFlowGuide(schools)
    first = fit(schools, guide, (Y,), target_gap=1e-9, **OPTIONS)
    assert first.widening is not None
    later = fit(schools, guide, (Y,), target_gap=1e-9, **OPTIONS)
    assert later.widening is None and later.steps == 10 and not guide.posterior.can_widen


def test_the_report_says_when_the_first_flow_was_kept() -> None:
    assert str(Widening(0.2, 0.1, 0.01, 5, 64, kept=True)).endswith(
        "nats were left: +0.100 +/- 0.010 nats in 5 of these steps, with 64 draws each"
    )
    assert str(Widening(0.2, 0.0, 0.0, 5, 64, kept=False)).endswith(
        "nats were left: no gain in 5 of these steps, with 64 draws each; the first flow was kept"
    )


def test_noise_is_not_reported_as_a_loss() -> None:
    """The wider flow is the one of higher ELBO; by other draws its gain may be below zero."""
    assert "left: +0.000 +/- 0.010 nats in" in str(Widening(0.2, -0.003, 0.01, 5, 64, kept=True))


def test_a_gap_that_is_small_enough_ends_the_training_of_a_wider_flow() -> None:
    settings = FitSettings(
        estimates=SHORT.estimates, schedule=SHORT.schedule, wider=WiderSettings(first_cycle=5, max_steps=1000)
    )
    pyro.clear_param_store()
    options = {**OPTIONS, "settings": settings}
    before = fit(schools, AutoFlowGuide(schools), (Y,), target_gap=1e-9, callback=lambda now: now.cycle > 1, **options)
    assert before.widening is not None and before.reason == "the callback asked for it"
    target = 0.9999 * before.widening.gap  # reached by noise, if not by steps
    result = fit(schools, AutoFlowGuide(schools), (Y,), target_gap=target, **options)
    assert result.widening is not None
    assert result.reason == f"the gap is below {target:g} nats"


@pytest.mark.parametrize(
    "flow, options",
    [
        ("auto", {"target_gap": 100.0}),
        ("auto", {"target_gap": math.inf}),
        ("auto", {"num_steps": 10, "target_gap": 1e-9}),
        ("diagonal_normal", {"target_gap": 1e-9}),
        ("auto", {"callback": lambda now: True, "target_gap": 1e-9}),
    ],
    ids=["small enough", "no bound", "steps given", "no wider flow", "stopped"],
)
def test_no_wider_flow(flow: str, options: dict[str, Any]) -> None:
    guide = AutoFlowGuide(schools, flow)
    result = fit(schools, guide, (Y,), **{**OPTIONS, **options})
    assert result.widening is None and result.steps == 10
    assert "wider" not in str(result)


def test_mini_batches_and_trained_models_have_none() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(10.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale + tau), obs=y)

    pyro.clear_param_store()
    assert fit(model, AutoFlowGuide(model), (Y,), target_gap=1e-9, **OPTIONS).widening is None


def test_a_wide_guide_resumes_its_run_and_is_left_as_it_is_by_another(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = AutoFlowGuide(schools)
    whole = fit(schools, first, (Y,), target_gap=1e-9, checkpoint=path, **OPTIONS)
    again = fit(schools, first, (Y,), target_gap=1e-9, checkpoint=path, **OPTIONS)  # by a guide that is wide already
    assert again.losses == whole.losses and again.elbo == whole.elbo
    pyro.clear_param_store()
    guide = AutoFlowGuide(schools)
    fit(schools, guide, (Y + 1.0,), target_gap=1e-9, **OPTIONS)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    with pytest.raises(ValueError, match="checksum"):
        fit(schools, guide, (Y + 1.0,), target_gap=1e-9, checkpoint=path, **OPTIONS)
    after = dict(guide.named_parameters())
    assert any("inserted" in name for name in after) and before.keys() == after.keys()
    assert all(torch.equal(before[name], p) for name, p in after.items())


def test_several_parts_of_a_step() -> None:
    settings = replace(SHORT, num_parts=2)
    result = fit(schools, AutoFlowGuide(schools), (Y,), target_gap=1e-9, **{**OPTIONS, "settings": settings})
    assert result.widening is not None and result.steps == 20


@pytest.mark.parametrize("killed", [None, 5], ids=["finished", "not finished"])
def test_runs_of_releases_without_wider_flows(killed: int | None, tmp_path: Path) -> None:
    def run(**options: Any) -> FitResult:
        pyro.clear_param_store()
        settings = replace(SHORT, checkpoint_interval=0.0)
        options = {**OPTIONS, "settings": settings, **options}
        return fit(schools, AutoFlowGuide(schools), (Y,), checkpoint=path, **options)

    path = tmp_path / "run.pt"
    with pytest.MonkeyPatch.context() as monkeypatch, nullcontext() if killed is None else pytest.raises(Killed):
        kill_after(monkeypatch, killed)
        run(target_gap=math.inf)
    values = _files.read(path)
    del values["options"]["target_gap"], values["options"]["objective"], values["wider"], values["weighted"]
    _files.write(path, values)
    for _ in range(2):
        result = run(target_gap=1e-9)
        assert (result.widening is None, result.steps) == ((True, 10) if killed is None else (False, 20))
    if killed is None:  # what this call adds is not finished
        assert run(target_gap=1e-9, num_steps=12).steps == 12
        assert run(target_gap=1e-9, num_steps=None).widening is not None


def test_the_target_has_to_be_the_same_again(tmp_path: Path) -> None:
    options = {**OPTIONS, "checkpoint": tmp_path / "run.pt"}
    fit(schools, AutoFlowGuide(schools), (Y,), target_gap=100.0, **options)
    with pytest.raises(ValueError, match=r"target_gap to be 100.0, but got 0.05. .* \(all but objective, target_gap,"):
        fit(schools, AutoFlowGuide(schools), (Y,), **options)


def test_more_steps_of_a_wider_flow_can_be_interrupted(tmp_path: Path) -> None:
    def run(path: Path, **options: Any) -> FitResult:
        pyro.clear_param_store()
        settings = replace(SHORT, checkpoint_interval=0.0)
        options = {**OPTIONS, "settings": settings, **options}
        return fit(schools, AutoFlowGuide(schools), (Y,), target_gap=1e-9, checkpoint=path, **options)

    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    assert run(whole).steps == 20
    shutil.copy(whole, part)
    expected = run(whole, num_steps=50)
    assert expected.steps == len(expected.losses) == 50
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_after(monkeypatch, 12)
        run(part, num_steps=50)
    result = run(part, num_steps=50)
    assert result.losses == expected.losses and result.elbo == expected.elbo
