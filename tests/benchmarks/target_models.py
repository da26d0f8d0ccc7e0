# SPDX-License-Identifier: Apache-2.0
"""Large and hard posteriors, as Pyro users write them: for one draw, with loops where users loop.

Data are simulated from the seed that a target's name is followed by in ``TARGETS``, or are scikit-learn's. What
``targets.py`` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """A model with its data.

    Args:
        model: As a user writes it.
        args: What it is called with.
        wanted: Largest gap that is wanted, in nats.
        seconds: Most seconds that are wanted.
        large: Whether it runs only if it is asked for.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    wanted: float
    seconds: float
    large: bool = False


# Regressions


def logistic(x: Tensor, y: Tensor, prior_sd: float) -> None:
    """Logistic regression."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), prior_sd).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, prior_sd))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


def sparse_logistic(x: Tensor, y: Tensor) -> None:
    """Logistic regression whose weights have Gamma scales, one each and one for all."""
    scale = pyro.sample("scale", dist.Gamma(0.5, 0.5))
    with pyro.plate("columns", x.shape[1]):
        scales = pyro.sample("scales", dist.Gamma(0.5, 0.5))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ (scale * scales * w)), obs=y)


def horseshoe(x: Tensor, y: Tensor, centered: bool) -> None:
    """Linear regression with a horseshoe prior."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("columns", x.shape[1]):
        scales = pyro.sample("scales", dist.HalfCauchy(1.0))
        if centered:
            beta = pyro.sample("beta", dist.Normal(0.0, tau * scales))
        else:
            beta = tau * scales * pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + x @ beta, sigma), obs=y)


def network(x: Tensor, y: Tensor) -> None:
    """Regression by 10 hidden units of 31 weights in all; noise of a known sd."""
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 10]).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([10, 1]).to_event(2))
    b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
    mean = ((x @ w1 + b1).tanh() @ w2).squeeze(-1) + b2
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def breast_cancer(prior_sd: float) -> tuple[Tensor, Tensor, float]:
    """scikit-learn's: 569 rows, 30 standardized columns."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.tensor(data.data)
    x = (x - x.mean(0)) / x.std(0)
    return x.float(), torch.tensor(data.target).float(), prior_sd


def correlated_columns(rows: int, columns: int, seed: int) -> tuple[Tensor, Generator]:
    """Standard normal, neighbours correlated by 0.8 as the bands of a signal are; and the generator."""
    generator = Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    x = [noise[:, 0]]
    for j in range(1, columns):
        x.append(0.8 * x[-1] + 0.6 * noise[:, j])
    return torch.stack(x, -1), generator


def classes(rows: int, columns: int, seed: int, num_relevant: int | None = None) -> tuple[Tensor, Tensor]:
    """Columns and classes of a logistic regression; ``num_relevant`` of its weights are not zero, all by default."""
    x, generator = correlated_columns(rows, columns, seed)
    w = torch.randn(columns, generator=generator)
    if num_relevant is not None:
        w = 2 * w * (torch.arange(columns) % (columns // num_relevant) == 0)
    return x, torch.bernoulli((x @ w).sigmoid(), generator=generator)


def sparse_rows(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Data of a linear regression in which five columns matter."""
    generator = Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    beta = torch.zeros(columns)
    beta[:5] = torch.tensor([2.0, -1.5, 1.0, 0.6, -0.3])
    return x, 1.0 + x @ beta + torch.randn(rows, generator=generator)


