# SPDX-License-Identifier: Apache-2.0
"""L7. Checkpoints that version 0.1.0 wrote: neither optimizers nor random state were part of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyro_flows.flows.version_0_1_0 import from_0_1_0, names_in_0_1_0
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.training.state import Point, TrainingState

__all__ = ["is_run_of_0_1_0", "state_from_0_1_0"]

# Name in 0.1.0 -> attribute of TrainingState.
NAMES = {
    "rate": "learning_rate",
    "start": "initial_point",
    "start_is_best": "initial_is_best",
    "steps": "num_steps",
    "skipped": "num_skipped",
    "rollbacks": "num_rollbacks",
}
SAME = {"best_point", "point", "cycle", "step", "losses", "last_gain", "seed", "reason"}


def is_run_of_0_1_0(values: Mapping[str, Any]) -> bool:
    """Whether these are the contents of such a file."""
    return values.keys() == NAMES.keys() | SAME


def state_from_0_1_0(values: Mapping[str, Any], leaves: Sequence[Tensor], guide: Callable[..., Any]) -> TrainingState:
    """The state in such a file.

    Args:
        values: Its contents.
        leaves: Unconstrained parameters of the guide and the model, in order.
        guide: The guide, set up.
    """
    state = TrainingState.from_dict({NAMES.get(name, name): value for name, value in values.items()})
    state.initial_point, state.best_point, state.point = (
        _converted(point, leaves, guide) for point in (state.initial_point, state.best_point, state.point)
    )
    state.num_losses, state.window_point = len(state.losses), list(state.point)
    state.reason = "" if state.reason == "interrupted" else state.reason  # 0.1.0 wrote it, and went on from there
    return state


def _converted(values: Sequence[Tensor], leaves: Sequence[Tensor], guide: Callable[..., Any]) -> Point:
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
