# SPDX-License-Identifier: Apache-2.0
"""Error rates of the verdict: how often "trust it" is wrong, and how often a right guide is not trusted.

    python tests/benchmarks/verdicts.py [--cases 1000] [--seed 0] [--out cases.jsonl]   # diagnose
    python tests/benchmarks/verdicts.py --stops --cases 60 [--seed 0]                   # fit's own "converged"
    python tests/benchmarks/verdicts.py --read cases.jsonl [--write]                    # tables of a finished run

Run by hand, never by pytest. A case is a random model whose posterior is known exactly and a guide of it: exact, off on
purpose, or trained. A guide is *wrong* if the mean of some coordinate of some site is off by more than 0.15 posterior
standard deviations, or a standard deviation by more than 15 %. It is *right* if neither is and the exact KL(q ||
posterior) is below 0.1 nats. Between the two are guides of right moments and another shape: a Gaussian over two modes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tables import TABLES, as_rst
from torch import Tensor
from verdict_guides import GUIDES, Moments
from verdict_targets import TARGETS, Constructed, Packed, Target

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyro_flows import AutoFlowGuide, diagnose, fit
from pyro_flows.diagnostics import importance_resample, log_weights

MAX_SHIFT = MAX_RATIO = 0.15
MAX_GAP = 0.1  # nats
NUM_EXACT, NUM_DRAWS = 400_000, 200_000  # so that moments are exact to about a hundredth of these limits
MIN_GAIN = 0.05  # nats that four times the steps must gain for "converged" to be wrong
HIDDEN = "far and narrow"  # the kind that no draw can reveal
Case = dict[str, Any]


# Truth.


class Truth(NamedTuple):
    """Moments of all coordinates of all sites; of asinh((z - middle) / scale) where tails are too heavy for moments."""

    mean: Tensor
    sd: Tensor
    correlation: Tensor
    bulk: tuple[Tensor, Tensor] | None


def packed(draws: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().reshape(len(value), -1) for _, value in sorted(draws.items())], -1)


def truth_of(target: Target) -> Truth:
    """By exact draws of the posterior."""
    guide = Constructed(target.continuous, target.exact)
    guide(*target.args)
    found = Predictive(guide, num_samples=NUM_EXACT, parallel=True)(*target.args)
    flat = packed({name: found[name] for name in guide.prototype_trace.stochastic_nodes})
    bulk = None
    if target.heavy:
        low, middle, high = flat[:100_000].quantile(torch.tensor([0.159, 0.5, 0.841]).double(), 0)
        bulk = middle, (high - low) / 2
        flat = ((flat - middle) / bulk[1]).asinh()
    return Truth(flat.mean(0), flat.std(0), torch.corrcoef(flat.mT).reshape(flat.shape[-1], -1), bulk)


def errors(draws: dict[str, Tensor], truth: Truth) -> dict[str, float]:
    """Largest errors of a mean, in standard deviations, of a standard deviation, relative, and of a correlation."""
    flat = packed(draws)
    if truth.bulk is not None:
        flat = ((flat - truth.bulk[0]) / truth.bulk[1]).asinh()
    correlation = torch.corrcoef(flat.mT).reshape(flat.shape[-1], -1)
    return {
        "shift": ((flat.mean(0) - truth.mean) / truth.sd).abs().max().item(),
        "ratio": (flat.std(0) / truth.sd - 1).abs().max().item(),
        "correlation": (correlation - truth.correlation).abs().nan_to_num(0.0).max().item(),
    }


def is_wrong(found: dict[str, float]) -> bool:
    """Whether a mean or a standard deviation is off."""
    return not (found["shift"] <= MAX_SHIFT and found["ratio"] <= MAX_RATIO)


# Cases.


def random_target(rng: random.Random) -> tuple[str, Target]:
    kinds = list(TARGETS)
    kind = rng.choices(kinds, [0.4 if kind == HIDDEN else 1.0 for kind in kinds])[0]
    return kind, rng.choice(TARGETS[kind])(rng)


def random_guide(rng: random.Random, target: Target) -> tuple[str, Callable[..., Any]]:
    about = Moments(target)
    while True:
        kind = rng.choices(list(GUIDES), [share for share, _ in GUIDES.values()])[0]
        made = GUIDES[kind][1](rng, target, about)
        if made is not None:
            return kind, Constructed(target.continuous, made) if isinstance(made, Packed) else made


def start(seed: int, number: int) -> tuple[random.Random, str, Target, float]:
    """The model of a case, with its log evidence."""
    pyro.clear_param_store()
    rng = random.Random(f"{seed}, {number}")
    torch.manual_seed(rng.randrange(2**31))
    kind, target = random_target(rng)
    weights, _ = log_weights(target.model, Constructed(target.continuous, target.exact), 1000, target.args)
    assert weights.std() < 0.2, f"{kind}: log weights of the exact posterior have an sd of {weights.std():.2f}"
    return rng, kind, target, (weights.logsumexp(0) - math.log(len(weights))).item()


def one_case(seed: int, number: int) -> Case:
    """Diagnose and resample a random guide of a random model."""
    rng, kind, target, log_evidence = start(seed, number)
    guide_kind, guide = random_guide(rng, target)
    truth = truth_of(target)
    begin = time.perf_counter()
    report = diagnose(target.model, guide, target.args, progress=False, seed=number)
    seconds = time.perf_counter() - begin
    _, drawn = log_weights(target.model, guide, NUM_DRAWS, target.args)
    return {
        "number": number,
        "target": kind,
        "guide": guide_kind,
        "dim": target.exact.dim,
        **errors(drawn, truth),
        "verdict": report.verdict,
        "reason": report.reason,
        "seconds": seconds,
        "khat": report.khat,
        "ess": report.ess,
        "gap": log_evidence - report.elbo,
        "evidence error": report.log_evidence - log_evidence,
        "evidence se": report.log_evidence_se,
        **resampled(target, guide, truth, number),
    }


def resampled(target: Target, guide: Callable[..., Any], truth: Truth, seed: int) -> Case:
    """What importance_resample says and returns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            draws = importance_resample(
                target.model, guide, 4000, target.args, num_draws=10_000, progress=False, seed=seed
            )
        except RuntimeError:
            return {"resampled": "refused", "resampled wrong": False}
    ours = any("importance_resample" in str(warning.message) for warning in caught)
    wrong = is_wrong(errors(draws, truth))
    return {"resampled": "warned" if ours else "quiet", "resampled wrong": wrong}