def curve(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Data of a regression on one input."""
    generator = Generator().manual_seed(seed)
    x = 4 * torch.rand(rows, 1, generator=generator) - 2
    return x, (2 * x).sin().squeeze(-1) + 0.1 * torch.randn(rows, generator=generator)


# Gaussian processes


def cox(counts: Tensor, factor: Tensor, mean: float) -> None:
    """Log-Gaussian Cox process, centered: the log intensity is the latent."""
    field = pyro.sample("field", dist.MultivariateNormal(torch.full((len(counts),), mean), scale_tril=factor))
    with pyro.plate("cells", len(counts)):
        pyro.sample("counts", dist.Poisson(field.exp() / len(counts)), obs=counts)


def cox_whitened(counts: Tensor, factor: Tensor, mean: float) -> None:
    """The same, whose latent is standard normal noise."""
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(counts)]).to_event(1))
    field = mean + factor @ noise
    with pyro.plate("cells", len(counts)):
        pyro.sample("counts", dist.Poisson(field.exp() / len(counts)), obs=counts)


def cox_cells(side: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Counts of ``side`` x ``side`` cells, the Cholesky factor of the field's covariance and its mean: the usual
    constants of the Finnish pine saplings, 126 points on average."""
    generator = Generator().manual_seed(seed)
    variance, scale, mean = 1.91, side / 33, math.log(126) - 1.91 / 2
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    factor = torch.linalg.cholesky(variance * (-torch.cdist(cells, cells) / scale).exp())
    field = mean + factor @ torch.randn(side**2, generator=generator).double()
    return torch.poisson(field.exp() / side**2, generator=generator).float(), factor.float(), mean


def kernel(x: Tensor, length: Tensor, amplitude: Tensor) -> Tensor:
    """Squared exponential, with jitter, ``(N, N)``."""
    squares = (x.unsqueeze(-1) - x).square()
    return amplitude**2 * (-squares / (2 * length**2)).exp() + 1e-4 * torch.eye(len(x))


def gp_latents(x: Tensor) -> Tensor:
    """Length scale, amplitude and values of a Gaussian process, centered, ``(N,)``."""
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))
    amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 0.5))
    return pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), kernel(x, length, amplitude)))


def gp_regression(x: Tensor, y: Tensor) -> None:
    """Gaussian process with noise of an unknown sd."""
    f = gp_latents(x)
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(f, sigma), obs=y)


def gp_classification(x: Tensor, y: Tensor) -> None:
    """Gaussian process for classes."""
    f = gp_latents(x)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=f), obs=y)


def gp_counts(x: Tensor, y: Tensor) -> None:
    """Gaussian process for counts."""
    f = gp_latents(x)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson((1.0 + f).exp()), obs=y)


def gp_rows(likelihood: str, seed: int) -> tuple[Tensor, Tensor]:
    """100 points, and observations at them: a ``"normal"``, ``"bernoulli"`` or ``"poisson"`` likelihood."""
    generator = Generator().manual_seed(seed)
    x = torch.rand(100, generator=generator).sort().values * 4 - 2
    f = 1.5 * (3 * x).sin()
    if likelihood == "normal":
        return x, f + 0.3 * torch.randn(100, generator=generator)
    if likelihood == "bernoulli":
        return x, torch.bernoulli((2 * f).sigmoid(), generator=generator)
    return x, torch.poisson((1 + f).exp(), generator=generator)


# Time series


def volatility(returns: Tensor) -> None:
    """Stochastic volatility, after Stan's user's guide: an autoregression of the log variance, non-centered."""
    mean = pyro.sample("mean", dist.Cauchy(0.0, 5.0))
    persistence = 2 * pyro.sample("persistence", dist.Beta(20.0, 1.5)) - 1
    scale = pyro.sample("scale", dist.HalfCauchy(2.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(returns)]).to_event(1))
    h = scale * noise[0] / (1 - persistence**2).sqrt()
    log_variances = [h]
    for t in range(1, len(returns)):
        h = persistence * h + scale * noise[t]
        log_variances.append(h)
    sd = ((mean + torch.stack(log_variances)) / 2).exp()
    with pyro.plate("days", len(returns)):
        pyro.sample("returns", dist.Normal(0.0, sd), obs=returns)


def volatility_walk(returns: Tensor) -> None:
    """Stochastic volatility, after NumPyro's example: a random walk of the log variance, a site a day, and Student-t
    returns."""
    scale = pyro.sample("scale", dist.Exponential(50.0))
    df = pyro.sample("df", dist.Exponential(0.1))
    h = torch.tensor(0.0)
    for t in pyro.markov(range(len(returns))):
        h = pyro.sample(f"h_{t}", dist.Normal(h, scale))
        pyro.sample(f"return_{t}", dist.StudentT(df, 0.0, (h / 2).exp()), obs=returns[t])


def returns(days: int, seed: int) -> Tensor:
    """Daily returns in percent."""
    generator = Generator().manual_seed(seed)
    noise = torch.randn(2, days, generator=generator)
    h, found = torch.tensor(0.0), []
    for t in range(days):
        h = 0.95 * h + 0.25 * noise[0, t]
        found.append((h / 2).exp() * noise[1, t])
    return torch.stack(found)


