# SPDX-License-Identifier: Apache-2.0
"""Client programs, after Pyro's tutorials and examples and as users write them: what ``swap.py`` swaps guides in.

Nobody here thinks of guides. Models are written for one particle (``x @ w``, ``a[group]``, loops over time);
optimizers, rates and steps are the authors'. Data are simulated from seeds of their own, so that a run's seed is the
guide's, or are small and well known. A client's program is built when it is run; the table is at the end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import optim, poutine
from pyro.contrib.forecast import ForecastingModel
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import init_to_feasible, init_to_median, init_to_sample
from pyro.infer.reparam import DiscreteCosineReparam, LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.tensor_utils import periodic_features, periodic_repeat
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

__all__ = ["CLIENTS", "Client", "Program", "eight_schools", "linear_regression"]

Model = Callable[..., Any]


@dataclass(frozen=True)
class Program:
    """A model and what it is called with.

    Args:
        model: The model; networks in it are fresh.
        args: Its arguments.
        batches: Makes the arguments of one step instead, from a generator.
        baseline: A guide written by hand in place of ``AutoNormal``.
        flow_options: Options that only ``AutoFlowGuide`` has.
    """

    model: Model
    args: tuple[Any, ...] = ()
    batches: Callable[[Generator], tuple[Any, ...]] | None = None
    baseline: Callable[..., Any] | None = None
    flow_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """A training loop.

    Args:
        name: In its author's words, with optimizer and rate.
        build: Makes data, networks and model; called after the run's seed is set.
        optimizer: Makes a fresh optimizer, of Pyro or, in a loop of torch, of the parameters.
        steps: Steps of it.
        loss: Makes the ELBO.
        guide_options: Options of the guide, of those that a guide has.
        expose: The sites that the guide is for, where others are enumerated.
        peers: Whether ``AutoMultivariateNormal`` and ``AutoIAFNormal`` can be had.
        torch_loop: Whether the loop is ``loss.backward()`` and an optimizer of torch.
    """

    name: str
    build: Callable[[], Program]
    optimizer: Callable[..., Any]
    steps: int
    loss: Callable[[], ELBO] = Trace_ELBO
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    expose: tuple[str, ...] = ()
    peers: bool = True
    torch_loop: bool = False


def simulate(*shape: int, seed: int) -> tuple[Tensor, Generator]:
    """Standard normal covariates, and the generator for what follows."""
    generator = Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), generator


def noise(like: Tensor, generator: Generator) -> Tensor:
    """Standard normal, of that shape."""
    return torch.randn(like.shape, generator=generator)


# Regressions


@functools.cache
def terrain() -> tuple[Tensor, Tensor, Tensor]:
    """170 countries: on a continent or not, a skew covariate, and an outcome of both and their product."""
    z, generator = simulate(170, seed=1)
    on_continent = (torch.rand(170, generator=generator) < 0.3).float()
    ruggedness = (0.7 * z).exp()
    income = 9.2 - 1.85 * on_continent - 0.2 * ruggedness + 0.35 * on_continent * ruggedness
    return on_continent, ruggedness, income + 0.93 * noise(z, generator)


def linear_regression(prior: dist.Distribution | None = None) -> Program:
    """Five scalar sites."""
    on_continent, ruggedness, income = terrain()
    spread = prior or dist.Uniform(0.0, 10.0)

    def model(on_continent: Tensor, ruggedness: Tensor, income: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b_continent = pyro.sample("b_continent", dist.Normal(0.0, 1.0))
        b_rugged = pyro.sample("b_rugged", dist.Normal(0.0, 1.0))
        b_both = pyro.sample("b_both", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", spread)
        mean = a + b_continent * on_continent + b_rugged * ruggedness + b_both * on_continent * ruggedness
        with pyro.plate("countries", len(income)):
            pyro.sample("income", dist.Normal(mean, sigma), obs=income)

    return Program(model, (on_continent, ruggedness, income))


def logistic_regression() -> Program:
    """25 coefficients in one site, 400 rows."""
    x, generator = simulate(400, 25, seed=2)
    w = 0.8 * torch.randn(25, generator=generator)
    y = torch.bernoulli((x @ w).sigmoid(), generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(25), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    return Program(model, (x, y))


def poisson_effects() -> Program:
    """Counts with an effect for each of 60 rows."""
    x, generator = simulate(60, seed=4)
    y = torch.poisson((1.0 + 0.6 * x + 0.5 * noise(x, generator)).exp(), generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            effect = pyro.sample("effect", dist.Normal(0.0, spread))
            pyro.sample("y", dist.Poisson((intercept + slope * x + effect).exp()), obs=y)

    return Program(model, (x, y))


def horseshoe_counts(*, centered: bool = True) -> Program:
    """Counts, of which few of 20 covariates tell anything."""
    x, generator = simulate(100, 20, seed=5)
    y = torch.poisson((0.5 + 0.8 * x[:, 0] - 0.6 * x[:, 1]).exp(), generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        with pyro.plate("features", x.shape[1]):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            if centered:
                beta = pyro.sample("beta", dist.Normal(0.0, tau * local))
            else:
                beta = tau * local * pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((intercept + x @ beta).exp()), obs=y)

    return Program(model, (x, y))


def ordinal_regression() -> Program:
    """Answers on a scale of five."""
    x, generator = simulate(200, 3, seed=6)
    score = x @ torch.tensor([1.0, -0.5, 0.0]) + torch.logit(torch.rand(200, generator=generator))
    y = (score.unsqueeze(-1) > torch.tensor([-2.0, -0.5, 0.5, 2.0])).sum(-1)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        base = dist.Normal(torch.linspace(-2.0, 2.0, 4), 2.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
        with pyro.plate("people", len(x)):
            pyro.sample("y", dist.OrderedLogistic(x @ beta, cuts), obs=y)

    return Program(model, (x, y))


class Network(PyroModule):
    """1 - 20 - 20 - 1 with a prior on each weight."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 20, 20, 1]
        layers = [PyroModule[nn.Linear](a, b) for a, b in itertools.pairwise(widths)]
        for layer in layers:
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))
        self.layers = PyroModule[nn.ModuleList](layers)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = x.unsqueeze(-1)
        for layer in list(self.layers)[:-1]:
            hidden = layer(hidden).tanh()
        mean = self.layers[-1](hidden).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)
        return mean


