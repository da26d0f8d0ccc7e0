# SPDX-License-Identifier: Apache-2.0
"""L7. Loss and gradient of a step: of one part, or the mean over the parts that processes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_flows.distributed.gradients import mean_gradient
from pyro_flows.models.traces import NO_DENSITY
from pyro_flows.training.objective import Objective

__all__ = ["StepResult", "step_gradient"]


class StepResult(NamedTuple):
    """What a step finds besides its gradient.

    Attributes:
        loss: The loss, NaN if it is not finite in a part.
        wanted: For each flag, whether any process has it.
        rows_norm: Norm of the gradients of tables of which each process holds some rows, of all of them.
    """

    loss: float
    wanted: list[bool]
    rows_norm: float = 0.0


def step_gradient(
    objective: Objective,
    elbo: Trace_ELBO | TraceEnum_ELBO,
    tables: Sequence[Tensor],
    key: tuple[int, ...],
    flags: Sequence[bool] = (),
) -> StepResult:
    """Loss of a step; its gradient is left in ``grad`` of the objective's parameters, which must be None.

    Args:
        objective: The objective.
        elbo: The loss of a part.
        tables: Parameters whose gradients have sparse rows.
        key: Seed of the run and number of the step; by these, and by its own number, the noise of each part.
        flags: What this process wants, such as to stop.

    Raises:
        ValueError: Only if a step is a single part, as the model raises it where it has no density; see
            :data:`~pyro_flows.models.traces.NO_DENSITY`. In a part, such a loss is NaN.
    """
    parts = objective.parts
    if parts.is_whole:
        return StepResult(objective.gradient(elbo, objective.batches.next()), list(flags))
    total, sums = 0.0, []
    for part, call in parts.calls(objective.batches):
        with parts.at_work(part, objective.buffers), parts.noise(*key, part):
            try:
                total += objective.gradient(elbo, call, part)
            except NO_DENSITY:
                total = math.nan
        sums.append([p.grad for p in objective.parameters])
        for p in objective.parameters:
            p.grad = None
    for p, *found in zip(objective.parameters, *sums, strict=True):
        given = [gradient for gradient in found if gradient is not None]
        p.grad = sum(given[1:], given[0]) if given else None
    own = [p for p in tables if p in parts.shards]
    squares = sum(p.grad.coalesce().values().double().square().sum().item() for p in own if p.grad is not None)
    numbers = mean_gradient(
        parts.processes,
        objective.parameters,
        [total, squares, *map(float, flags)],
        tables=tables,
        own=own,
        count=parts.count,
    )
    loss, squares, *wanted = numbers
    return StepResult(loss, [number > 0 for number in wanted], math.sqrt(squares / parts.count))