def one_stop(seed: int, number: int) -> Case:
    """Train until fit stops, diagnose, and train four times as long from the same start."""
    rng, kind, target, log_evidence = start(seed, number)
    make = rng.choice([AutoFlowGuide, AutoFlowGuide, AutoNormal, AutoMultivariateNormal])
    truth = truth_of(target)
    guide = make(target.continuous)
    result = fit(target.model, guide, target.args, progress=False, compile=False, seed=number)
    report = diagnose(target.model, guide, target.args, progress=False, seed=number)
    _, drawn = log_weights(target.model, guide, NUM_DRAWS, target.args)
    elbo = elbo_of(target, guide)
    longer = copy.deepcopy(guide)
    settings = {"num_steps": max(3 * result.steps, 750), "progress": False, "compile": False, "seed": number + 1}
    fit(target.model, longer, target.args, **settings)
    after = elbo_of(target, longer)
    return {
        "number": number,
        "target": kind,
        "guide": make.__name__,
        "dim": target.exact.dim,
        **errors(drawn, truth),
        "verdict": report.verdict,
        "reason": report.reason,
        "stop": result.reason,
        "steps": result.steps,
        "gap": log_evidence - elbo[0],
        "gain": after[0] - elbo[0],
        "gain se": math.hypot(after[1], elbo[1]),
    }


def elbo_of(target: Target, guide: Callable[..., Any]) -> tuple[float, float]:
    """The ELBO and its standard error."""
    weights, _ = log_weights(target.model, guide, 20_000, target.args)
    return weights.mean().item(), weights.std().item() / math.sqrt(len(weights))


# Tables.


