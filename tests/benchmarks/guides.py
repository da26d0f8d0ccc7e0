# SPDX-License-Identifier: Apache-2.0
"""What the guide costs and how good it is, next to its peers in the same run.

    python tests/benchmarks/guides.py [gap] [single] [start] [far] [step] [size] [--seeds 5] [--write]

Run by hand, never by pytest. Each measure prints a table; ``--write`` also puts it in ``docs/tables``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuide,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    init_to_median,
)
from pyro.optim import Adam, CosineAnnealingLR
from tables import Measure, Rows, parser, run

from pyro_flows import AutoFlowGuide, flows
from pyro_flows.__main__ import LOG_EVIDENCE, SIGMA, Y
from pyro_flows.__main__ import model as eight_schools
from pyro_flows.diagnostics import log_weights

SCHOOLS = (torch.tensor(SIGMA), torch.tensor(Y))
# Pyro's guides and ours, of a model.
GUIDES: dict[str, Callable[[Callable], AutoGuide]] = {
    "AutoNormal": lambda model: AutoNormal(model, init_loc_fn=init_to_median),
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal x2": lambda model: AutoIAFNormal(model, num_transforms=2),
    "AutoNormalizingFlow, 4 couplings": lambda model: AutoNormalizingFlow(model, partial(iterated, 4, affine_coupling)),
    "AutoFlowGuide": AutoFlowGuide,
}
# What sampling costs a pass per dimension for is no guide.
FAMILIES = tuple(name for name in flows.names() if flows.get(name).one_pass_sampling)


def evaluate(guide: Callable, num_draws: int = 20_000) -> tuple[float, float]:
    """ELBO of a guide of eight schools, and its standard error."""
    weights, _ = log_weights(eight_schools, guide, num_draws, SCHOOLS)
    return weights.mean().item(), weights.std().item() / num_draws**0.5


def fit(model: Callable, guide: AutoGuide, args: Sequence, num_steps: int, num_particles: int, lr: float) -> float:
    """Plain SVI with Adam and a cosine schedule, the same for every guide; returns seconds."""
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": num_steps}
    optim = CosineAnnealingLR(schedule)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1)
    svi = SVI(model, guide, optim, elbo)
    start = time.perf_counter()
    for _ in range(num_steps):
        svi.step(*args)
        optim.step()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def measure_gap(seeds: int) -> tuple[Sequence[str], Rows]:
    """Eight schools centered, 3000 steps x 16 particles: gap to the exact log evidence."""
    rows = []
    for name, make in GUIDES.items():
        gaps, times = [], []
        for seed in range(seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = make(eight_schools)
            times.append(fit(eight_schools, guide, SCHOOLS, 3000, 16, 0.02))
            elbo = statistics.mean(evaluate(guide)[0] for _ in range(5))  # 100,000 draws
            gaps.append(LOG_EVIDENCE - elbo)
        rows.append([name, spread(gaps), f"{statistics.median(times):.0f}"])
    return ("guide", "gap in nats, median (range over seeds)", "seconds"), rows


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """A linear regression whose two covariates correlate at 0.7."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + x @ slope, noise), obs=y)


def regression_data() -> tuple[torch.Tensor, torch.Tensor]:
    """100 rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=generator)
    x[:, 1] += 0.9 * x[:, 0]
    return x, 2.0 + x @ torch.tensor([1.0, -1.0, 0.5]) + 0.5 * torch.randn(100, generator=generator)


def measure_single(seeds: int) -> tuple[Sequence[str], Rows]:
    """One particle and a constant rate, 1500 steps: ELBO less AutoNormal's at the same rate and seed."""
    rows = []
    models = {"eight schools": (eight_schools, SCHOOLS), "regression": (regression, regression_data())}
    for title, (model, data) in models.items():
        for lr in (0.005, 0.01, 0.02):
            gains = []
            for seed in range(seeds):
                elbos = []
                for make in (AutoNormal, AutoFlowGuide):
                    pyro.clear_param_store()
                    pyro.set_rng_seed(seed)
                    guide = make(model)
                    svi = SVI(model, guide, Adam({"lr": lr}), Trace_ELBO())
                    for _ in range(1500):
                        svi.step(*data)
                    elbos.append(-statistics.mean(svi.evaluate_loss(*data) for _ in range(1000)))
                gains.append(elbos[1] - elbos[0])
            rows.append([title, str(lr), spread(gains)])
    return ("model", "learning rate", "gain in nats, median (range over seeds)"), rows


