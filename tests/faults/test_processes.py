# SPDX-License-Identifier: Apache-2.0
"""Several threads, and several processes: Pyro's handlers and parameters belong to a whole process."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, diagnose, fit
from pyro_flows._threads import one_at_a_time
from pyro_flows.compiled import inductor

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 5.0), obs=y)


def train(program: Callable[..., Any], seed: int) -> float:
    guide = AutoFlowGuide(program)
    return fit(program, guide, (Y,), seed=seed, num_steps=30, progress=False).elbo


class HeldUp:
    """A model that stops in one of its runs until it may go on."""

    def __init__(self, stop: float) -> None:
        self.stop, self.count = stop, 0
        self.arrived, self.go = threading.Event(), threading.Event()

    def __call__(self, y: Tensor) -> None:
        self.count += 1
        if self.count == self.stop:
            self.arrived.set()
            assert self.go.wait(30.0)
        model(y)


def test_the_second_of_two_fits_waits() -> None:
    """One of them failed, or trained a mixture of both."""
    counted = HeldUp(math.inf)
    expected = [train(counted, 0), train(model, 1)]
    held_up = HeldUp(counted.count - 2)  # in the last estimate of the ELBO
    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = pool.submit(train, held_up, 0)
        assert held_up.arrived.wait(30.0)
        second = pool.submit(train, model, 1)
        end = time.monotonic() + 30.0
        while not caught and time.monotonic() < end:
            time.sleep(0.01)
        held_up.go.set()
        assert [first.result(60.0), second.result(60.0)] == expected
    (warning,) = caught
    assert str(warning.message).startswith("fit: waits for fit in another thread")
    assert warning.filename == __file__


def test_a_thread_may_nest_runs() -> None:
    """As ``check_calibration(refit=...)`` does."""
    with one_at_a_time("outer"), warnings.catch_warnings():
        warnings.simplefilter("error")
        guide = AutoFlowGuide(model)
        fit(model, guide, (Y,), seed=0, num_steps=3, progress=False)
        diagnose(model, guide, (Y,), num_samples=100, search=False, progress=False)


def test_two_threads_of_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording in one of them met the handlers of the other."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)

    def run(offset: float) -> tuple[float, int]:
        guide = AutoFlowGuide(model)
        svi = CompiledSVI(model, guide, Adam({"lr": 0.2}), Trace_ELBO())
        for step in range(60):  # of six shapes, so that eager and recorded steps of both meet
            svi.step((Y + offset)[: 2 + step % 3].repeat(1 + step % 2))
        for _ in range(60):
            svi.step(Y + offset)
        return guide.median(Y)["loc"].item(), len(svi._graphs)

    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [future.result(120.0) for future in [pool.submit(run, offset) for offset in (0.0, -20.0)]]
    exact = 4 * 100.0 / (4 * 100.0 + 25.0) * 10.0  # of means of 10 and -10, which the prior shrinks
    assert [loc for loc, _ in found] == [pytest.approx(exact, abs=3.0), pytest.approx(-exact, abs=3.0)]
    assert [count for _, count in found] == [4, 4]


def in_a_child(queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(train(model, 1))


def test_forked_processes_train_side_by_side() -> None:
    """A child has its own turn, even if it was forked while another thread of its parent had it."""
    expected = train(model, 1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    release, holds = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time("another thread"):
            holds.set()
            release.wait(60.0)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(10.0)
    children = [context.Process(target=in_a_child, args=(queue,)) for _ in range(2)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, about forks of a process with threads
            for child in children:
                child.start()
        assert [queue.get(timeout=50.0) for _ in children] == [pytest.approx(expected)] * 2
    finally:
        release.set()
        thread.join()
        for child in children:
            child.join(10.0)


SPAWNED = """
import multiprocessing
import pyro, pyro.distributions as dist, torch
from pyro_flows import AutoFlowGuide, fit

def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 5.0), obs=y)

def train(y):
    return fit(model, AutoFlowGuide(model), (y,), seed=1, num_steps=30, progress=False).elbo

if __name__ == "__main__":
    y = torch.tensor([28.0, 8.0, -3.0, 7.0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(train, (y,)).get(60.0)
    assert abs(found - train(y)) < 1e-4, found
"""


@pytest.mark.slow
def test_spawned_processes_train(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    subprocess.run([sys.executable, str(script)], check=True, timeout=100.0)
