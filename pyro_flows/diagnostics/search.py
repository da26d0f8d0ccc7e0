# SPDX-License-Identifier: Apache-2.0
"""L7. What a guide's own draws cannot show: places in which the posterior has mass, found without the guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.models.traces import Call, run_quietly, sample_nodes
from pyro_flows.starts.lbfgs import climb, local_factor

__all__ = ["Regions", "Search", "SearchResult", "search_regions"]

# Climbs start from draws of the prior and from draws of the guide, spread out this much about their mean.
STARTS, FEW_STARTS = 12, 4
WIDENING = 3.0
# Steps of each climb, and after how many its point is a candidate: the mode of a centred hierarchy is at a scale of
# zero, where there is no mass, but an early point of the way there is fine.
NUM_STEPS = 90
LOOKS = (6, 15, 30, 60)
# Draws from the Gaussian at a candidate: to rank it, and to say how much mass there is.
RANKING_DRAWS, FEW_RANKING_DRAWS = 32, 8
MASS_DRAWS, FEW_MASS_DRAWS = 1000, 200
MAX_REGIONS = 6
# An ellipsoid holds 99 % of its Gaussian; the normal quantile of that.
COVERAGE_QUANTILE = 2.3263
# Fewer of each where the model runs draw by draw, a draw takes more than a megabyte, or there are many items.
MIN_CHUNK, MANY_COORDINATES = 64, 2000
# One backward pass a dimension for a Hessian; and what a batch of items may have in all.
MAX_DIM, MAX_COORDINATES = 200, 100_000


class Regions(NamedTuple):
    r"""Ellipsoids :math:`B_k` and the mass :math:`A_k = \int_{B_k} p(x, z) dz` of each; N items.

    A point belongs to the first ellipsoid that it is in, so that masses add up.

    Attributes:
        centres: ``(K, N, d)``, unconstrained.
        factors: Cholesky factors of the covariances, ``(K, N, d, d)``.
        radius: In units of these.
        log_mass: log :math:`A_k`, ``(K, N)``.
        error: Its standard error relative to :math:`A_k`, ``(K, N)``.
    """

    centres: Tensor
    factors: Tensor
    radius: float
    log_mass: Tensor
    error: Tensor

    def locate(self, packed: Tensor) -> Tensor:
        """Which region each of ``(S, N, d)`` is in, ``(S, N)``; ``K`` for none."""
        count = len(self.centres)
        where = torch.full(packed.shape[:2], count, device=packed.device)
        for k in reversed(range(count)):
            where = torch.where(self.distance(packed, k) <= self.radius, k, where)
        return where

    def distance(self, packed: Tensor, k: int) -> Tensor:
        """Mahalanobis distance of ``(S, N, d)`` from the centre of region k, ``(S, N)``."""
        deviation = (packed.double() - self.centres[k]).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factors[k], deviation, upper=False).squeeze(-1).norm(dim=-1)


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        regions: Regions that hold mass; None if there are none.
        why_none: Why there are none; empty if there are some.
    """

    regions: Regions | None
    why_none: str


def search_regions(
    sampler: ImportanceSampler,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    enabled: bool,
    progress: bool,
) -> SearchResult:
    """Search, where that is asked for and can be done; the arguments are those of :class:`Search`."""
    why_none = _why_not(sampler) if enabled else "search is off"
    if why_none:
        return SearchResult(None, why_none)
    regions = Search(sampler, model, args, kwargs).run(progress=progress)
    return SearchResult(regions, "" if regions is not None else "the log joint cannot be followed")


