# SPDX-License-Identifier: Apache-2.0
"""Thirty small targets: does the swap ever cost anything?

    python tests/benchmarks/never_worse.py [--only NAME ...] [--seeds 5] [--write]

``fit(model, AutoFlowGuide(model))`` with nothing set, against ``AutoNormal`` and ``AutoMultivariateNormal`` that
``fit`` trains until they have had as many seconds. ELBOs of 20,000 fresh draws each; a loss is significant if it is
beyond alpha = 0.01, corrected for the number of comparisons. Run by hand, never by pytest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from tables import TABLES, as_rst

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.diagnostics import log_weights

DRAWS = 20_000
ALPHA = 0.01
PEERS: dict[str, Callable[[Callable], AutoGuide]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}
Model = Callable[[], None]


def gaussian(dim: int, condition: float) -> Model:
    """Random rotation, variances spread evenly in the log from 1 down to ``1 / condition``."""
    generator = torch.Generator().manual_seed(dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.double)).Q
    scales = torch.logspace(0.0, -0.5 * math.log10(condition), dim, dtype=torch.double)
    factor = torch.linalg.qr((rotation * scales).mT).R.mT  # lower triangular, up to the signs of its columns
    factor = factor * factor.diagonal().sign()
    target = dist.MultivariateNormal(torch.ones(dim), scale_tril=factor.float())
    return partial(density, target)


def density(target: dist.Distribution) -> None:
    """The target as a prior, with no data."""
    pyro.sample("z", target)


def banana(bend: float) -> None:
    """A Gaussian bent along a parabola."""
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(bend * x**2, 1.0))


def twisted() -> None:
    """A banana whose bend is not in the order of its sites."""
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    pyro.factor("bend", -0.5 * (y**2 - 4.0) ** 2 / 16.0)
    pyro.sample("x", dist.Normal(y, 0.5))


def funnel(dim: int) -> None:
    """Neal's funnel."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("dims", dim - 1):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def mixture(apart: float) -> None:
    """Two normals."""
    components = dist.Normal(torch.tensor([-apart, apart]), 1.0)
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)
    prior = dist.Normal(0.0, 10.0)  # a mixture itself has a support that no guide of Pyro's knows
    z = pyro.sample("z", prior)
    pyro.factor("mixture", target.log_prob(z) - prior.log_prob(z))


def logistic(dim: int, rows: int, separation: float) -> Model:
    """Logistic regression; a large separation makes posteriors skew."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, dim, generator=generator)
    y = (torch.rand(rows, generator=generator) < (separation * x.sum(-1)).sigmoid()).float()

    def model() -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(dim), 2.5).to_event(1))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Bernoulli(logits=(x * slope.unsqueeze(-2)).sum(-1)), obs=y)

    return model


def poisson(rows: int) -> Model:
    """Poisson regression with a random effect for each row."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, generator=generator)
    y = torch.poisson((0.5 + 0.6 * x + 0.5 * torch.randn(rows, generator=generator)).exp(), generator=generator)

    def model() -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("rows", rows):
            effect = pyro.sample("effect", dist.Normal(0.0, spread))
            pyro.sample("y", dist.Poisson((intercept + slope * x + effect).exp()), obs=y)

    return model


def linear(dim: int, correlation: float) -> Model:
    """Linear regression with correlated covariates and unknown noise."""
    generator = torch.Generator().manual_seed(dim)
    common = torch.randn(60, 1, generator=generator)
    x = correlation**0.5 * common + (1 - correlation) ** 0.5 * torch.randn(60, dim, generator=generator)
    y = x.sum(-1) + torch.randn(60, generator=generator)

    def model() -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(dim), 5.0).to_event(1))
        noise = pyro.sample("noise", dist.HalfCauchy(1.0))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal((x * slope.unsqueeze(-2)).sum(-1), noise.unsqueeze(-1)), obs=y)

    return model


def hierarchy(groups: int, scale: float) -> Model:
    """Centered random effects."""
    generator = torch.Generator().manual_seed(groups)
    y = 1.0 + scale * torch.randn(groups, generator=generator) + torch.randn(groups, generator=generator)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(2.0))
        with pyro.plate("groups", groups):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    return model


