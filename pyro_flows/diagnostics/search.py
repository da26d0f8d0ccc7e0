# SPDX-License-Identifier: Apache-2.0
"""L7. Search for regions with posterior mass that the guide's own draws cannot reveal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.models.traces import NO_DENSITY, Call, run_quietly, sample_nodes
from pyro_flows.starts.fixed_draws import scored
from pyro_flows.starts.gaussian import Gaussian, refined
from pyro_flows.starts.lbfgs import lbfgs_paths, local_factor

__all__ = ["Regions", "Search", "SearchResult", "SearchSettings", "search_regions"]


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search for regions with posterior mass.

    Attributes:
        num_starts: Number of ascents from draws of the prior, and again from draws of the guide. Every second one from
            the prior starts at a random point of the line from there to the center of the guide: in many dimensions all
            draws of a wide prior are far away, from where ascents end in the widest mode.
        widening: Factor by which the draws of the guide are spread out about their mean.
        num_steps: Steps of L-BFGS on each path.
        candidate_steps: Numbers of steps after which a point is a candidate, besides the last one: the mode of a
            centered hierarchy is at a scale of zero, where there is no mass, but early points of the path are useful.
        num_ranking_draws: Draws from the Gaussian at a candidate by which candidates are ranked.
        num_guide_draws: Draws of the guide; a candidate is elsewhere if none of them is near.
        num_refined: Number of candidates elsewhere whose Gaussian is improved.
        most_to_gain: Largest gain in ELBO, in nats, that is expected of that.
        num_mass_draws: Draws by which the mass of a region is measured; its relative error is at most a few percent
            where the Gaussian fits.
        max_regions: Largest number of regions for each item.
        coverage_quantile: Standard normal quantile of the probability of an ellipsoid under its Gaussian, 99 %.
        min_chunk: A model that takes fewer draws at once than this is expensive, since a draw takes a megabyte.
        max_cheap_values: Number of values of a run of the model above which there are a third of the ascents.
        max_cheap_coordinates: Unconstrained dimensions of all items together above which a search is expensive.
        max_dim: Largest dimension of an item: a Hessian takes a backward pass for each.
        max_coordinates: Largest number of dimensions of all items together.
    """

    num_starts: int = 36
    widening: float = 3.0
    num_steps: int = 90
    candidate_steps: tuple[int, ...] = (6, 15, 30, 60)
    num_ranking_draws: int = 32
    num_guide_draws: int = 200
    num_refined: int = 3
    most_to_gain: float = 20.0
    num_mass_draws: int = 1000
    max_regions: int = 6
    coverage_quantile: float = 2.3263
    min_chunk: int = 64
    max_cheap_values: int = 1000
    max_cheap_coordinates: int = 2000
    max_dim: int = 200
    max_coordinates: int = 100_000

    def reduced(self) -> SearchSettings:
        """Settings with a ninth of the ascents and fewer draws, for expensive models."""
        return replace(
            self,
            num_starts=self.num_starts // 9,
            num_ranking_draws=self.num_ranking_draws // 4,
            num_guide_draws=self.num_guide_draws // 5,
            num_refined=self.num_refined // 3,
            num_mass_draws=self.num_mass_draws // 5,
        )


class Regions(NamedTuple):
    r"""Ellipsoids :math:`B_k` and the mass :math:`A_k = \int_{B_k} p(x, z) dz` of each; N items.

    A point belongs to the first ellipsoid that it is in, so that masses add up.

    Attributes:
        centers: ``(K, N, d)``, unconstrained.
        factors: Cholesky factors of the covariances, ``(K, N, d, d)``.
        radius: Mahalanobis radius of the ellipsoids.
        log_mass: log :math:`A_k`, ``(K, N)``.
        error: Its standard error relative to :math:`A_k`, ``(K, N)``.
    """

    centers: Tensor
    factors: Tensor
    radius: float
    log_mass: Tensor
    error: Tensor

    def locate(self, packed: Tensor) -> Tensor:
        """Index of the region of each point, ``(S, N, d)`` to ``(S, N)``; ``K`` for none."""
        count = len(self.centers)
        where = torch.full(packed.shape[:2], count, device=packed.device)
        for k in reversed(range(count)):
            where = torch.where(self.distance(packed, k) <= self.radius, k, where)
        return where

    def distance(self, packed: Tensor, k: int) -> Tensor:
        """Mahalanobis distance of ``(S, N, d)`` from the center of region k, ``(S, N)``."""
        deviation = (packed.double() - self.centers[k]).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factors[k], deviation, upper=False).squeeze(-1).norm(dim=-1)


