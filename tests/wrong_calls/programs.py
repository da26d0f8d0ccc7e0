# SPDX-License-Identifier: Apache-2.0
"""Models, guides and data that are right, for calls that are wrong in one thing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide

__all__ = ["ARRAY", "INF", "NAN", "NOT_INTEGERS", "NOT_PROGRAMS", "SEEDS", "Row", "X", "Y"]

# A call, the exception that it has to raise, and a pattern of its message.
Row = tuple[Callable[[], Any], type[Exception], str]

N = 8
X = torch.linspace(-1.0, 1.0, N)
Y = 2.0 * X + torch.linspace(0.5, -0.5, N).sin()
ARRAY = np.zeros((2, 3))
NAN, INF = float("nan"), float("inf")

# Values that no argument for a program, a seed or a number of draws takes, with a pattern of how messages show them.
NOT_PROGRAMS: dict[str, tuple[Any, str]] = {
    "None": (None, "None"),
    "a number": (3, "3"),
    "a name": ("model", "'model'"),
    "a tensor": (X, r"a tensor of shape \(8,\)"),
    "a list": ([1], r"\[1\]"),
}
NOT_INTEGERS: dict[str, tuple[Any, str]] = {
    "zero": (0, "0"),
    "negative": (-3, "-3"),
    "a float": (100.5, "100.5"),
    "a name": ("200", "'200'"),
    "a bool": (True, "True"),
    "a tensor": (X, r"a tensor of shape \(8,\)"),
    "nan": (NAN, "nan"),
    "inf": (INF, "inf"),
    "an array": (ARRAY, r"a NumPy array of shape \(2, 3\)"),
}
SEEDS: dict[str, tuple[Any, str]] = {
    "a float": (1.5, r"1\.5"),
    "a name": ("a", "'a'"),
    "2**70": (2**70, str(2**70)),
    "a bool": (True, "True"),
    "a list": ([0], r"\[0\]"),
}


def regression(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def no_plate(x: Tensor, y: Tensor) -> None:
    """A forgotten plate."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def scales(x: Tensor, y: Tensor) -> None:
    """Other latents than :func:`regression`."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x, tau), obs=y)


def counts(x: Tensor, y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def supports() -> None:
    """A site of every common support."""
    pyro.sample("tau", dist.HalfNormal(1.0))
    pyro.sample("p", dist.Beta(2.0, 2.0))
    pyro.sample("u", dist.Uniform(-1.0, 3.0))
    pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    pyro.sample("z", dist.Normal(0.0, 1.0))


def items(y: Tensor) -> None:
    with pyro.plate("items", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def chains(y: Tensor) -> None:
    """A plate that is named as a dimension of ArviZ."""
    with pyro.plate("chain", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("items", len(y), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def pair() -> None:
    """Two latents and no data."""
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))


class Decoder(nn.Module):
    """Maps ``(N, 2)`` to images of 4 x 4."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(-1, keepdim=True).sigmoid().expand(len(z), 16)


@functools.cache
def ready(model: Callable[..., Any] = regression, *args: Any, kind: Any = AutoFlowGuide) -> Any:
    """A guide that is trained, a little, for regression by default."""
    made = kind(model)
    made(*(args or ((X, Y) if model in (regression, scales, counts) else ())))
    with torch.no_grad():
        next(made.parameters()).add_(1e-4)
    return made


def other(kind: Any = AutoNormal) -> Any:
    """The guide of another model of the same data."""
    return ready(scales, kind=kind)
