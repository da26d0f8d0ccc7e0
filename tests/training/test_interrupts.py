# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at any moment of ``fit``, once and twice: what was trained is kept, and the checkpoint is good."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide, _files, fit
from pyro_flows.starts import plates
from pyro_flows.training import EstimateSettings, FitSettings, ScheduleSettings
from pyro_flows.training.interrupts import Interrupts
from pyro_flows.training.objective import Objective
from pyro_flows.training.trainer import Trainer

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])
SETTINGS = FitSettings(
    checkpoint_interval=0.0,
    estimates=EstimateSettings(num_runs=4, num_particles=50),
    schedule=ScheduleSettings(clear_errors=1e9),  # both are in the final comparison
)
# Estimates of a run of one cycle: the start's, the cycle's, and two in the final comparison.
FIRST, OF_CYCLE, FINAL, FINAL_OF_START = 1, 2, 3, 4


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 50.0))
    pyro.sample("y", dist.Normal(loc, 10.0).expand([4]).to_event(1), obs=y)


def train(path: Path | None, guide: Any, num_steps: int = 60) -> Any:
    """From far away: after a few steps, the ELBO is a hundred nats higher."""
    options: dict[str, Any] = {"learning_rate": 0.5, "num_particles": 8, "progress": False, "settings": SETTINGS}
    return fit(model, guide, (Y,), num_steps=num_steps, seed=0, checkpoint=path, **options)


def fresh() -> AutoNormal:
    pyro.clear_param_store()
    return AutoNormal(model)


