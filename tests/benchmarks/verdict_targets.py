# SPDX-License-Identifier: Apache-2.0
"""Random models whose posterior is known exactly, as a density in unconstrained space that can be drawn from.

A model is run with its exact posterior as the guide before it is used: then all log weights must be the log evidence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["TARGETS", "Constructed", "Packed", "Target", "gaussian", "mixture_of", "restricted", "stretched"]

Predicate = Callable[[Tensor], Tensor]
Build = Callable[[random.Random], "Target"]


class Packed(dist.TorchDistribution):
    """A distribution of unconstrained vectors, ``(D,)``, given by a sampler and a log density, in float64.

    Args:
        dim: Length D of the vectors.
        draw: Number of draws S -> draws, ``(S, D)``.
        density: ``(S, D)`` -> log density, ``(S,)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector

    def __init__(
        self, dim: int, draw: Callable[[int], Tensor], density: Callable[[Tensor], Tensor], batch_shape: Any = ()
    ) -> None:
        self.dim, self.draw, self.density = dim, draw, density
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.draw(shape.numel()).to(torch.get_default_dtype()).reshape(*shape, self.dim)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.density(value.double().reshape(-1, self.dim)).reshape(value.shape[:-1])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Packed:
        return Packed(self.dim, self.draw, self.density, batch_shape)


class Constructed(AutoContinuous):
    """A guide that draws the packed unconstrained latents from a given distribution."""

    def __init__(self, model: Callable[..., Any], posterior: Packed) -> None:
        super().__init__(model)
        self.given = posterior

    def get_posterior(self, *args: Any, **kwargs: Any) -> Packed:
        return self.given


