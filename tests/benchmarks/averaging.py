# SPDX-License-Identifier: Apache-2.0
"""What averaging the parameters over the last steps would add to ``fit``, whose cycles end at a low rate.

    python tests/benchmarks/averaging.py [averaging] [--seeds 3] [--write]

Run by hand, never by pytest. ``--write`` puts the table in ``docs/tables``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from guides import SCHOOLS
from local import Effects, Shuffled
from never_worse import funnel, poisson, twisted
from tables import Measure, Rows, parser, run

from pyro_flows import AutoFlowGuide
from pyro_flows.__main__ import model as eight_schools
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective
from pyro_flows.training.settings import FitSettings
from pyro_flows.training.trainer import Trainer

DECAYS = (0.98, 0.99, 0.995)
STEPS = (250, 1000)
Target = tuple[Callable[..., Any], Any, Callable[[Callable[..., Any]], AutoFlowGuide]]


def groups() -> Target:
    """Random effects of 2000 groups, in mini-batches of 100."""
    effects = Effects.simulate(2000, 0)
    return effects.model, Shuffled(2000, 100), partial(AutoFlowGuide, create_plates=effects.plates)


TARGETS: dict[str, Callable[[], Target]] = {
    "eight schools": lambda: (eight_schools, tuple(SCHOOLS), AutoFlowGuide),
    "funnel 10-D": lambda: (partial(funnel, 10), (), AutoFlowGuide),
    "twisted banana": lambda: (twisted, (), AutoFlowGuide),
    "poisson with effects, 20 rows": lambda: (poisson(20), (), AutoFlowGuide),
    "2000 groups in mini-batches": groups,
}


class Averages:
    """Exponential averages of parameters, one for each decay."""

    def __init__(self, trainer: Trainer) -> None:
        self.leaves = [leaf.detach() for leaf in trainer.objective.leaves]
        self.points = {decay: trainer.snapshot() for decay in DECAYS}

    def __call__(self, step: int) -> None:
        """Take in a step, the first of which is number 1; early ones are averaged evenly."""
        for decay, point in self.points.items():
            torch._foreach_lerp_(point, self.leaves, max(1.0 - decay, 1.0 / step))


def gains(target: Target, num_steps: int, seed: int) -> list[tuple[float, float]]:
    """ELBO of each average less that of the last step's parameters, from the same noise, and its standard error."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, args, make = target
    batches = Batches(args, None)
    guide = make(model)
    settings = FitSettings()
    calls = batches.one_pass(100, settings.estimates.max_elements)
    guide.setup(*calls[0][0])
    guide.warm_start_on(calls)
    objective = Objective(model, guide, batches)
    trainer = Trainer(objective, settings.num_particles(objective), settings.rate_warm)
    averages = Averages(trainer)
    trainer.cycle(num_steps, lambda: averages(trainer.state.step))
    last = objective.estimate(seed)
    found = []
    for point in averages.points.values():
        trainer.restore(point)
        found.append(objective.estimate(seed).gain_over(last))
    return found


def measure_averaging(seeds: int) -> tuple[Sequence[str], Rows]:
    """ELBO of exponentially averaged parameters less that of the last ones, nats: the best and the worst seed."""
    rows = []
    for title, load in TARGETS.items():
        for num_steps in STEPS:
            by_decay = zip(*(gains(load(), num_steps, seed) for seed in range(seeds)), strict=True)
            cells = []
            for found in by_decay:
                (low, low_error), (high, high_error) = min(found), max(found)
                cells.append(f"{low:+.4f} ± {low_error:.4f} to {high:+.4f} ± {high_error:.4f}")
            rows.append([title, str(num_steps), *cells])
            print("  ".join(rows[-1]), flush=True)
    return ("target", "steps", *(f"decay {decay}" for decay in DECAYS)), rows


MEASURES: dict[str, Measure] = {"averaging": measure_averaging}


if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, 3).parse_args())
