# SPDX-License-Identifier: Apache-2.0
"""Models whose time goes into many observations: steps of each kind, draws in chunks, and whole fits.

    python tests/benchmarks/observations.py [steps] [chunks] [fits] [--seeds 3] [--write]

Run by hand, never by pytest. ``--seeds`` is the number of repeats of a timing, or of seeds of a fit. ``--write`` puts
the tables in ``docs/tables``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from tables import Measure, Rows, parser, run
from target_models import TARGETS
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective

PARTICLES = 16
Problem = tuple[Callable[..., Any], tuple[Any, ...]]


def regression() -> Problem:
    """Negative binomial regression: 20,000 rows, 12 latents."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 10)

    def model(x: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(10), 2.0).to_event(1))
        spread = pyro.sample("spread", dist.HalfNormal(2.0))
        with pyro.plate("rows", len(x)):
            logits = intercept + x @ slopes + spread.log()
            pyro.sample("y", dist.NegativeBinomial(total_count=1 / spread, logits=logits), obs=y)

    return model, (x, torch.poisson((x.sum(-1) * 0.3).exp()))


def groups(num_rows: int = 30_000) -> Problem:
    """Overdispersed counts in 25 groups: 30,000 rows, 31 latents."""
    torch.manual_seed(1)
    group, x = torch.randint(25, (num_rows,)), torch.randn(num_rows, 3)
    rate = (0.5 + 0.3 * torch.randn(25)[group] + x @ torch.tensor([0.2, -0.1, 0.3])).exp()

    def model(group: Tensor, x: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        size = pyro.sample("size", dist.Gamma(2.0, 0.1))
        with pyro.plate("groups", 25):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rate = (intercept + scale * z[group] + x @ slopes).exp()
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.GammaPoisson(size, size / rate), obs=y)

    return model, (group, x, torch.poisson(rate))


def item_response() -> Problem:
    """Item response, 2PL: 95,000 answers, 2001 latents."""
    target = TARGETS["item response, 2PL (9)"]()
    return target.model, target.args


PROBLEMS: tuple[Callable[[], Problem], ...] = (regression, groups, item_response)


def set_up(build: Callable[[], Problem]) -> tuple[Callable[..., Any], tuple[Any, ...], AutoFlowGuide]:
    """A model, its arguments, and a guide that has been called."""
    model, args = build()
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model)
    guide(*args)
    return model, args, guide


def name_of(build: Callable[[], Problem]) -> str:
    """A row's name."""
    return (build.__doc__ or "").rstrip(".")


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def steps(repeats: int) -> tuple[list[str], Rows]:
    """Milliseconds of a loss and its gradient, 16 particles: eager, recorded, with large operations compiled."""
    rows = []
    for build in PROBLEMS:
        model, args, guide = set_up(build)
        objective = Objective(model, guide, Batches(args, {}))
        elbo = objective.elbo(PARTICLES)

        def step(objective: Objective = objective, elbo: Any = elbo, call: Any = (args, {})) -> None:
            for parameter in objective.parameters:
                parameter.grad = None
            objective.gradient(elbo, call)

        times = [seconds(step, repeats)]
        graph = objective.record(elbo)
        graph.script(*objective.batches.first)
        step(), step()
        times.append(seconds(step, 10 * repeats))
        begin = time.perf_counter()
        with fresh_inductor_cache():
            assert graph.fuse(*objective.batches.first)
        took = time.perf_counter() - begin
        step(), step()
        times.append(seconds(step, 10 * repeats))
        rows.append([name_of(build), *(f"{1e3 * t:.1f}" for t in times), f"{took:.1f}"])
        objective.release()
    return ["model", "eager", "recorded", "large operations compiled", "seconds of compiling them"], rows


def chunks(repeats: int) -> tuple[list[str], Rows]:
    """Milliseconds a draw of the log joint and its gradient: 500 draws at once, and in the chunks of a warm start."""
    rows = []
    for build in PROBLEMS:
        model, args, guide = set_up(build)
        layout = guide.posterior.joint.layout
        log_joint = LogJoint(model, layout, args, {})
        draws = layout.init_loc + 0.1 * torch.randn(500, len(layout.init_loc))

        def evaluate(size: int, log_joint: LogJoint = log_joint, draws: Tensor = draws) -> None:
            for part in draws.split(size):
                log_joint(part.requires_grad_()).sum().backward()

        sizes = (len(draws), log_joint.chunk)
        times = [seconds(lambda size=size: evaluate(size), repeats) / len(draws) for size in sizes]
        rows.append([name_of(build), *(f"{1e3 * t:.2f}" for t in times), str(log_joint.chunk)])
    return ["model", "all at once", "in chunks", "draws in a chunk"], rows


def fits(seeds: int) -> tuple[list[str], Rows]:
    """``fit`` with nothing set, counts in 25 groups, by number of rows; medians over seeds, the worst in brackets."""
    rows = []
    for num_rows in (300, 3000, 30_000):
        model, args = groups(num_rows)
        found = []
        for seed in range(seeds):
            pyro.set_rng_seed(seed)
            begin = time.perf_counter()
            AutoFlowGuide(model).warm_start(*args)
            start = time.perf_counter() - begin
            pyro.set_rng_seed(seed)
            result = fit(model, AutoFlowGuide(model), args=args, progress=False)
            found.append((start, result.seconds, float(result.steps), result.gap, result.khat))
            print(num_rows, seed, result, flush=True)
        columns = zip(*found, strict=True)
        formats = ("{:.1f}", "{:.0f}", "{:.0f}", "{:.3f}", "{:.2f}")
        cells = [
            f"{form.format(statistics.median(c))} ({form.format(max(c))})"
            for form, c in zip(formats, columns, strict=True)
        ]
        rows.append([f"{num_rows:,}", *cells])
    return ["rows", "seconds of the warm start", "of fit", "steps", "gap", "k-hat"], rows


MEASURES: dict[str, Measure] = {"steps": steps, "chunks": chunks, "fits": fits}

if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, 3).parse_args(), "observations_")
