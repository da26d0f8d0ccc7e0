# SPDX-License-Identifier: Apache-2.0
"""Large and hard posteriors: how close ``fit`` with nothing set comes, against references that know nothing of it.

    python tests/benchmarks/targets.py [--only NAME ...] [--seeds 3] [--large] [--nuts] [--write]

The models of target_models.py, float32. Reference evidence is that of target_references.py: closed forms, quadrature,
or annealed importance sampling, computed anew. Where there is none it is the highest of the guides' own estimates, and
the column says "own". Reference moments are the same module's, or those of NumPyro's NUTS in data/target_nuts.json,
which ``--nuts`` makes anew, of the targets named, instead of fits. Run by hand, never by pytest; needs
``pip install "pyro-flows[benchmarks]"``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    "k-hat",
    "verdict",
    "worst mean error, sds",
    "worst log sd ratio",
    "seconds",
    "NUTS, seconds",
    "wanted: gap, seconds",
)
NUTS = Path(__file__).parent / "data" / "target_nuts.json"
Moments = Mapping[str, tuple[Tensor, Tensor]]


class Outcome(NamedTuple):
    """One seed: what ``diagnose`` says of the guide, and seconds of ``fit``."""

    diagnosis: Diagnosis
    seconds: float


def train(target: Target, seed: int) -> Outcome:
    """``fit`` with nothing set."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(target.model)
    begin = time.perf_counter()
    result = fit(target.model, guide, target.args, seed=seed, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - begin
    print(result, flush=True)
    return Outcome(diagnose(target.model, guide, target.args, seed=seed, progress=sys.stderr.isatty()), seconds)


def find_reference(target: Target) -> Reference | None:
    """Computed anew; None where there is no way."""
    if target.model not in REFERENCES or target.large:
        return None
    pyro.set_rng_seed(0)
    with double():
        return REFERENCES[target.model](*target.args)


def saved_nuts(name: str) -> tuple[float, Moments]:
    """Seconds and moments; NaN and none if NUTS has not been run."""
    saved = json.loads(NUTS.read_text()).get(name) if NUTS.exists() else None
    if saved is None:
        return math.nan, {}
    return saved["seconds"], {
        site: (torch.tensor(mean).double(), torch.tensor(sd).double()) for site, (mean, sd) in saved["moments"].items()
    }


def moment_errors(diagnosis: Diagnosis, moments: Moments) -> tuple[float, float]:
    """Largest error of a mean in reference sds, and largest log ratio of sds, regardless of sign; NaN without any."""
    mean_error, log_ratio = [math.nan], [math.nan]
    for name, (mean, sd) in moments.items():
        site = diagnosis.sites[name]
        mean_error.append(((site.mean.double() - mean) / sd).abs().max().item())
        log_ratio.append((site.sd.double() / sd).log().abs().max().item())
    return max(mean_error[1:], default=math.nan), max(log_ratio[1:], default=math.nan)


def number(value: float, digits: int = 3) -> str:
    """Rounded; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def row(name: str, target: Target, outcomes: Sequence[Outcome]) -> list[str]:
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
        number(max(reference.log_evidence - d.elbo for d in diagnoses)),
        number(max(d.khat for d in diagnoses), 2),
        ", ".join(sorted({d.verdict for d in diagnoses})),
        number(max(mean for mean, _ in errors)),
        number(max(ratio for _, ratio in errors)),
        number(max(o.seconds for o in outcomes), 0),
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
            return [name, "-", "-", "-", type(error).__name__, *["-"] * 6, f"{target.wanted:g}, {target.seconds:g}"]
        d = outcomes[-1].diagnosis
        print(f"{name}, seed {seed}, {outcomes[-1].seconds:.0f} s: {d}", flush=True)
    return row(name, target, outcomes)


def save_nuts(name: str) -> None:
    """Run NUTS and keep means, sds and seconds; nothing where target_nuts.py has no twin."""
    nuts, target = importlib.import_module("target_nuts"), TARGETS[name]()
    if target.model.__name__ not in nuts.TWINS:
        return
    saved = json.loads(NUTS.read_text()) if NUTS.exists() else {}
    saved[name] = nuts.run(target)
    shown = {key: value for key, value in saved[name].items() if key != "moments"}
    print(f"{name}: {shown}", flush=True)
    NUTS.parent.mkdir(exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(saved.items())]
    NUTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Run, print a line each, and write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="those whose names contain one of these")
    made.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    made.add_argument("--large", action="store_true", help="those of 1000 latents and more too, but for Cox processes")
    made.add_argument("--nuts", action="store_true", help="make NUTS references instead")
    made.add_argument("--write", action="store_true", help="write docs/tables/targets.rst")
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
    rows = []
    for name in names:
        rows.append(measure(name, options.seeds))
        print("  ".join(rows[-1]), flush=True)
    if options.write:
        (TABLES / "targets.rst").write_text(as_rst(HEADER, rows))


if __name__ == "__main__":
    main()
