# SPDX-License-Identifier: Apache-2.0
"""L7. The modes that a guide lost: where they are, and whether the guide could get there uphill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.diagnostics.search import Regions
from pyro_flows.importance.weights import ImportanceSampler

__all__ = ["LostMode", "lost_modes"]

# Points on the way from a near draw of the guide, out of so many, and how deep a dip divides two modes, in nats.
POINTS, DRAWS, DIP = 25, 200, 2.0
# Rank of that draw: the very nearest may be a stray one that is over the ridge already.
NEAR = DRAWS // 5


@dataclass(frozen=True, eq=False)
class LostMode:
    """A place where the posterior has mass and the guide does not go.

    Attributes:
        share: Of all mass that was found.
        separate: Whether the log joint dips between there and the guide: another mode.
        values: Site name -> value there.
    """

    share: float
    separate: bool
    values: Mapping[str, Tensor]


@torch.no_grad()
def lost_modes(sampler: ImportanceSampler, regions: Regions, share: Tensor) -> tuple[LostMode, ...]:
    """The lost regions of the item that lost most, largest first.

    Args:
        sampler: Of the model and the guide.
        regions: K of them.
        share: What is lost in each, ``(K, N)``; 0 if nothing is.
    """
    item = int(share.sum(0).argmax())
    modes = []
    for k in share[:, item].argsort(descending=True).tolist():
        if share[k, item] > 0:
            like = sampler.structure.pack(sampler.draw(1).values)
            values, _ = sampler.structure.unpack(regions.centres[k : k + 1].to(like))
            separate = _dips(sampler, regions, k, item)
            modes.append(LostMode(share[k, item].item(), separate, {name: value[0] for name, value in values.items()}))
    return tuple(modes)


def _dips(sampler: ImportanceSampler, regions: Regions, k: int, item: int) -> bool:
    """Whether the log joint falls and rises again on the straight line to a region's centre."""
    packed = sampler.structure.pack(sampler.draw(DRAWS).values)
    near = regions.distance(packed, k)[:, item].argsort()[NEAR]
    steps = torch.linspace(0.0, 1.0, POINTS, dtype=packed.dtype, device=packed.device)[:, None, None]
    line = torch.lerp(packed[near], regions.centres[k].to(packed), steps)  # (POINTS, N, d)
    heights = sampler.log_joint(line)[:, item]
    lower_end = torch.minimum(heights[0], heights[-1])
    return bool(heights.min() < lower_end - DIP)
