# SPDX-License-Identifier: Apache-2.0
"""Large and hard posteriors: how close ``fit`` with nothing set comes, against references that know nothing of it.

    python tests/benchmarks/targets.py [--only NAME ...] [--seeds 3] [--large] [--nuts] [--write]

The models of target_models.py, float32. Reference evidence is that of target_references.py: closed forms, quadrature,
or annealed importance sampling, computed anew. Where there is none it is the highest of the guides' own estimates, and
the column says "own". Reference moments are the same module's, or those of NumPyro's NUTS in data/target_nuts.json,
which ``--nuts`` makes anew, of the targets named, instead of fits. All take hours: ``--write`` puts the lines of those
that ran in data/targets.json, and all that are there in docs/tables/targets.rst. Run by hand, never by pytest; needs
``pip install "pyro-flows[benchmarks]"``.

Seconds to means within 0.05 sd: of ``fit``, those at the first end of a cycle from which on the root mean square over
all coordinates of the distance from NUTS' means, in NUTS' sds and less NUTS' own Monte Carlo error, is at most 0.05; of
NUTS, its warmup and as much of its sampling as brings the smallest effective sample size to 400, where a mean has that
error. "not reached" is what the guide that ``fit`` leaves is too far for, or all of NUTS' draws too few. Nothing is
compared with chains whose R-hat is above 1.05.
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
from target_references import AT_ANY_SIZE, REFERENCES, Reference, double
from torch import Tensor

from pyro_flows import AutoFlowGuide, Diagnosis, FitProgress, diagnose, fit

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
    "CPU seconds to means within 0.05 sd: fit",
    "CPU seconds to means within 0.05 sd: NUTS",
    "wanted: gap, seconds",
)
MAX_REFERENCE_ERROR = 0.2  # nats
CLOSE = 0.05  # sds
MAX_RHAT = 1.05
GUIDE_DRAWS = 20_000  # which know a mean to 0.007 sd
DATA = Path(__file__).parent / "data"
NUTS, ROWS = DATA / "target_nuts.json", DATA / "targets.json"
Moments = Mapping[str, tuple[Tensor, Tensor]]


class Nuts(NamedTuple):
    """A saved run of NumPyro's NUTS, by ``target_nuts.run``.

    Args:
        warmup: CPU seconds, compilation included.
        sampling: CPU seconds.
        ess: Smallest effective sample size of the coordinates.
        rhat: Largest R-hat of the coordinates.
        divergences: Number of them.
        error: Root mean square over coordinates of the Monte Carlo error of a mean, in sds.
        moments: Site -> mean and sd.
    """

    warmup: float
    sampling: float
    ess: float
    rhat: float
    divergences: int
    error: float
    moments: Moments

    @property
    def is_usable(self) -> bool:
        """Whether its chains agree."""
        return self.rhat <= MAX_RHAT

    @property
    def seconds_to_means(self) -> float:
        """CPU seconds until the smallest effective sample size is such that a mean has an error of ``CLOSE`` sds."""
        wanted = 1 / CLOSE**2
        return self.warmup + self.sampling * wanted / self.ess if self.ess >= wanted else math.inf

    def distance(self, guide: AutoFlowGuide) -> float:
        """Root mean square over coordinates of a guide's errors of means, in sds, less NUTS' own."""
        draws = guide.sample_posterior(GUIDE_DRAWS)
        errors = [((draws[name].double().mean(0) - mean) / sd).flatten() for name, (mean, sd) in self.moments.items()]
        return math.sqrt(max(torch.cat(errors).square().mean().item() - self.error**2, 0.0))


class Watch:
    """A callback of ``fit``: from which CPU second on the guide's means are close to NUTS'; its own do not count.

    Args:
        guide: What is trained.
        nuts: What it is compared with; it is not if there is none, or its chains disagree.
    """

    def __init__(self, guide: AutoFlowGuide, nuts: Nuts | None) -> None:
        self._guide, self._nuts = guide, nuts if nuts is not None and nuts.is_usable else None
        self._begin = cpu_seconds()
        self.to_means = math.nan

    def __call__(self, progress: FitProgress | None = None) -> None:
        """Measure now; draws of the run that is watched stay what they are."""
        if self._nuts is None:
            return
        now = cpu_seconds()
        with torch.random.fork_rng():
            distance = self._nuts.distance(self._guide)
        seconds = now - self._begin
        print(f"{seconds:.1f} s: means {distance:.3f} sd from NUTS'", flush=True)
        if not distance <= CLOSE:  # or NaN
            self.to_means = math.inf
        elif not math.isfinite(self.to_means):
            self.to_means = seconds
        self._begin += cpu_seconds() - now

    @property
    def seconds(self) -> float:
        """CPU seconds so far."""
        return cpu_seconds() - self._begin


class Outcome(NamedTuple):
    """One seed: what ``diagnose`` says of the guide, and CPU seconds of ``fit``, its compiler's included: all, and
    until means are close to NUTS'."""

    diagnosis: Diagnosis
    seconds: float
    to_means: float