def neural_network() -> Program:
    """481 weights, 100 points of a sine."""
    z, generator = simulate(100, seed=7)
    x = torch.linspace(-2.0, 2.0, 100)
    return Program(Network(), (x, (3 * x).sin() + 0.3 * x + 0.1 * noise(z, generator)))


# Hierarchies


SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])  # Rubin, 1981
HITS = torch.tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])  # Efron and Morris, 1975


def eight_schools() -> Program:
    """The centered form."""

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return Program(model, SCHOOLS)


def eight_schools_non_centered() -> Program:
    """As samplers prefer it."""

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    return Program(model, SCHOOLS)


def baseball() -> Program:
    """18 players who batted 45 times, partially pooled."""

    def model(hits: Tensor) -> None:
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", len(hits)):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(45, phi), obs=hits)

    return Program(model, (HITS,))


def random_slopes(*, centered: bool = True) -> Program:
    """25 groups of 8 rows, each with a slope."""
    x, generator = simulate(200, seed=8)
    group = torch.arange(200) % 25
    slopes = 1.0 + 0.5 * torch.randn(25, generator=generator)
    y = 0.3 + slopes[group] * x + 0.5 * noise(x, generator)

    def model(x: Tensor, group: Tensor, y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", 25):
            if centered:
                beta = pyro.sample("beta", dist.Normal(mu, tau))
            else:
                beta = mu + tau * pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(alpha + beta[group] * x, sigma), obs=y)

    return Program(model, (x, group, y))


def bugs_hierarchy(spread: Callable[[str], Tensor]) -> Program:
    """30 groups of 5, and priors said to say nothing; ``spread`` samples a standard deviation."""
    z, generator = simulate(30, seed=9)
    group = torch.arange(150) % 30
    y = 10.0 + 2.0 * z[group] + noise(group, generator)

    def model(group: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        between, within = spread("between"), spread("within")
        with pyro.plate("groups", 30):
            theta = pyro.sample("theta", dist.Normal(mu, between))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(theta[group], within), obs=y)

    return Program(model, (group, y))


def by_precision(name: str) -> Tensor:
    """A standard deviation by BUGS' prior of its precision."""
    return pyro.sample(name, dist.Gamma(0.001, 0.001)).rsqrt()


def by_variance(name: str) -> Tensor:
    """A standard deviation by the same prior, of a variance."""
    return pyro.sample(name, dist.InverseGamma(0.001, 0.001)).sqrt()