@dataclass(frozen=True, eq=False)
class Target:
    """A model with its exact posterior.

    Attributes:
        model: The model.
        args: Its arguments.
        exact: The posterior of the packed unconstrained latents.
        modes: Predicates that tell which draws belong to a mode; empty if there is one.
        heavy: Whether the posterior has no variance, or none that can be estimated from draws: moments are then those
            of asinh of the values.
        partial: The posterior of a part of the data, whose likelihood was not scaled up; None if there is none.
        enumerated: Names of the sites that are summed out.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    exact: Packed
    modes: tuple[Predicate, ...] = ()
    heavy: bool = False
    partial: Packed | None = None
    enumerated: tuple[str, ...] = ()

    @property
    def continuous(self) -> Callable[..., Any]:
        """The model as guides see it, without enumerated sites."""
        return poutine.block(self.model, hide=list(self.enumerated)) if self.enumerated else self.model


# Distributions.


def gaussian(mean: Tensor, covariance: Tensor) -> Packed:
    """A multivariate normal."""
    mean, factor = mean.double(), torch.linalg.cholesky(covariance.double())
    normal = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    return Packed(len(mean), lambda count: normal.sample((count,)), normal.log_prob)


def product(parts: Sequence[Packed]) -> Packed:
    """Independent parts, one after another."""
    sizes = [part.dim for part in parts]

    def density(x: Tensor) -> Tensor:
        return torch.stack([p.density(y) for p, y in zip(parts, x.split(sizes, -1), strict=True)]).sum(0)

    return Packed(sum(sizes), lambda count: torch.cat([part.draw(count) for part in parts], -1), density)


def constrained(fn: Any) -> Packed:
    """A distribution on its own support, whose batch and event dimensions are packed."""
    to_support = biject_to(fn.support)
    shape = to_support.inv(fn.sample()).shape

    def draw(count: int) -> Tensor:
        return to_support.inv(fn.sample((count,))).flatten(1) if shape else to_support.inv(fn.sample((count, 1)))

    def density(x: Tensor) -> Tensor:
        x = x.reshape(len(x), *shape)
        value = to_support(x)
        ladj = to_support.log_abs_det_jacobian(x, value)
        return (fn.log_prob(value) + ladj.reshape(fn.log_prob(value).shape)).reshape(len(x), -1).sum(-1)

    return Packed(max(shape.numel(), 1), draw, density)


def grid(log_density: Callable[[Tensor], Tensor], *bounds: tuple[float, float], count: int | None = None) -> Packed:
    """A density that is constant in the cells of a fine grid of one or two dimensions."""
    dim = len(bounds)
    count = count or (20_000 if dim == 1 else 700)
    width = torch.tensor([(high - low) / count for low, high in bounds], dtype=torch.double)
    low = torch.tensor([low for low, _ in bounds], dtype=torch.double)
    axes = [low[i] + width[i] * (torch.arange(count, dtype=torch.double) + 0.5) for i in range(dim)]
    log_mass = log_density(torch.cartesian_prod(*axes).reshape(-1, dim))
    log_mass = log_mass - log_mass.logsumexp(0)
    cumulative = log_mass.exp().cumsum(0)

    def draw(number: int) -> Tensor:
        cell = torch.searchsorted(cumulative, torch.rand(number, dtype=torch.double)).clamp_max(len(cumulative) - 1)
        index = torch.stack([cell] if dim == 1 else [cell // count, cell % count], -1)
        return low + width * (index + torch.rand(number, dim, dtype=torch.double))

    def density(x: Tensor) -> Tensor:
        index = ((x - low) / width).floor().long()
        inside = ((index >= 0) & (index < count)).all(-1)
        index = index.clamp(0, count - 1)
        cell = index[:, 0] if dim == 1 else index[:, 0] * count + index[:, 1]
        return torch.where(inside, log_mass[cell] - width.log().sum(), -torch.inf)

    return Packed(dim, draw, density)


def mixture_of(parts: Sequence[Packed], weights: Sequence[float]) -> Packed:
    """A mixture."""
    log_weights = torch.tensor(weights, dtype=torch.double).log().log_softmax(0)

    def draw(count: int) -> Tensor:
        which = torch.multinomial(log_weights.exp(), count, replacement=True)
        rows = torch.empty(count, parts[0].dim, dtype=torch.double)
        for k, part in enumerate(parts):
            rows[which == k] = part.draw(int((which == k).sum())).double()
        return rows

    def density(x: Tensor) -> Tensor:
        return torch.stack([part.density(x) + w for part, w in zip(parts, log_weights, strict=True)]).logsumexp(0)

    return Packed(parts[0].dim, draw, density)


def restricted(whole: Packed, keeps: Predicate) -> Packed:
    """A distribution restricted to a part of its support."""
    mass = keeps(whole.draw(100_000)).double().mean().item()

    def draw(count: int) -> Tensor:
        rows = torch.zeros(0, whole.dim, dtype=torch.double)
        while len(rows) < count:
            more = whole.draw(int(1.2 * count / mass) + 10)
            rows = torch.cat([rows, more[keeps(more)]])
        return rows[:count]

    return Packed(
        whole.dim, draw, lambda x: torch.where(keeps(x), whole.density(x) - math.log(max(mass, 1e-9)), -torch.inf)
    )


def stretched(whole: Packed, center: Tensor, scale: Tensor, shift: Tensor) -> Packed:
    """A distribution stretched about a center by a factor for each coordinate, then shifted."""
    return Packed(
        whole.dim,
        lambda count: center + scale * (whole.draw(count) - center) + shift,
        lambda x: whole.density(center + (x - shift - center) / scale) - scale.log().sum(),
    )


def on_grid(
    model: Callable[..., Any], args: tuple[Any, ...], supports: dict[str, Any], *bounds: tuple[float, float]
) -> Packed:
    """The posterior of a model with one or two scalar latents, by running it at the points of a grid."""

    def log_joint(x: Tensor) -> Tensor:
        values, total = {}, torch.zeros(len(x), dtype=torch.double)
        for (name, support), column in zip(supports.items(), x.unbind(-1), strict=True):
            transform = biject_to(support)
            values[name] = transform(column).unsqueeze(-1)
            total += transform.log_abs_det_jacobian(column, transform(column))
        with poutine.block(), pyro.plate("points", len(x), dim=-2), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args)
            trace.compute_log_prob()
        for node in trace.nodes.values():
            if node["type"] == "sample" and "log_prob" in node and node["log_prob"].dim() >= 2:
                total = total + node["log_prob"].double().sum(-1)
        return total

    return grid(lambda x: torch.cat([log_joint(part) for part in x.split(10_000)]), *bounds)


# Gaussian posteriors.


def random_covariates(count: int, dim: int, common: float) -> Tensor:
    return torch.randn(count, dim) + common * torch.randn(count, 1)


def means(rng: random.Random) -> Target:
    dim, sigma = rng.choice([1, 1, 2, 5, 10, 30, 100]), rng.uniform(0.3, 2.0)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([y.shape[-1]]).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma).to_event(1), obs=y)

    def posterior(y: Tensor) -> Packed:
        precision = 1.0 + len(y) / sigma**2
        return gaussian(y.sum(0) / sigma**2 / precision, torch.eye(dim) / precision)

    y = torch.randn(dim) + sigma * torch.randn(rng.choice([1, 5, 20]), dim)
    return Target(model, (y,), posterior(y), partial=posterior(y[: len(y) // 3]) if len(y) > 3 else None)


def regression(rng: random.Random) -> Target:
    dim, sigma = rng.choice([2, 3, 5, 10, 20, 50]), rng.choice([0.5, 1.0])

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(x.shape[-1])).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), sigma), obs=y)

    def posterior(x: Tensor, y: Tensor) -> Packed:
        x, y = x.double(), y.double()
        covariance = torch.linalg.inv(torch.eye(dim).double() + x.mT @ x / sigma**2)
        return gaussian(covariance @ x.mT @ y / sigma**2, covariance)

    x = random_covariates(rng.choice([60, 200]), dim, rng.choice([0.0, 0.5, 2.0]))
    y = x @ torch.randn(dim) + sigma * torch.randn(len(x))
    return Target(model, (x, y), posterior(x, y), partial=posterior(x[::10], y[::10]))


def line(rng: random.Random) -> Target:
    """A regression as written by hand: one scalar site for each coefficient, covariates that are not centered."""

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    def posterior(x: Tensor, y: Tensor) -> Packed:
        design = torch.stack([torch.ones_like(x), x], -1).double()
        covariance = torch.linalg.inv(torch.eye(2).double() / 100 + design.mT @ design)
        return gaussian(covariance @ design.mT @ y.double(), covariance)

    x = rng.uniform(0.0, 3.0) + torch.rand(rng.choice([8, 30, 100]))
    y = 1.0 + 2.0 * x + torch.randn(len(x))
    return Target(model, (x, y), posterior(x, y), partial=posterior(x[::4], y[::4]))


def random_walk(rng: random.Random) -> Target:
    steps, scale = rng.choice([5, 10, 30]), rng.choice([0.2, 0.5, 1.0])

    def model(y: Tensor) -> None:
        z = 0.0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0 if t == 0 else scale))
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])

    step = torch.eye(steps).double() - torch.diag(torch.ones(steps - 1), -1).double()
    step[1:] /= scale
    covariance = torch.linalg.inv(step.mT @ step + torch.eye(steps).double())
    y = scale * torch.randn(steps).cumsum(0) + torch.randn(steps)
    return Target(model, (y,), gaussian(covariance @ y.double(), covariance))


def random_effects(rng: random.Random) -> Target:
    groups, tau, sigma = rng.choice([3, 10, 40]), rng.choice([0.3, 1.0, 3.0]), rng.choice([0.5, 1.0, 2.0])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    y = rng.uniform(-3, 3) + tau * torch.randn(groups) + sigma * torch.randn(groups)
    precision = torch.zeros(groups + 1, groups + 1).double()
    precision[0, 0] = 1 / 25 + groups / tau**2
    precision[0, 1:] = precision[1:, 0] = -1 / tau**2
    precision[1:, 1:] = torch.eye(groups).double() * (1 / tau**2 + 1 / sigma**2)
    covariance = torch.linalg.inv(precision)
    return Target(model, (y,), gaussian(covariance[:, 1:] @ y.double() / sigma**2, covariance))


# Conjugate posteriors on other supports.


def rates(rng: random.Random) -> Target:
    """Binomial proportions."""

    def model(trials: Tensor, hits: Tensor) -> None:
        with pyro.plate("groups", len(hits)):
            p = pyro.sample("p", dist.Beta(1.5, 2.0))
            pyro.sample("hits", dist.Binomial(trials, p), obs=hits)

    def posterior(trials: Tensor, hits: Tensor) -> Packed:
        return constrained(dist.Beta(1.5 + hits.double(), 2.0 + (trials - hits).double()))

    trials = torch.full((rng.choice([1, 3, 10]),), float(rng.choice([2, 10, 50])))
    hits = torch.distributions.Binomial(trials, torch.rand(len(trials))).sample()
    return Target(model, (trials, hits), posterior(trials, hits), partial=posterior(trials // 4, hits // 4))


def counts(rng: random.Random) -> Target:
    """A Poisson rate, or several."""
    shape = rng.choice([1.0, 2.0, 5.0])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(shape, 1.0).expand([y.shape[-1]]).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    def posterior(y: Tensor) -> Packed:
        return constrained(dist.Gamma(shape + y.double().sum(0), torch.tensor(1.0 + len(y)).double()).to_event(1))

    y = torch.poisson(3 * torch.rand(rng.choice([1, 5]), rng.choice([1, 4])))
    return Target(model, (y,), posterior(y))


def categories(rng: random.Random) -> Target:
    size = rng.choice([2, 3, 6])

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(size)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    y = torch.multinomial(torch.rand(size) + 0.1, rng.choice([3, 10, 40]), replacement=True)
    fn = dist.Dirichlet(1.0 + torch.bincount(y, minlength=size).double())
    return Target(model, (y,), constrained(fn))


def mean_and_variance(rng: random.Random) -> Target:
    """Normal data with both unknown; the conjugate prior."""

    def model(y: Tensor) -> None:
        precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
        mu = pyro.sample("mu", dist.Normal(0.0, precision.rsqrt()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, precision.rsqrt()), obs=y)

    y = rng.uniform(0.3, 2.0) * torch.randn(rng.choice([4, 8, 30])).double()
    shape = torch.tensor(2.0 + len(y) / 2).double()
    rate = 2.0 + 0.5 * y.var(correction=0) * len(y) + 0.5 * len(y) * y.mean().square() / (1 + len(y))
    loc = y.sum() / (1 + len(y))
    gamma = torch.distributions.Gamma(shape, rate)

    def conditional(log_precision: Tensor) -> Any:
        return torch.distributions.Normal(loc, (-0.5 * log_precision).exp() / math.sqrt(1 + len(y)))

    def draw(count: int) -> Tensor:
        x = gamma.sample((count,)).log()
        return torch.stack([x, conditional(x).sample()], -1)

    def density(z: Tensor) -> Tensor:
        x, mu = z.unbind(-1)
        return gamma.log_prob(x.exp()) + x + conditional(x).log_prob(mu)

    return Target(model, (y.float(),), Packed(2, draw, density))


# Heavy tails.


def students(rng: random.Random) -> Target:
    dim, df = rng.choice([1, 2, 5, 10]), rng.choice([1.5, 2.5, 5.0, 10.0])

    def model() -> None:
        pyro.sample("z", dist.StudentT(df, torch.zeros(dim), 1.0).to_event(1))

    fn = torch.distributions.StudentT(torch.tensor(df).double(), torch.zeros(dim).double(), 1.0)
    exact = Packed(dim, lambda count: fn.sample((count,)), lambda x: fn.log_prob(x).sum(-1))
    return Target(model, (), exact, heavy=df < 5)


def scale_of_few(rng: random.Random) -> Target:
    """The scale of a few data, with a half-Cauchy prior."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    y = rng.uniform(0.1, 10.0) * torch.randn(rng.choice([1, 3, 10]))
    middle = y.square().mean().sqrt().log().item()
    exact = on_grid(model, (y,), {"scale": dist.constraints.positive}, (middle - 8, middle + 16))
    return Target(model, (y,), exact, heavy=len(y) < 10)


