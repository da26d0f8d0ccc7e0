# SPDX-License-Identifier: Apache-2.0
"""Models whose evidence is known, and guides of them made by hand: the posterior itself, or wrong in one way."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.__main__ import LOG_EVIDENCE, SIGMA, Y
from pyro_flows.__main__ import model as eight_schools

__all__ = ["BAD", "GOOD", "REGRESSION", "Fit", "correlated_regression", "mixture", "mixture_guide", "regression"]


class Fit(NamedTuple):
    """A model, a guide, the model's arguments, and the exact log evidence."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    log_evidence: float


# Conjugate normal: z ~ N(0, I), y ~ N(z, I).


def normal(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def normal_fit(dim: int, shift: float | Tensor = 0.0, scale: float | Tensor = 1.0) -> Fit:
    """The posterior N(y / 2, 1 / 2), moved by ``shift`` posterior sds and stretched by ``scale``."""
    y = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    sd = math.sqrt(0.5)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(y / 2 + shift * sd, sd * scale * torch.ones(dim)).to_event(1))

    return Fit(normal, guide, (y,), dist.Normal(0.0, math.sqrt(2.0)).log_prob(y).double().sum().item())


# Linear regression with correlated covariates: w ~ N(0, I), y ~ N(x w, 1).


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((w.unsqueeze(-2) * x).sum(-1), 1.0), obs=y)


def regression_data(dim: int, common: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, dim, generator=generator) + common * torch.randn(60, 1, generator=generator)
    return x, x.sum(-1) / dim + torch.randn(60, generator=generator)


