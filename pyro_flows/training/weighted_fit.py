# SPDX-License-Identifier: Apache-2.0
"""L7. The last part of a run of :func:`~pyro_flows.fit`, which follows the ELBO's: training by another objective."""

from __future__ import annotations

from dataclasses import replace

from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.estimates import Estimate
from pyro_flows.training.result import WeightedResult
from pyro_flows.training.schedule import Schedule
from pyro_flows.training.trainer import Trainer
from pyro_flows.training.weighted_objective import WeightedObjective

__all__ = ["train_weighted"]


def train_weighted(schedule: Schedule, former: Trainer, file: Checkpoint) -> tuple[WeightedResult, Estimate]:
    """Train by a weighted objective, from the ELBO's fit on or from where the file's run was.

    Args:
        schedule: That of a trainer of a :class:`WeightedObjective`.
        former: The trainer of the ELBO's fit.
        file: The checkpoint.

    Returns:
        The result, and the ELBO of the guide as it is now.
    """
    trainer, objective = schedule.trainer, schedule.objective
    assert isinstance(objective, WeightedObjective) and file.run.options is not None
    file.begin_part("weighted", former.state)
    if file.run.weighted is None:
        schedule.begin()
    else:
        schedule.resume(file.load(objective))
        file.run.options = replace(file.run.options, num_steps=schedule.num_steps)
    before = trainer.state.num_steps
    kept, best = schedule.finish(schedule.train())
    state = trainer.state
    if state.elbo_estimate is None or state.num_steps > before:
        state.elbo_estimate = former.objective.estimate()
        if state.kept:
            schedule.save()
    assert state.initial_estimate is not None
    result = WeightedResult(
        objective=objective.kind,
        value=best.mean,
        se=best.error,
        start=state.initial_estimate.mean,
        num_draws=objective.num_draws,
        steps=state.num_steps,
        kept=kept == "flow",
        reason=state.reason,
        losses=tuple(state.losses),
    )
    return result, state.elbo_estimate
