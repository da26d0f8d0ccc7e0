# SPDX-License-Identifier: Apache-2.0
"""Whether the diagnostics say true: errors of evidence, memory, lost modes, and NUTS in a guide's coordinates.

    python tests/benchmarks/diagnostics.py [evidence] [memory] [neutra] [--seeds 200] [--write]

Run by hand, never by pytest. Each measure prints a table; ``--write`` also puts it in ``docs/tables``.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size
from tables import Measure, Rows, parser, run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyro_flows import AutoFlowGuide, diagnose, fit
from pyro_flows.__main__ import model as eight_schools
from tests.diagnostics import fits


def wide_beta(count: torch.Tensor) -> None:
    """The posterior of half the data."""
    pyro.sample("p", dist.Beta(1.0 + count / 2, 11.5 - count / 2))


def wide_mixture() -> None:
    """Both modes, with other weights and wider."""
    parts = dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-5.0, 5.0]), 1.3)
    pyro.sample("z", dist.MixtureSameFamily(*parts))


def wide_funnel() -> None:
    """The funnel, a little wider."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.5))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(0.0, 1.1 * torch.exp(log_scale / 2)))


def heavy_schools(sigma: torch.Tensor, y: torch.Tensor) -> None:
    """Exact but for tau, which comes from a wide log-normal."""
    tau = pyro.sample("tau", dist.LogNormal(0.7, 1.5))
    fits.schools_given_tau(tau, sigma, y)


# Guides that are off, so that weights vary, with weights that have a variance.
IMPERFECT: dict[str, Callable[[], fits.Fit]] = {
    "normal, 1-D, narrow": lambda: fits.normal_fit(1, scale=0.8),
    "normal, 10-D, shifted": lambda: fits.normal_fit(10, shift=0.2, scale=1.1),
    "normal, 100-D": lambda: fits.normal_fit(100, shift=0.05, scale=1.03),
    "regression, mean-field": fits.correlated_regression,
    "beta-binomial": lambda: fits.GOOD["beta-binomial"]()._replace(guide=wide_beta),
    "mixture 0.3/0.7": lambda: fits.GOOD["mixture"]()._replace(guide=wide_mixture),
    "funnel": lambda: fits.GOOD["funnel"]()._replace(guide=wide_funnel),
    "eight schools": lambda: fits.GOOD["eight schools"]()._replace(guide=heavy_schools),
}


def measure_evidence(seeds: int) -> tuple[Sequence[str], Rows]:
    """log evidence less the exact one in units of its own standard error; 4000 draws a run."""
    rows = []
    for name, make in IMPERFECT.items():
        case = make()
        scores, khats, errors = [], [], []
        for seed in range(seeds):
            found = diagnose(case.model, case.guide, case.args, search=False, progress=False, seed=seed)
            scores.append((found.log_evidence - case.log_evidence) / found.log_evidence_se)
            khats.append(found.khat)
            errors.append(found.log_evidence_se)
        within = sum(abs(z) < 3 for z in scores) / seeds
        rows.append(
            [
                name,
                f"{statistics.median(khats):.2f}",
                f"{statistics.median(errors):.4f}",
                f"{statistics.mean(scores):+.2f}",
                f"{statistics.stdev(scores):.2f}",
                f"{within:.1%}",
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    return ("model, guide", "k-hat", "standard error", "mean of z", "sd of z", "within 3"), rows


def report_memory(num_samples: int) -> None:
    """Peak memory before and after, in MiB, and seconds; for a process of its own."""
    case = fits.normal_fit(100)
    guide = AutoFlowGuide(fits.normal)
    guide.warm_start(*case.args)
    diagnose(case.model, guide, case.args, num_samples=1000, search=False, progress=False)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
    found = diagnose(case.model, guide, case.args, num_samples=num_samples, search=False, seed=0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(after - before, time.perf_counter() - begin, found.log_evidence - case.log_evidence)


def measure_memory(seeds: int) -> tuple[Sequence[str], Rows]:
    """A guide of 100 dimensions: peak memory above what it was, and seconds."""
    rows = []
    for count in (10_000, 100_000, 1_000_000):
        command = [sys.executable, __file__, "--memory-of", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        memory, seconds, error = map(float, done.stdout.split())
        rows.append([f"{count:,}", f"{memory:.0f}", f"{seconds:.0f}", f"{error:+.4f}"])
    return ("draws", "MiB", "seconds", "error of log evidence"), rows


def exact_moments() -> dict[str, tuple[float, float]]:
    """Posterior mean and sd of eight schools' mu and log tau, from a million exact draws of the grid guide."""
    with torch.no_grad(), pyro.plate("draws", 1_000_000, dim=-2):
        trace = pyro.poutine.trace(fits.schools_guide).get_trace(*fits.SCHOOLS)
    values = {"mu": trace.nodes["mu"]["value"], "log tau": trace.nodes["tau"]["value"].log()}
    return {name: (value.mean().item(), value.std().item()) for name, value in values.items()}


def measure_neutra(seeds: int) -> tuple[Sequence[str], Rows]:
    """Eight schools, centered: NUTS in the coordinates of a fitted guide, 1000 draws after 300 of warm-up."""
    exact = exact_moments()
    rows = []
    for seed in range(min(seeds, 2)):
        pyro.clear_param_store()
        guide = AutoFlowGuide(eight_schools)
        fit(eight_schools, guide, fits.SCHOOLS, seed=seed, progress=False)
        found = diagnose(eight_schools, guide, fits.SCHOOLS, seed=seed, progress=False)
        pyro.set_rng_seed(seed)
        begin = time.perf_counter()
        neutra = NeuTraReparam(guide.requires_grad_(False))
        mcmc = MCMC(NUTS(neutra.reparam(eight_schools)), num_samples=1000, warmup_steps=300, disable_progbar=True)
        mcmc.run(*fits.SCHOOLS)
        draws = neutra.transform_sample(*[z.unsqueeze(-2) for z in mcmc.get_samples().values()])
        seconds = time.perf_counter() - begin
        for name, value in {"mu": draws["mu"].flatten(), "log tau": draws["tau"].flatten().log()}.items():
            mean, sd = exact[name]
            ess = effective_sample_size(value.unsqueeze(0), 0, 1).item()
            shift, ratio = (value.mean().item() - mean) / sd, value.std().item() / sd
            cells = [f"{shift:+.3f}", f"{1 / math.sqrt(ess):.3f}", f"{ratio:.3f}", f"{ess:.0f}", f"{seconds:.0f}"]
            rows.append([str(seed), f"{found.gap:.3f}, {found.khat:.2f}, {found.verdict}", name, *cells])
            print("  ".join(rows[-1]), flush=True)
    return (
        "seed",
        "gap, k-hat, verdict",
        "site",
        "mean, sds off",
        "standard error",
        "sd ratio",
        "ESS",
        "seconds",
    ), rows


MEASURES: dict[str, Measure] = {
    "evidence": measure_evidence,
    "memory": measure_memory,
    "neutra": measure_neutra,
}


def main() -> None:
    """Run the measures that are named, or all."""
    made = parser(__doc__, MEASURES, 200)
    made.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = made.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        report_memory(options.memory_of)
        return
    run(MEASURES, options, prefix="diagnostics_")


if __name__ == "__main__":
    main()
