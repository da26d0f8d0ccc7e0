# SPDX-License-Identifier: Apache-2.0
"""L7. The second part of a run of :func:`~pyro_flows.fit`: a wider flow, where the first has left too large a gap."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from pyro_flows._checks import Settings
from pyro_flows._memory import DoesNotFit
from pyro_flows.distributed.parameters import share_parameters
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.log_joint import LogJoint, PulledBack
from pyro_flows.starts.directions import observed_directions
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.estimates import Estimate
from pyro_flows.training.objective import Objective
from pyro_flows.training.result import Widening
from pyro_flows.training.schedule import Schedule
from pyro_flows.training.trainer import Trainer

__all__ = ["WiderSettings", "can_widen", "gap_to_close", "train_wider", "widened"]


@dataclass(frozen=True)
class WiderSettings(Settings):
    """Training of a wider flow. Values are heuristics; ``tests/benchmarks/targets.py`` measures their effect.

    Attributes:
        first_cycle: Number of steps of the first cycle, >= 1: the new layers begin at the identity.
        max_steps: Approximate number of steps of all cycles at most.
        min_gain: Tolerance of the ELBO gain of the first cycle, in nats, > 0; for longer ones in proportion.
        more_particles: Factor of the number of particles per step, >= 1: more layers follow more of the noise. The
            number is at most ``FitSettings.max_particles``.
    """

    first_cycle: int = 1000
    max_steps: int = 8000
    min_gain: float = 0.0025
    more_particles: int = 4


def can_widen(objective: Objective) -> bool:
    """Whether a wider flow may close a gap.

    None does with mini-batches or a model that is trained along, where the ELBO does not tell a gap; nor where draws
    are run one by one, so that a step has too few of them.
    """
    is_suited = objective.vectorized and not objective.subsampled and not objective.trains_model
    return is_suited and isinstance(objective.guide, AutoFlowGuide) and objective.guide.posterior.can_widen


def gap_to_close(schedule: Schedule, file: Checkpoint) -> float | None:
    """The gap that a finished run has left, in nats, if it is above the target and a wider flow may help; else None.

    Beside what :func:`can_widen` says, there is no wider flow where the number of steps was given; where the guide
    leaves latents to the model; and in runs that were finished before there were wider flows.

    Args:
        schedule: The schedule of the run.
        file: The checkpoint, whose run has a gap that is small enough, and may have a wider flow already.
    """
    objective = schedule.objective
    if not can_widen(objective):
        return None
    is_wide = file.run.wider is not None
    is_over = schedule.num_steps is not None or schedule.was_stopped or file.run.weighted is not None
    assert file.run.options is not None
    target_gap = math.inf if file.run.options.target_gap is None else file.run.options.target_gap
    if (is_over or target_gap == math.inf) and not is_wide:
        return None
    gap = schedule.trainer.state.gap
    if gap is None:
        gap = objective.gap(target_gap)  # infinite where draws have no density, which no flow mends
    return gap if is_wide or target_gap < gap < math.inf else None


def widened(objective: Objective) -> Objective:
    """The objective with a wider flow in its guide, whose distribution is the same."""
    model, guide, batches, parts = objective.model, objective.guide, objective.batches, objective.parts
    assert isinstance(guide, AutoFlowGuide)
    guide.posterior.widen(_directions(objective))
    parts.forget_buffers()
    if not parts.is_whole:
        share_parameters(parts.processes, model, guide, *batches.first)
    return Objective(model, guide, batches, objective.settings, parts)


def _directions(objective: Objective) -> Tensor | None:
    """Directions in which the observations see the latents that are no leaves, in noise space; None where draws are run
    one by one."""
    assert isinstance(objective.guide, AutoFlowGuide)
    joint = objective.guide.posterior.joint
    assert joint is not None
    log_joint = LogJoint(objective.model, joint.layout, *objective.batches.first)
    if not log_joint.is_vectorized:
        return None
    layout, transform = joint.layout, joint.flow.transform

    def push(free: Tensor) -> tuple[Tensor, Tensor]:
        return transform.forward_and_ladj(F.pad(free, (0, layout.num_leaves)))

    return observed_directions(PulledBack(log_joint, push), layout.init_loc[: layout.num_free])


def train_wider(schedule: Schedule, former: Trainer, file: Checkpoint, gap: float) -> tuple[Widening, Estimate]:
    """Train a guide that was made wider, or go on from where the file's run was.

    Args:
        schedule: That of a trainer of the wide guide.
        former: The trainer of the guide as it was before.
        file: The checkpoint.
        gap: The gap then, in nats.

    Returns:
        What the wider flow gained, and the ELBO of the guide as it is now.

    Raises:
        DoesNotFit: If memory runs out for a step in one of several processes. A single one keeps what it has.
    """
    trainer, before = schedule.trainer, former.state
    trainer.skipped_at, schedule.earlier_cycles = former.skipped_at, before.cycle
    file.begin_part("wider", before)
    if file.run.wider is None:
        state = trainer.state  # counts and losses are those of the whole run, as the user sees it
        state.num_steps, state.losses = before.num_steps, list(before.losses)
        state.num_skipped, state.num_rollbacks = before.num_skipped, before.num_rollbacks
        schedule.begin()
    elif file.run.weighted is not None:
        schedule.restore(file.load(schedule.objective))
    else:
        schedule.resume(file.load(schedule.objective))
        assert file.run.options is not None
        file.run.options = replace(file.run.options, num_steps=schedule.num_steps)
    try:
        compare = schedule.train()
    except DoesNotFit:
        if schedule.objective.parts.processes.size > 1:  # the others wait in that step
            raise
        trainer.state.reason = f"memory ran out for a step of {trainer.num_particles} particles"
        compare = schedule.train()  # to its end, without further steps: the best parameters so far are kept
    kept, best = schedule.finish(compare)
    start = trainer.state.initial_estimate
    assert start is not None
    gain, se = best.gain_over(start) if kept == "flow" else (0.0, 0.0)
    steps = trainer.state.num_steps - before.num_steps
    return Widening(gap, gain, se, steps, trainer.num_particles, kept == "flow"), best
