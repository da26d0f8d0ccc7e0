# SPDX-License-Identifier: Apache-2.0
"""L1. Recording a function that is called hundreds of times with tensors of one shape, to replay it without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.compiled.parameters import trial
from pyro_flows.compiled.script import to_script
from pyro_flows.compiled.tracer import trace_operations

__all__ = ["Replay"]

Function = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class ReplaySettings:
    """When a function is recorded.

    Attributes:
        recorded_call: Number of the call, from 1, that is recorded. Recording takes as long as some twenty calls, and
            each later call saves most of its time.
        tolerance: Largest difference of a replay from the function, relative to one plus its result.
    """

    recorded_call: int = 10
    tolerance: float = 1e-4


SETTINGS = ReplaySettings()


class Replay:
    """A function of tensors whose operations, once recorded, are repeated by TorchScript's interpreter.

    A function of many small operations, such as the log density of a model with a site per time step, spends most of
    its time in Python. The result of the first replay is compared with that of the function, from other inputs than
    those it was recorded with. If they differ, or Python reads a value, the function itself is called from then on; if
    a replay raises an exception, the function is called in its place that time.

    Args:
        function: Takes tensors that need no gradient, and returns such tensors. It may read other tensors, which have
            to stay in place in memory, and may compute gradients internally.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._calls = 0
        self._shapes: list[torch.Size] = []
        self._replay: Function | None = None
        self._is_checked = False
        self._gave_up = False

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Result of the function."""
        self._calls += 1
        found = self._replayed(inputs)
        if found is not None and self._is_checked:
            return found
        expected = self._function(*inputs)
        if found is not None:
            self._is_checked = True
            self._gave_up = not _agree(found, expected)
        elif (
            self._calls >= SETTINGS.recorded_call
            and self._replay is None
            and not self._gave_up
            and _are_finite(expected)
        ):
            self._record(inputs)
        return expected

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._shapes = [value.shape for value in inputs]
        try:
            with trial(()):
                graph, captured, _ = trace_operations(self._function, inputs)
                run = to_script(graph, [*inputs, *captured])
        except Exception:  # can't be recorded, for any reason: the function is called as it is
            self._gave_up = True
        else:
            self._replay = lambda *values: run(*values, *captured)

    def _replayed(self, inputs: Sequence[Tensor]) -> Sequence[Tensor] | None:
        if self._replay is None or self._gave_up or [value.shape for value in inputs] != self._shapes:
            return None
        try:
            with torch.no_grad():
                return self._replay(*inputs)
        except RuntimeError:  # an index out of range, say, which the function handles itself
            return None


def _are_finite(values: Sequence[Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(bool(((one - other).abs() <= SETTINGS.tolerance * (1.0 + other.abs())).all()) for one, other in pairs)
