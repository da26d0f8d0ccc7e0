# SPDX-License-Identifier: Apache-2.0
"""Local latents in mini-batches, next to exact answers and peers in the same run.

    python tests/benchmarks/local.py [effects] [funnel] [million] [--seeds 3] [--write]

Run by hand, never by pytest. Each measure prints a table; ``--write`` also puts it in ``docs/tables``.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from guides import spread
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from pyro.optim import CosineAnnealingLR
from tables import Measure, Rows, parser, run
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective
from pyro_flows.training.preparation import sparse_tables
from pyro_flows.training.trainer import Trainer


class Effects(NamedTuple):
    """Data of a Gaussian random-effects model: a group's mean and its standard error."""

    y: Tensor
    sd: Tensor

    @classmethod
    def simulate(cls, count: int, seed: int) -> Effects:
        """Groups of one to five members, so that they pool unequally."""
        generator = torch.Generator().manual_seed(seed)
        members = torch.randint(1, 6, (count,), generator=generator)
        sd = members.float().rsqrt()
        theta = 2.0 + 0.7 * torch.randn(count, generator=generator)
        return cls(theta + sd * torch.randn(count, generator=generator), sd)

    def model(self, index: Tensor) -> None:
        """theta ~ N(mu, tau), y ~ N(theta, sd)."""
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", len(self.y), subsample=index):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, self.sd[index]), obs=self.y[index])

    def plates(self, index: Tensor) -> pyro.plate:
        """The guide's plate."""
        return pyro.plate("groups", len(self.y), subsample=index)

    def exact(self) -> dict[str, Tensor]:
        """Posterior means and sds, by quadrature over log tau around its mode."""
        y, variance = self.y.double(), self.sd.double().square()
        width = 8.0 / math.sqrt(len(y))
        grid = torch.linspace(math.log(0.7) - width, math.log(0.7) + width, 161, dtype=torch.float64)
        mu_mean, mu_variance, log_p = [], [], []
        for log_tau in grid:
            weight = 1 / ((2 * log_tau).exp() + variance)
            precision = weight.sum() + 1e-2
            mean = (weight * y).sum() / precision
            mu_mean.append(mean)
            mu_variance.append(1 / precision)
            log_p.append(0.5 * (weight.log() - weight * y**2).sum() + 0.5 * mean**2 * precision - 0.5 * precision.log())
        p = (torch.stack(log_p) - 0.5 * grid**2).softmax(0)
        means, variances = torch.stack(mu_mean), torch.stack(mu_variance)
        first = torch.zeros_like(y)
        second = torch.zeros_like(y)
        for log_tau, mean, var, prob in zip(grid, means, variances, p, strict=True):
            share = (2 * log_tau).exp() / ((2 * log_tau).exp() + variance)
            theta = share * y + (1 - share) * mean
            first += prob * theta
            second += prob * (theta**2 + share * variance + (1 - share) ** 2 * var)
        mu = (p * means).sum()
        tau = (p * grid).sum()
        return {
            "theta": first,
            "mu": mu,
            "log_tau": tau,
            "theta_sd": (second - first**2).sqrt(),
            "mu_sd": ((p * (variances + means**2)).sum() - mu**2).sqrt(),
            "log_tau_sd": ((p * grid**2).sum() - tau**2).sqrt(),
        }

    def score(self, guide: AutoGuide, exact: dict[str, Tensor]) -> list[float]:
        """Errors of the groups' means in sds (median, 99 %), their sds' ratio (median), the globals' sds' ratios."""
        with torch.no_grad():
            if isinstance(guide, AutoNormal):
                mean, sd = guide.locs.theta, guide.scales.theta
                mu_sd, log_tau_sd = guide.scales.mu, guide.scales.tau
            else:
                # From mirrored draws, hence exact where the guide is Gaussian; the mean of plain ones is off by their
                # own sampling error.
                mean = guide.median(num_samples=20)["theta"]
                count = max(40, 4_000_000 // len(self.y))
                sd = torch.cat([draws.std(0) for draws in guide.sample_posterior(count)["theta"].split(100_000, -1)])
                latent = guide.posterior.joint.distribution(path_gradient=False).sample(torch.Size((20_000,)))
                mu_sd, log_tau_sd = latent.std(0)
        error = ((mean - exact["theta"]).abs() / exact["theta_sd"]).float()
        return [
            error.median().item(),
            error.kthvalue(int(0.99 * len(error))).values.item(),
            (sd / exact["theta_sd"]).median().item(),
            (mu_sd / exact["mu_sd"]).item(),
            (log_tau_sd / exact["log_tau_sd"]).item(),
        ]


class Shuffled:
    """Indices of all groups, in mini-batches, in another order at each pass; what a ``DataLoader`` would give."""

    def __init__(self, count: int, batch: int) -> None:
        self.count, self.batch = count, batch

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(self.count).split(self.batch))


