# SPDX-License-Identifier: Apache-2.0
"""L7. What :func:`~pyro_flows.fit` does to a guide before its first step, and undoes after the last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows._random import forked
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.traces import Call, run_quietly, sample_nodes
from pyro_flows.posterior.mini_batches import MiniBatch
from pyro_flows.training.batches import Arguments, Batches
from pyro_flows.training.checkpoint import Checkpoint, flow_guides
from pyro_flows.training.estimates import EstimateSettings
from pyro_flows.training.monitor import Monitor
from pyro_flows.training.objective import Objective
from pyro_flows.training.parts import Parts
from pyro_flows.training.random_state import restore_random_state
from pyro_flows.training.state import TrainingState, set_leaves
from pyro_flows.transforms.fixed import look_again

__all__ = ["divided_tables", "is_point", "restored", "set_up", "sparse_tables", "warm_start", "without_step_limit"]


def set_up(guide: Callable[..., Any], batches: Batches, limit: int, max_elements: int) -> list[Arguments]:
    """Set up a flow guide; returns mini-batches to warm-start it on, none if it is trained or no flow guide.

    Args:
        guide: Any guide.
        batches: The data.
        limit: Largest number of mini-batches.
        max_elements: See :meth:`Batches.one_pass`.
    """
    if not isinstance(guide, AutoFlowGuide) or not (guide.prototype_trace is None or guide.is_initial):
        return []
    calls = batches.one_pass(limit, max_elements)
    guide.setup(*calls[0][0], **calls[0][1])
    return calls


def warm_start(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Batches,
    calls: list[Arguments],
    monitor: Monitor,
    parts: Parts,
) -> bool:
    """Warm-start a guide on the mini-batches of :func:`set_up`; returns whether it was warm-started."""
    if not calls:
        return False
    parts.look_for_plate(model, guide, Call(*calls[0]))
    assert isinstance(guide, AutoFlowGuide)
    if len(calls) > 1 and not len(guide.posterior.local):
        return False  # the posterior given a part of the data is too wide, and in another place

    def watch(passed: Iterator[MiniBatch], title: str) -> Iterable[MiniBatch]:
        total = len(calls) if batches.many else None  # unknown for plates that draw their own
        return monitor.watch(passed, title, total)

    try:
        guide.warm_start_on(calls, watch, model, parts.find_shards(guide))
    except NotImplementedError:  # amortized plates, say
        return False
    return True


def restored(
    file: Checkpoint,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Batches,
    settings: EstimateSettings,
    parts: Parts,
) -> tuple[Objective, TrainingState]:
    """Objective and state of a run in a file, with the guide as it was when the run began.

    Raises:
        ValueError: If it is a run of another model, guide, or other data; then the guide is as before.
    """
    with _as_before_if_refused(guide):
        file.adopt(guide)
        objective = Objective(model, guide, batches, settings, parts)
        file.check(objective, complete=False)
        before = [leaf.detach().clone() for leaf in objective.leaves]
        state = file.load(objective)
        set_leaves(objective.leaves, state.initial_point)
        if isinstance(guide, torch.nn.Module):
            look_again(guide)  # the warm start was in another process
        if file.run.before_analysis is not None:
            # Once more, as it was done then: mini-batches may be shuffled, and how draws share a run is found out at
            # draws.
            restore_random_state(file.run.before_analysis, batches.generators)
            objective = Objective(model, guide, batches, settings, parts)
        try:
            file.check(objective, complete=True)
        except ValueError:
            set_leaves(objective.leaves, before)
            if isinstance(guide, torch.nn.Module):
                look_again(guide)
            raise
    return objective, state


@contextmanager
def _as_before_if_refused(guide: Callable[..., Any]) -> Iterator[None]:
    """Give a guide's flows their kind and their parameters back if a run is refused, whose kind they have taken."""
    parts = [part.posterior for part in flow_guides(guide) if part.prototype_trace is not None]
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except ValueError:
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        raise


def is_point(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether all of a guide's sites are points."""
    with forked():
        nodes = sample_nodes(run_quietly(guide, Call(args, kwargs)))
    return bool(nodes) and all(isinstance(node["fn"], dist.Delta) for node in nodes.values())


@contextmanager
def without_step_limit(guide: Callable[..., Any]) -> Iterator[None]:
    """Lift a guide's step limit: the learning rates here suit a flow, and divergence is rolled back."""
    flows = flow_guides(guide)  # several in an AutoGuideList
    try:
        for flow in flows:
            flow.limits_steps = False
            flow.step_limit.forget()
        yield
    finally:
        for flow in flows:
            flow.limits_steps = True
            flow.step_limit.forget()


@contextmanager
def sparse_tables(guide: Callable[..., Any], *, enabled: bool) -> Iterator[list[Tensor]]:
    """The parameter tables of a guide's local latents, with sparse gradients within this context."""
    blocks = list(guide.posterior.blocks()) if enabled and isinstance(guide, AutoFlowGuide) else []
    blocks = [block for block in blocks if block.items is not None]
    try:
        for block in blocks:
            block.sparse = True
        yield [block.items for block in blocks]
    finally:
        for block in blocks:
            block.sparse = False


@contextmanager
def divided_tables(objective: Objective, state: TrainingState | None) -> Iterator[None]:
    """Within this context, each process holds the rows of its own items only, in tables and in the points of a state.

    Args:
        objective: The objective, whose parts have a share of the items each.
        state: State of a run that goes on, with all rows.
    """
    shards = objective.parts.find_shards(objective.guide)
    with shards.divided():
        if state is not None:
            state.change_points(objective.leaves, shards.own)
        yield
