# SPDX-License-Identifier: Apache-2.0
"""Large and hard posteriors: how close ``fit`` with nothing set comes, against references that know nothing of it.

    python tests/benchmarks/targets.py [--only NAME ...] [--seeds 3] [--large] [--nuts] [--write]

The models of target_models.py, float32. Reference evidence is that of target_references.py: closed forms, quadrature,
or annealed importance sampling, computed anew. Where there is none it is the highest of the guides' own estimates, and
the column says "own". Reference moments are the same module's, or those of NumPyro's NUTS in data/target_nuts.json,
which ``--nuts`` makes anew, of the targets named, instead of fits. All take hours: ``--write`` puts the lines of those
that ran in data/targets.json, and all that are there in docs/tables/targets.rst. Run by hand, never by pytest; needs
``pip install "pyro-flows[benchmarks]"``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from tables import TABLES, as_rst
from target_models import TARGETS, Target
from target_references import REFERENCES, Reference, double
from torch import Tensor

from pyro_flows import AutoFlowGuide, Diagnosis, diagnose, fit

HEADER = (
    "target",
    "latents",
    "log evidence",
    "by",
    "gap",
    "gap, by diagnose",
    "k-hat",
    "verdict",
    "worst mean error, sds",
    "worst log sd ratio",
    "CPU seconds",
    "NUTS, CPU seconds",
    "wanted: gap, seconds",
)
MAX_REFERENCE_ERROR = 0.2  # nats
DATA = Path(__file__).parent / "data"
NUTS, ROWS = DATA / "target_nuts.json", DATA / "targets.json"
Moments = Mapping[str, tuple[Tensor, Tensor]]


class Outcome(NamedTuple):
    """One seed: what ``diagnose`` says of the guide, and CPU seconds of ``fit``, its compiler's included."""

    diagnosis: Diagnosis
    seconds: float


def train(target: Target, seed: int) -> Outcome:
    """``fit`` with nothing set."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(target.model)
    begin = sum(os.times()[:4])  # one thread: wall time on a core of its own
    result = fit(target.model, guide, target.args, seed=seed, progress=sys.stderr.isatty())
    seconds = sum(os.times()[:4]) - begin
    print(result, flush=True)
    return Outcome(diagnose(target.model, guide, target.args, seed=seed, progress=sys.stderr.isatty()), seconds)


def load(file: Path) -> dict[str, Any]:
    """By name of a target; empty if there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def save(file: Path, found: Mapping[str, Any]) -> None:
    """Add what was found, a line a target."""
    merged = load(file) | dict(found)
    DATA.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(merged[name])}" for name in TARGETS if name in merged]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def find_reference(target: Target) -> Reference | None:
    """Computed anew; None where there is no way, or annealing fails, which its standard error shows."""
    if target.model not in REFERENCES or target.large:
        return None
    pyro.set_rng_seed(0)
    with double():
        found = REFERENCES[target.model](*target.args)
    return found if found.se <= MAX_REFERENCE_ERROR else None


def saved_nuts(name: str) -> tuple[float, Moments]:
    """Seconds and moments; NaN and none if NUTS has not been run."""
    saved = load(NUTS).get(name)
    if saved is None:
        return math.nan, {}
    return saved["seconds"], {
        site: (torch.tensor(mean).double(), torch.tensor(sd).double()) for site, (mean, sd) in saved["moments"].items()
    }


def moment_errors(diagnosis: Diagnosis, moments: Moments) -> tuple[float, float]:
    """Largest error of a mean in reference sds, and largest log ratio of sds, regardless of sign; NaN without any."""
    errors, log_ratios = [], []
    for name, (mean, sd) in moments.items():
        site = diagnosis.sites[name]
        errors.append(((site.mean.double() - mean) / sd).abs().max().item())
        log_ratios.append((site.sd.double() / sd).log().abs().max().item())
    return worst(errors), worst(log_ratios)


def worst(values: Iterable[float]) -> float:
    """The largest; NaN if any is, or there is none."""
    values = list(values)
    return math.nan if not values or any(map(math.isnan, values)) else max(values)


def number(value: float, digits: int = 3) -> str:
    """Rounded; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def summarize(name: str, target: Target, outcomes: Sequence[Outcome]) -> list[str]:
    """A line of the table: the worst of the seeds."""
    reference = find_reference(target)
    nuts_seconds, nuts_moments = saved_nuts(name)
    if reference is None:
        best = max((o.diagnosis for o in outcomes), key=lambda d: d.log_evidence)
        reference = Reference(best.log_evidence, best.log_evidence_se, {}, "own")
    errors = [moment_errors(o.diagnosis, {**nuts_moments, **reference.moments}) for o in outcomes]
    diagnoses = [o.diagnosis for o in outcomes]
    return [
        name,
        str(sum(site.mean.numel() for site in diagnoses[0].sites.values())),
        f"{reference.log_evidence:.3f} +/- {reference.se:.3f}",
        reference.source,
        number(worst(reference.log_evidence - d.elbo for d in diagnoses)),
        number(worst(d.gap for d in diagnoses)),
        number(worst(d.khat for d in diagnoses), 2),
        ", ".join(sorted({d.verdict for d in diagnoses})),
        number(worst(mean for mean, _ in errors)),
        number(worst(ratio for _, ratio in errors)),
        number(worst(o.seconds for o in outcomes), 0),
        number(nuts_seconds, 0),
        f"{target.wanted:g}, {target.seconds:g}",
    ]


def measure(name: str, seeds: int) -> list[str]:
    """A target's line; what raised, where something did."""
    target = TARGETS[name]()
    outcomes = []
    for seed in range(seeds):
        try:
            outcomes.append(train(target, seed))
        except Exception as error:
            print(f"{name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
            return [name, "-", "-", "-", type(error).__name__, *["-"] * 7, f"{target.wanted:g}, {target.seconds:g}"]
        d = outcomes[-1].diagnosis
        print(f"{name}, seed {seed}, {outcomes[-1].seconds:.0f} s: {d}", flush=True)
    return summarize(name, target, outcomes)


def save_nuts(name: str) -> None:
    """Run NUTS and keep means, sds and seconds; nothing where target_nuts.py has no twin."""
    nuts, target = importlib.import_module("target_nuts"), TARGETS[name]()
    if target.model.__name__ not in nuts.TWINS:
        return
    found = nuts.run(target)
    save(NUTS, {name: found})
    print(f"{name}: { ({key: value for key, value in found.items() if key != 'moments'}) }", flush=True)


def main() -> None:
    """Run, print a line each, and write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="those whose names contain one of these")
    made.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    made.add_argument("--large", action="store_true", help="those of 1000 latents and more too, but for Cox processes")
    made.add_argument("--nuts", action="store_true", help="make NUTS references instead")
    made.add_argument("--write", action="store_true", help="add to docs/tables/targets.rst")
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pyro").setLevel(logging.WARNING)  # "Guessed max_plate_nesting", at every fresh ELBO
    names = [name for name in TARGETS if any(part in name for part in options.only)]
    names = [name for name in names if options.large or not TARGETS[name]().large]
    if options.nuts:
        for name in names:
            save_nuts(name)
        return
    for name in names:
        row = measure(name, options.seeds)
        print("  ".join(row), flush=True)
        if options.write:
            save(ROWS, {name: row})
            (TABLES / "targets.rst").write_text(as_rst(HEADER, list(load(ROWS).values())))


if __name__ == "__main__":
    main()