def plain_svi(effects: Effects, guide: AutoGuide, batches: Shuffled, num_steps: int, lr: float) -> float:
    """Plain SVI, Adam with a cosine schedule; returns seconds."""
    # With the usual 0.999 the first gradients, N times those of the end, hold steps back for thousands of steps.
    settings = {"lr": lr, "betas": (0.9, 0.99)}
    optim = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": settings, "T_max": num_steps})
    svi = SVI(effects.model, guide, optim, Trace_ELBO())
    start = time.perf_counter()
    endless = itertools.chain.from_iterable(batches for _ in itertools.count())
    for index in itertools.islice(endless, num_steps):
        svi.step(index)
        optim.step()
    return time.perf_counter() - start


def spread_rows(name: str, scores: Sequence[Sequence[float]]) -> list[str]:
    """A row of the table."""
    return [name, *(spread(column) for column in zip(*scores, strict=True))]


HEADER = ("guide", "mean error, sds: median", "99 %", "sd ratio: median", "mu sd ratio", "log tau sd ratio", "seconds")


def measure_effects(seeds: int) -> tuple[Sequence[str], Rows]:
    """Gaussian random effects, 10,000 groups, batches of 100: AutoNormal by 20,000 steps of SVI, the flow by fit."""
    normal, flow = [], []
    for seed in range(seeds):
        effects, batches = Effects.simulate(10_000, seed), Shuffled(10_000, 100)
        exact = effects.exact()
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoNormal(effects.model, create_plates=effects.plates)
        seconds = plain_svi(effects, guide, batches, 20_000, 0.02)
        normal.append([*effects.score(guide, exact), seconds])
        guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
        result = fit(effects.model, guide, batches, seed=seed, progress=False)
        flow.append([*effects.score(guide, exact), result.seconds])
        print(f"seed {seed}", normal[-1], flow[-1], flush=True)
    return HEADER, [spread_rows("AutoNormal, SVI", normal), spread_rows("AutoFlowGuide, fit", flow)]


def funnel(counts: Tensor) -> None:
    """500 groups around one mean with a small scale, centered, and Poisson counts."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(counts)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=counts)


def measure_funnel(seeds: int) -> tuple[Sequence[str], Rows]:
    """Centered Poisson hierarchy of 500 groups, tau 0.1, 3000 steps x 8 particles: ELBO above AutoNormal's."""
    guides: dict[str, Callable[[], AutoGuide]] = {
        "AutoNormal": lambda: AutoNormal(funnel),
        "AutoMultivariateNormal": lambda: AutoMultivariateNormal(funnel),
        "AutoFlowGuide": lambda: AutoFlowGuide(funnel),
        'AutoFlowGuide, structure="plates"': lambda: AutoFlowGuide(funnel, structure="plates"),
    }
    elbos: dict[str, list[float]] = {name: [] for name in guides}
    times: dict[str, list[float]] = {name: [] for name in guides}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.poisson((0.5 + 0.1 * torch.randn(500, generator=generator)).exp(), generator=generator)
        for name, make in guides.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = make()
            optim = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "T_max": 3000})
            svi = SVI(funnel, guide, optim, Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1))
            start = time.perf_counter()
            for _ in range(3000):
                svi.step(counts)
                optim.step()
            times[name].append((time.perf_counter() - start) / 3000)
            elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
            with torch.no_grad():
                elbos[name].append(-statistics.mean(elbo.loss(funnel, guide, counts) for _ in range(20)))
    rows = []
    for name in guides:
        gains = [mine - normal for mine, normal in zip(elbos[name], elbos["AutoNormal"], strict=True)]
        costs = [mine / normal for mine, normal in zip(times[name], times["AutoNormal"], strict=True)]
        rows.append([name, spread(gains), f"{statistics.median(costs):.2f}"])
    return ("guide", "nats above AutoNormal, median (range over seeds)", "step, x AutoNormal"), rows


def step_seconds(effects: Effects) -> Callable[[], float]:
    """Time of ``fit``'s step at mini-batches of 100 groups, over 200 steps at each call."""
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates).setup(torch.arange(100))
    objective = Objective(effects.model, guide, Batches(Shuffled(len(effects.y), 100), None))

    def measure() -> float:
        with sparse_tables(guide, enabled=True) as tables:
            trainer = Trainer(objective, 4, 1e-3, tables)
            trainer.cycle(50)
            trainer.state.step = 0
            start = time.perf_counter()
            trainer.cycle(200)
            return time.perf_counter() - start

    return measure


def measure_million(seeds: int) -> tuple[Sequence[str], Rows]:
    """A million groups, mini-batches of 10,000, fit as it is; and a step of 100 groups at 10^6 against 10^4."""
    scores = []
    for seed in range(seeds):
        effects = Effects.simulate(1_000_000, seed)
        guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
        result = fit(effects.model, guide, Shuffled(1_000_000, 10_000), seed=seed, progress=False)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        scores.append([*effects.score(guide, effects.exact()), result.seconds, memory])
        print(f"seed {seed}", scores[-1], flush=True)
    large, small = (step_seconds(Effects.simulate(count, 0)) for count in (1_000_000, 10_000))
    ratios = [large() / small() for _ in range(5)]
    row = [*spread_rows("AutoFlowGuide, fit", scores), spread(ratios)]
    return (*HEADER, "peak GiB", "step at 10^6 / at 10^4"), [row]


MEASURES: dict[str, Measure] = {
    "effects": measure_effects,
    "funnel": measure_funnel,
    "million": measure_million,
}


if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, 3).parse_args())
