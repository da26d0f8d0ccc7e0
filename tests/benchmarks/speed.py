# SPDX-License-Identifier: Apache-2.0
"""What a step costs, and how soon a guide is good, side by side with peers in one run.

    python tests/benchmarks/speed.py [compiled] [first] [twins] [particles] [dimension] [data] [plate] [quality]
        [limit] [draws] [--seeds 5] [--write]

Medians over ``--seeds`` repeats, in which all take turns, on one thread. All but ``compiled``, ``first``, ``limit`` and
``draws`` need NumPyro (``pip install "pyro-flows[benchmarks]"``), and the first three of these scikit-learn. Run by
hand, never by pytest. ``--write`` puts the tables in ``docs/tables`` and the figures in ``docs/figures``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

import torch
from pyro.infer import SVI
from speed_draws import measure_draws
from speed_figures import with_figure
from speed_limit import measure_limit
from speed_quality import measure_quality, report_fit, report_quality
from speed_scaling import (
    measure_data,
    measure_dimension,
    measure_particles,
    measure_plate,
    measure_twins,
    report_dimension,
)
from speed_steps import CASES, NOTHING, Contender, alone, milliseconds, ratio, rounds, started
from tables import Measure, Rows, parser, run

from pyro_flows import CompiledSVI


def measure_compiled(repeats: int) -> tuple[Sequence[str], Rows]:
    """Milliseconds of a step: pyro.infer.SVI's, CompiledSVI's, and their ratio."""
    rows = []
    for title, load in CASES.items():
        for name in load().guides:
            made = {kind: started(partial(begin, kind, title, name)) for kind in (SVI, CompiledSVI)}
            times = rounds(made, repeats)
            rows.append([title, name, *map(milliseconds, times.values()), ratio(times[SVI], times[CompiledSVI])])
            print("  ".join(rows[-1]), flush=True)
    return ("model", "guide", "SVI, ms", "CompiledSVI, ms", "ratio"), rows


def begin(kind: type[SVI], title: str, name: str) -> Callable[[int], None]:
    """Training of one of a case's own guides; of a model of its own too, which may have parameters."""
    case = CASES[title]()
    return Contender(kind, case.guides[name]).begin(case, case.num_particles)


def measure_first(repeats: int) -> tuple[Sequence[str], Rows]:
    """Seconds of a first step, recorded and compiled, in processes of their own: inductor's cache empty, and warm."""
    rows = []
    for title, load in CASES.items():
        for name in load().guides:
            cold, warm = [], []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as cache:
                    for found in (cold, warm):
                        found += alone("first", title, name, cache=cache) or []
            medians = map(statistics.median, (cold, warm))
            rows.append([title, name, *(NOTHING if math.isnan(value) else f"{value:.1f}" for value in medians)])
            print("  ".join(rows[-1]), flush=True)
    return ("model", "guide", "empty cache, s", "warm cache, s"), rows


def report_first(title: str, name: str) -> list[float]:
    """In a process of its own: seconds of the first step, set-up included."""
    steps = started(partial(begin, CompiledSVI, title, name))
    return [math.nan if steps is None else steps.first]


MEASURES: dict[str, Measure] = {
    "compiled": measure_compiled,
    "first": measure_first,
    "twins": measure_twins,
    "particles": measure_particles,
    "dimension": measure_dimension,
    "data": measure_data,
    "plate": measure_plate,
    "quality": measure_quality,
    "limit": measure_limit,
    "draws": measure_draws,
}
AXES = {
    "particles": "particles",
    "dimension": "latent dimension",
    "data": "rows of data",
    "plate": "size of the plate",
}
# What runs in processes of its own, and prints numbers.
ALONE: dict[str, Callable[..., list[float]]] = {
    "first": report_first,
    "dimension": report_dimension,
    "quality": report_quality,
    "fit": report_fit,
}


def main() -> None:
    """Run the measures that are named, or all."""
    made = parser(__doc__, MEASURES, 5)
    made.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.alone:
        torch.set_num_threads(1)
        name, *words = options.alone
        print(*ALONE[name](*words))
        return
    figures = {name: with_figure(name, MEASURES[name], label) for name, label in AXES.items()} if options.write else {}
    run({**MEASURES, **figures}, options, prefix="speed_")


if __name__ == "__main__":
    main()
