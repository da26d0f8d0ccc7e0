# SPDX-License-Identifier: Apache-2.0
"""Models in two forms: as users write them, for one draw, and written to broadcast over particles.

Both forms of a model have the same sites, shapes and density, and share all but the expression that does not broadcast
(``x @ w``, ``a[group]``, ``torch.stack`` over time, ``nn.Linear``). Data are simulated from seeds of their own, so that
a run's seed is the guide's. What ``any_model.py`` measures, and ``tests/models/test_as_written.py`` tests.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Generator, Tensor, nn

__all__ = [
    "TWINS",
    "Twins",
    "arms",
    "gaussian_process",
    "logistic_regression",
    "mixture",
    "network",
    "random_slopes",
    "random_walk",
    "spike_and_slab",
]


@dataclass(frozen=True)
class Twins:
    """A model in two forms.

    Args:
        as_written: For one draw of the latents.
        broadcasting: For vectorized particles too.
        args: What both are called with.
        enumerated: A site of values 0 and 1 that is summed out, in a plate; empty where there is none.
    """

    as_written: Callable[..., Any]
    broadcasting: Callable[..., Any]
    args: tuple[Any, ...]
    enumerated: str = ""


def in_rows(value: Tensor) -> Tensor:
    """``(particles, 1, rows)`` to ``(particles, rows)``: latents outside a plate keep its place empty. ``(rows,)`` as
    it is."""
    return value.reshape(*value.shape[:-2], value.shape[-1])


# Products and indices


def logistic_regression(dim: int, rows: int, prior_sd: float = 1.0) -> Twins:
    """``x @ w``; ``dim`` coefficients, the intercept among them."""
    generator = Generator().manual_seed(dim)
    x = torch.randn(rows, dim - 1, generator=generator)
    w = 0.8 * torch.randn(dim - 1, generator=generator)
    y = torch.bernoulli((x @ w).sigmoid(), generator=generator)

    def model(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), prior_sd).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, prior_sd))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=product(x, w) + b), obs=y)

    return Twins(partial(model, operator.matmul), partial(model, lambda x, w: in_rows(w @ x.mT)), (x, y))


def random_slopes(firms: int = 11, years: int = 20) -> Twins:
    """``beta[f]``: an intercept and two slopes for each firm."""
    generator = Generator().manual_seed(1)
    f = torch.arange(firms).repeat_interleave(years)
    slopes = torch.tensor([0.5, 1.0, -0.5])
    x = torch.randn(len(f), len(slopes), generator=generator)
    x[:, 0] = 1.0
    beta = slopes + 0.5 * torch.randn(firms, len(slopes), generator=generator)
    y = (x * beta[f]).sum(-1) + 0.5 * torch.randn(len(f), generator=generator)

    def model(of_rows: Callable[[Tensor, Tensor], Tensor], x: Tensor, f: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(x.shape[1])).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("firms", firms):
            beta = pyro.sample("beta", dist.Normal(mu, tau).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((x * of_rows(beta, f)).sum(-1), sigma), obs=y)

    return Twins(partial(model, operator.getitem), partial(model, lambda beta, f: beta[..., f, :]), (x, f, y))


def arms(count: int, rows: int = 60) -> Twins:
    """``a[arm]``: a rate of success for each arm of a trial.

    One arm and two are plates of sizes that particles can have; and no latent besides makes shapes disagree earlier.
    """
    generator = Generator().manual_seed(2)
    arm = torch.arange(rows) % count
    y = torch.bernoulli(torch.randn(count, generator=generator)[arm].sigmoid(), generator=generator)

    def model(of_rows: Callable[[Tensor, Tensor], Tensor], arm: Tensor, y: Tensor) -> None:
        with pyro.plate("arms", count):
            a = pyro.sample("a", dist.Normal(0.0, 1.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=of_rows(a, arm)), obs=y)

    return Twins(partial(model, operator.getitem), partial(model, lambda a, arm: a[..., arm]), (arm, y))


def checked_regression(rows: int = 50) -> Twins:
    """A line, and an ``assert`` of its author's about shapes, which particles would break."""
    generator = Generator().manual_seed(3)
    x = torch.randn(rows, generator=generator)
    y = 1.0 + 2.0 * x + 0.5 * torch.randn(rows, generator=generator)

    def model(careful: bool, x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        mu = a + b * x
        if careful:
            assert mu.shape == y.shape
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    return Twins(partial(model, True), partial(model, False), (x, y))


# Time, networks and matrices


def random_walk(steps: int = 30) -> Twins:
    """``torch.stack`` of a site a step, from a Python loop; scales of the steps and of the noise are unknown.

    Under particles nothing is raised: time becomes one more batch dimension, and the density is another.
    """
    generator = Generator().manual_seed(4)
    y = (0.4 * torch.randn(steps, generator=generator)).cumsum(0) + 0.3 * torch.randn(steps, generator=generator)

    def model(over_time: Callable[[list[Tensor]], Tensor], y: Tensor) -> None:
        drift = pyro.sample("drift", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        level: Tensor | float = 0.0
        path = []
        for t in range(len(y)):
            level = pyro.sample(f"level_{t}", dist.Normal(level, drift))
            path.append(level)
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(over_time(path), noise), obs=y)

    return Twins(partial(model, torch.stack), partial(model, lambda path: in_rows(torch.stack(path, -1))), (y,))


class Network(PyroModule):
    """1 - width - width - 1, with a prior on each weight."""

    linear: ClassVar[type[nn.Linear]] = nn.Linear

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [PyroModule[self.linear](a, b) for a, b in itertools.pairwise([1, width, width, 1])]
        for layer in layers:
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))
        self.layers = PyroModule[nn.ModuleList](layers)

    def mean(self, x: Tensor) -> Tensor:
        """Of each row."""
        *hidden, last = self.layers
        value = x.unsqueeze(-1)
        for layer in hidden:
            value = layer(value).tanh()
        return last(value).squeeze(-1)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.mean(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


class BroadcastingLinear(nn.Linear):
    """Weights ``(*batch, out, in)`` and biases ``(*batch, out)``."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.mT + self.bias.unsqueeze(-2)


class BroadcastingNetwork(Network):
    """The same, for weights of many draws."""

    linear = BroadcastingLinear

    def mean(self, x: Tensor) -> Tensor:
        return in_rows(super().mean(x))


def network(width: int = 20, rows: int = 100) -> Twins:
    """``PyroSample`` on ``nn.Linear``; a sine."""
    x = torch.linspace(-2.0, 2.0, rows)
    y = (3 * x).sin() + 0.3 * x + 0.1 * torch.randn(rows, generator=Generator().manual_seed(5))
    return Twins(Network(width), BroadcastingNetwork(width), (x, y))


def gaussian_process(rows: int = 40) -> Twins:
    """A covariance matrix made of latents."""
    x = torch.linspace(0.0, 5.0, rows)
    y = 1.5 * (2 * x).sin() + 0.3 * torch.randn(rows, generator=Generator().manual_seed(6))

    def model(over_matrix: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        length, amplitude, noise = (
            over_matrix(pyro.sample(name, dist.LogNormal(0.0, 1.0))) for name in ("length", "amplitude", "noise")
        )
        cov = amplitude**2 * (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + noise**2 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=cov), obs=y)

    return Twins(partial(model, lambda value: value), partial(model, lambda value: value[..., None, None]), (x, y))


# Enumerated sites


def mixture(rows: int = 60) -> Twins:
    """``locs[assignment]``, assignments to two components enumerated; priors that tell the components apart."""
    generator = Generator().manual_seed(7)
    second = torch.rand(rows, generator=generator) < 0.4
    y = torch.where(second, 2.0, -1.5) + 0.8 * torch.randn(rows, generator=generator)

    def model(choose: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(y)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(choose(locs, assignment), scale), obs=y)

    as_written = config_enumerate(partial(model, operator.getitem))
    broadcasting = config_enumerate(partial(model, lambda locs, assignment: Vindex(locs)[..., assignment]))
    return Twins(as_written, broadcasting, (y,), "assignment")


def spike_and_slab(features: int = 5, rows: int = 80) -> Twins:
    """``x @ beta``, and a prior of beta that follows an enumerated site, which no observation does."""
    generator = Generator().manual_seed(8)
    x = torch.randn(rows, features, generator=generator)
    y = x[:, :2] @ torch.tensor([1.5, -1.0]) + 0.7 * torch.randn(rows, generator=generator)

    def model(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("features", x.shape[1]):
            included = pyro.sample("included", dist.Bernoulli(0.5))
            beta = pyro.sample("beta", dist.Normal(0.0, torch.where(included == 1, 2.0, 0.1)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(product(x, beta), sigma), obs=y)

    as_written = config_enumerate(partial(model, operator.matmul))
    broadcasting = config_enumerate(partial(model, lambda x, beta: beta @ x.mT))
    return Twins(as_written, broadcasting, (x, y), "included")


TWINS: dict[str, Callable[[], Twins]] = {
    "logistic regression, 25-D": partial(logistic_regression, 25, 400),
    "logistic regression, 35-D, prior sd 10": partial(logistic_regression, 35, 351, 10.0),
    "logistic regression, 61-D": partial(logistic_regression, 61, 208),
    "random slopes, 11 firms": random_slopes,
    "one arm": partial(arms, 1),
    "two arms": partial(arms, 2),
    "twelve arms": partial(arms, 12),
    "line with an assert": checked_regression,
    "random walk by a loop": random_walk,
    "neural network": network,
    "Gaussian process": gaussian_process,
    "mixture, enumerated": mixture,
    "spike and slab, enumerated": spike_and_slab,
}
