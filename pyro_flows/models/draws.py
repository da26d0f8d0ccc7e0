# SPDX-License-Identifier: Apache-2.0
"""L2. Draws of a guide, without densities, and the items that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_flows.models.particles import runs_in_a_plate
from pyro_flows.models.sites import full_size
from pyro_flows.models.traces import (
    DRAWS,
    Call,
    as_indices,
    mini_batches,
    nesting_of,
    replay_trace,
    rows_of,
    run_quietly,
    sample_nodes,
)

__all__ = ["GuideSampler"]


class GuideSampler:
    """Draws from any guide, in an outer plate where that gives the densities of single runs, else one by one.

    Args:
        guide: The guide; it need not have a density.
        call: Its arguments.

    Attributes:
        indices: Plate -> indices of the items that the guide draws, in its order, the same for all draws.
        full_sizes: Plate -> number of its items without subsampling.
        elements: Number of values of a draw.
    """

    def __init__(self, guide: Callable[..., Any], call: Call) -> None:
        self._guide, self._call = guide, call
        trace = run_quietly(guide, call)
        nodes = {name: node for name, node in sample_nodes(trace).items() if not node["is_observed"]}
        frames = [frame for node in nodes.values() for frame in node["cond_indep_stack"] if frame.vectorized]
        self.indices: dict[str, Tensor] = {name: as_indices(v) for name, v in mini_batches(trace).items()}
        self.full_sizes: Mapping[str, int] = {frame.name: full_size(frame) for frame in frames}
        self.elements = sum(node["value"].numel() for node in nodes.values())
        self._ranks = {name: node["value"].dim() for name, node in nodes.items()}
        self._nesting = nesting_of(sample_nodes(trace).values())
        self._at_once = runs_in_a_plate(guide, call._replace(fixed=self.indices), self._nesting)

    def __call__(self, count: int) -> dict[str, Tensor]:
        """Draw ``count`` times: site -> ``(count, *site shape)``, auxiliary sites included."""
        fixed = replay_trace(self.indices)
        if self._at_once:
            outermost = pyro.plate(DRAWS, count, dim=-1 - self._nesting)
            nodes = sample_nodes(run_quietly(outermost(self._guide), self._call, fixed))
            return {name: rows_of(nodes[name]["value"], rank, count) for name, rank in self._ranks.items()}
        singles = [sample_nodes(run_quietly(self._guide, self._call, fixed)) for _ in range(count)]
        return {name: torch.stack([nodes[name]["value"] for nodes in singles]) for name in self._ranks}
