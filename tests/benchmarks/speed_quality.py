# SPDX-License-Identifier: Apache-2.0
"""Seconds from the call until a guide of eight schools is close to the posterior."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import pyro
from guides import GUIDES as PEERS
from guides import SCHOOLS, evaluate
from pyro.infer import SVI
from speed_steps import CASES, Contender, Take, alone, contenders, endless, make_svi, numpyro_side
from tables import Rows

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.__main__ import LOG_EVIDENCE
from pyro_flows.__main__ import model as eight_schools

GAPS = (0.5, 0.1, 0.05)
RATES = ("0.01", "0.003")
PARTICLES, BUDGET = 16, 30.0
# Steps between two looks at the gap: so many, or that share of those taken, so that times are right to a twentieth.
CHUNK, SHARE = 50, 20
# Steps that fit is told to take.
FIT_STEPS = ("25", "50", "100", "200", "400", "800", "1600")
COMPILED = "CompiledSVI AutoFlowGuide"
LEFT_OUT = ("CompiledSVI AutoNormal", "CompiledSVI AutoIAFNormal")


def trained() -> dict[str, Contender]:
    """Who is trained step by step."""
    many = {name: one for name, one in contenders(10).items() if name not in LEFT_OUT}
    return {"Pyro AutoMultivariateNormal": Contender(SVI, PEERS["AutoMultivariateNormal"]), **many}


def begin(contender: Contender, rate: float, seed: int) -> tuple[Take, Callable[[], float]]:
    """Training, and the ELBO from 20,000 draws of the guide as it is."""
    case = CASES["eight schools"]()
    if contender.kind is None:
        training = numpyro_side().train(case.twin, contender.guide, case.args, PARTICLES, rate, seed)
        return training.loop, training.elbo
    pyro.set_rng_seed(seed)
    svi = make_svi(contender.kind, case, contender.guide, PARTICLES, rate)
    return endless(svi, itertools.repeat(case.args)), lambda: evaluate(svi.guide)[0]


def report_quality(name: str, rate: str, seed: str, budget: str) -> list[float]:
    """In a process of its own: seconds of training until each of the gaps; infinite if that takes too long."""
    contender = trained()[name]
    if contender.kind is None:
        numpyro_side()  # imports do not count
    found = dict.fromkeys(GAPS, math.inf)
    start = time.perf_counter()
    take, elbo = begin(contender, float(rate), int(seed))
    spent, steps = time.perf_counter() - start, 0
    while spent < float(budget) and math.inf in found.values():
        count = max(CHUNK, steps // SHARE)
        start = time.perf_counter()
        take(count)
        spent, steps = spent + time.perf_counter() - start, steps + count
        gap = LOG_EVIDENCE - elbo()
        found |= {wanted: spent for wanted, at in found.items() if gap < wanted and at == math.inf}
    return list(found.values())


def report_fit(num_steps: str, seed: str) -> list[float]:
    """In a process of its own: seconds until each of the gaps by ``fit``, which has them at its end or never."""
    start = time.perf_counter()
    guide = AutoFlowGuide(eight_schools)
    fit(eight_schools, guide, SCHOOLS, num_steps=int(num_steps) or None, seed=int(seed), progress=False)
    seconds = time.perf_counter() - start
    gap = LOG_EVIDENCE - evaluate(guide)[0]
    return [seconds if gap < wanted else math.inf for wanted in GAPS]


def afresh(*words: str) -> list[float]:
    """Seconds until each of the gaps, with inductor's cache empty."""
    with tempfile.TemporaryDirectory() as cache:
        found = alone(*words, cache=cache)
    assert found is not None  # there was no limit
    return found


def medians(runs: Sequence[Sequence[float]]) -> list[float]:
    """Over seeds, for each gap."""
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def least(runs: Sequence[Sequence[float]]) -> list[float]:
    """Over settings, for each gap."""
    return [min(column) for column in zip(*runs, strict=True)]


def measure_quality(seeds: int) -> tuple[Sequence[str], Rows]:
    """Eight schools centered: seconds from the call, compile included, until the gap is below so many nats."""
    found: dict[str, list[float]] = {}
    numbers = [str(seed) for seed in range(seeds)]
    found["fit AutoFlowGuide, nothing set"] = medians([afresh("fit", "0", seed) for seed in numbers])
    fixed = [medians([afresh("fit", steps, seed) for seed in numbers]) for steps in FIT_STEPS]
    found["fit AutoFlowGuide, best num_steps"] = least(fixed)
    for name in trained():
        rates = [medians([afresh("quality", name, rate, seed, str(BUDGET)) for seed in numbers]) for rate in RATES]
        found[name] = least(rates)
        print(name, found[name], flush=True)
    found[f"{COMPILED}, warm cache"] = warm(numbers)
    rows = [[name, *(_cell(seconds) for seconds in times)] for name, times in found.items()]
    return ("by, guide", *(f"gap < {gap}" for gap in GAPS)), rows


def warm(seeds: Sequence[str]) -> list[float]:
    """Seconds until each of the gaps by ``CompiledSVI``, where inductor's cache knows the graph from another run."""
    with tempfile.TemporaryDirectory() as cache:
        alone("quality", COMPILED, RATES[0], "0", "1e-3", cache=cache)
        words = [[("quality", COMPILED, rate, seed, str(BUDGET)) for seed in seeds] for rate in RATES]
        return least([medians([alone(*one, cache=cache) or [] for one in row]) for row in words])


def _cell(seconds: float) -> str:
    return f"{seconds:.1f}" if math.isfinite(seconds) else f"never in {BUDGET:.0f} s"