def robust_location(rng: random.Random) -> Target:
    """Student data that disagree: one mode or two."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Cauchy(0.0, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.StudentT(3.0, mu, 1.0), obs=y)

    gap = rng.uniform(0.0, 12.0)
    y = torch.cat([torch.randn(rng.choice([2, 3, 5])), gap + torch.randn(rng.choice([1, 2, 3]))])
    return Target(model, (y,), on_grid(model, (y,), {"mu": dist.constraints.real}, (-20.0, 35.0)))


# Bounded supports.


def bounded(rng: random.Random) -> Target:
    """Data near the boundary of the prior, or beyond it."""
    dim, sigma = rng.choice([1, 1, 2, 5, 10]), rng.choice([0.1, 0.5, 2.0])
    prior = rng.choice([dist.Uniform(0.0, 1.0), dist.HalfNormal(1.0), dist.LogNormal(0.0, 1.0), dist.Exponential(2.0)])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, sigma), obs=y)

    def one(y: Tensor) -> Packed:
        transform = biject_to(prior.support)

        def log_density(x: Tensor) -> Tensor:
            x = x.squeeze(-1)
            z = transform(x)
            joint = prior.log_prob(z) + dist.Normal(z, sigma).log_prob(y.double())
            return joint + transform.log_abs_det_jacobian(x, z)

        return grid(log_density, (-16.0, 16.0 if isinstance(prior, dist.Uniform) else 4.0))

    y = torch.tensor([rng.choice([-0.5, 0.0, 0.1, 0.5, 1.0, 1.5]) for _ in range(dim)])
    return Target(model, (y,), product([one(value) for value in y]))


# Two dimensions, by quadrature.


def logistic(rng: random.Random) -> Target:
    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)

    x = torch.randn(rng.choice([5, 20, 60])) + rng.choice([0.0, 1.0])
    y = torch.bernoulli(torch.sigmoid(1.5 * x))
    reals = dict.fromkeys("ab", dist.constraints.real)
    return Target(model, (x, y), on_grid(model, (x, y), reals, (-10.0, 10.0), (-8.0, 14.0)))


def location_scale(rng: random.Random) -> Target:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    y = 1.0 + torch.randn(rng.choice([3, 10, 40]))
    supports = {"mu": dist.constraints.real, "sigma": dist.constraints.positive}
    bounds = ((-8.0, 9.0), (-4.0, 2.2)) if len(y) == 3 else ((-1.5, 3.5), (-1.8, 1.6))
    return Target(model, (y,), on_grid(model, (y,), supports, *bounds))


def banana(rng: random.Random) -> Target:
    bend, width = rng.uniform(0.1, 1.0), rng.uniform(0.2, 1.0)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.5))
        pyro.sample("y", dist.Normal(bend * x.square(), width))

    def draw(count: int) -> Tensor:
        x = 1.5 * torch.randn(count).double()
        return torch.stack([x, bend * x.square() + width * torch.randn(count).double()], -1)

    def density(z: Tensor) -> Tensor:
        x, y = z.unbind(-1)
        return dist.Normal(0.0, 1.5).log_prob(x) + dist.Normal(bend * x.square(), width).log_prob(y)

    return Target(model, (), Packed(2, draw, density))


# Hierarchies with unknown scales.


def schools(rng: random.Random) -> Target:
    """Eight schools with other data, centered or not: tau by quadrature, the rest given tau exactly."""
    count = rng.choice([6, 8, 20])
    prior = rng.choice([dist.HalfCauchy(5.0), dist.HalfNormal(5.0), dist.LogNormal(0.5, 1.0), dist.Exponential(0.3)])
    centered = rng.random() < 0.5

    def model(sigma: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", prior)
        with pyro.plate("schools", len(y)):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    sigma = 1.0 + 10.0 * torch.rand(count).double()
    y = rng.uniform(0.0, 5.0) + rng.choice([0.5, 3.0, 10.0]) * torch.randn(count).double() + sigma * torch.randn(count)

    def of_mu(tau: Tensor) -> tuple[Tensor, Tensor]:
        variance = tau.unsqueeze(-1).square() + sigma.square()
        precision = variance.reciprocal().sum(-1) + 1.0 / 25.0
        return (y / variance).sum(-1) / precision, precision.rsqrt()

    def log_density(x: Tensor) -> Tensor:
        x = x.squeeze(-1)
        mean, sd = of_mu(x.exp())
        scales = (x.exp().square().unsqueeze(-1) + sigma.square()).sqrt()
        likelihood = dist.Normal(mean.unsqueeze(-1), scales).log_prob(y).sum(-1)
        return prior.log_prob(x.exp()) + x + likelihood + dist.Normal(0.0, 5.0).log_prob(mean) + sd.log()

    of_tau = grid(log_density, (-14.0, 7.0))

    def of_last(mu: Tensor, tau: Tensor) -> Any:
        mu, tau = mu.unsqueeze(-1), tau.unsqueeze(-1)
        precision = tau.square().reciprocal() + sigma.square().reciprocal()
        if centered:
            return torch.distributions.Normal((mu / tau.square() + y / sigma.square()) / precision, precision.rsqrt())
        precision = 1.0 + tau.square() / sigma.square()
        return torch.distributions.Normal(tau * (y - mu) / sigma.square() / precision, precision.rsqrt())

    def draw(number: int) -> Tensor:
        x = of_tau.draw(number)
        tau = x.squeeze(-1).exp()
        mu = torch.distributions.Normal(*of_mu(tau)).sample()
        return torch.cat([mu.unsqueeze(-1), x, of_last(mu, tau).sample()], -1)

    def density(z: Tensor) -> Tensor:
        mu, tau, rest = z[:, 0], z[:, 1].exp(), z[:, 2:]
        given = torch.distributions.Normal(*of_mu(tau)).log_prob(mu) + of_last(mu, tau).log_prob(rest).sum(-1)
        return of_tau.density(z[:, 1:2]) + given

    return Target(model, (sigma.float(), y.float()), Packed(count + 2, draw, density))


def funnel(rng: random.Random) -> Target:
    dim, scale = rng.choice([1, 4, 9, 19]), rng.uniform(0.5, 3.0)

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, scale))
        with pyro.plate("D", dim):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    def draw(count: int) -> Tensor:
        v = scale * torch.randn(count, 1).double()
        return torch.cat([v, (v / 2).exp() * torch.randn(count, dim).double()], -1)

    def density(z: Tensor) -> Tensor:
        v, x = z[:, :1], z[:, 1:]
        return dist.Normal(0.0, scale).log_prob(v).squeeze(-1) + dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum(-1)

    return Target(model, (), Packed(dim + 1, draw, density), heavy=scale > 1.0)


# Several modes.


def mixture(rng: random.Random, narrow: bool = False) -> Target:
    """Modes at random places; with ``narrow`` the second one is far and narrow."""
    dim = rng.choice([1, 2, 5, 10])
    weights = [rng.uniform(0.1, 1.0) for _ in range(2 if narrow else rng.choice([2, 2, 3]))]
    directions = torch.nn.functional.normalize(torch.randn(len(weights), dim), dim=-1)
    if dim == 1:
        directions = torch.tensor([[-1.0], [1.0], [0.0]])[: len(weights)]
    centers = (rng.uniform(4.0, 12.0) * directions).double()
    sds = [rng.uniform(0.5, 1.5) for _ in weights]
    if narrow:
        sds[1] = rng.uniform(0.01, 0.05)

    def log_target(z: Tensor) -> Tensor:
        log_weights = torch.tensor(weights, dtype=z.dtype).log().log_softmax(0)
        parts = [
            w + dist.Normal(center.to(z), sd).log_prob(z).sum(-1)
            for w, center, sd in zip(log_weights, centers, sds, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0).expand([dim]).to_event(1))
        pyro.factor("target", log_target(z) - dist.Normal(0.0, 10.0).log_prob(z).sum(-1))

    parts = [gaussian(c, sd**2 * torch.eye(dim)) for c, sd in zip(centers, sds, strict=True)]

    def nearest(k: int) -> Predicate:
        def predicate(x: Tensor) -> Tensor:
            distance = torch.stack([(x - c).norm(dim=-1) / sd for c, sd in zip(centers, sds, strict=True)])
            return distance.argmin(0) == k

        return predicate

    return Target(model, (), mixture_of(parts, weights), modes=tuple(nearest(k) for k in range(len(weights))))


def far_and_narrow(rng: random.Random) -> Target:
    return mixture(rng, narrow=True)


def without_sign(rng: random.Random) -> Target:
    """Data that tell the size of a latent, not its sign."""
    sigma, slope = rng.choice([0.2, 0.5, 1.0]), rng.choice([0.0, 0.0, 0.1])

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z.abs() + slope * z, sigma), obs=y)

    y = rng.uniform(1.5, 5.0) + sigma * torch.randn(rng.choice([1, 3]))
    exact = on_grid(model, (y,), {"z": dist.constraints.real}, (-10.0, 10.0))
    return Target(model, (y,), exact, modes=(lambda x: x[:, 0] > 0, lambda x: x[:, 0] < 0))


def labels(rng: random.Random) -> Target:
    """A mixture of two normals with known scales: the labels may be switched."""
    weight = rng.choice([0.5, 0.5, 0.4])

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            means = torch.stack(torch.broadcast_tensors(a, b), -1)
            parts = dist.Categorical(torch.tensor([weight, 1 - weight])), dist.Normal(means, 1.0)
            pyro.sample("y", dist.MixtureSameFamily(*parts), obs=y)

    distance = rng.uniform(2.0, 6.0)
    y = torch.cat([torch.randn(rng.choice([5, 15])), distance + torch.randn(rng.choice([5, 15]))])
    reals = dict.fromkeys("ab", dist.constraints.real)
    exact = on_grid(model, (y,), reals, (-6.0, 12.0), (-6.0, 12.0))
    return Target(model, (y,), exact, modes=(lambda x: x[:, 0] < x[:, 1], lambda x: x[:, 0] > x[:, 1]))


def switch(rng: random.Random) -> Target:
    """An enumerated site that moves the mean."""
    p, jump = rng.uniform(0.2, 0.8), rng.uniform(3.0, 9.0)

    @config_enumerate
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        k = pyro.sample("k", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(z + jump * k, 1.0), obs=y)

    y = torch.tensor(rng.uniform(-3.0, 6.0))
    offsets = (0.0, jump)
    weights = [w * dist.Normal(o, math.sqrt(26.0)).log_prob(y).exp().item() for w, o in zip((1 - p, p), offsets)]
    parts = [gaussian((y - o).reshape(1) * 25 / 26, torch.full((1, 1), 25.0 / 26.0)) for o in offsets]
    middle = (y - jump / 2).item() * 25 / 26
    modes = (lambda x: x[:, 0] > middle, lambda x: x[:, 0] < middle)
    return Target(model, (y,), mixture_of(parts, weights), modes=modes, enumerated=("k",))


# Kind -> models of this kind, of equal shares.
TARGETS: dict[str, list[Build]] = {
    "Gaussian": [means, regression, line, random_walk, random_effects],
    "conjugate": [rates, counts, categories, mean_and_variance],
    "heavy-tailed": [students, scale_of_few, robust_location],
    "bounded": [bounded],
    "quadrature": [logistic, location_scale, banana],
    "hierarchical": [schools, funnel],
    "multimodal": [mixture, without_sign, labels, switch],
    "far and narrow": [far_and_narrow],
}
