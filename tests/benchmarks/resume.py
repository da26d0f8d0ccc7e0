# SPDX-License-Identifier: Apache-2.0
"""Runs of ``fit`` that are killed at random moments and resumed, against the same runs without interruption.

    python tests/benchmarks/resume.py [kills] [--seeds 10] [--write]

Run by hand, never by pytest. ``--seeds`` is the number of kills of each problem. ``--write`` puts the table in
``docs/tables``.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from guides import SCHOOLS
from local import Effects
from tables import Measure, Rows, parser, run
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.__main__ import model as eight_schools
from pyro_flows.training import FitSettings, ScheduleSettings, TrainerSettings

# A fork of this process, which has one thread and has imported all, begins at once.
FORK = multiprocessing.get_context("fork")
# Seconds between two checkpoints; so short that many kills come while one is written.
INTERVAL = 0.05


class Problem(NamedTuple):
    """A model, a guide, data and options of ``fit``."""

    model: Callable[..., Any]
    guide: AutoFlowGuide
    args: Any
    options: dict[str, Any]


def schools() -> Problem:
    """To convergence, in recorded steps."""
    return Problem(eight_schools, AutoFlowGuide(eight_schools), tuple(SCHOOLS), {})


def compiled_schools() -> Problem:
    """In compiled steps."""
    return Problem(eight_schools, AutoFlowGuide(eight_schools), tuple(SCHOOLS), {"compile": True, "num_steps": 600})


def groups() -> Problem:
    """400 groups in shuffled mini-batches, with parameters of their own, in eager steps with sparse gradients."""
    effects = Effects.simulate(400, 0)
    guide = AutoFlowGuide(lambda index: effects.model(index), create_plates=lambda index: effects.plates(index))
    loader = DataLoader(TensorDataset(torch.arange(400)), batch_size=50, shuffle=True)
    return Problem(effects.model, guide, loader, {"num_steps": 150})


def autoencoder() -> Problem:
    """A small variational autoencoder on shuffled mini-batches: encoder and decoder are trained."""
    data = torch.randn(512, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, 6)
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    decoder = torch.nn.Linear(2, 6)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    loader = DataLoader(TensorDataset(data), batch_size=64, shuffle=True)
    return Problem(model, AutoFlowGuide(model, amortize={"data": encoder}), loader, {"num_steps": 200})


def funnel() -> Problem:
    """Annealed, in eager steps with a kind of step that is not chosen before the second cycle."""

    def model() -> None:
        scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (scale / 2).exp()).to_event(1))

    trainer = TrainerSettings(min_steps_to_record=0, min_seconds_to_record=0.0)
    schedule = ScheduleSettings(first_cycle_long=100, max_steps_long=200, min_gain=1e-6)
    settings = {"trainer": trainer, "schedule": schedule}
    return Problem(model, AutoFlowGuide(model), (), {"anneal": True, "settings": settings})


PROBLEMS = {
    "eight schools": schools,
    "eight schools, compiled": compiled_schools,
    "groups in mini-batches": groups,
    "autoencoder": autoencoder,
    "annealed funnel": funnel,
}


def train(name: str, folder: Path, *, checkpoint: bool = True) -> None:
    """Train to the end, and store the parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problem = PROBLEMS[name]()
    options = dict(problem.options)
    settings = FitSettings(checkpoint_interval=INTERVAL, **options.pop("settings", {}))
    path = folder / "run.pt" if checkpoint else None
    result = fit(
        problem.model,
        problem.guide,
        problem.args,
        seed=0,
        progress=False,
        checkpoint=path,
        settings=settings,
        **options,
    )
    store = pyro.get_param_store()
    values = [problem.guide.state_dict(), {name: store[name].detach() for name in sorted(store.keys())}]
    end = {"values": values, "elbo": result.elbo, "losses": result.losses, "kept": result.kept}
    torch.save(end, folder / "end.part")
    (folder / "end.part").rename(folder / "end.pt")


def process(name: str, folder: Path, *, checkpoint: bool = True) -> Any:
    """Another process that trains."""
    made = FORK.Process(target=train, args=(name, folder), kwargs={"checkpoint": checkpoint})
    made.start()
    return made


def same(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def kills(num: int) -> tuple[Sequence[str], Rows]:
    """Killed (``kill -9``) at a random moment, and resumed: how many end with the same parameters, losses and ELBO."""
    header = ["problem", "kills", "identical", "other", "not resumed"]
    rows = []
    generator = random.Random(num)
    torch.optim.Adam([torch.zeros(1)])  # which imports much, once for all children
    for name in PROBLEMS:
        with tempfile.TemporaryDirectory() as start:
            expected, _ = _whole(name, Path(start), checkpoint=False)  # which also fills the compiler's cache
        with tempfile.TemporaryDirectory() as start:
            found, length = _whole(name, Path(start))
            assert same(found, expected), f"{name}: writing checkpoints changes the run"
        outcomes: Counter[str] = Counter()
        while outcomes["kills"] < num:
            with tempfile.TemporaryDirectory() as start:
                folder = Path(start)
                child = process(name, folder)
                child.join(generator.uniform(0.0, length))
                if child.exitcode is not None:
                    continue  # it was done
                child.kill()
                child.join()
                outcomes["kills"] += 1
                outcomes["early"] += not _has_state(folder / "run.pt")
                child = process(name, folder)
                child.join()
                good = child.exitcode == 0 and same(torch.load(folder / "end.pt", weights_only=False), expected)
                outcome = "identical" if good else "other" if child.exitcode == 0 else "not resumed"
                outcomes[outcome] += 1
                print(f"  {name}, kill {outcomes['kills']} (early: {outcomes['early']}): {outcome}", flush=True)
        rows.append([name, *(str(outcomes[key]) for key in ("kills", "identical", "other", "not resumed"))])
    return header, rows


def _whole(name: str, folder: Path, *, checkpoint: bool = True) -> tuple[Any, float]:
    """End and seconds of a run that is not killed."""
    begin = time.perf_counter()
    child = process(name, folder, checkpoint=checkpoint)
    child.join()
    assert child.exitcode == 0
    return torch.load(folder / "end.pt", weights_only=False), time.perf_counter() - begin


def _has_state(path: Path) -> bool:
    return path.exists() and torch.load(path, weights_only=True)["state"] is not None


MEASURES: dict[str, Measure] = {"kills": kills}

if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, 10).parse_args(), "resume_")
