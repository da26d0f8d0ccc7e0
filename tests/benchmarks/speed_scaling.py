# SPDX-License-Identifier: Apache-2.0
"""Time of a step against particles, latent dimension, rows of data, and size of a plate."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from local import Effects, Shuffled, step_seconds
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuide, AutoNormal
from speed_steps import (
    CASES,
    NOTHING,
    RATE,
    Case,
    Contender,
    Take,
    Timed,
    alone,
    contenders,
    endless,
    logistic_case,
    make_svi,
    milliseconds,
    numpyro_side,
    ratio,
    rounds,
    started,
)
from tables import Rows
from torch._inductor.utils import fresh_inductor_cache

from pyro_flows import AutoFlowGuide, CompiledSVI, flows

PARTICLES = (1, 16, 64, 256)
DIMENSIONS = (2, 10, 100, 1000, 10_000)
ROWS = (100, 1000, 10_000, 100_000, 1_000_000)
PLATES = (1000, 10_000, 100_000, 1_000_000)
# Guides of dense matrices stop at the first of these dimensions, and logistic regression in 16 particles at the second
# number of rows.
MANY_DIMENSIONS, MANY_ROWS = 1000, 100_000
# Seconds that a process may take to compile and to time steps.
LIMIT = 100.0
# A mini-batch of a plate; draws and steps of a round are those of local.step_seconds.
BATCH, BATCH_PARTICLES, FIT_ROUND, NUM_BATCHES = 100, 4, 200, 10
COMPARED = 10_000
LONG = 1000  # steps of a training, compile included


def measure_particles(repeats: int) -> tuple[Sequence[str], Rows]:
    """Milliseconds of a step on eight schools by particles; with 16, seconds of the first step and of 1000 with it."""
    case = CASES["eight schools"]()
    many = contenders(10)
    times: dict[int, dict[str, list[float]]] = {}
    first: dict[str, float] = {}
    for count in PARTICLES:
        with fresh_inductor_cache():
            made = {name: started(partial(one.begin, case, count)) for name, one in many.items()}
            times[count] = rounds(made, repeats)
        if count == 16:
            first = {name: steps.first for name, steps in made.items() if steps is not None}
    rows = []
    for name in many:
        cells = [milliseconds(times[count][name]) for count in PARTICLES]
        begin = first.get(name, math.nan)
        thousand = begin + (LONG - 1) * statistics.median(times[16][name] or [math.nan])
        rows.append([name, *cells, f"{begin:.2f}", f"{thousand:.1f}"])
        print("  ".join(rows[-1]), flush=True)
    return ("by, guide", *map(str, PARTICLES), "first step, s", "1000 steps, s"), rows


def twins(hidden: int) -> dict[str, Contender]:
    """NumPyro's IAF of two layers with two hidden layers each, and those of the same size under ``CompiledSVI``."""
    spec = flows.IAF(num_transforms=2, hidden_dims=(hidden, hidden))
    every = contenders(hidden)
    return {
        "NumPyro AutoIAFNormal": every["NumPyro AutoIAFNormal"],
        "CompiledSVI AutoIAFNormal": every["CompiledSVI AutoIAFNormal"],
        "CompiledSVI AutoFlowGuide, no path gradient": Contender(
            CompiledSVI, partial(AutoFlowGuide, flow=spec, path_gradient=False)
        ),
        "CompiledSVI AutoFlowGuide": Contender(CompiledSVI, partial(AutoFlowGuide, flow=spec)),
    }


def measure_twins(repeats: int) -> tuple[Sequence[str], Rows]:
    """IAFs of one size: ms of a step, and in brackets its ratio to NumPyro's jitted update of as many particles."""
    rows = []
    for title, hidden in (("eight schools", 32), ("logistic, 1000 x 20", 40)):
        case = CASES[title]()
        many = twins(hidden)
        loop, reference, *_ = ("NumPyro AutoIAFNormal, fori_loop", *many)
        cells: dict[str, list[str]] = {name: [] for name in (reference, loop, *many)}
        for count in PARTICLES:
            begin: dict[str, Callable[[], Take]] = {n: partial(one.begin, case, count) for n, one in many.items()}
            begin[loop] = partial(_begin_loop, many[reference], case, count)
            times = rounds({name: started(begin[name]) for name in cells}, repeats)
            for name, row in cells.items():
                row.append(f"{milliseconds(times[name])} ({ratio(times[name], times[reference])})")
        rows += [[title, name, *row] for name, row in cells.items()]
        print("\n".join("  ".join(row) for row in rows[-len(cells) :]), flush=True)
    return ("model", "by, guide", *map(str, PARTICLES)), rows


def _begin_loop(contender: Contender, case: Case, num_particles: int) -> Take:
    """NumPyro without a call a step."""
    take: Take = numpyro_side().train(case.twin, contender.guide, case.args, num_particles, RATE).loop
    return take