def correlated_effects() -> Program:
    """Intercepts and slopes of 20 groups, correlated through an LKJ prior."""
    z, generator = simulate(20, 2, seed=10)
    effects = z @ torch.tensor([[1.0, -0.6], [0.0, 0.5]])
    group = torch.arange(160) % 20
    x = torch.randn(160, generator=generator)
    y = effects[group, 0] + effects[group, 1] * x + 0.4 * noise(x, generator)

    def model(x: Tensor, group: Tensor, y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2)).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", 20):
            effect = pyro.sample("effect", dist.MultivariateNormal(loc, scale_tril=torch.diag(scale) @ factor))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(effect[group, 0] + effect[group, 1] * x, sigma), obs=y)

    return Program(model, (x, group, y))


GROUPS, GROUP_BATCH = 400, 50


def group_plate(*args: Any) -> pyro.plate:
    """The subsample that guide and model share."""
    return pyro.plate("groups", GROUPS, subsample_size=GROUP_BATCH, dim=-1)


def subsampled_groups() -> Program:
    """400 groups, 50 at a step."""
    z, generator = simulate(GROUPS, seed=11)
    y = 2.0 + 0.7 * z.unsqueeze(-1) + torch.randn(GROUPS, 4, generator=generator)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with group_plate() as index:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), sigma).expand([len(index), 4]).to_event(1), obs=y[index])

    return Program(model, (y,))