def elbo(guide: Any) -> float:
    return -float(pyro.infer.Trace_ELBO(200).loss(model, guide, Y))


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    *numbers: int,
    press: Callable[[], None] | None = None,
    after: bool = False,
) -> None:
    """Have some calls of a function interrupted, before or after they are done."""
    function, calls = getattr(owner, name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in numbers and not after:
            (press or raise_)()
        found = function(*args, **kwargs)
        if calls in numbers and after:
            (press or raise_)()
        return found

    monkeypatch.setattr(owner, name, interrupted)


def raise_() -> None:
    raise KeyboardInterrupt


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def check_file(path: Path, monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    """The checkpoint is whole, alone in its folder, and its run goes on to the end."""
    monkeypatch.undo()
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    result = train(path, fresh())
    assert result.reason == "all 60 steps done" and result.kept == "flow"
    assert result.elbo == pytest.approx(expected.elbo, abs=0.3)


@pytest.fixture(scope="module")
def whole() -> Any:
    return train(None, fresh())


ONCE: dict[str, tuple[Any, str, int]] = {
    "a step": (Trainer, "_step", 25),
    "the cycle's estimate": (Objective, "estimate", OF_CYCLE),
    "saving": (_files, "write", 20),
}


@pytest.mark.parametrize(("owner", "name", "number"), ONCE.values(), ids=ONCE)
def test_once_in_training(
    owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    guide = fresh()
    interrupt(monkeypatch, owner, name, number)
    result = train(tmp_path / "run.pt", guide)
    assert (result.reason, result.kept) == ("interrupted", "flow") and 15 < result.steps <= 60
    assert result.elbo > result.start_elbo + 1.0
    assert elbo(guide) == pytest.approx(result.elbo, abs=0.5)
    check_file(tmp_path / "run.pt", monkeypatch, whole)


TWICE: dict[str, list[tuple[Any, str, int]]] = {
    "a step, and the estimate after it": [(Trainer, "_step", 40), (Objective, "estimate", OF_CYCLE)],
    "the cycle's estimate, and the next": [(Objective, "estimate", OF_CYCLE), (Objective, "estimate", FINAL)],
    "a step, and saving after it": [(Trainer, "_step", 40), (_files, "write", 42)],
    "a step, and the final comparison": [(Trainer, "_step", 40), (Objective, "estimate", FINAL_OF_START)],
}


@pytest.mark.parametrize("moments", TWICE.values(), ids=TWICE)
def test_twice(
    moments: list[tuple[Any, str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Any,
) -> None:
    guide = fresh()
    for owner, name, number in moments:
        interrupt(monkeypatch, owner, name, number)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.pt", guide)
    assert elbo(guide) > elbo(fresh()) + 1.0
    check_file(tmp_path / "run.pt", monkeypatch, whole)


@pytest.mark.parametrize("number", [FINAL, FINAL_OF_START])
def test_in_the_final_comparison_the_trained_guide_is_kept(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    guide = fresh()
    interrupt(monkeypatch, Objective, "estimate", number)
    result = train(tmp_path / "run.pt", guide)
    assert (result.kept, result.reason, result.steps) == ("flow", "interrupted", 60)
    assert elbo(guide) == pytest.approx(result.elbo, abs=0.5)
    check_file(tmp_path / "run.pt", monkeypatch, whole)


def test_in_the_first_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    start = train(None, fresh(), num_steps=1).start_elbo
    guide = fresh()
    interrupt(monkeypatch, Objective, "estimate", FIRST)
    result = train(tmp_path / "run.pt", guide)
    assert (result.kept, result.reason, result.steps) == ("start", "interrupted", 0)
    assert result.elbo == pytest.approx(start, rel=0.1)
    check_file(tmp_path / "run.pt", monkeypatch, whole)
    (tmp_path / "twice").mkdir()
    interrupt(monkeypatch, Objective, "estimate", 1, 2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "twice" / "run.pt", fresh())
    check_file(tmp_path / "twice" / "run.pt", monkeypatch, whole)


def test_in_the_warm_start_no_half_of_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halfway(block: nn.Module, *args: Any) -> None:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(plates, "warm_start_joint", halfway)
    pyro.clear_param_store()
    guide = AutoFlowGuide(model, "diagonal_normal").setup(Y)
    before = elbo(guide)
    torch.manual_seed(0)
    guide = AutoFlowGuide(model, "diagonal_normal")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.pt", guide)
    assert elbo(guide) == pytest.approx(before, rel=0.2)
    monkeypatch.undo()
    assert train(tmp_path / "run.pt", AutoFlowGuide(model, "diagonal_normal")).steps == 60


# Real signals: heard between two steps


def test_a_run_that_ctrl_c_stopped_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    interrupt(monkeypatch, Objective, "gradient", 25, press=ctrl_c)
    result = train(tmp_path / "run.pt", fresh())
    assert (result.reason, result.steps) == ("interrupted", 25) and len(result.losses) == 25
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    again = train(tmp_path / "run.pt", fresh())
    assert again.losses == whole.losses and again.elbo == whole.elbo


def test_a_second_ctrl_c_is_heard_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    def twice() -> None:
        ctrl_c()
        ctrl_c()

    guide = fresh()
    interrupt(monkeypatch, Objective, "gradient", 40, press=twice, after=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.pt", guide)
    assert elbo(guide) > elbo(fresh()) + 1.0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_file(tmp_path / "run.pt", monkeypatch, whole)


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    def own(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGINT, own)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is own
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)

    def enter() -> None:
        with Interrupts() as interrupts:
            interrupts.raise_pending()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_ends_when_its_seconds_are_over_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def clock() -> float:
        return 1e3 * steps

    def one_step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args)

    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", one_step)
    monkeypatch.setattr("pyro_flows.training.interrupts.time.perf_counter", clock)
    whole = fresh()
    options: dict[str, Any] = {"learning_rate": 0.5, "num_particles": 8, "progress": False, "settings": SETTINGS}
    options |= {"num_steps": 60, "seed": 0}
    uninterrupted = fit(model, whole, (Y,), **options)
    expected = [value.clone() for value in whole.parameters()]
    steps = 0
    part = fresh()
    result = fit(model, part, (Y,), max_seconds=20e3, checkpoint=tmp_path / "run", **options)
    assert result.reason == "its 20000 seconds are over"
    assert result.steps == 21
    assert result.start_elbo < result.elbo < uninterrupted.elbo
    again = fit(model, part, (Y,), checkpoint=tmp_path / "run", **options)
    assert again.steps == 60
    assert all(torch.equal(one, other) for one, other in zip(part.parameters(), expected, strict=True))


def test_the_end_of_the_time_is_no_interruption() -> None:
    """After it, the first Ctrl-C is the first, and a second one raises."""
    with Interrupts(end=-math.inf) as interrupts:
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_pending()
        interrupts.heed()
        assert (interrupts.count, interrupts.ran_out, interrupts.is_late) == (0, True, False)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_pending()
        interrupts.heed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_time_of_another_process_ends_a_run_for_the_same_reason() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        interrupts.raise_pending([False, True])
    assert interrupts.ran_out