def vector(y: torch.Tensor) -> None:
    """A scale and a vector."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("elements", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def measure_dimension(repeats: int) -> tuple[Sequence[str], Rows]:
    """A scale and a vector by latent dimension: ms of a step of 16 particles, each in a process of its own."""
    found: dict[tuple[str, int], list[list[float]]] = {}
    late: set[tuple[str, int]] = set()
    with fresh_inductor_cache():
        for _ in range(repeats):
            for dim, name in itertools.product(DIMENSIONS, contenders(2)):
                if (name, dim) in late or (dim > MANY_DIMENSIONS and not _is_linear(name)):
                    continue
                numbers = alone("dimension", name, str(dim), limit=LIMIT)
                if numbers is None:
                    late.add((name, dim))
                elif not math.isnan(numbers[0]):
                    found.setdefault((name, dim), []).append(numbers)
                print(name, dim, numbers, flush=True)
    rows = []
    for name in contenders(2):
        times = {dim: [numbers[0] for numbers in found.get((name, dim), [])] for dim in DIMENSIONS}
        cells = [f"over {LIMIT:.0f} s" if (name, dim) in late else milliseconds(times[dim]) for dim in DIMENSIONS]
        memory = [_peak(found.get((name, dim), [])) for dim in DIMENSIONS[-2:]]
        rows.append([name, *cells, ratio(times[DIMENSIONS[-1]], times[DIMENSIONS[-2]]), *memory])
    header = ("by, guide", *(f"{dim:,}" for dim in DIMENSIONS), "10,000 / 1,000")
    return (*header, "peak MiB at 1,000", "at 10,000"), rows


def _is_linear(name: str) -> bool:
    """Whether a guide has no dense matrices of the latents' size."""
    return name.endswith(("AutoNormal", "AutoFlowGuide"))


def _peak(numbers: Sequence[Sequence[float]]) -> str:
    return f"{max(peak for _, peak in numbers):,.0f}" if numbers else NOTHING


def report_dimension(name: str, dim: str) -> list[float]:
    """In a process of its own: seconds a step, and peak resident MiB."""
    size = int(dim)
    y = 2.0 * torch.randn(size - 1, generator=torch.Generator().manual_seed(0))
    steps = started(partial(contenders(size)[name].begin, Case(vector, (y,), twin="vector"), 16))
    seconds = math.nan if steps is None else statistics.median(rounds({name: steps}, 3)[name])
    return [seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def measure_data(repeats: int) -> tuple[Sequence[str], Rows]:
    """Logistic regression with 20 covariates by rows of data: milliseconds of a step, 1 and 16 particles."""
    many = contenders(20)
    cells: dict[tuple[str, int], list[str]] = {key: [] for key in itertools.product(many, (1, 16))}
    for size in ROWS:
        case = logistic_case(size)
        for count in (1, 16):
            made: dict[str, Timed | None] = {}
            if count == 1 or size <= MANY_ROWS:
                made = {name: started(partial(one.begin, case, count)) for name, one in many.items()}
            times = rounds(made, repeats)
            for name in many:
                cells[name, count].append(milliseconds(times.get(name, [])))
                print(size, count, name, cells[name, count][-1], flush=True)
    rows = [[f"{name} x {count}", *row] for (name, count), row in cells.items()]
    return ("by, guide x particles", *(f"{size:,}" for size in ROWS)), rows


PLATE_GUIDES: dict[str, tuple[type[SVI], Callable[..., AutoGuide]]] = {
    "Pyro AutoNormal": (SVI, AutoNormal),
    "SVI AutoFlowGuide": (SVI, AutoFlowGuide),
    "CompiledSVI AutoNormal": (CompiledSVI, AutoNormal),
    "CompiledSVI AutoFlowGuide": (CompiledSVI, AutoFlowGuide),
}


def begin_plate(effects: Effects, kind: type[SVI], guide: Callable[..., AutoGuide]) -> Take:
    """Training on mini-batches that are drawn beforehand."""
    case = Case(effects.model, ())
    svi = make_svi(kind, case, partial(guide, create_plates=effects.plates), BATCH_PARTICLES)
    batches = itertools.islice(Shuffled(len(effects.y), BATCH), NUM_BATCHES)
    calls: list[Sequence[Any]] = [(index,) for index in batches]
    return endless(svi, itertools.cycle(calls))


def begin_numpyro_plate(effects: Effects) -> Take:
    """The same by NumPyro, which draws its mini-batches itself."""
    take: Take = numpyro_side().train_plate(effects, BATCH, BATCH_PARTICLES, RATE).take
    return take


class FitSteps:
    """Steps of ``fit``, whose tables of items have sparse gradients; see :func:`local.step_seconds`."""

    def __init__(self, effects: Effects) -> None:
        self._measure = step_seconds(effects)

    def seconds(self) -> float:
        """Of a step."""
        return self._measure() / FIT_ROUND


def measure_plate(repeats: int) -> tuple[Sequence[str], Rows]:
    """Random effects by size of the plate, in mini-batches of 100: milliseconds of a step of 4 particles."""
    times: dict[int, dict[str, list[float]]] = {}
    for size in PLATES:
        effects = Effects.simulate(size, 0)
        begin = {name: partial(begin_plate, effects, *one) for name, one in PLATE_GUIDES.items()}
        begin["NumPyro AutoNormal"] = partial(begin_numpyro_plate, effects)
        made: dict[str, Timed | None] = {name: started(one) for name, one in begin.items()}
        made["fit AutoFlowGuide"] = FitSteps(effects)
        times[size] = rounds(made, repeats)
        print(size, {name: milliseconds(found) for name, found in times[size].items()}, flush=True)
    rows = []
    for name in times[PLATES[0]]:
        cells = [milliseconds(times[size][name]) for size in PLATES]
        rows.append([name, *cells, ratio(times[PLATES[-1]][name], times[COMPARED][name])])
    return ("by, guide", *(f"{size:,}" for size in PLATES), f"{PLATES[-1]:,} / {COMPARED:,}"), rows