def local_linear_trend(y: Tensor) -> None:
    """A level that follows a slope that walks, non-centered, by a loop; as in structural time series."""
    scales = pyro.sample("scales", dist.HalfNormal(torch.tensor([1.0, 0.1])).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(y), 2]).to_event(2))
    level = slope = torch.tensor(0.0)
    levels = []
    for t in range(len(y)):
        slope = slope + scales[1] * noise[t, 1]
        level = level + slope + scales[0] * noise[t, 0]
        levels.append(level)
    pyro.sample("y", dist.Normal(torch.stack(levels), sd).to_event(1), obs=y)


def trend_rows(days: int, seed: int) -> Tensor:
    """A trend of a standard deviation of 0.05 a day in the slope, seen with noise of 1."""
    noise = torch.randn(2, days, generator=Generator().manual_seed(seed))
    return (0.05 * noise[0]).cumsum(0).cumsum(0) + noise[1]


def random_walk(y: Tensor, times: list[int]) -> None:
    """Brownian motion with unknown scales, of which some steps are not observed; 30 steps."""
    innovation = pyro.sample("innovation", dist.LogNormal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 2.0))
    x = torch.tensor(0.0)
    for t in range(30):
        x = pyro.sample(f"x_{t}", dist.Normal(x, innovation))
        if t in times:
            pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])


def walk(seed: int) -> tuple[Tensor, list[int]]:
    """A path with noise, and the steps that are observed: all but the middle third."""
    generator = Generator().manual_seed(seed)
    path = 0.1 * torch.randn(30, generator=generator).cumsum(0)
    return path + 0.15 * torch.randn(30, generator=generator), [*range(10), *range(20, 30)]