def counts(total: float) -> None:
    """A simplex, and what was counted."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    pyro.sample(
        "n", dist.Multinomial(probs=share, total_count=int(total)), obs=torch.tensor([0.6, 0.3, 0.1, 0.0]) * total
    )


def ordered() -> None:
    """Cut points in order."""
    cuts = pyro.sample("cuts", dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 2.0).to_event(1), [dist.transforms.OrderedTransform()]))  # fmt: skip
    pyro.factor("pull", -0.5 * (cuts - torch.tensor([-1.0, 0.0, 3.0])).square().sum(-1))


def bounded() -> None:
    """Mass at the edge of an interval, and a rate near zero."""
    p = pyro.sample("p", dist.Beta(0.5, 3.0))
    rate = pyro.sample("rate", dist.Gamma(0.7, 1.0))
    pyro.sample("y", dist.Normal(p * rate, 0.3), obs=torch.tensor(0.1))


def correlations() -> None:
    """A Cholesky factor of a correlation matrix."""
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.5))
    pyro.factor("pull", 3.0 * factor[..., 1, 0] - 2.0 * factor[..., 2, 1])


def student(df: float, dim: int) -> None:
    """Heavy tails."""
    with pyro.plate("dims", dim):
        pyro.sample("z", dist.StudentT(df, 0.0, 1.0))


TARGETS: dict[str, Model] = {
    "gaussian 2-D": gaussian(2, 10.0),
    "gaussian 10-D, condition 1e3": gaussian(10, 1e3),
    "gaussian 10-D, condition 1e6": gaussian(10, 1e6),
    "gaussian 50-D, condition 1e4": gaussian(50, 1e4),
    "normal 1-D": lambda: density(dist.Normal(3.0, 0.01)),
    "gamma 1-D": lambda: density(dist.Gamma(0.5, 1.0)),
    "beta 1-D": lambda: density(dist.Beta(0.5, 0.5)),
    "gumbel 1-D": lambda: density(dist.Gumbel(0.0, 1.0)),
    "banana, slight": partial(banana, 0.1),
    "banana, strong": partial(banana, 1.0),
    "two bends": twisted,
    "funnel 2-D": partial(funnel, 2),
    "funnel 10-D": partial(funnel, 10),
    "mixture, close": partial(mixture, 1.0),
    "mixture, apart": partial(mixture, 4.0),
    "student-t 3, 1-D": partial(student, 3.0, 1),
    "student-t 5, 5-D": partial(student, 5.0, 5),
    "logistic 3-D": logistic(3, 50, 1.0),
    "logistic 10-D, separated": logistic(10, 30, 4.0),
    "logistic 20-D": logistic(20, 400, 0.5),
    "poisson with effects, 20 rows": poisson(20),
    "poisson with effects, 60 rows": poisson(60),
    "linear 5-D, correlation 0.99": linear(5, 0.99),
    "linear 20-D": linear(20, 0.5),
    "hierarchy, 5 groups": hierarchy(5, 0.1),
    "hierarchy, 40 groups": hierarchy(40, 2.0),
    "simplex": partial(counts, 20.0),
    "ordered": ordered,
    "interval and rate": bounded,
    "correlation matrix": correlations,
}


def elbo(model: Model, guide: AutoGuide) -> tuple[float, float]:
    """Mean and standard error."""
    weights, _ = log_weights(model, guide, DRAWS)
    return weights.mean().item(), weights.std().item() / math.sqrt(DRAWS)


def run(model: Model, seed: int) -> dict[str, tuple[float, float, float]]:
    """ELBO, standard error and seconds of each guide."""
    scores = {}
    budget = 0.0
    for name, make in {"AutoFlowGuide": AutoFlowGuide, **PEERS}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = make(model)
        begin = time.perf_counter()
        rounds = 0
        while rounds == 0 or (time.perf_counter() - begin < budget and rounds < 3):
            fit(model, guide, seed=seed + rounds, progress=False)
            rounds += 1
        seconds = time.perf_counter() - begin
        budget = budget or seconds
        scores[name] = (*elbo(model, guide), seconds)
    return scores


def main() -> None:
    """Run, print a line each, and write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="*", default=list(TARGETS), choices=list(TARGETS), metavar="NAME")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--write", action="store_true", help="write docs/tables/never_worse.rst")
    options = made.parse_args()
    torch.set_num_threads(1)
    critical = statistics.NormalDist().inv_cdf(1 - ALPHA / (len(options.only) * options.seeds * len(PEERS)))
    rows, losses = [], 0
    for title in options.only:
        gains: dict[str, list[float]] = {name: [] for name in PEERS}
        seconds, worst = [], math.inf
        for seed in range(options.seeds):
            scores = run(TARGETS[title], seed)
            mean, error, took = scores["AutoFlowGuide"]
            seconds.append(took)
            for name in PEERS:
                gain = mean - scores[name][0]
                # A guide that has the posterior itself has weights equal to rounding of float32.
                worst = min(worst, gain / (math.hypot(error, scores[name][1]) + 1e-6 * (1 + abs(mean))))
                gains[name].append(gain)
        losses += not worst > -critical
        cells = [f"{statistics.median(g):+.3f} ({min(g):+.3f})" for g in gains.values()]
        rows.append([title, *cells, f"{worst:+.1f}", f"{statistics.median(seconds):.0f}"])
        print("  ".join(rows[-1]), flush=True)
    print(f"{losses} of {len(rows)} targets with a significant loss (z below {-critical:.1f})", file=sys.stderr)
    header = ("target", *(f"gain over {name}: median (least)" for name in PEERS), "least z", "seconds")
    if options.write:
        (TABLES / "never_worse.rst").write_text(as_rst(header, rows))


if __name__ == "__main__":
    main()
