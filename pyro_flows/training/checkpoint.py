# SPDX-License-Identifier: Apache-2.0
"""L7. The file from which an interrupted run of :func:`~pyro_flows.fit` is resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.flows.version_0_1_0 import from_0_1_0, names_in_0_1_0
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.training.state import Point, TrainingState

__all__ = ["Checkpoint"]

# Version of the file's format; files of 0.1.0 have none.
FORMAT = 2
# Name in 0.1.0 -> attribute of TrainingState.
NAMES_0_1_0 = {
    "rate": "learning_rate",
    "start": "initial_point",
    "best_point": "best_point",
    "point": "point",
    "start_is_best": "initial_is_best",
    "cycle": "cycle",
    "step": "step",
    "steps": "num_steps",
    "losses": "losses",
    "skipped": "num_skipped",
    "rollbacks": "num_rollbacks",
    "last_gain": "last_gain",
    "seed": "seed",
    "reason": "reason",
}
POINTS = ("initial_point", "best_point", "point")


class Checkpoint:
    """A file with the state of a run, in types that ``torch.load(weights_only=True)`` reads.

    Args:
        path: Path of the file; None writes no checkpoint.
        interval: Seconds between two checkpoints within a cycle, >= 0.
    """

    def __init__(self, path: str | os.PathLike[str] | None, interval: float) -> None:
        self.path = None if path is None else Path(path)
        self.interval = interval
        self._saved = time.monotonic()

    @property
    def exists(self) -> bool:
        """Whether there is a run to resume."""
        return self.path is not None and self.path.exists()

    @property
    def is_due(self) -> bool:
        """Whether the file is old enough to be replaced."""
        return self.path is not None and time.monotonic() - self._saved >= self.interval

    def save(self, state: TrainingState) -> None:
        """Replace the file; the old one stays until the new one is whole."""
        if self.path is None:
            return
        part = self.path.with_name(self.path.name + ".part")
        torch.save({"format": FORMAT, **state.to_dict()}, part)
        os.replace(part, self.path)
        self._saved = time.monotonic()

    def load(self, leaves: Sequence[Tensor], guide: Callable[..., Any]) -> TrainingState:
        """Load the state in the file, which version 0.1.0 may have written.

        Args:
            leaves: Unconstrained parameters of the guide and the model, in order.
            guide: The guide, set up.

        Raises:
            ValueError: If the state has other parameters, or the file does not hold the state of a run.
        """
        assert self.path is not None
        values: dict[str, Any] = torch.load(self.path, map_location=leaves[0].device, weights_only=True)
        if values.pop("format", None) == FORMAT:
            state = TrainingState.from_dict(values)
        else:
            renamed = {NAMES_0_1_0.get(name, name): value for name, value in values.items()}
            state = TrainingState.from_dict(renamed)
            for name in POINTS:
                setattr(state, name, _point_from_0_1_0(getattr(state, name), leaves, guide))
        found = [tuple(value.shape) for value in state.point]
        expected = [tuple(leaf.shape) for leaf in leaves]
        if found != expected:
            raise ValueError(
                f"fit: expected '{self.path.name}' to hold the state of this model and guide, whose parameters have "
                f"shapes {expected}, but got {found}. Delete the file, or pass another checkpoint."
            )
        return state


def _point_from_0_1_0(values: Sequence[Tensor], leaves: Sequence[Tensor], guide: Callable[..., Any]) -> Point:
    """Convert a point of version 0.1.0, whose flow guides had other parameters; unchanged if their number is wrong."""
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    flows = [part.posterior for part in parts if isinstance(part, AutoFlowGuide)]  # several in an AutoGuideList
    formers = [names_in_0_1_0(flow) for flow in flows]
    of_flow = {id(parameter): index for index, flow in enumerate(flows) for parameter in flow.parameters()}
    if len(values) != sum(map(len, formers)) + sum(id(leaf) not in of_flow for leaf in leaves):
        return list(values)
    rest = iter(values)
    converted: dict[int, Mapping[str, Tensor]] = {}
    names = {id(parameter): name for flow in flows for name, parameter in flow.named_parameters()}
    point = []
    for leaf in leaves:
        index = of_flow.get(id(leaf))
        if index is None:
            point.append(next(rest))
            continue
        if index not in converted:  # a flow's parameters are consecutive
            converted[index] = from_0_1_0({name: next(rest) for name in formers[index]}, flows[index])
        point.append(converted[index][names[id(leaf)]])
    return point