def lineages() -> Program:
    """A tutorial's work flow: shares of 25 strains in 24 places over 12 weeks, by rates that 60 mutations explain."""
    places, strains, mutations, weeks = 24, 25, 60, 12
    z, generator = simulate(strains, mutations, seed=12)
    features = (z > 0.8).float()
    coef = 0.15 * torch.randn(mutations, generator=generator)
    rate = features @ coef + 0.05 * torch.randn(places, strains, generator=generator)
    start = -1.0 + torch.randn(places, strains, generator=generator)
    time = torch.arange(weeks) - 0.5 * (weeks - 1)
    logits = start + rate * time[:, None, None]
    counts = torch.poisson(200 * logits.softmax(-1), generator=generator)

    def model(features: Tensor, counts: Tensor) -> None:
        coef_scale = pyro.sample("coef_scale", dist.LogNormal(-2.0, 1.0))
        rate_scale = pyro.sample("rate_scale", dist.LogNormal(-4.0, 2.0))
        start_scale = pyro.sample("start_scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("mutations", mutations):
            coef = pyro.sample("coef", dist.Laplace(0.0, coef_scale))
        strain_plate, place_plate = pyro.plate("strains", strains, dim=-1), pyro.plate("places", places, dim=-2)
        with strain_plate:
            rate_loc = pyro.sample("rate_loc", dist.Normal(features @ coef, rate_scale))
            start_loc = pyro.sample("start_loc", dist.Normal(0.0, start_scale))
        with place_plate, strain_plate:
            rate = pyro.sample("rate", dist.Normal(rate_loc, rate_scale))
            start = pyro.sample("start", dist.Normal(start_loc, start_scale))
        logits = start + rate * time[:, None, None]
        with pyro.plate("weeks", weeks, dim=-2), pyro.plate("observed places", places, dim=-1):
            multinomial = dist.Multinomial(total_count=int(counts.sum(-1).max()), logits=logits, validate_args=False)
            pyro.sample("counts", multinomial, obs=counts)

    return Program(model, (features, counts))


# Growth and epidemics


def curve(t: Tensor, capacity: Tensor, rate: Tensor, midpoint: Tensor) -> Tensor:
    """Logistic growth."""
    return capacity * (rate * (t - midpoint)).sigmoid()


def growth() -> Program:
    """One curve, and noise with heavy tails."""
    z, generator = simulate(40, seed=13)
    t = torch.arange(40.0)
    y = curve(t, *torch.tensor([50.0, 0.25, 18.0])) + 1.5 * z / (0.5 + noise(z, generator).abs())

    def model(t: Tensor, y: Tensor) -> None:
        capacity = pyro.sample("capacity", dist.LogNormal(math.log(40.0), 1.0))
        rate = pyro.sample("rate", dist.LogNormal(-2.0, 1.0))
        midpoint = pyro.sample("midpoint", dist.Normal(20.0, 10.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 2.0))
        with pyro.plate("time", len(t)):
            pyro.sample("y", dist.StudentT(3.0, curve(t, capacity, rate, midpoint), spread), obs=y)

    return Program(model, (t, y))


def regional_growth() -> Program:
    """40 regions whose curves are alike."""
    z, generator = simulate(3, 40, 1, seed=14)
    t = torch.arange(30.0)
    mean = curve(t, (3.5 + 0.4 * z[0]).exp(), (-1.3 + 0.3 * z[1]).exp(), 14.0 + 3.0 * z[2])
    y = mean + 2.0 * noise(mean, generator)

    def model(t: Tensor, y: Tensor) -> None:
        capacity_loc = pyro.sample("capacity_loc", dist.Normal(3.0, 2.0))
        capacity_scale = pyro.sample("capacity_scale", dist.LogNormal(-2.0, 2.0))
        rate_loc = pyro.sample("rate_loc", dist.Normal(-2.0, 1.0))
        rate_scale = pyro.sample("rate_scale", dist.LogNormal(-4.0, 2.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 2.0))
        with pyro.plate("regions", len(y), dim=-2):
            capacity = pyro.sample("capacity", dist.LogNormal(capacity_loc, capacity_scale))
            rate = pyro.sample("rate", dist.LogNormal(rate_loc, rate_scale))
            midpoint = pyro.sample("midpoint", dist.Normal(15.0, 10.0))
            with pyro.plate("time", len(t), dim=-1):
                pyro.sample("y", dist.StudentT(5.0, curve(t, capacity, rate, midpoint), spread), obs=y)

    return Program(model, (t, y))


def epidemic() -> Program:
    """Susceptible, infected, recovered: a chain-binomial model relaxed to normals, and reported cases."""
    days, population = 30, 10_000.0
    z, generator = simulate(2, days, seed=15)

    def courses(r0: Any, recovery: Any, shocks: Tensor) -> Tensor:
        susceptible, infected, new = torch.tensor(population - 20.0), torch.tensor(20.0), []
        for day in range(days):
            mean = susceptible * (1 - (-r0 / recovery * infected / population).exp())
            infections = nn.functional.softplus(mean + (mean + 1e-3).sqrt() * shocks[day])
            infections = torch.minimum(infections, susceptible)
            susceptible, infected = susceptible - infections, infected - infected / recovery + infections
            new.append(infections)
        return torch.stack(new)

    cases = torch.poisson(0.4 * courses(torch.tensor(2.5), 5.0, z[0]), generator=generator)

    def model(cases: Tensor) -> None:
        r0 = pyro.sample("r0", dist.LogNormal(0.5, 0.5))
        recovery = pyro.sample("recovery", dist.LogNormal(1.6, 0.3))
        rho = pyro.sample("rho", dist.Beta(2.0, 3.0))
        overdispersion = pyro.sample("overdispersion", dist.LogNormal(3.0, 1.0))
        shocks = pyro.sample("shocks", dist.Normal(torch.zeros(days), 1.0).to_event(1))
        mean = rho * courses(r0, 1.0 + recovery, shocks) + 1e-3
        with pyro.plate("days", days):
            pyro.sample("cases", dist.GammaPoisson(overdispersion, overdispersion / mean), obs=cases)

    return Program(model, (cases,))


# Time series


def stochastic_volatility(length: int, *, cosines: bool = False) -> Program:
    """Daily returns of a price whose volatility wanders; ``cosines`` has the walk in the frequency domain."""
    z, generator = simulate(length, seed=16)
    log_volatility = -4.0 + (0.1 * z).cumsum(-1)
    returns = log_volatility.exp() * noise(z, generator) / (0.4 + noise(z, generator).abs())

    def model(returns: Tensor) -> None:
        start = pyro.sample("start", dist.Normal(-4.0, 5.0))
        sigma = pyro.sample("sigma", dist.LogNormal(-3.0, 1.0))
        df = pyro.sample("df", dist.LogNormal(1.0, 0.5))
        walk = pyro.sample("walk", dist.Normal(torch.zeros(length), 1.0).to_event(1))
        with pyro.plate("days", length):
            pyro.sample("returns", dist.StudentT(df, 0.0, (start + sigma * walk.cumsum(-1)).exp()), obs=returns)

    return Program(poutine.reparam(model, {"walk": DiscreteCosineReparam()}) if cosines else model, (returns,))


class LevelAndRegression(ForecastingModel):
    """A drifting level and a year's waves."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        weight = pyro.sample("weight", dist.Normal(0.0, 0.1).expand([covariates.size(-1)]).to_event(1))
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-10.0, 5.0).expand([1]).to_event(1))
        with self.time_plate, poutine.reparam(config={"drift": LocScaleReparam()}):
            drift = pyro.sample("drift", dist.Normal(zero_data, drift_scale).to_event(1))
        mean = drift.cumsum(-2) + bias + (weight * covariates).sum(-1, keepdim=True)
        sigma = pyro.sample("sigma", dist.LogNormal(-5.0, 5.0).expand([1]).to_event(1))
        self.predict(dist.Normal(0.0, sigma), mean)


class LevelAndSeason(ForecastingModel):
    """A drifting level, and a season whose period repeats."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        duration = zero_data.size(-2)
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-10.0, 5.0).expand([1]).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(-5.0, 5.0).expand([1]).to_event(1))
        with pyro.plate("hour", 24, dim=-1):
            season = pyro.sample("season", dist.Normal(torch.zeros(1), 5.0).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(zero_data, drift_scale).to_event(1))
        mean = periodic_repeat(season, duration, dim=-2) + drift.cumsum(-2)
        self.predict(dist.StudentT(4.0, 0.0, sigma), mean)


