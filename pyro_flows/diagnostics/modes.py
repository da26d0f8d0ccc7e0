# SPDX-License-Identifier: Apache-2.0
"""L7. Modes of a posterior, between which the log joint dips: that of a draw, and those that a guide lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.diagnostics.search import Regions
from pyro_flows.importance.weights import ImportanceSampler

__all__ = ["LostMode", "Modes", "RidgeSettings", "lost_modes"]


@dataclass(frozen=True)
class RidgeSettings:
    """When a region is a separate mode: the log joint dips on a straight line to it, from the center of another region,
    or from a near draw of the guide.

    Attributes:
        num_draws: Number of draws of the guide, from which a near one is chosen.
        rank: Rank of that draw by distance; the nearest may be an outlier that is already beyond the dip.
        num_points: Number of points on the line.
        min_dip: Depth in nats, below the lower end, that separates two modes: a seventh of the density.
    """

    num_draws: int = 200
    rank: int = 40
    num_points: int = 25
    min_dip: float = 2.0


@dataclass(frozen=True, eq=False)
class LostMode:
    """A region with posterior mass and hardly any draws of the guide.

    Attributes:
        share: Its share of all mass that was found, in [0, 1].
        separate: Whether the log joint dips between the guide and the region, so that it is a separate mode.
        values: Site name -> value at the center of the region, on the device of the guide's draws.
    """

    share: float
    separate: bool
    values: Mapping[str, Tensor]

    def to(self, device: torch.device | str) -> LostMode:
        """The same on another device."""
        return replace(self, values={name: value.to(device) for name, value in self.values.items()})


class Modes:
    """The modes of a posterior that were found, and the middle of a guide's draws in each.

    Regions are of one mode if there is a way between them without a dip; a point is of the region whose Gaussian has
    the most density there.

    Args:
        sampler: Sampler of the model.
        regions: K regions with posterior mass.
        packed: Draws of the guide, unconstrained, ``(S, N, d)``.
        settings: When regions are separate modes.
    """

    @torch.no_grad()
    def __init__(
        self, sampler: ImportanceSampler, regions: Regions, packed: Tensor, settings: RidgeSettings = RidgeSettings()
    ) -> None:
        self._regions = regions
        count = len(regions.centers)
        one, other = torch.triu_indices(count, count, 1, device=packed.device)
        centers = regions.centers.to(packed)
        linked = torch.ones(count, *centers.shape[:2], dtype=torch.bool, device=packed.device)
        if count > 1:
            linked[one, other] = linked[other, one] = ~_dips_between(sampler, centers[one], centers[other], settings)
        for _ in range(count):
            linked = (linked.unsqueeze(2) & linked.unsqueeze(0)).any(1)
        self._numbers = linked.long().argmax(0)  # of the first region that is linked, (K, N)
        numbers, found = self.of(packed), []
        for mode in range(count):
            of_mode = torch.where((numbers == mode).unsqueeze(-1), packed, torch.nan).nanmedian(0).values
            found.append(torch.where(of_mode.isnan(), centers[mode], of_mode))
        self._medians = torch.stack(found)  # (K, N, d)

    def of(self, packed: Tensor) -> Tensor:
        """A number for the mode of each point, ``(S, N, d)`` to ``(S, N)``."""
        regions = self._regions
        log_dets = regions.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        distances = torch.stack([regions.distance(packed, k) for k in range(len(log_dets))])  # (K, S, N)
        log_density = (regions.log_mass - log_dets).unsqueeze(1) - 0.5 * distances.square()
        return self._numbers.gather(0, log_density.nan_to_num(-torch.inf, neginf=-torch.inf).argmax(0))

    def within(self, packed: Tensor) -> Tensor:
        """Points, ``(S, N, d)``, less the median of the guide's draws of their mode."""
        numbers = self.of(packed).unsqueeze(-1).expand_as(packed)
        return packed - self._medians.to(packed).gather(0, numbers)


@torch.no_grad()
def lost_modes(
    sampler: ImportanceSampler, regions: Regions, share: Tensor, settings: RidgeSettings = RidgeSettings()
) -> tuple[LostMode, ...]:
    """The lost regions of the item that lost most, in order of their mass.

    Args:
        sampler: Sampler of the model and the guide.
        regions: K regions with posterior mass.
        share: Share of the mass that is lost in each, ``(K, N)``; 0 if nothing is.
        settings: When a lost region is a separate mode.
    """
    item = int(share.sum(0).argmax())
    modes = []
    for k in share[:, item].argsort(descending=True).tolist():
        if share[k, item] > 0:
            like = sampler.structure.pack(sampler.draw(1).values)
            values, _ = sampler.structure.unpack(regions.centers[k : k + 1].to(like))
            separate = _dips(sampler, regions, k, item, settings)
            modes.append(LostMode(share[k, item].item(), separate, {name: value[0] for name, value in values.items()}))
    return tuple(modes)


def _dips(sampler: ImportanceSampler, regions: Regions, k: int, item: int, settings: RidgeSettings) -> bool:
    """Whether the log joint has a dip on the straight line to a region's center."""
    packed = sampler.structure.pack(sampler.draw(settings.num_draws).values)
    near = regions.distance(packed, k)[:, item].argsort()[settings.rank]
    found = _dips_between(sampler, packed[near : near + 1], regions.centers[k : k + 1].to(packed), settings)
    return bool(found[0, item])


def _dips_between(sampler: ImportanceSampler, begin: Tensor, end: Tensor, settings: RidgeSettings) -> Tensor:
    """Whether the log joint has a dip on the straight lines between P points, ``(P, N, d)`` each, to ``(P, N)``."""
    steps = torch.linspace(0.0, 1.0, settings.num_points, dtype=begin.dtype, device=begin.device)
    lines = torch.lerp(begin, end, steps[:, None, None, None])  # (points, P, N, d)
    heights = sampler.log_joint_in_parts(lines.flatten(0, 1)).unflatten(0, lines.shape[:2])
    lower_end = torch.minimum(heights[0], heights[-1])
    return heights.nan_to_num(-torch.inf, neginf=-torch.inf).amin(0) < lower_end - settings.min_dip