class SearchResult(NamedTuple):
    """Result of a search.

    Attributes:
        regions: Regions with posterior mass; None if there are none.
        why_none: Reason that there are none; empty if there are some.
    """

    regions: Regions | None
    why_none: str

    def to(self, device: torch.device | str) -> SearchResult:
        """The same on another device."""
        if self.regions is None:
            return self
        centers, factors, radius, log_mass, error = self.regions
        moved = Regions(centers.to(device), factors.to(device), radius, log_mass.to(device), error.to(device))
        return self._replace(regions=moved)


def search_regions(
    sampler: ImportanceSampler,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    enabled: bool,
    progress: bool,
    settings: SearchSettings = SearchSettings(),
) -> SearchResult:
    """Search if requested and possible; the arguments are those of :class:`Search`."""
    why_none = _why_not(sampler, settings) if enabled else "search is off"
    if why_none:
        return SearchResult(None, why_none)
    regions = Search(sampler, model, args, kwargs, settings).run(progress=progress)
    return SearchResult(regions, "" if regions is not None else "the log joint cannot be followed")


class Search:
    """Maximizes the log joint from draws of the prior and widened draws of the guide, and measures the mass along the
    paths.

    Modes are compared by probability mass, not density: the density of a centered hierarchy is unbounded. The integral
    of p(x, z) over an ellipsoid has two unbiased estimates, by importance sampling from the ellipsoid's Gaussian and by
    the guide's own draws in it, and the two must agree.

    Args:
        sampler: Sampler of the model and a guide.
        model: The model, for draws of its prior.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        settings: Settings of the search.
    """

    def __init__(
        self,
        sampler: ImportanceSampler,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        settings: SearchSettings = SearchSettings(),
    ) -> None:
        self._sampler = sampler
        self._structure = sampler.structure
        self._model = model
        self._args = args
        self._kwargs = kwargs
        is_expensive = (
            self._structure.num_items * self._structure.item_dim > settings.max_cheap_coordinates
            or sampler.chunk < settings.min_chunk
            or not sampler.score.is_vectorized
        )
        if is_expensive:
            settings = settings.reduced()
        elif self._structure.elements > settings.max_cheap_values:
            settings = replace(settings, num_starts=settings.num_starts // 3)
        self._settings = settings

    @torch.no_grad()
    def run(self, *, progress: bool) -> Regions | None:
        """Find a few regions for each item; None if there are none or the log joint cannot be maximized."""
        start = self._starts()
        start = torch.where(start.isfinite(), start, 0.0)
        self._dtype = start.dtype
        # An overlong step is shortened, where an exception would end all paths; masses are measured with validation.
        with pyro.validation_enabled(False):
            candidates = self._climb(start, progress=progress)
            parts = candidates.split(self._sampler.chunk)
            sizes = self._structure.layout.sizes
            factors = torch.cat([local_factor(self._sampler.log_joint, part, sizes) for part in parts])
            centers, factors = self._with_refined(candidates, factors)
        return self._choose(centers.double(), factors)

    def _climb(self, start: Tensor, *, progress: bool) -> Tensor:
        """Candidate points on the paths of ascent, ``(R, N, d)``."""
        num_steps, candidate_steps = self._settings.num_steps, self._settings.candidate_steps
        candidates, number, points = [], 0, start
        with tqdm(total=num_steps, desc="search", disable=not progress, delay=1.0) as bar:
            for number, points in enumerate(lbfgs_paths(self._sampler.log_joint, start, num_steps), 1):
                if number in candidate_steps:
                    candidates.append(points)
                bar.update()
        return torch.cat(candidates if number in candidate_steps else [*candidates, points])

    def _from_prior(self) -> Iterator[Tensor]:
        """Draws of the prior; none where it cannot be drawn from."""
        for _ in range(self._settings.num_starts):
            try:
                trace = run_quietly(self._model, Call(self._args, self._kwargs))
            except NO_DENSITY:  # a likelihood that refuses a draw of the prior
                continue
            except NotImplementedError:  # an improper prior
                return
            nodes = sample_nodes(trace)
            values = {site.name: nodes[site.name]["value"].unsqueeze(0) for site in self._structure.latents}
            yield self._structure.pack(values)

    def _starts(self) -> Tensor:
        """Draws of the prior and of the guide, some of them moved, ``(R, N, d)``."""
        prior = list(self._from_prior())
        packed = self._structure.pack(self._sampler.draw(self._settings.num_starts).values)
        center = packed.mean(0)
        prior[1::2] = [center + torch.rand(()).to(center) * (draw - center) for draw in prior[1::2]]
        return torch.cat([*prior, center + self._settings.widening * (packed - center), center.unsqueeze(0)])

    def _with_refined(self, centers: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates, and the Gaussians of highest ELBO near some around which the guide does not draw.

        In tens of dimensions, draws of the Gaussian of the curvature are a poor measure of a mode's mass.
        """
        # A Hessian takes a thousand runs of a model of which draws cannot share one.
        if self._structure.num_items > 1 or not self._sampler.score.is_vectorized:
            return centers, factors
        chunks = list(self._sampler.chunks(self._settings.num_guide_draws, progress=False))
        packed = torch.cat([self._structure.pack(draws.values) for draws in chunks])
        log_weights = torch.cat([draws.log_weights for draws in chunks])
        floor = log_weights.logsumexp(0).item() - math.log(len(packed)) - self._settings.most_to_gain
        usable = _usable(centers, factors).squeeze(-1)
        every = self._ellipsoids(centers[usable].double(), factors[usable])
        found = [
            Gaussian(center[0], factor[0].to(center))
            for k, (center, factor) in enumerate(zip(centers[usable], every.factors, strict=True))
            if not (every.distance(packed, k) <= every.radius).any()
        ]
        if not found:
            return centers, factors
        target = _OneItem(self._sampler)
        count = self._settings.num_ranking_draws
        found = sorted(scored(target, found, count, found[0].loc), key=lambda gaussian: -gaussian.elbo)
        better: list[Gaussian] = []
        for gaussian in found:
            if len(better) == self._settings.num_refined or gaussian.elbo < floor:
                break
            if all(gaussian.distance(other) > every.radius for other in better):
                better.append(refined(target, gaussian))
        if not better:
            return centers, factors
        locs = torch.stack([gaussian.loc for gaussian in better]).unsqueeze(1)
        roots = torch.stack([gaussian.factor for gaussian in better]).unsqueeze(1)
        return torch.cat([centers, locs]), torch.cat([factors, roots.to(factors)])

    def _ellipsoids(self, centers: Tensor, factors: Tensor) -> Regions:
        """Regions whose mass is not measured yet."""
        none = torch.zeros_like(centers[:0, :, 0])
        return Regions(centers, factors, self._radius(), none, none)

    def _radius(self) -> float:
        """Radius of the ball that holds 99 % of a standard normal, by Wilson and Hilferty's approximation."""
        dim = self._structure.item_dim
        variance = 2.0 / (9.0 * dim)
        return math.sqrt(dim) * (1.0 - variance + self._settings.coverage_quantile * math.sqrt(variance)) ** 1.5

    def _choose(self, centers: Tensor, factors: Tensor) -> Regions | None:
        """The candidates with the most mass, none of which has its center in another."""
        usable = _usable(centers, factors)
        factors = torch.where(usable[..., None, None], factors, torch.eye(centers.shape[-1]).to(factors))
        every = self._ellipsoids(centers, factors)
        num_draws = self._settings.num_ranking_draws
        log_mass, error = self._measure(every, num_draws, exclusive=False)
        # Of two Gaussians around the same mass, prefer the one whose weights vary less: its estimate is less noisy.
        log_mass = torch.where(usable, log_mass - torch.log1p(num_draws * error.square()), -torch.inf)
        log_mass = log_mass.nan_to_num(-torch.inf, neginf=-torch.inf)
        chosen: list[Tensor] = []
        items = torch.arange(centers.shape[1], device=centers.device)
        for _ in range(self._settings.max_regions):
            best = log_mass.argmax(0)  # (N,)
            chosen.append(best)
            own = self._ellipsoids(centers[best, items][None], factors[best, items][None])
            inside = own.locate(centers) == 0
            inside[best, items] = True
            log_mass = torch.where(inside, -torch.inf, log_mass)
            if log_mass.max() == -torch.inf:
                break
        index = torch.stack(chosen)  # (K, N)
        regions = every._replace(centers=centers[index, items], factors=factors[index, items])
        log_mass, error = self._measure(regions, self._settings.num_mass_draws, exclusive=True)
        if not log_mass.isfinite().any():
            return None
        return regions._replace(log_mass=log_mass, error=error)

    def _measure(self, regions: Regions, count: int, *, exclusive: bool) -> tuple[Tensor, Tensor]:
        """Log mass and relative error of each region by draws of its Gaussian, ``(K, N)``."""
        shape = regions.centers.shape
        noise = torch.randn(count, *shape, dtype=torch.double, device=regions.centers.device)
        draws = regions.centers + (regions.factors @ noise.unsqueeze(-1)).squeeze(-1)  # (count, K, N, d)
        squared = noise.square().sum(-1)
        log_density = -0.5 * squared - 0.5 * shape[-1] * math.log(2 * math.pi)
        log_density -= regions.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        rows = draws.flatten(0, 1).to(self._dtype)
        log_joint = self._sampler.log_joint_in_parts(rows).reshape(log_density.shape)
        inside = squared <= regions.radius**2
        if exclusive:
            own = torch.arange(shape[0], device=rows.device)[:, None]
            inside &= regions.locate(draws.flatten(0, 1)).reshape(log_density.shape) == own
        log_weights = torch.where(inside & ~log_joint.isnan(), log_joint - log_density, -torch.inf)
        log_mass = log_weights.logsumexp(0) - math.log(count)
        relative = (log_weights - log_mass).exp()
        return log_mass, relative.std(0) / math.sqrt(count)


def _usable(centers: Tensor, factors: Tensor) -> Tensor:
    """Which candidates have a Gaussian, ``(R, N)``."""
    return factors.isfinite().flatten(2).all(-1) & centers.isfinite().all(-1)


@dataclass(frozen=True, eq=False)
class _OneItem:
    """The log joint of a model of one item, of vectors."""

    sampler: ImportanceSampler

    @property
    def sizes(self) -> Sequence[int]:
        return self.sampler.structure.layout.sizes

    def affordable(self, count: int, _: int) -> int:
        return max(2, min(count, self.sampler.chunk) // 2 * 2)

    @property
    def chunk(self) -> int:
        return self.sampler.chunk

    @property
    def is_vectorized(self) -> bool:
        return self.sampler.score.is_vectorized

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        items = draws.unsqueeze(1) if isinstance(draws, Tensor) else [part.unsqueeze(1) for part in draws]
        return self.sampler.log_joint(items).squeeze(1)


def _why_not(sampler: ImportanceSampler, settings: SearchSettings) -> str:
    """Reason that a model cannot be searched; empty if it can."""
    structure = sampler.structure
    if structure.subsampled:
        return "its plates are subsampled"
    if not structure.is_continuous:
        return "it has latents without an unconstrained space"
    if structure.item_dim > settings.max_dim:
        return f"it has {structure.item_dim} dimensions, more than {settings.max_dim}"
    if structure.num_items * structure.item_dim > settings.max_coordinates:
        return f"it has {structure.num_items} items of {structure.item_dim} dimensions; pass a smaller batch"
    return ""