def forecast(kind: type[ForecastingModel], length: int, period: int) -> Program:
    """A series with a wave of that period, as the forecaster is given it."""
    z, generator = simulate(length, 1, seed=17)
    t = torch.arange(float(length)).unsqueeze(-1)
    data = 2.0 + (2 * math.pi * t / period).sin() + (0.05 * z).cumsum(0) + 0.2 * noise(z, generator)
    return Program(kind(), (data, periodic_features(length, period, period / 4)))


def many_series() -> Program:
    """20 series over 50 weeks: shared season, own level, own drift."""
    series, length = 20, 50
    z, generator = simulate(series, length, seed=18)
    phase = torch.linspace(0.0, 6 * math.pi, length)
    y = (0.1 * z).cumsum(-1) + phase.sin() + 0.3 * noise(z, generator) + torch.randn(series, 1, generator=generator)

    def model(y: Tensor) -> None:
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-10.0, 5.0))
        wave = pyro.sample("wave", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        season = wave[0] * phase.sin() + wave[1] * phase.cos()
        with pyro.plate("series", series, dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 5.0))
            sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 2.0))
            with pyro.plate("time", length, dim=-1):
                drift = pyro.sample("drift", dist.Normal(0.0, drift_scale))
                pyro.sample("y", dist.Normal(level + drift.cumsum(-1) + season, sigma), obs=y)

    return Program(model, (y,))


def autoregression() -> Program:
    """Two lags, a site for each observation."""
    z, _ = simulate(40, seed=19)
    y = [0.0, 0.0]
    for shock in z.tolist():
        y.append(0.2 + 0.6 * y[-1] - 0.2 * y[-2] + 0.3 * shock)

    def model(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        for t in range(2, len(y)):
            pyro.sample(f"y_{t}", dist.Normal(c + phi[0] * y[t - 1] + phi[1] * y[t - 2], sigma), obs=y[t])

    return Program(model, (torch.tensor(y),))


def walk_by_loop() -> Program:
    """A level for each of 20 days, a site each."""
    z, generator = simulate(20, seed=20)
    y = (0.5 * z).cumsum(-1) + 0.5 * noise(z, generator)

    def model(y: Tensor) -> None:
        step = pyro.sample("step", dist.HalfNormal(1.0))
        level = torch.tensor(0.0)
        for t in range(len(y)):
            level = pyro.sample(f"level_{t}", dist.Normal(level, step))
            pyro.sample(f"y_{t}", dist.Normal(level, 0.5), obs=y[t])

    return Program(model, (y,))


def gaussian_process(*, classify: bool) -> Program:
    """Amplitude and length by marginal likelihood, or also the latent function of yes or no."""
    z, generator = simulate(40, seed=21)
    x = torch.linspace(0.0, 5.0, 40)
    f = (2 * x).sin() * 1.5
    y = torch.bernoulli(f.sigmoid(), generator=generator) if classify else f + 0.3 * z

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 1.0))
        cov = amplitude**2 * (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + 1e-4 * torch.eye(len(x))
        if classify:
            f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), cov))
            pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)
        else:
            sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov + sigma**2 * torch.eye(len(x))), obs=y)

    return Program(model, (x, y))