def regression_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance."""
    x, y = x.double(), y.double()
    covariance = torch.linalg.inv(torch.eye(x.shape[-1], dtype=torch.double) + x.mT @ x)
    return covariance @ x.mT @ y, covariance


def regression_evidence(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    covariance = torch.eye(len(x), dtype=torch.double) + x @ x.mT
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()


def exact_regression(x: Tensor, y: Tensor) -> None:
    mean, covariance = regression_posterior(x, y)
    pyro.sample("w", dist.MultivariateNormal(mean.float(), covariance.float()))


def mean_field_regression(x: Tensor, y: Tensor) -> None:
    """The mean-field normal of highest ELBO: the conditional sds."""
    mean, covariance = regression_posterior(x, y)
    sd = torch.linalg.inv(covariance).diagonal().rsqrt()
    pyro.sample("w", dist.Normal(mean.float(), sd.float()).to_event(1))


REGRESSION = regression_data(8, 0.5)
STRONG_REGRESSION = regression_data(8, 2.0)


def correlated_regression(guide: Callable[..., Any] = mean_field_regression, data: Any = REGRESSION) -> Fit:
    return Fit(regression, guide, data, regression_evidence(*data))


# Models whose prior is their posterior: a mixture with modes at +-5, a Student t, a funnel.


def mixture(weight: float = 0.3) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 20.0))
    parts = [
        math.log(weight) + dist.Normal(-5.0, 1.0).log_prob(z),
        math.log1p(-weight) + dist.Normal(5.0, 1.0).log_prob(z),
    ]
    pyro.factor("target", torch.logaddexp(*parts) - dist.Normal(0.0, 20.0).log_prob(z))


def mixture_guide(weight: float = 0.3) -> None:
    """Both modes."""
    parts = dist.Categorical(torch.tensor([weight, 1.0 - weight])), dist.Normal(torch.tensor([-5.0, 5.0]), 1.0)
    pyro.sample("z", dist.MixtureSameFamily(*parts))


def one_mode(loc: float, *args: Any) -> None:
    pyro.sample("z", dist.Normal(loc, 1.0))


def wrong_mode() -> None:
    """All but e^-34 of the mass is at 10; a narrow bump at -10 has a mode of its own."""
    z = pyro.sample("z", dist.Normal(0.0, 20.0))
    parts = dist.Normal(-10.0, 1.0).log_prob(z) - 34.0, dist.Normal(10.0, 1.0).log_prob(z)
    pyro.factor("target", torch.logaddexp(*parts) - dist.Normal(0.0, 20.0).log_prob(z))


def student() -> None:
    pyro.sample("z", dist.StudentT(3.0, torch.zeros(3), 1.0).to_event(1))


def normal_for_student() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.2).to_event(1))


def funnel() -> None:
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(log_scale / 2)))


def mean_field_funnel() -> None:
    pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(0.0, 0.7))


# Others.


def beta_binomial(count: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    pyro.sample("count", dist.Binomial(20, p), obs=count)


def beta_guide(count: Tensor) -> None:
    pyro.sample("p", dist.Beta(2.0 + count, 23.0 - count))


def beta_binomial_evidence() -> float:
    lbeta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
    return math.log(math.comb(20, 7)) + lbeta(9, 16) - lbeta(2, 3)


def dirichlet(counts: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("counts", dist.Multinomial(10, p), obs=counts)


def dirichlet_guide(counts: Tensor) -> None:
    pyro.sample("p", dist.Dirichlet(1.0 + counts))


@config_enumerate
def switch(y: Tensor) -> None:
    """The mean is z or z + 6, and nobody knows which: two modes from a discrete site."""
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    k = pyro.sample("k", dist.Bernoulli(0.4))
    pyro.sample("y", dist.Normal(z + 6.0 * k, 1.0), obs=y)


def switch_guide(y: Tensor) -> None:
    """Given k the posterior of z is normal; k has its own posterior."""
    offsets, prior = torch.tensor([0.0, 6.0]), torch.tensor([0.6, 0.4])
    weights = prior * dist.Normal(offsets, math.sqrt(26.0)).log_prob(y).exp()
    parts = dist.Normal((y - offsets) * 25.0 / 26.0, math.sqrt(25.0 / 26.0) * torch.ones(2))
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights / weights.sum()), parts))


def switch_evidence(y: Tensor) -> float:
    both = torch.tensor([0.6, 0.4]).log() + dist.Normal(torch.tensor([0.0, 6.0]), math.sqrt(26.0)).log_prob(y)
    return both.logsumexp(0).item()


def items(y: Tensor) -> None:
    with pyro.plate("items", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def items_fit(scale: float) -> Fit:
    y = torch.randn(50, generator=torch.Generator().manual_seed(2))

    def guide(y: Tensor) -> None:
        with pyro.plate("items", len(y)):
            pyro.sample("z", dist.Normal(y / 2, scale * math.sqrt(0.5)))

    return Fit(items, guide, (y,), dist.Normal(0.0, math.sqrt(2.0)).log_prob(y).double().sum().item())


def subsample_scale() -> Fit:
    """What training on a tenth of the rows without scaling up their likelihood ends at."""
    x, y = REGRESSION

    def guide(x: Tensor, y: Tensor) -> None:
        mean, covariance = regression_posterior(x[::10], y[::10])
        pyro.sample("w", dist.MultivariateNormal(mean.float(), covariance.float()))

    return Fit(regression, guide, (x, y), regression_evidence(x, y))


SCHOOLS = (torch.tensor(SIGMA), torch.tensor(Y))


def schools_given_tau(tau: Tensor, sigma: Tensor, y: Tensor) -> None:
    """The exact posterior of the other latents of eight schools, centered."""
    variance = tau.unsqueeze(-1).square() + sigma.square()
    precision = variance.reciprocal().sum(-1) + 1.0 / 25.0
    mu = pyro.sample("mu", dist.Normal((y / variance).sum(-1) / precision, precision.rsqrt()))
    with pyro.plate("schools", len(sigma)):
        precision = tau.square().reciprocal() + sigma.square().reciprocal()
        pyro.sample("theta", dist.Normal((mu / tau.square() + y / sigma.square()) / precision, precision.rsqrt()))


def schools_guide(sigma: Tensor, y: Tensor) -> None:
    """tau from a fine grid, mu and theta exactly."""
    grid = torch.linspace(-7.0, 5.0, 241, dtype=torch.double)
    variance = grid.exp().square().unsqueeze(-1) + sigma.double().square()  # of y given mu
    precision = variance.reciprocal().sum(-1) + 1.0 / 25.0
    mean = (y / variance).sum(-1) / precision
    log_density = dist.HalfCauchy(5.0).log_prob(grid.exp()) + grid
    log_density += dist.Normal(0.0, variance.sqrt()).log_prob(y.double()).sum(-1)
    log_density += 0.5 * mean.square() * precision - 0.5 * precision.log()
    parts = dist.Normal(grid.float(), 0.05)
    log_tau = dist.MixtureSameFamily(dist.Categorical(logits=log_density.float()), parts)
    tau = pyro.sample("tau", dist.TransformedDistribution(log_tau, dist.transforms.ExpTransform()))
    schools_given_tau(tau, sigma, y)


def fitted_normal() -> Fit:
    exact = normal_fit(5)
    guide = AutoFlowGuide(normal)
    fit(normal, guide, exact.args, num_steps=100, seed=0, progress=False)
    return exact._replace(guide=guide)


def untrained(model: Callable[..., Any], guide: Any, exact: Fit) -> Fit:
    guide(*exact.args)
    return exact._replace(guide=guide)


def one_thin_coordinate() -> Fit:
    scale = torch.ones(100)
    scale[17] = 0.4
    return normal_fit(100, scale=scale)


GOOD: dict[str, Callable[[], Fit]] = {
    "normal, 1-D": lambda: normal_fit(1),
    "normal, 10-D": lambda: normal_fit(10),
    "normal, 100-D": lambda: normal_fit(100),
    "normal, off by a hundredth": lambda: normal_fit(10, shift=0.01, scale=1.01),
    "regression": lambda: correlated_regression(exact_regression),
    "beta-binomial": lambda: Fit(beta_binomial, beta_guide, (torch.tensor(7.0),), beta_binomial_evidence()),
    "dirichlet": lambda: Fit(dirichlet, dirichlet_guide, (torch.tensor([5.0, 2.0, 3.0]),), -math.log(66.0)),
    "mixture": lambda: Fit(mixture, mixture_guide, (), 0.0),
    "student": lambda: Fit(student, student, (), 0.0),
    "funnel": lambda: Fit(funnel, funnel, (), 0.0),
    "enumerated": lambda: Fit(switch, switch_guide, (torch.tensor(3.0),), switch_evidence(torch.tensor(3.0))),
    "eight schools": lambda: Fit(eight_schools, schools_guide, SCHOOLS, LOG_EVIDENCE),
    "items": lambda: items_fit(1.0),
    "fitted": fitted_normal,
}
BAD: dict[str, Callable[[], Fit]] = {
    "lost the small mode": lambda: Fit(mixture, partial(one_mode, 5.0), (), 0.0),
    "lost the large mode": lambda: Fit(mixture, partial(one_mode, -5.0), (), 0.0),
    "lost a mode of a discrete site": lambda: Fit(
        switch, partial(one_mode, 2.88), (torch.tensor(3.0),), switch_evidence(torch.tensor(3.0))
    ),
    "wrong mode": lambda: Fit(wrong_mode, partial(one_mode, -10.0), (), 0.0),
    "narrow": lambda: normal_fit(10, scale=0.5),
    "collapsed": lambda: normal_fit(3, scale=0.02),
    "wide": lambda: normal_fit(10, scale=1.5),
    "shifted": lambda: normal_fit(1, shift=0.4),
    "one thin coordinate of 100": one_thin_coordinate,
    "light tails": lambda: Fit(student, normal_for_student, (), 0.0),
    "mean-field, correlated": lambda: correlated_regression(data=STRONG_REGRESSION),
    "mean-field, funnel": lambda: Fit(funnel, mean_field_funnel, (), 0.0),
    "not trained": lambda: untrained(normal, AutoNormal(normal), normal_fit(10)),
    "wrong likelihood scale": subsample_scale,
    "narrow items": lambda: items_fit(0.6),
}
