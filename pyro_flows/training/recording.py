# SPDX-License-Identifier: Apache-2.0
"""L7. Whether steps are eager, recorded or compiled, by how long each of these would take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_flows._blame import user_level
from pyro_flows._checks import Settings
from pyro_flows._random import forked
from pyro_flows.compiled.cost import StepCost
from pyro_flows.compiled.graph import LossGraph
from pyro_flows.compiled.parameters import RecordingError
from pyro_flows.training.objective import Objective
from pyro_flows.training.state import TrainingState

__all__ = ["Recorder", "RecordingSettings"]


@dataclass(frozen=True)
class RecordingSettings(Settings):
    """When steps are recorded and compiled.

    Attributes:
        eager_operation: Seconds that an operation of an eager step takes, Pyro's share included. These times are
            estimates, for a core of 2023: measured ones would differ from run to run, and with them what is recorded
            and how it is rounded, so that neither a seed nor a checkpoint would reproduce a run.
        element: Seconds that an element of its result, or a product in a matrix product, takes in addition.
        min_steps_to_record: Smallest number of remaining steps for which a step is recorded: recording takes as long as
            a hundred eager steps, and halves the time of those that follow.
        min_seconds_to_record: Smallest time in seconds that the remaining eager steps would take.
        saved_operation: Seconds that compilation saves per operation of a recorded step.
        saved_element: Seconds that it saves per element of its result, in addition; none in matrix products.
        compile_seconds: Seconds that the compiler takes per operation, on one core: as long as some 15,000 small steps.
        fused_element: Seconds that it saves per element where it compiles only the operations with large results.
        fuse_seconds: Seconds that it takes then, in addition.
    """

    eager_operation: float = 6e-6
    element: float = 3e-10
    min_steps_to_record: int = 200
    min_seconds_to_record: float = 2.0
    saved_operation: float = 1e-6
    saved_element: float = 1.5e-10
    compile_seconds: float = 0.015
    fused_element: float = 4e-10
    fuse_seconds: float = 4.0

    def seconds(self, cost: StepCost) -> float:
        """Approximate time of an eager step."""
        return cost.operations * self.eager_operation + (cost.elements + cost.products) * self.element

    def saved_seconds(self, cost: StepCost) -> float:
        """Approximate time that compilation saves in a recorded step."""
        return cost.operations * self.saved_operation + cost.elements * self.saved_element


class Recorder:
    """Records and compiles the step of an objective where that saves time.

    Args:
        objective: The objective.
        elbo: The loss of a step.
        compile: Whether steps are compiled: True, False, or ``"auto"``, which compiles where that saves time.
        has_tables: Whether a step updates some rows of tables of parameters, so that it can't be recorded.
        settings: Times of steps and of the compiler.
    """

    def __init__(
        self,
        objective: Objective,
        elbo: Trace_ELBO | TraceEnum_ELBO,
        compile: bool | str,
        has_tables: bool,
        settings: RecordingSettings,
    ) -> None:
        self._objective = objective
        self._elbo = elbo
        self._compile = compile
        self._has_tables = has_tables
        self._settings = settings

    def counts(self, state: TrainingState) -> bool:
        """Whether the operations of the next step are to be counted."""
        return state.cost is None and self._compile is not False and state.step_kind == "eager"

    def choose(self, state: TrainingState, steps_left: int) -> bool:
        """Record the step, or compile the recorded one or its largest part, if that saves time.

        Returns:
            Whether it is recorded now, and was not before.
        """
        settings, objective = self._settings, self._objective
        asked = self._compile is True
        if self._compile is False or state.is_step_kind_final or not (asked or state.cost):
            return False
        is_new = state.step_kind == "eager"
        if is_new:
            seconds = 0.0 if state.cost is None else steps_left * settings.seconds(state.cost)
            is_short = steps_left < settings.min_steps_to_record or seconds < settings.min_seconds_to_record
            if is_short and not asked:
                return False
            failure = self._record()
            if failure:
                state.is_step_kind_final = True
                if asked:
                    warnings.warn(f"fit: takes eager steps, since {failure}.", stacklevel=user_level())
                return False
            state.step_kind = "recorded"
            if objective.is_read:
                state.cost = objective.recorded_cost()
        graph = objective.graph
        assert graph is not None
        # Seconds that it saves from now on to compile all operations, or only the large ones.
        whole = 0.0 if state.cost is None else steps_left * settings.saved_seconds(state.cost)
        whole -= graph.num_operations * settings.compile_seconds
        part = 0.0
        if graph.part is not None:
            part = steps_left * graph.part.elements * settings.fused_element
            if state.step_kind == "fused":
                whole, part = whole - part, 0.0
            else:
                part -= settings.fuse_seconds + graph.part.num_operations * settings.compile_seconds
        if asked or whole > max(0.0, part):
            state.is_step_kind_final = True
            try:
                objective.compile()
                state.step_kind = "compiled"
                return is_new
            except RuntimeError as error:
                if asked:
                    warnings.warn(
                        f"fit: runs its recorded step without compilation, since {error}.", stacklevel=user_level()
                    )
        elif part > 0.0:
            if self._fuse(graph):
                state.step_kind = "fused"
                return is_new
            state.is_step_kind_final = True
        if is_new:
            graph.script(*objective.batches.first)
        return is_new

    def resume(self, state: TrainingState, points: Iterable[Callable[[], None]]) -> None:
        """Record the step again, of the kind that the state has.

        Args:
            state: The state of the run.
            points: Set the parameters to some points, at any of which the loss may be finite.
        """
        objective = self._objective
        failure: RecordingError | None = None
        for restore in points:
            restore()
            try:
                graph = objective.record(self._elbo)
                break
            except RecordingError as error:
                failure = error
        else:
            state.step_kind, state.is_step_kind_final = "eager", True
            warnings.warn(
                f"fit: goes on with eager steps where the run had recorded ones, since {failure}. Results differ from "
                "those of the uninterrupted run by rounding.",
                stacklevel=user_level(),
            )
            return
        if state.step_kind == "compiled":
            try:
                objective.compile()
                return
            except RuntimeError as error:
                warnings.warn(f"fit: goes on without compilation, since {error}.", stacklevel=user_level())
        elif state.step_kind == "fused":
            if graph.part is not None and self._fuse(graph):
                return
            warnings.warn(
                "fit: goes on without compilation, which fails here. Results differ from those of the uninterrupted "
                "run by rounding.",
                stacklevel=user_level(),
            )
        graph.script(*objective.batches.first)

    def _fuse(self, graph: LossGraph) -> bool:
        """Compile the large operations; returns whether that worked."""
        with forked():
            return graph.fuse(*self._objective.batches.first)

    def _record(self) -> str:
        """Record the step; returns why not, where that is not possible in one of the processes."""
        failure: RecordingError | None = None
        try:
            if self._has_tables:
                raise RecordingError("items have parameters of their own, of which a step moves a few rows")
            self._objective.record(self._elbo)
        except RecordingError as error:
            failure = error
        reason = self._objective.parts.first_failure(failure)
        if reason and failure is None:
            self._objective.release()
        return reason