def change_point() -> Program:
    """Yearly counts whose rate falls at some time."""
    years = torch.arange(100.0)
    rates = torch.where(years < 41, 3.1, 0.9)
    y = torch.poisson(rates, generator=Generator().manual_seed(22))

    def model(years: Tensor, y: Tensor) -> None:
        early = pyro.sample("early", dist.Exponential(1.0))
        late = pyro.sample("late", dist.Exponential(1.0))
        change = pyro.sample("change", dist.Uniform(0.0, 100.0))
        before = (change - years).sigmoid()
        with pyro.plate("years", len(years)):
            pyro.sample("y", dist.Poisson(before * early + (1 - before) * late), obs=y)

    return Program(model, (years, y))


def survival() -> Program:
    """Weibull times with a frailty for each of 12 hospitals; some are censored."""
    x, generator = simulate(120, 2, seed=23)
    hospital = torch.arange(120) % 12
    scale = (1.0 + x @ torch.tensor([0.5, -0.3]) + 0.4 * torch.randn(12, generator=generator)[hospital]).exp()
    times = scale * (-torch.rand(120, generator=generator).log()) ** (1 / 1.4)
    seen, times = times < 6.0, times.clamp(1e-3, 6.0)

    def model(x: Tensor, hospital: Tensor, times: Tensor, seen: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        spread = pyro.sample("spread", dist.HalfCauchy(1.0))
        with pyro.plate("hospitals", 12):
            frailty = pyro.sample("frailty", dist.Normal(0.0, spread))
        scale = (intercept + x @ beta + frailty[hospital]).exp()
        with pyro.plate("patients", len(x)):
            with poutine.mask(mask=seen):
                pyro.sample("time", dist.Weibull(scale, shape), obs=times)
            pyro.factor("censored", torch.where(seen, torch.zeros(()), -((times / scale) ** shape)))

    return Program(model, (x, hospital, times, seen))


# Mixtures, factors and hidden states


def mixture() -> Program:
    """Five points and two components, assignments enumerated."""

    @config_enumerate
    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    return Program(model, (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),))


def capture_recapture() -> Program:
    """60 marked animals over seven years: survival varies by year, and who is alive is enumerated."""
    _, generator = simulate(1, seed=24)
    alive, history = torch.ones(60), [torch.ones(60)]
    for _ in range(6):
        alive = alive * (torch.rand(60, generator=generator) < 0.65)
        history.append(alive * (torch.rand(60, generator=generator) < 0.8))

    def model(history: Tensor) -> None:
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        animals = pyro.plate("animals", history.shape[1], dim=-1)
        z = torch.ones(history.shape[1])
        for t in pyro.markov(range(1, len(history))):
            phi = pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0))
            with animals:
                z = pyro.sample(f"z_{t}", dist.Bernoulli(phi * z), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=history[t])

    return Program(model, (torch.stack(history),))


def gamma_factors() -> Program:
    """A sparse Gamma deep exponential family in two layers, 40 small images."""
    top, middle, pixels, images = 10, 8, 64, 40
    _, generator = simulate(1, seed=25)
    parts = (torch.rand(middle, pixels, generator=generator) < 0.15).float() * 4.0
    weights = -torch.rand(images, middle, generator=generator).log() * 0.6
    x = torch.poisson(weights @ parts + 0.05, generator=generator)

    def model(x: Tensor) -> None:
        with pyro.plate("w_top_plate", top * middle):
            w_top = pyro.sample("w_top", dist.Gamma(0.1, 0.3))
        with pyro.plate("w_bottom_plate", middle * pixels):
            w_bottom = pyro.sample("w_bottom", dist.Gamma(0.1, 0.3))
        with pyro.plate("data", len(x)):
            z_top = pyro.sample("z_top", dist.Gamma(0.1, 0.1).expand([top]).to_event(1))
            mean = z_top @ w_top.reshape(top, middle)
            z_bottom = pyro.sample("z_bottom", dist.Gamma(0.1, 0.1 / mean).to_event(1))
            pyro.sample("obs", dist.Poisson(z_bottom @ w_bottom.reshape(middle, pixels)).to_event(1), obs=x)

    return Program(model, (x,))


def word_counts() -> Program:
    """Shares of six words in 15 documents around the corpus's."""
    _, generator = simulate(1, seed=26)
    shares = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.07, 0.03]) * (0.5 + torch.rand(15, 6, generator=generator))
    counts = torch.stack(
        [torch.bincount(torch.multinomial(p, 40, True, generator=generator), minlength=6) for p in shares]
    )

    def model(counts: Tensor) -> None:
        base = pyro.sample("base", dist.Dirichlet(torch.ones(6)))
        concentration = pyro.sample("concentration", dist.Gamma(2.0, 0.1))
        with pyro.plate("documents", len(counts)):
            share = pyro.sample("share", dist.Dirichlet(concentration * base))
            pyro.sample("counts", dist.Multinomial(40, probs=share), obs=counts)

    return Program(model, (counts.float(),))


