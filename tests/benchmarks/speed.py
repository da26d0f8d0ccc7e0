# SPDX-License-Identifier: Apache-2.0
"""What a compiled step saves, and what it costs to get one.

    python tests/benchmarks/speed.py [compiled] [first] [--seeds 5] [--write]

Medians over ``--seeds`` repeats; eager and compiled steps take turns. Run by hand, never by pytest. ``--write`` puts
the tables in ``docs/tables``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from guides import SCHOOLS
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.optim import Adam
from tables import Measure, Rows, parser, run

from pyro_flows import AutoFlowGuide, CompiledSVI
from pyro_flows.__main__ import model as eight_schools

PARTICLES = 16
WARM_UP, ROUND = 5, 30


class Case(NamedTuple):
    """A model and its arguments."""

    model: Callable[..., Any]
    args: Sequence[Any]


def logistic(x: torch.Tensor, y: torch.Tensor) -> None:
    """A logistic regression."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        logits = (x @ beta.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def logistic_case() -> Case:
    """1000 rows, 20 covariates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 20, generator=generator)
    y = torch.bernoulli((x[:, 0] - x[:, 1]).sigmoid(), generator=generator)
    return Case(logistic, (x, y))


def groups(y: torch.Tensor) -> None:
    """Centred random effects: a mean and a scale over 500 groups."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


CASES: dict[str, Callable[[], Case]] = {
    "eight schools": lambda: Case(eight_schools, SCHOOLS),
    "logistic, 1000 x 20": logistic_case,
    "500 groups": lambda: Case(groups, (torch.randn(500, generator=torch.Generator().manual_seed(0)),)),
}
GUIDES: dict[str, Callable[..., AutoGuide]] = {
    "AutoNormal": AutoNormal,
    "AutoFlowGuide": AutoFlowGuide,
    "AutoFlowGuide, iaf": partial(AutoFlowGuide, flow="iaf"),
}


def make(kind: type[SVI], name: str, case: Case) -> SVI:
    """An SVI with a guide of its own."""
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    return kind(case.model, GUIDES[name](case.model), Adam({"lr": 1e-4}), elbo)


def seconds(svi: SVI, args: Sequence[Any], count: int) -> float:
    """Of so many steps, each."""
    begin = time.perf_counter()
    for _ in range(count):
        svi.step(*args)
    return (time.perf_counter() - begin) / count


@pyro.settings.context(module_local_params=True)  # two guides of one name train side by side
def measure_compiled(repeats: int) -> tuple[Sequence[str], Rows]:
    """Milliseconds of a step with 16 particles: pyro.infer.SVI's, CompiledSVI's, and their ratio."""
    rows = []
    for title, load in CASES.items():
        case = load()
        for name in GUIDES:
            made = {kind: make(kind, name, case) for kind in (SVI, CompiledSVI)}
            times: dict[type[SVI], list[float]] = {kind: [] for kind in made}
            for svi in made.values():
                seconds(svi, case.args, WARM_UP)
            for _ in range(repeats):
                for kind, svi in made.items():
                    times[kind].append(seconds(svi, case.args, ROUND))
            ratio = statistics.median(a / b for a, b in zip(times[SVI], times[CompiledSVI], strict=True))
            cells = [f"{1e3 * statistics.median(found):.2f}" for found in times.values()]
            rows.append([title, name, *cells, f"{ratio:.1f}"])
            print("  ".join(rows[-1]), flush=True)
    return ("model", "guide", "SVI, ms", "CompiledSVI, ms", "ratio"), rows


def measure_first(repeats: int) -> tuple[Sequence[str], Rows]:
    """Seconds of a first step, recorded and compiled, in processes of their own: inductor's cache empty, and warm."""
    rows = []
    for title in CASES:
        for name in GUIDES:
            cold, warm = [], []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as cache:
                    for found in (cold, warm):
                        done = subprocess.run(
                            [sys.executable, __file__, "--first-of", title, name],
                            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                            capture_output=True,
                            text=True,
                            check=True,
                        )
                        found.append(float(done.stdout.split()[-1]))
            rows.append([title, name, *(f"{statistics.median(found):.1f}" for found in (cold, warm))])
            print("  ".join(rows[-1]), flush=True)
    return ("model", "guide", "empty cache, s", "warm cache, s"), rows


MEASURES: dict[str, Measure] = {"compiled": measure_compiled, "first": measure_first}


def main() -> None:
    """Run the measures that are named, or all."""
    made = parser(__doc__, MEASURES, 5)
    made.add_argument("--first-of", nargs=2, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.first_of:
        torch.set_num_threads(1)
        title, name = options.first_of
        case = CASES[title]()
        print(seconds(make(CompiledSVI, name, case), case.args, 1))
        return
    run(MEASURES, options, prefix="speed_")


if __name__ == "__main__":
    main()
