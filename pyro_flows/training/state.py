# SPDX-License-Identifier: Apache-2.0
"""L7. The state of a run of :func:`~pyro_flows.fit`, from which it can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pyro_flows.compiled.cost import StepCost
from pyro_flows.training.estimates import Estimate

__all__ = ["Point", "TrainingState", "set_leaves"]

# Values of the objective's leaves, in order.
Point = list[Tensor]
# Of each optimizer, of each of its parameters in order: name -> tensor or number of steps; None before the first step.
Moments = list[list[dict[str, Any] | None]]

# Attributes of a state that are points.
POINTS = ("initial_point", "best_point", "window_point", "point")
# Attributes of a state that are estimates.
ESTIMATES = ("initial_estimate", "best_estimate", "final_estimate", "elbo_estimate")


@torch.no_grad()
def set_leaves(leaves: Sequence[Tensor], point: Point) -> None:
    """Set an objective's leaves to a point."""
    for leaf, value in zip(leaves, point, strict=True):
        leaf.copy_(value)


@dataclass
class TrainingState:
    """State of a run. The trainer and the schedule share one and write to it; a checkpoint is one in a file.

    Attributes:
        learning_rate: Peak learning rate of the current cycle, > 0.
        initial_point: Parameters before training.
        best_point: Parameters with the best ELBO so far.
        initial_is_best: Whether no cycle has improved on the initial point.
        initial_estimate: ELBO estimate of the initial point; None before it is made.
        best_estimate: That of the best point.
        lengths: Numbers of steps of all cycles.
        cycle: Number of finished cycles.
        step: Number of steps of the current cycle that were taken.
        num_steps: Number of steps of all cycles that were taken.
        losses: Negative ELBO estimates in nats, one per step; only those that are finite.
        norms: Gradient norms of the latest steps.
        num_skipped: Number of steps that were skipped.
        num_rollbacks: Number of returns to an earlier point, each of which halved the learning rate.
        last_gain: ELBO gain of the last cycle in nats; 0 after the first, whose gain depends on the initial point.
        seed: Seed of the noise of ELBO estimates, where they share it; None draws it afresh.
        num_losses: Number of losses before the current cycle.
        window_loss: Lowest mean loss of a window of steps in the current cycle.
        window_spread: Standard deviation of a loss in that window.
        window_point: Parameters after that window, or at the cycle's begin; None between two cycles.
        cost: Cost of an eager step; None before it is counted.
        step_kind: Whether steps are ``"eager"``, ``"recorded"``, ``"fused"`` (recorded, with a compiled part) or
            ``"compiled"``.
        is_step_kind_final: Whether this is decided for good.
        gap: Gap in nats for which training stopped, to go on with a wider flow; None if it did not.
        reason: Why training stopped; empty while it is in progress.
        kept: ``"flow"`` or ``"start"``, see ``FitResult``; empty while this is not decided.
        final_estimate: ELBO estimate of the parameters that were kept.
        elbo_estimate: The same where all estimates above are those of another objective; None before the end.
        point: Parameters when the state was saved; empty during a run, whose parameters are the leaves themselves.
        buffers: Other tensors that a step changes, then.
        moments: Moments of the optimizers, then; empty between two cycles.
        random: State of the random generators, then.
        position: Position in the data, then.
        parts: Buffers, random state and position of each part of a step, then; empty if a step is a single part.
        noise: Seed of the noise of parts.
    """

    learning_rate: float
    initial_point: Point
    best_point: Point
    initial_is_best: bool = True
    initial_estimate: Estimate | None = None
    best_estimate: Estimate | None = None
    lengths: list[int] = field(default_factory=list)
    cycle: int = 0
    step: int = 0
    num_steps: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    num_rollbacks: int = 0
    last_gain: float = 0.0
    seed: int | None = None
    num_losses: int = 0
    window_loss: float = math.inf
    window_spread: float = 0.0
    window_point: Point | None = None
    cost: StepCost | None = None
    step_kind: str = "eager"
    is_step_kind_final: bool = False
    gap: float | None = None
    reason: str = ""
    kept: str = ""
    final_estimate: Estimate | None = None
    elbo_estimate: Estimate | None = None
    point: Point = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    moments: Moments = field(default_factory=list)
    random: dict[str, Any] | None = None
    position: dict[str, Any] | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    noise: int | None = None

    def change_points(self, leaves: Sequence[Tensor], change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the values of all points, by a function of a leaf and its value."""
        for name in POINTS:
            point = getattr(self, name)
            if point:
                setattr(self, name, [change(leaf, value) for leaf, value in zip(leaves, point, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary of numbers, strings, and lists of numbers and tensors, by the attributes' names."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ESTIMATES:
            values[name] = None if values[name] is None else tuple(values[name])
        values["cost"] = None if self.cost is None else astuple(self.cost)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingState:
        """Invert :meth:`to_dict`; attributes that are missing have their default.

        Raises:
            ValueError: If an attribute that has no default is missing, or one is unknown.
        """
        unknown = sorted(values.keys() - {each.name for each in fields(cls)})
        missing = sorted({"learning_rate", "initial_point", "best_point"} - values.keys())
        if unknown or missing:
            raise ValueError(f"it has {f'no {missing[0]!r}' if missing else f'an unknown {unknown[0]!r}'}")
        state = cls(**values)
        for name in ESTIMATES:
            found = getattr(state, name)
            setattr(state, name, None if found is None else Estimate(*found))
        state.cost = None if state.cost is None else StepCost(*values["cost"])
        return state
