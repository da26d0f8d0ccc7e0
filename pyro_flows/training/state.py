# SPDX-License-Identifier: Apache-2.0
"""L7. The state of a run of :func:`~pyro_flows.fit`, from which it can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

__all__ = ["Point", "TrainingState"]

# Values of the objective's leaves, in order.
Point = list[Tensor]


@dataclass
class TrainingState:
    """State of a run. The trainer and the schedule share one and write to it; a checkpoint is one in a file.

    Optimizers are not part of it: a resumed run begins with fresh moments, as a cycle does.

    Attributes:
        learning_rate: Peak learning rate of the current cycle, > 0.
        initial_point: Parameters before training.
        best_point: Parameters with the best ELBO so far.
        point: Parameters when the state was saved; empty during a run, whose parameters are the leaves themselves.
        initial_is_best: Whether no cycle has improved on the initial point.
        cycle: Number of finished cycles.
        step: Number of steps of the current cycle that were taken.
        num_steps: Number of steps of all cycles that were taken.
        losses: Negative ELBO estimates in nats, one per step; only those that are finite.
        num_skipped: Number of steps that were skipped.
        num_rollbacks: Number of returns to an earlier point, each of which halved the learning rate.
        last_gain: ELBO gain of the last cycle in nats; 0 after the first, whose gain depends on the initial point.
        seed: Seed of the noise of ELBO estimates, where they share it; None draws it afresh.
        reason: Why the run stopped; empty while it is in progress.
    """

    learning_rate: float
    initial_point: Point
    best_point: Point
    point: Point = field(default_factory=list)
    initial_is_best: bool = True
    cycle: int = 0
    step: int = 0
    num_steps: int = 0
    losses: list[float] = field(default_factory=list)
    num_skipped: int = 0
    num_rollbacks: int = 0
    last_gain: float = 0.0
    seed: int | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary of numbers, strings, and lists of numbers and tensors, by the attributes' names."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingState:
        """Invert :meth:`to_dict`.

        Raises:
            ValueError: If an attribute is missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        if names != values.keys():
            raise ValueError(
                f"fit: expected a training state with {sorted(names)}, but got one with {sorted(values)}. "
                "Pass a checkpoint that fit has written."
            )
        return cls(**values)