@functools.cache
def grey_digits() -> Tensor:
    """1500 images of 8x8 pixels, grey levels as probabilities."""
    return torch.tensor(load_digits().data[:1500] / 16, dtype=torch.float32)


class GaussianEncoder(nn.Module):
    """The tutorial's: one hidden layer, and a location and a scale on it."""

    def __init__(self, hidden: nn.Module, width: int, latents: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.loc = nn.Linear(width, latents)
        self.log_scale = nn.Linear(width, latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


def autoencoder() -> Program:
    """Digits, 100 at a step; a flow has the hidden layer for its context."""
    latents, width = 4, 64
    decoder = nn.Sequential(nn.Linear(latents, width), nn.Softplus(), nn.Linear(width, 64))
    hidden = nn.Sequential(nn.Linear(64, width), nn.Softplus())
    encoder = GaussianEncoder(hidden, width, latents)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def batch(generator: Generator) -> tuple[Tensor]:
        rows = torch.randperm(1500, generator=generator)[:100]
        return (torch.bernoulli(grey_digits()[rows], generator=generator),)

    return Program(model, batches=batch, baseline=guide, flow_options={"amortize": {"data": hidden}})


# The table


def decaying(steps: int, rate: float, **settings: Any) -> Callable[[], optim.PyroOptim]:
    """``ClippedAdam`` whose rate falls to a tenth, as the longer tutorials have it."""
    return partial(optim.ClippedAdam, {"lr": rate, "lrd": 0.1 ** (1 / steps), **settings})


def adam(rate: float) -> Callable[[], optim.PyroOptim]:
    """Adam as it comes."""
    return partial(optim.Adam, {"lr": rate})


def clipped(rate: float) -> Callable[[], optim.PyroOptim]:
    """``ClippedAdam`` as it comes."""
    return partial(optim.ClippedAdam, {"lr": rate})


def forecaster(steps: int, rate: float) -> Callable[[], optim.PyroOptim]:
    """What ``pyro.contrib.forecast.Forecaster`` trains with."""
    return partial(optim.DCTAdam, {"lr": rate, "betas": (0.9, 0.99), "lrd": 0.1 ** (1 / steps), "clip_norm": 10.0})


def exponential(rate: float, gamma: float) -> Callable[[], optim.PyroOptim]:
    """Adam under a schedule, a step of it after each step."""
    # A fresh dictionary each time: Pyro takes the optimizer out of it.
    return lambda: optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "gamma": gamma})


