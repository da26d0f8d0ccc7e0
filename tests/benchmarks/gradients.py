# SPDX-License-Identifier: Apache-2.0
"""Path gradients against ordinary ones: noise near the optimum, and the cost of a step.

    python tests/benchmarks/gradients.py [noise] [cost] [--seeds 1] [--write]

Run by hand, never by pytest. ``--write`` puts the tables in ``docs/tables``. For the cost, ``--seeds`` is the number of
repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from guides import FAMILIES, SCHOOLS, wide_model
from never_worse import gaussian
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from tables import Measure, Rows, parser, run

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.__main__ import model as eight_schools

DRAWS, STEPS = 200, 300
ROUNDS, ROUND = 11, 20
TARGETS: dict[str, tuple[Callable[..., Any], Sequence[Any]]] = {
    "eight schools": (eight_schools, SCHOOLS),
    "gaussian 5-D": (gaussian(5, 10.0), ()),
}


def variance(model: Callable[..., Any], guide: AutoFlowGuide, args: Sequence[Any], path: bool) -> float:
    """Of the gradient from one draw, summed over all parameters."""
    guide.path_gradient = path
    parameters = list(guide.parameters())
    elbo = Trace_ELBO()
    total = [torch.zeros_like(p, dtype=torch.double) for p in parameters]
    squares = [torch.zeros_like(p, dtype=torch.double) for p in parameters]
    pyro.set_rng_seed(0)  # the same noise for both
    for _ in range(DRAWS):
        gradients = torch.autograd.grad(elbo.differentiable_loss(model, guide, *args), parameters, allow_unused=True)
        for gradient, first, second in zip(gradients, total, squares, strict=True):
            if gradient is not None:
                first += gradient
                second += gradient.double().square()
    means = [first / DRAWS for first in total]
    return sum((second / DRAWS - mean.square()).sum().item() for second, mean in zip(squares, means, strict=True))


def measure_noise(seeds: int) -> tuple[Sequence[str], Rows]:
    """Variance of the gradient, path / total, after ``fit`` of 300 steps: the same parameters, 200 draws of one."""
    rows = []
    for name in FAMILIES:
        cells = []
        for model, args in TARGETS.values():
            ratios = []
            for seed in range(seeds):
                pyro.clear_param_store()
                guide = AutoFlowGuide(model, flow=name)
                fit(model, guide, tuple(args), num_steps=STEPS, seed=seed, progress=False)
                ratios.append(variance(model, guide, args, True) / variance(model, guide, args, False))
            cells.append(f"{statistics.median(ratios):.2g}")
        rows.append([name, *cells])
        print("  ".join(rows[-1]), flush=True)
    return ("family", *TARGETS), rows


def step_ratio(model: Callable[..., Any], args: Sequence[Any], name: str, particles: int, rounds: int) -> float:
    """Seconds of an eager ``SVI.step``, path / total: median over interleaved rounds."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(model, flow=name)
    svi = SVI(model, guide, Adam({"lr": 1e-4}), Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1))
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for path in (True, False):
            guide.path_gradient = path
            begin = time.perf_counter()
            for _ in range(ROUND):
                svi.step(*args)
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round warms up


def measure_cost(seeds: int) -> tuple[Sequence[str], Rows]:
    """Time of an eager SVI step, path / total, medians of interleaved rounds of 20 steps."""
    cases: dict[str, Callable[[str, int], float]] = {
        "eight schools, 1 draw": lambda name, rounds: step_ratio(eight_schools, SCHOOLS, name, 1, rounds),
        "eight schools, 16 draws": lambda name, rounds: step_ratio(eight_schools, SCHOOLS, name, 16, rounds),
        "100-D, 16 draws": lambda name, rounds: step_ratio(partial(wide_model, 100), (), name, 16, rounds),
    }
    rows = []
    for name in FAMILIES:
        rows.append([name, *(f"{case(name, ROUNDS * seeds):.2f}" for case in cases.values())])
        print("  ".join(rows[-1]), flush=True)
    return ("family", *cases), rows


MEASURES: dict[str, Measure] = {"noise": measure_noise, "cost": measure_cost}


def main() -> None:
    """Run the measures that are named, or all."""
    options: argparse.Namespace = parser(__doc__, MEASURES, 1).parse_args()
    run(MEASURES, options, prefix="gradient_")


if __name__ == "__main__":
    main()