class Search:
    """Climbs the log joint from places that the guide did not choose, and measures the mass around where it gets.

    A high mode is no evidence of mass (that of a centred hierarchy is infinite), and a guide's weights know nothing of
    where it never draws. The integral of p(x, z) over an ellipsoid, though, has two unbiased estimates: from the
    Gaussian that the ellipsoid belongs to, and from the guide's own draws in it. They have to agree.

    Args:
        sampler: Of the model and a guide.
        model: The model, for draws of its prior.
        args: Its arguments.
        kwargs: Likewise.
    """

    def __init__(
        self, sampler: ImportanceSampler, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._sampler = sampler
        self._structure = sampler.structure
        self._model = model
        self._args = args
        self._kwargs = kwargs
        few = self._structure.num_items * self._structure.item_dim > MANY_COORDINATES
        few |= sampler.chunk < MIN_CHUNK or not sampler.score.is_vectorized
        self._starts = FEW_STARTS if few else STARTS
        self._ranking = FEW_RANKING_DRAWS if few else RANKING_DRAWS
        self._mass = FEW_MASS_DRAWS if few else MASS_DRAWS

    @torch.no_grad()
    def run(self, *, progress: bool) -> Regions | None:
        """Find up to six regions per item; None if the log joint cannot be followed or there are none."""
        start = torch.cat([*self._from_prior(), self._from_guide()])
        start = torch.where(start.isfinite(), start, 0.0)
        self._dtype = start.dtype
        # A step too far is cut down anyway, where an error would stop all climbs; masses are measured with checks on.
        with pyro.validation_enabled(False):
            candidates = self._climb(start, progress=progress)
            parts = candidates.split(self._sampler.chunk)
            factors = torch.cat([local_factor(self._sampler.log_joint, part) for part in parts])
        return self._choose(candidates.double(), factors)

    def _climb(self, start: Tensor, *, progress: bool) -> Tensor:
        """Points on the way up, ``(R, N, d)``."""
        looks, number, points = [], 0, start
        with tqdm(total=NUM_STEPS, desc="search", disable=not progress, delay=1.0) as bar:
            for number, points in enumerate(climb(self._sampler.log_joint, start, NUM_STEPS), 1):
                if number in LOOKS:
                    looks.append(points)
                bar.update()
        return torch.cat(looks if number in LOOKS else [*looks, points])

    def _from_prior(self) -> Iterator[Tensor]:
        for _ in range(self._starts):
            try:
                trace = run_quietly(self._model, Call(self._args, self._kwargs))
            except ValueError:  # a likelihood that its own prior breaks
                continue
            nodes = sample_nodes(trace)
            values = {site.name: nodes[site.name]["value"].unsqueeze(0) for site in self._structure.latents}
            yield self._structure.pack(values)

    def _from_guide(self) -> Tensor:
        packed = self._structure.pack(self._sampler.draw(self._starts).values)
        centre = packed.mean(0)
        return torch.cat([centre + WIDENING * (packed - centre), centre.unsqueeze(0)])

    def _radius(self) -> float:
        """Of the ball that holds 99 % of a standard normal, by Wilson and Hilferty."""
        dim = self._structure.item_dim
        spread = 2.0 / (9.0 * dim)
        return math.sqrt(dim) * (1.0 - spread + COVERAGE_QUANTILE * math.sqrt(spread)) ** 1.5

    def _choose(self, centres: Tensor, factors: Tensor) -> Regions | None:
        """The candidates with most mass, none of which has its centre in another."""
        usable = factors.isfinite().flatten(2).all(-1) & centres.isfinite().all(-1)
        factors = torch.where(usable[..., None, None], factors, torch.eye(centres.shape[-1]).to(factors))
        radius = self._radius()
        none = torch.zeros_like(centres[:0, :, 0])
        every = Regions(centres, factors, radius, none, none)
        log_mass, error = self._measure(every, self._ranking, exclusive=False)
        # Of two Gaussians around the same mass the one whose weights vary less tells more, and ranks less by luck.
        log_mass = torch.where(usable, log_mass - torch.log1p(self._ranking * error.square()), -torch.inf)
        log_mass = log_mass.nan_to_num(-torch.inf, neginf=-torch.inf)
        chosen: list[Tensor] = []
        items = torch.arange(centres.shape[1], device=centres.device)
        for _ in range(MAX_REGIONS):
            best = log_mass.argmax(0)  # (N,)
            chosen.append(best)
            own = Regions(centres[best, items][None], factors[best, items][None], radius, none, none)
            inside = own.locate(centres) == 0
            inside[best, items] = True
            log_mass = torch.where(inside, -torch.inf, log_mass)
            if log_mass.max() == -torch.inf:
                break
        index = torch.stack(chosen)  # (K, N)
        regions = every._replace(centres=centres[index, items], factors=factors[index, items])
        log_mass, error = self._measure(regions, self._mass, exclusive=True)
        if not log_mass.isfinite().any():
            return None
        return regions._replace(log_mass=log_mass, error=error)

    def _measure(self, regions: Regions, count: int, *, exclusive: bool) -> tuple[Tensor, Tensor]:
        """log mass and relative error of each region by draws of its Gaussian, ``(K, N)``."""
        shape = regions.centres.shape
        noise = torch.randn(count, *shape, dtype=torch.double, device=regions.centres.device)
        draws = regions.centres + (regions.factors @ noise.unsqueeze(-1)).squeeze(-1)  # (count, K, N, d)
        squared = noise.square().sum(-1)
        log_density = -0.5 * squared - 0.5 * shape[-1] * math.log(2 * math.pi)
        log_density -= regions.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        rows = draws.flatten(0, 1).to(self._dtype)
        parts = rows.split(self._sampler.chunk)
        log_joint = torch.cat([self._sampler.log_joint(part) for part in parts]).reshape(log_density.shape)
        inside = squared <= regions.radius**2
        if exclusive:
            own = torch.arange(shape[0], device=rows.device)[:, None]
            inside &= regions.locate(draws.flatten(0, 1)).reshape(log_density.shape) == own
        log_weights = torch.where(inside & ~log_joint.isnan(), log_joint - log_density, -torch.inf)
        log_mass = log_weights.logsumexp(0) - math.log(count)
        relative = (log_weights - log_mass).exp()
        return log_mass, relative.std(0) / math.sqrt(count)


def _why_not(sampler: ImportanceSampler) -> str:
    """Why there is no search for a model, in words; empty if there is one."""
    structure = sampler.structure
    if structure.subsampled:
        return "its plates are subsampled"
    if not structure.is_continuous:
        return "it has latents without an unconstrained space"
    if structure.item_dim > MAX_DIM:
        return f"it has {structure.item_dim} dimensions, more than {MAX_DIM}"
    if structure.num_items * structure.item_dim > MAX_COORDINATES:
        return f"it has {structure.num_items} items of {structure.item_dim} dimensions; pass a smaller batch"
    return ""