FORECASTER = {"init_loc_fn": init_to_sample, "init_scale": 0.1}  # its guide's options
WAVES = partial(forecast, LevelAndRegression, 150, 50)
HOURS = partial(forecast, LevelAndSeason, 168, 24)
ENUM = partial(TraceEnum_ELBO, max_plate_nesting=1)
PRICES = partial(optim.ClippedAdam, {"lr": 0.05, "betas": (0.9, 0.99), "lrd": 0.1 ** (1 / 1000)})
MIXTURE = ("weights", "scale", "locs")
SURVIVAL = ("rho", *(f"phi_{t}" for t in range(1, 7)))
GAMMAS = partial(optim.AdagradRMSProp, {"eta": 0.2, "t": 0.1})
TABLE = (
    Client("linear regression, Adam 0.03", linear_regression, adam(0.03), 1500),
    Client("linear regression, Adam 0.02", linear_regression, adam(0.02), 1000),
    Client("linear regression, ClippedAdam 0.02", linear_regression, clipped(0.02), 1000),
    Client("linear regression, Adam 0.05", linear_regression, adam(0.05), 1000),
    Client("linear regression, SGD 1e-3", linear_regression, partial(optim.SGD, {"lr": 1e-3}), 1500),
    Client(
        "linear regression, HalfNormal noise, torch loop, Adam 0.03",
        partial(linear_regression, dist.HalfNormal(10.0)),
        partial(torch.optim.Adam, lr=0.03),
        1500,
        torch_loop=True,
    ),
    Client("logistic regression, 25-D, Adam 0.05", logistic_regression, adam(0.05), 1000),
    Client("Poisson regression with effects, Adam 0.02", poisson_effects, adam(0.02), 1500),
    Client("counts with a horseshoe, ClippedAdam 0.03", horseshoe_counts, clipped(0.03), 1500),
    Client(
        "counts with a horseshoe, non-centered, ClippedAdam 0.03",
        partial(horseshoe_counts, centered=False),
        clipped(0.03),
        1500,
    ),
    Client("ordinal regression, Adam 0.02", ordinal_regression, adam(0.02), 1500),
    Client("neural network, Adam 0.01", neural_network, adam(0.01), 1000),
    Client("eight schools, Adam 0.05", eight_schools, adam(0.05), 1000),
    Client("eight schools, SGD 0.01", eight_schools, partial(optim.SGD, {"lr": 0.01}), 1000),
    Client("eight schools, non-centered, Adam 0.05", eight_schools_non_centered, adam(0.05), 1000),
    Client("baseball, Adam 0.02", baseball, adam(0.02), 1000),
    Client("random slopes, Adam 0.02", random_slopes, adam(0.02), 1000),
    Client("random slopes, ExponentialLR from Adam 0.05", random_slopes, exponential(0.05, 0.998), 1000),
    Client("random slopes, non-centered, Adam 0.02", partial(random_slopes, centered=False), adam(0.02), 1000),
    Client("hierarchy, Gamma(0.001), Adam 0.01", partial(bugs_hierarchy, by_precision), adam(0.01), 1500),
    Client("hierarchy, InverseGamma(0.001), Adam 0.01", partial(bugs_hierarchy, by_variance), adam(0.01), 1500),
    Client("correlated effects, Adam 0.02", correlated_effects, adam(0.02), 1000),
    Client(
        "groups in mini-batches, Adam 0.01",
        subsampled_groups,
        adam(0.01),
        1500,
        guide_options={"create_plates": group_plate},
        peers=False,
    ),
    Client(
        "lineages, ClippedAdam 0.01",
        lineages,
        decaying(1000, 0.01),
        1000,
        guide_options={"init_loc_fn": init_to_median, "init_scale": 0.01},
    ),
    Client("growth, ClippedAdam 0.1", growth, decaying(1000, 0.1), 1000),
    Client("growth in 40 regions, ClippedAdam 0.1", regional_growth, decaying(1000, 0.1), 1000),
    Client("epidemic, Adam 0.02", epidemic, adam(0.02), 600),
    Client("volatility, 200 days, ClippedAdam 0.05", partial(stochastic_volatility, 200), PRICES, 1000),
    Client(
        "volatility, 1000 days, cosines, ClippedAdam 0.05",
        partial(stochastic_volatility, 1000, cosines=True),
        PRICES,
        1000,
    ),
    Client("forecast, level and waves, DCTAdam 0.1", WAVES, forecaster(1000, 0.1), 1000, guide_options=FORECASTER),
    Client("forecast, level and season, DCTAdam 0.1", HOURS, forecaster(1000, 0.1), 1000, guide_options=FORECASTER),
    Client("20 series, ClippedAdam 0.1", many_series, decaying(1000, 0.1), 1000),
    Client("autoregression by a loop, Adam 0.02", autoregression, adam(0.02), 500),
    Client("random walk by a loop, Adam 0.02", walk_by_loop, adam(0.02), 500),
    Client("Gaussian process, regression, Adam 0.02", partial(gaussian_process, classify=False), adam(0.02), 1000),
    Client("Gaussian process, classes, Adam 0.02", partial(gaussian_process, classify=True), adam(0.02), 1500),
    Client("change point, Adam 0.02", change_point, adam(0.02), 1500),
    Client("survival, Adam 0.02", survival, adam(0.02), 1000),
    Client("mixture, enumerated, Adam 0.1", mixture, adam(0.1), 500, ENUM, expose=MIXTURE),
    Client("capture and recapture, Adam 0.01", capture_recapture, adam(0.01), 500, ENUM, expose=SURVIVAL),
    Client(
        "Gamma factors, AdagradRMSProp 0.2",
        gamma_factors,
        GAMMAS,
        1000,
        TraceMeanField_ELBO,
        guide_options={"init_loc_fn": init_to_feasible},
    ),
    Client("word counts, Adam 0.02", word_counts, adam(0.02), 1000),
    Client("autoencoder of digits, Adam 1e-3", autoencoder, adam(1e-3), 2000, peers=False),
    Client("autoencoder of digits, Adam 1e-2", autoencoder, adam(1e-2), 2000, peers=False),
)
CLIENTS = {client.name: client for client in TABLE}