def lorenz_step(state: Tensor) -> Tensor:
    """Where the Lorenz system goes in 0.02 units of time."""
    x, y, z = state
    return state + 0.02 * torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def lorenz_bridge(y: Tensor, times: list[int]) -> None:
    """A chaotic system with noise, of which one coordinate is observed, not in the middle third; 30 steps."""
    innovation = pyro.sample("innovation", dist.LogNormal(-1.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    state = pyro.sample("state_0", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for t in range(30):
        if t > 0:
            state = pyro.sample(f"state_{t}", dist.Normal(lorenz_step(state), 0.02**0.5 * innovation).to_event(1))
        if t in times:
            pyro.sample(f"y_{t}", dist.Normal(state[0], noise), obs=y[t])


def lorenz_path(seed: int) -> tuple[Tensor, list[int]]:
    """Data of :func:`lorenz_bridge`."""
    generator = Generator().manual_seed(seed)
    state, found = torch.randn(3, generator=generator), []
    for t in range(30):
        if t > 0:
            state = lorenz_step(state) + 0.02**0.5 * 0.1 * torch.randn(3, generator=generator)
        found.append(state[0] + torch.randn((), generator=generator))
    return torch.stack(found), [*range(10), *range(20, 30)]


# Many effects


def item_response(student: Tensor, item: Tensor, y: Tensor, slopes: bool) -> None:
    """Abilities of students and difficulties of items; with a slope of each item if ``slopes``."""
    mean = pyro.sample("mean", dist.Normal(0.75, 1.0))
    with pyro.plate("students", int(student.max()) + 1):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", int(item.max()) + 1):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        if slopes:
            slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    logits = mean + ability[student] - difficulty[item]
    if slopes:
        logits = slope[item] * logits
    with pyro.plate("answers", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def answers(students: int, items: int, share: float, slopes: bool, seed: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Which students answered which items, and whether right; ``share`` of all pairs."""
    generator = Generator().manual_seed(seed)
    asked = torch.rand(students, items, generator=generator) < share
    student, item = asked.nonzero(as_tuple=True)
    ability, difficulty = torch.randn(students, generator=generator), torch.randn(items, generator=generator)
    slope = (0.3 * torch.randn(items, generator=generator)).exp() if slopes else torch.ones(items)
    logits = slope[item] * (0.75 + ability[student] - difficulty[item])
    return student, item, torch.bernoulli(logits.sigmoid(), generator=generator), slopes


def crossed(a: Tensor, b: Tensor, y: Tensor) -> None:
    """Two crossed factors, centered, and noise, of unknown sds."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    sd_a = pyro.sample("sd_a", dist.HalfNormal(1.0))
    sd_b = pyro.sample("sd_b", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("a", int(a.max()) + 1):
        effect_a = pyro.sample("effect_a", dist.Normal(0.0, sd_a))
    with pyro.plate("b", int(b.max()) + 1):
        effect_b = pyro.sample("effect_b", dist.Normal(0.0, sd_b))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + effect_a[a] + effect_b[b], sigma), obs=y)


def crossed_rows(num_a: int, num_b: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels drawn at random, each at least once, and observations."""
    generator = Generator().manual_seed(seed)
    a, b = (
        torch.cat([torch.arange(num), torch.randint(num, (rows - num,), generator=generator)])[
            torch.randperm(rows, generator=generator)
        ]
        for num in (num_a, num_b)
    )
    effect_a, effect_b = torch.randn(num_a, generator=generator), 0.5 * torch.randn(num_b, generator=generator)
    return a, b, 1.0 + effect_a[a] + effect_b[b] + 0.7 * torch.randn(rows, generator=generator)


def bym2(counts: Tensor, expected: Tensor, edges: Tensor) -> None:
    """Disease mapping: effects of regions are a mix of an intrinsic autoregression and of independent ones."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rho = pyro.sample("rho", dist.Beta(0.5, 0.5))
    with pyro.plate("independent", len(counts)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 10.0).expand([len(counts)]).to_event(1))
    pyro.factor("neighbours", -0.5 * (phi[edges[0]] - phi[edges[1]]).square().sum())
    pyro.factor("sum to zero", dist.Normal(0.0, 0.001 * len(counts)).log_prob(phi.sum()))
    effect = sigma * ((1 - rho).sqrt() * theta + rho.sqrt() * phi)
    with pyro.plate("regions", len(counts)):
        pyro.sample("counts", dist.Poisson(expected * (intercept + effect).exp()), obs=counts)


def grid_map(side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, expected counts and pairs of neighbours ``(2, E)`` of ``side`` x ``side`` regions."""
    generator = Generator().manual_seed(seed)
    number = torch.arange(side**2).view(side, side)
    across, down = (number[:, :-1], number[:, 1:]), (number[:-1], number[1:])
    edges = torch.stack([torch.cat([across[i].flatten(), down[i].flatten()]) for i in (0, 1)])
    row, column = torch.meshgrid(*2 * [torch.linspace(-1, 1, side)], indexing="ij")
    effect = 0.6 * (2 * row + column).sin().flatten() + 0.2 * torch.randn(side**2, generator=generator)
    expected = 2 + 8 * torch.rand(side**2, generator=generator)
    return torch.poisson(expected * effect.exp(), generator=generator), expected, edges


# Several modes


def modes(weights: Tensor, locs: Tensor, sds: Tensor) -> None:
    """A potential with several modes under a wide normal prior."""
    z = pyro.sample("z", dist.Normal(torch.zeros(locs.shape[-1]), 10.0).to_event(1))
    pyro.factor("potential", (weights.log() + dist.Normal(locs, sds).to_event(1).log_prob(z)).logsumexp(-1))


def mixture_modes(weights: list[float], dim: int, distance: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, locations on a sphere and sds of normal modes, about ``distance`` from the origin."""
    generator = Generator().manual_seed(seed)
    direction = torch.linalg.qr(torch.randn(max(dim, 2), dim, generator=generator)).Q
    angles = torch.arange(len(weights)) * 2 * math.pi / len(weights)
    locs = distance * (angles.cos().unsqueeze(-1) * direction[0] + angles.sin().unsqueeze(-1) * direction[1])
    return torch.tensor(weights), locs, 0.5 + torch.rand(len(weights), dim, generator=generator)


def mixture(y: Tensor) -> None:
    """A normal mixture of three components in 1-D, assignments summed out: six modes."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, sd)), obs=y)


def three_clusters(rows: int, seed: int) -> Tensor:
    """Data of :func:`mixture`."""
    generator = Generator().manual_seed(seed)
    locs, weights = torch.tensor([-3.0, 0.0, 4.0]), torch.tensor([0.3, 0.3, 0.4])
    cluster = torch.multinomial(weights, rows, replacement=True, generator=generator)
    return locs[cluster] + 0.7 * torch.randn(rows, generator=generator)


def one_factor(y: Tensor) -> None:
    """A factor model of one factor, whose sign is free: two modes."""
    loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([y.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        score = pyro.sample("score", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(score.unsqueeze(-1) * loadings, sigma).to_event(1), obs=y)


def factor_rows(rows: int, columns: int, seed: int) -> Tensor:
    """Data of :func:`one_factor`."""
    generator = Generator().manual_seed(seed)
    loadings = 1.0 - 0.4 * torch.arange(columns)
    score = torch.randn(rows, 1, generator=generator)
    return score * loadings + 0.5 * torch.randn(rows, columns, generator=generator)


# Name -> target, made when it is asked for.
TARGETS: dict[str, Callable[[], Target]] = {
    "logistic, breast cancer, N(0, 10)": lambda: Target(logistic, breast_cancer(10.0), 0.05, 60),
    "logistic, breast cancer, N(0, 1)": lambda: Target(logistic, breast_cancer(1.0), 0.05, 60),
    "logistic, simulated (61), N(0, 1)": lambda: Target(logistic, (*classes(208, 60, 61), 1.0), 0.05, 60),
    "logistic, simulated (25), N(0, 10)": lambda: Target(logistic, (*classes(1000, 24, 25), 10.0), 0.05, 60),
    "Cox process, centered (1)": lambda: Target(cox, cox_cells(40, 1), 2.0, 120),
    "Cox process, whitened (1)": lambda: Target(cox_whitened, cox_cells(40, 1), 2.0, 120),
    "volatility, 100 days (2)": lambda: Target(volatility, (returns(100, 2),), 0.05, 60),
    "volatility, 100 days, a site a day (2)": lambda: Target(volatility_walk, (returns(100, 2),), 0.05, 60),
    "volatility, 2500 days (3)": lambda: Target(volatility, (returns(2500, 3),), 1.0, 300, large=True),
    "local linear trend, 100 days (25)": lambda: Target(local_linear_trend, (trend_rows(100, 25),), 0.05, 60),
    "Gaussian process, regression (4)": lambda: Target(gp_regression, gp_rows("normal", 4), 0.05, 60),
    "Gaussian process, classes (5)": lambda: Target(gp_classification, gp_rows("bernoulli", 5), 0.05, 60),
    "Gaussian process, counts (6)": lambda: Target(gp_counts, gp_rows("poisson", 6), 0.05, 60),
    "item response, 1PL (7)": lambda: Target(item_response, answers(400, 100, 0.75, False, 7), 0.05, 60),
    "item response, 2PL (8)": lambda: Target(item_response, answers(420, 40, 1.0, True, 8), 0.05, 60),
    "item response, 2PL (9)": lambda: Target(item_response, answers(1900, 50, 1.0, True, 9), 0.2, 180, large=True),
    "crossed effects, 40 x 45 (10)": lambda: Target(crossed, crossed_rows(40, 45, 400, 10), 0.05, 60),
    "crossed effects, 500 x 500 (11)": lambda: Target(crossed, crossed_rows(500, 500, 5000, 11), 0.5, 300, large=True),
    "horseshoe, centered (12)": lambda: Target(horseshoe, (*sparse_rows(100, 25, 12), True), 0.3, 60),
    "horseshoe, non-centered (12)": lambda: Target(horseshoe, (*sparse_rows(100, 25, 12), False), 0.3, 60),
    "sparse logistic, 25 columns (13)": lambda: Target(sparse_logistic, classes(1000, 25, 13, 5), 0.3, 60),
    "sparse logistic, 61 columns (14)": lambda: Target(sparse_logistic, classes(208, 61, 14, 6), 0.3, 60),
    "random walk (15)": lambda: Target(random_walk, walk(15), 0.01, 60),
    "chaotic bridge (16)": lambda: Target(lorenz_bridge, lorenz_path(16), 0.05, 60),
    "two modes, 2-D (17)": lambda: Target(modes, mixture_modes([0.7, 0.3], 2, 5.0, 17), 0.05, 60),
    "three modes, 2-D (18)": lambda: Target(modes, mixture_modes([0.5, 0.3, 0.2], 2, 6.0, 18), 0.05, 60),
    "two modes, 20-D (19)": lambda: Target(modes, mixture_modes([0.6, 0.4], 20, 6.0, 19), 0.05, 60),
    "three modes, 20-D (20)": lambda: Target(modes, mixture_modes([0.5, 0.3, 0.2], 20, 8.0, 20), 0.05, 60),
    "label switching, K = 3 (21)": lambda: Target(mixture, (three_clusters(60, 21),), 0.05, 60),
    "sign flips, one factor (22)": lambda: Target(one_factor, (factor_rows(30, 5, 22),), 0.05, 60),
    "network, 31 weights (23)": lambda: Target(network, curve(40, 23), 1.0, 60),
    "BYM2, 8 x 8 map (24)": lambda: Target(bym2, grid_map(8, 24), 0.05, 60),
}
