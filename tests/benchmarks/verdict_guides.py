# SPDX-License-Identifier: Apache-2.0
"""Guides of every quality for a target whose posterior is known: exact, a little off, wrong in one way, or trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor
from verdict_targets import Packed, Target, gaussian, mixture_of, restricted, stretched

from pyro_flows import AutoFlowGuide, fit

__all__ = ["GUIDES"]

Guide = Callable[..., Any]


class Moments:
    """Location, covariance and scales of a target's packed latents; of its bulk where it has no variance."""

    def __init__(self, target: Target) -> None:
        self.draws = target.exact.draw(100_000).double()
        self.loc, self.sd = self.draws.mean(0), self.draws.std(0)
        clipped = self.draws
        if target.heavy:
            low, self.loc, high = self.draws.quantile(torch.tensor([0.159, 0.5, 0.841]).double(), 0)
            self.sd = (high - low) / 2
            clipped = torch.minimum(torch.maximum(self.draws, self.loc - 5 * self.sd), self.loc + 5 * self.sd)
        covariance = (clipped - self.loc).mT @ (clipped - self.loc) / len(clipped)
        correction = self.sd / covariance.diagonal().sqrt()
        self.covariance = correction.unsqueeze(-1) * covariance * correction


def one_or_all(rng: random.Random, moments: Moments, value: float, otherwise: float) -> Tensor:
    """A value for all coordinates, or for one."""
    dim = len(moments.loc)
    if rng.random() < 0.5:
        return torch.full((dim,), value).double()
    values = torch.full((dim,), otherwise).double()
    values[rng.randrange(dim)] = value
    return values


def exact(rng: random.Random, target: Target, moments: Moments) -> Packed:
    return target.exact


def perturbed(rng: random.Random, target: Target, moments: Moments, size: float) -> Packed:
    """Shift and scale of every coordinate are off a little, at random; KL about ``1.5 size ** 2``."""
    dim = len(moments.loc)
    scale, shift = (size / dim**0.5 * torch.randn(2, dim).double()).unbind(0)
    return stretched(target.exact, moments.loc, scale.exp(), shift * moments.sd)


def good(rng: random.Random, target: Target, moments: Moments) -> Packed:
    return perturbed(rng, target, moments, rng.uniform(0.0, 0.1))


def fair(rng: random.Random, target: Target, moments: Moments) -> Packed:
    return perturbed(rng, target, moments, rng.uniform(0.1, 0.3))


def shifted(rng: random.Random, target: Target, moments: Moments) -> Packed:
    size = 0.1 * 20 ** rng.random()
    where = torch.randn(len(moments.loc)).double() if rng.random() < 0.5 else one_or_all(rng, moments, 1.0, 0.0)
    return stretched(target.exact, moments.loc, torch.ones_like(where), size * where / where.norm() * moments.sd)


def narrow(rng: random.Random, target: Target, moments: Moments) -> Packed:
    scale = one_or_all(rng, moments, rng.uniform(0.4, 0.95), 1.0)
    return stretched(target.exact, moments.loc, scale, torch.zeros_like(scale))


def wide(rng: random.Random, target: Target, moments: Moments) -> Packed:
    scale = one_or_all(rng, moments, rng.uniform(1.05, 2.0), 1.0)
    return stretched(target.exact, moments.loc, scale, torch.zeros_like(scale))


def mean_field(rng: random.Random, target: Target, moments: Moments) -> Guide:
    """AutoNormal with the exact means, and the exact sds or those given all other latents."""
    sd = moments.sd if rng.random() < 0.5 else torch.linalg.inv(moments.covariance).diagonal().rsqrt()
    guide = AutoNormal(target.continuous)
    guide(*target.args)
    start = 0
    for name in guide.prototype_trace.stochastic_nodes:
        loc = pyro.param(f"AutoNormal.locs.{name}")
        part = slice(start, start + loc.numel())
        start += loc.numel()
        with torch.no_grad():
            loc.copy_(moments.loc[part].reshape(loc.shape))
            scale = getattr(guide.scales, f"{name}_unconstrained")
            scale.copy_(torch.expm1(sd[part]).log().reshape(loc.shape))
    return guide


def full_rank(rng: random.Random, target: Target, moments: Moments) -> Packed:
    return gaussian(moments.loc, moments.covariance)