def interval(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if not total:
        return 0.0, 1.0
    z, share = 1.96, hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(hits: int, total: int) -> str:
    """A proportion with its interval, in per cent."""
    low, high = interval(hits, total)
    return f"{hits} of {total}: {100 * hits / max(total, 1):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def count(cases: Iterable[Case], *tests: Callable[[Case], bool]) -> int:
    return sum(all(test(case) for test in tests) for case in cases)


def trusted(case: Case) -> bool:
    return bool(case["verdict"] == "trust it")


def right(case: Case) -> bool:
    return not is_wrong(case) and bool(case["gap"] < MAX_GAP)


def between(case: Case) -> bool:
    """Whether means and standard deviations are right, but the shape is not: draws are not the posterior's."""
    return not is_wrong(case) and not case["gap"] < MAX_GAP


def bad_draws(case: Case) -> bool:
    return bool(case["resampled wrong"])


def covered(case: Case) -> bool:
    """Whether the interval of two standard errors has the log evidence, up to the error of quadrature."""
    return abs(case["evidence error"]) < 2 * case["evidence se"] + 0.003


def rates_of(cases: Sequence[Case]) -> list[list[str]]:
    """The headline rates, each with its denominator."""
    seen = [case for case in cases if case["target"] != HIDDEN]
    rows = []
    for title, part in (("", seen), (f"with '{HIDDEN}': ", cases)):
        bold = count(part, trusted)
        bad, good, close = count(part, is_wrong), count(part, right), count(part, between)
        modest = count(part, right) - count(part, right, trusted)
        rows += [
            [f"{title}trusted and wrong, of all cases", rate(count(part, is_wrong, trusted), len(part))],
            [f"{title}trusted and wrong, of the trusted", rate(count(part, is_wrong, trusted), bold)],
            [f"{title}trusted and wrong, of the wrong", rate(count(part, is_wrong, trusted), bad)],
            [f"{title}right and not trusted, of all cases", rate(modest, len(part))],
            [f"{title}right and not trusted, of the right", rate(modest, good)],
            [f"{title}between right and wrong, trusted, of these", rate(count(part, between, trusted), close)],
            [
                f"{title}right or between and not trusted, of all cases",
                rate(good + close - count(part, right, trusted) - count(part, between, trusted), len(part)),
            ],
        ]
    told = [case for case in seen if case["verdict"] == "use importance_resample"]
    quiet = [case for case in seen if case["resampled"] == "quiet"]
    rows += [
        ["verdict 'use importance_resample', its draws wrong", rate(count(told, bad_draws), len(told))],
        ["importance_resample without a warning, its draws wrong", rate(count(quiet, bad_draws), len(quiet))],
        [
            "evidence within two standard errors, of the trusted",
            rate(count(seen, trusted, covered), count(seen, trusted)),
        ],
        ["the same, of 'use importance_resample'", rate(count(told, covered), len(told))],
    ]
    return rows


def by_kind(cases: Sequence[Case], key: str) -> list[list[str]]:
    """Counts by kind of target or of guide."""
    rows = []
    for kind in TARGETS if key == "target" else GUIDES:
        part = [case for case in cases if case[key] == kind]
        quiet = [case for case in part if case["resampled"] == "quiet"]
        good = count(part, right)
        rows.append(
            [
                kind,
                str(len(part)),
                f"{count(part, is_wrong, trusted)} of {count(part, is_wrong)}",
                f"{count(part, between, trusted)} of {count(part, between)}",
                f"{good - count(part, right, trusted)} of {good}",
                f"{count(quiet, bad_draws)} of {len(quiet)}",
            ]
        )
    return rows


HEADER = (
    "kind",
    "cases",
    "trusted, of the wrong",
    "trusted, of those between",
    "not trusted, of the right",
    "draws wrong, of importance_resample without a warning",
)


def stops_of(cases: Sequence[Case]) -> list[list[str]]:
    """How often fit's "converged" was wrong, and the verdict on what it returned."""
    stopped = [case for case in cases if case["stop"].startswith(("converged", "the start"))]
    gained = [case for case in stopped if case["gain"] - 2 * case["gain se"] > MIN_GAIN]
    bold, good = count(cases, trusted), count(cases, right)
    return [
        ["'converged', and four times the steps gain more than 0.05 nats", rate(len(gained), len(stopped))],
        ["not converged within fit's limit of steps", rate(len(cases) - len(stopped), len(cases))],
        ["trusted and wrong, of the trusted", rate(count(cases, is_wrong, trusted), bold)],
        ["right and not trusted, of the right", rate(good - count(cases, right, trusted), good)],
    ]


def show(header: Sequence[str], rows: list[list[str]], name: str, write: bool) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)
    if write:
        (TABLES / f"verdicts_{name}.rst").write_text(as_rst(header, rows))


def report_of(cases: Sequence[Case], write: bool) -> None:
    """Print all tables."""
    if "stop" in cases[0]:
        show(("rate", "of"), stops_of(cases), "stops", write)
        return
    show(("rate", "cases, with 95 % intervals"), rates_of(cases), "rates", write)
    show(HEADER, by_kind(cases, "target"), "targets", write)
    show(HEADER, by_kind(cases, "guide"), "guides", write)
    print(f"seconds of diagnose: mean {sum(case['seconds'] for case in cases) / len(cases):.3f}")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", type=int, default=1000, help="number of cases")
    made.add_argument("--first", type=int, default=0, help="number of the first case")
    made.add_argument("--seed", type=int, default=0, help="seed of all cases")
    made.add_argument("--stops", action="store_true", help="measure when fit stops")
    made.add_argument("--out", type=Path, help="file of cases, a line of JSON each")
    made.add_argument("--read", type=Path, nargs="+", help="only print the tables of files of cases")
    made.add_argument("--write", action="store_true", help="write docs/tables too")
    options = made.parse_args()
    torch.set_num_threads(1)
    if options.read:
        cases = [json.loads(line) for path in options.read for line in path.read_text().splitlines()]
        report_of(cases, options.write)
        return
    cases = []
    for number in range(options.first, options.first + options.cases):
        case = (one_stop if options.stops else one_case)(options.seed, number)
        cases.append(case)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(case) + "\n")
        if (trusted(case) and is_wrong(case)) or (right(case) and not trusted(case)):
            print(case, flush=True)
    report_of(cases, options.write)


if __name__ == "__main__":
    main()