def cpu_seconds() -> float:
    """Of this process and those that have ended which it started; on one thread, wall time on a core of its own."""
    return sum(os.times()[:4])


def train(target: Target, seed: int, nuts: Nuts | None) -> Outcome:
    """``fit`` with nothing set."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(target.model)
    watch = Watch(guide, nuts)
    result = fit(target.model, guide, target.args, seed=seed, callback=watch, progress=sys.stderr.isatty())
    seconds = watch.seconds
    watch()  # of the cycles' guides, it may have kept another than the last
    print(result, flush=True)
    diagnosis = diagnose(target.model, guide, target.args, seed=seed, progress=sys.stderr.isatty())
    return Outcome(diagnosis, seconds, watch.to_means)


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
    if target.model not in REFERENCES or (target.large and target.model not in AT_ANY_SIZE):
        return None
    pyro.set_rng_seed(0)
    with double():
        found = REFERENCES[target.model](*target.args)
    return found if found.se <= MAX_REFERENCE_ERROR else None


def saved_nuts(name: str) -> Nuts | None:
    """None if NUTS has not been run."""
    saved = load(NUTS).get(name)
    if saved is None:
        return None
    moments = {site: tuple(torch.tensor(x).double() for x in pair) for site, pair in saved["moments"].items()}
    return Nuts(**{**saved, "moments": moments})


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


def seconds_until(value: float) -> str:
    """Rounded; "not reached" for infinity, a dash for NaN."""
    return "not reached" if value == math.inf else number(value, 0)


def summarize(name: str, target: Target, outcomes: Sequence[Outcome]) -> list[str]:
    """A line of the table: the worst of the seeds."""
    reference = find_reference(target)
    nuts = saved_nuts(name)
    usable = nuts if nuts is not None and nuts.is_usable else None
    if reference is None:
        best = max((o.diagnosis for o in outcomes), key=lambda d: d.log_evidence)
        reference = Reference(best.log_evidence, best.log_evidence_se, {}, "own")
    errors = [moment_errors(o.diagnosis, {**(usable.moments if usable else {}), **reference.moments}) for o in outcomes]
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
        number(nuts.warmup + nuts.sampling if nuts else math.nan, 0),
        seconds_until(worst(o.to_means for o in outcomes)),
        seconds_until(usable.seconds_to_means if usable else math.nan),
        f"{target.wanted:g}, {target.seconds:g}",
    ]


def measure(name: str, seeds: int) -> list[str]:
    """A target's line; what raised, where something did."""
    target = TARGETS[name]()
    outcomes = []
    for seed in range(seeds):
        try:
            outcomes.append(train(target, seed, saved_nuts(name)))
        except Exception as error:
            print(f"{name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
            blank = ["-"] * (len(HEADER) - 6)
            return [name, "-", "-", "-", type(error).__name__, *blank, f"{target.wanted:g}, {target.seconds:g}"]
        d = outcomes[-1].diagnosis
        print(f"{name}, seed {seed}, {outcomes[-1].seconds:.0f} s: {d}", flush=True)
    return summarize(name, target, outcomes)


def save_nuts(name: str) -> None:
    """Run NUTS and keep what it found; nothing where target_nuts.py has no twin."""
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
