# SPDX-License-Identifier: Apache-2.0
"""Models as users write them, for one draw, next to the same models written to broadcast over particles.

    python tests/benchmarks/any_model.py [twins] [step] [--only NAME ...] [--seeds 1] [--write]

The models are those of ``any_models.py``. Seconds are CPU seconds of one thread: wall time on a core of its own. Run by
hand, never by pytest. Each measure prints a table; ``--write`` also puts it in ``docs/tables``.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import Any

import pyro
from any_models import TWINS, Twins
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from speed_steps import RATE, Steps, Take, endless, milliseconds, ratio, rounds, started
from tables import Measure, Rows, parser, run

from pyro_flows import AutoFlowGuide, CompiledSVI, Diagnosis, FitResult, diagnose, fit

# Those whose steps are timed: two products, an index, a loop, and a network.
TIMED = (
    "logistic regression, 25-D",
    "logistic regression, 61-D",
    "random slopes, 11 firms",
    "random walk by a loop",
    "neural network",
)
TIMED_PARTICLES, MIN_ROUNDS = 16, 5
NOTHING = "-"


@dataclass(frozen=True)
class Outcome:
    """What became of one form of a model under one seed.

    Args:
        result: None if ``fit`` raised.
        seconds: Of ``fit``.
        diagnosis: None if ``fit`` or ``diagnose`` raised.
        crash: Name of the exception.
    """

    result: FitResult | None = None
    seconds: float = math.nan
    diagnosis: Diagnosis | None = None
    crash: str = ""


def train(title: str, model: Callable[..., Any], args: tuple[Any, ...], seed: int) -> Outcome:
    """``fit`` with nothing set, and ``diagnose``; their exceptions as a user would meet them."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(model)
    outcome = Outcome()
    begin = time.process_time()
    try:
        outcome = Outcome(fit(model, guide, args, seed=seed, progress=False), time.process_time() - begin)
        outcome = replace(outcome, diagnosis=diagnose(model, guide, args, seed=seed, progress=False))
    except Exception as error:
        print(f"{title}, seed {seed}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        outcome = replace(outcome, crash=type(error).__name__)
    print(f"{title}, seed {seed}: {outcome.result}", flush=True)
    return outcome


def gaps(outcomes: Sequence[Outcome], twins: Sequence[Outcome]) -> list[float]:
    """To the better of the two forms' evidences, seed by seed: the larger, since importance sampling errs below."""
    found = []
    for pair in zip(outcomes, twins, strict=True):
        if pair[0].diagnosis is not None:
            evidence = max(outcome.diagnosis.log_evidence for outcome in pair if outcome.diagnosis is not None)
            found.append(evidence - pair[0].diagnosis.elbo)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the worst of several; without those that are NaN."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return NOTHING
    worst = f" ({max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{worst}"


def words(outcomes: Sequence[Outcome]) -> str:
    """Why ``fit`` stopped, or what was raised."""
    reasons = [outcome.result.reason for outcome in outcomes if outcome.result is not None]
    return "; ".join(sorted({*reasons, *(outcome.crash for outcome in outcomes if outcome.crash)}))


def draws(outcomes: Sequence[Outcome]) -> str:
    """A step, of all seeds."""
    counts = sorted({outcome.result.num_particles for outcome in outcomes if outcome.result is not None})
    return ", ".join(map(str, counts)) or NOTHING


def latent_dim(twins: Twins) -> int:
    """Of both forms."""
    pyro.clear_param_store()
    return AutoFlowGuide(twins.broadcasting).setup(*twins.args).latent_dim


def measure_twins(names: Sequence[str], seeds: int) -> tuple[Sequence[str], Rows]:
    """fit with nothing set: draws a step, gap in nats, CPU seconds and why it stopped, in both forms."""
    rows = []
    for name in names:
        forms: tuple[list[Outcome], list[Outcome]] = ([], [])
        for seed in range(seeds):
            twins = TWINS[name]()
            for found, title in zip(forms, ("as_written", "broadcasting"), strict=True):
                found.append(train(f"{name}, {title}", getattr(twins, title), twins.args, seed))
        seconds = [[outcome.seconds for outcome in found] for found in forms]
        ratios = [one / other for one, other in zip(*seconds, strict=True)]
        rows.append(
            [
                name,
                str(latent_dim(twins)),
                *map(draws, forms),
                *(spread(gaps(*pair), 3) for pair in (forms, forms[::-1])),
                *(spread(values, 1) for values in seconds),
                spread(ratios, 2),
                *map(words, forms),
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    header = (
        "model",
        "dim",
        "draws a step, as written",
        "broadcasting",
        "gap, as written",
        "broadcasting",
        "CPU seconds, as written",
        "broadcasting",
        "ratio",
        "stopped, as written",
        "broadcasting",
    )
    return header, rows


def begin(
    kind: type[SVI],
    guide: Callable[[Callable[..., Any]], Any],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    elbo: Callable[[], ELBO],
) -> Take:
    """Set up training."""
    return endless(kind(model, guide(model), Adam({"lr": RATE}), elbo()), itertools.repeat(args))


def measure_step(names: Sequence[str], seeds: int) -> tuple[Sequence[str], Rows]:
    """Milliseconds a step of 16 particles: by vmap, as written, and by broadcasting; eager SVI and CompiledSVI."""
    from pyro_flows import VectorizedTrace_ELBO

    losses: dict[str, Callable[[], ELBO]] = {
        "as_written": partial(VectorizedTrace_ELBO, num_particles=TIMED_PARTICLES),
        "broadcasting": partial(Trace_ELBO, num_particles=TIMED_PARTICLES, vectorize_particles=True),
    }
    rows = []
    for name in names:
        if name not in TIMED:
            continue
        twins = TWINS[name]()
        for guide in (AutoNormal, AutoFlowGuide):
            made: dict[tuple[type[SVI], str], Steps | None] = {
                (kind, form): started(partial(begin, kind, guide, getattr(twins, form), twins.args, elbo))
                for kind in (SVI, CompiledSVI)
                for form, elbo in losses.items()
            }
            times = rounds(made, max(seeds, MIN_ROUNDS))
            cells = []
            for kind in (SVI, CompiledSVI):
                pair = [times[kind, form] for form in losses]
                cells += [*map(milliseconds, pair), ratio(*pair)]
            rows.append([name, guide.__name__, *cells])
            print("  ".join(rows[-1]), flush=True)
    columns = [f"{kind.__name__}, {form}" for kind in (SVI, CompiledSVI) for form in ("vmap", "broadcasting", "ratio")]
    return ("model", "guide", *columns), rows


MEASURES: dict[str, Callable[[Sequence[str], int], tuple[Sequence[str], Rows]]] = {
    "twins": measure_twins,
    "step": measure_step,
}


def main() -> None:
    """Run the measures that are named, or all, on the models that are named, or all."""
    made = parser(__doc__, MEASURES, 1)
    made.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="models whose names contain one of these")
    options = made.parse_args()
    names = [name for name in TWINS if any(part in name for part in options.only)]
    measures: dict[str, Measure] = {
        key: update_wrapper(partial(measure, names), measure) for key, measure in MEASURES.items()
    }
    run(measures, options, prefix="any_model_")


if __name__ == "__main__":
    main()