def measure_start(seeds: int) -> tuple[Sequence[str], Rows]:
    """First ELBO of a fresh guide less AutoNormal's, same start, 10,000 draws each, in standard errors."""
    rows = []
    for name in FAMILIES:
        scores = []
        for seed in range(seeds):
            values = []
            for make in (AutoNormal, partial(AutoFlowGuide, flow=name)):
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                guide = make(eight_schools, init_loc_fn=init_to_median)
                guide(*SCHOOLS)
                values.append(evaluate(guide, num_draws=10_000))
            (normal, normal_error), (flow, flow_error) = values
            scores.append((flow - normal) / (normal_error**2 + flow_error**2) ** 0.5)
        claims = "yes" if flows.get(name).identity_start else "no"
        rows.append([name, claims, f"{statistics.median(scores):+.2f}", f"{max(map(abs, scores)):.2f}"])
    return ("family", "claims it", "difference / standard error, median over seeds", "largest"), rows


def far_model() -> None:
    """A posterior far from the origin: its prior."""
    pyro.sample("z", dist.Normal(torch.full((2,), 100.0), 1.0).to_event(1))


def measure_far(seeds: int) -> tuple[Sequence[str], Rows]:
    """Prior N(100, 1) in 2-D and no data, 500 steps x 8 particles: KL(q || posterior)."""
    guides: dict[str, Callable[[], AutoGuide]] = {
        "Pyro AutoNormal": lambda: AutoNormal(far_model, init_loc_fn=init_to_median),
        "Pyro AutoIAFNormal x2": lambda: AutoIAFNormal(far_model, num_transforms=2),
        "Pyro 4 couplings": lambda: AutoNormalizingFlow(far_model, partial(iterated, 4, affine_coupling)),
    }
    guides |= {name: partial(AutoFlowGuide, far_model, flow=name) for name in FAMILIES}
    rows = []
    for name, make in guides.items():
        gaps = []
        for seed in range(seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = make()
            fit(far_model, guide, (), 500, 8, 0.02)
            with torch.no_grad():
                elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=0)
                gaps.append(elbo.loss(far_model, guide))
        rows.append([name, spread(gaps)])
    return ("guide", "KL in nats, median (range over seeds)"), rows


def measure_step(seeds: int) -> tuple[Sequence[str], Rows]:
    """Eager SVI step on eight schools, 1 and 16 particles, over AutoNormal's in the same run."""
    makers: dict[str, Callable[[], AutoGuide]] = {
        "Pyro AutoNormal": lambda: AutoNormal(eight_schools),
        "Pyro AutoIAFNormal x2": lambda: AutoIAFNormal(eight_schools, num_transforms=2),
    }
    makers |= {name: partial(AutoFlowGuide, eight_schools, flow=name) for name in FAMILIES}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(seeds):
        for name, make in makers.items():
            for particles in (1, 16):
                pyro.clear_param_store()
                guide = make()
                elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
                svi = SVI(eight_schools, guide, Adam({"lr": 1e-3}), elbo)
                for _ in range(20):
                    svi.step(*SCHOOLS)
                start = time.perf_counter()
                for _ in range(100):
                    svi.step(*SCHOOLS)
                times.setdefault((name, particles), []).append(time.perf_counter() - start)
    rows = []
    for name in makers:
        ratios = []
        for particles in (1, 16):
            pairs = zip(times[name, particles], times["Pyro AutoNormal", particles], strict=True)
            ratios.append(f"{statistics.median(mine / normal for mine, normal in pairs):.2f}")
        rows.append([name, *ratios])
    return ("guide", "1 particle, x AutoNormal", "16 particles, x AutoNormal"), rows


def wide_model(dim: int) -> None:
    """Two scalars that steer a long vector."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("plate", dim - 2):
        pyro.sample("x", dist.Normal(loc, scale))


def measure_size(seeds: int) -> tuple[Sequence[str], Rows]:
    """Default flow: parameters, and peak memory of a process that imports, builds and takes 5 steps x 16 particles."""
    rows = []
    for dim in (30, 300, 1000, 3000, 10_000):
        done = subprocess.run(
            [sys.executable, __file__, "--size-of", str(dim)], capture_output=True, text=True, check=True
        )
        count, megabytes, seconds = done.stdout.split()
        rows.append([f"{dim:,}", f"{int(count):,}", f"{int(count) / dim:,.0f}", f"{float(megabytes):,.0f}", seconds])
    return ("latent dimension", "parameters", "per dimension", "peak MiB, everything", "seconds a step"), rows


def report_size(dim: int) -> None:
    """In a process of its own: parameters, peak resident MiB, seconds a step."""
    guide = AutoFlowGuide(wide_model)
    seconds = fit(wide_model, guide, (dim,), 5, 16, 1e-3) / 5
    count = sum(p.numel() for p in guide.parameters())
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, f"{seconds:.3f}")


MEASURES: dict[str, Measure] = {
    "gap": measure_gap,
    "single": measure_single,
    "start": measure_start,
    "far": measure_far,
    "step": measure_step,
    "size": measure_size,
}


def main() -> None:
    """Run the measures that are named, or all."""
    made = parser(__doc__, MEASURES, 5)
    made.add_argument("--size-of", type=int, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.size_of:
        torch.set_num_threads(1)
        report_size(options.size_of)
        return
    run(MEASURES, options)


if __name__ == "__main__":
    main()
