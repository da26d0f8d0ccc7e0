# SPDX-License-Identifier: Apache-2.0
"""L7. The modes that a guide lost: location, and whether a region of low density separates them from the guide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.diagnostics.search import Regions
from pyro_flows.importance.weights import ImportanceSampler

__all__ = ["LostMode", "RidgeSettings", "lost_modes"]


@dataclass(frozen=True)
class RidgeSettings:
    """When a lost region is a separate mode: the log joint dips on a straight line to it from a near draw of the guide.

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
    steps = torch.linspace(0.0, 1.0, settings.num_points, dtype=packed.dtype, device=packed.device)[:, None, None]
    line = torch.lerp(packed[near], regions.centers[k].to(packed), steps)  # (points, N, d)
    heights = sampler.log_joint(line)[:, item]
    lower_end = torch.minimum(heights[0], heights[-1])
    return bool(heights.min() < lower_end - settings.min_dip)