def student(rng: random.Random, target: Target, moments: Moments) -> Packed:
    """A multivariate Student t with the posterior's covariance; tails that are too heavy are easily weighted."""
    df, dim = rng.uniform(4.0, 8.0), len(moments.loc)
    normal = gaussian(torch.zeros(dim), moments.covariance * (df - 2) / df)
    precision = torch.linalg.inv(moments.covariance * (df - 2) / df)
    constant = torch.lgamma(torch.tensor((df + dim) / 2)) - torch.lgamma(torch.tensor(df / 2))
    constant = constant.double() - 0.5 * (dim * torch.tensor(df * torch.pi).double().log() - precision.logdet())

    def draw(count: int) -> Tensor:
        chi2 = torch.distributions.Chi2(torch.tensor(df).double()).sample((count, 1))
        return moments.loc + normal.draw(count) * (df / chi2).sqrt()

    def density(x: Tensor) -> Tensor:
        squared = ((x - moments.loc) @ precision * (x - moments.loc)).sum(-1)
        return constant - (df + dim) / 2 * torch.log1p(squared / df)

    return Packed(dim, draw, density)


def half_support(rng: random.Random, target: Target, moments: Moments) -> Packed:
    """The posterior where one coordinate is below, or above, one of its quantiles."""
    k, mass, above = rng.randrange(len(moments.loc)), rng.uniform(0.5, 0.97), rng.random() < 0.5
    cut = moments.draws[:, k].quantile(1 - mass if above else mass)
    return restricted(target.exact, lambda x: (x[:, k] > cut) if above else (x[:, k] <= cut))


def masses(target: Target, moments: Moments) -> list[float]:
    return [mode(moments.draws).double().mean().item() for mode in target.modes]


def some_modes(rng: random.Random, target: Target, moments: Moments) -> Packed | None:
    """The posterior without one of its modes."""
    left = [k for k, mass in enumerate(masses(target, moments)) if mass < 0.98]
    if not left:
        return None
    lost = target.modes[rng.choice(left)]
    return restricted(target.exact, lambda x: ~lost(x))


def mode_weights(rng: random.Random, target: Target, moments: Moments) -> Packed | None:
    """All modes, with other weights."""
    found = [(mode, mass) for mode, mass in zip(target.modes, masses(target, moments), strict=True) if mass > 0.01]
    if len(found) < 2:
        return None
    size = rng.uniform(0.0, 1.5)
    weights = [mass * 2.718 ** (size * rng.gauss(0.0, 1.0)) for _, mass in found]
    return mixture_of([restricted(target.exact, mode) for mode, _ in found], weights)


def part_of_the_data(rng: random.Random, target: Target, moments: Moments) -> Packed | None:
    return target.partial


def few_steps(rng: random.Random, target: Target, moments: Moments) -> Guide:
    """Pyro's guides, trained by SVI for too few steps, or just enough."""
    make, steps = rng.choice([AutoNormal, AutoMultivariateNormal]), rng.choice([100, 300, 1000])
    guide = make(target.continuous)
    loss = TraceEnum_ELBO(max_plate_nesting=1) if target.enumerated else Trace_ELBO()
    svi = SVI(target.model, guide, Adam({"lr": rng.choice([0.01, 0.03])}), loss)
    for _ in range(steps):
        svi.step(*target.args)
    return guide


def warm_start(rng: random.Random, target: Target, moments: Moments) -> Guide:
    guide = AutoFlowGuide(target.continuous)
    guide.setup(*target.args)
    return guide.warm_start_on([(target.args, {})], model=target.model)


def flow_few_steps(rng: random.Random, target: Target, moments: Moments) -> Guide:
    guide = AutoFlowGuide(target.continuous)
    fit(target.model, guide, target.args, num_steps=rng.choice([50, 200]), compile=False, progress=False)
    return guide


# Kind -> share among cases, and what makes one; None where the target has none of this kind.
GUIDES: dict[str, tuple[float, Callable[[random.Random, Target, Moments], Packed | Guide | None]]] = {
    "exact": (2, exact),
    "good": (4, good),
    "fair": (2, fair),
    "shifted": (2, shifted),
    "narrow": (2, narrow),
    "wide": (2, wide),
    "mean-field": (2, mean_field),
    "full-rank Gaussian": (2, full_rank),
    "Student": (1, student),
    "half support": (2, half_support),
    "a mode missing": (6, some_modes),
    "mode weights": (2, mode_weights),
    "part of the data": (3, part_of_the_data),
    "SVI, few steps": (1, few_steps),
    "flow, warm start": (1, warm_start),
    "flow, few steps": (1, flow_few_steps),
}
