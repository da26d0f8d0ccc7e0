# SPDX-License-Identifier: Apache-2.0
"""L7. Optimizer steps that are robust to rare large gradients: adaptive clipping, and a rollback on divergence."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pyro_flows._memory import DoesNotFit, first_line, is_out_of_memory
from pyro_flows.compiled.cost import OperationCounter
from pyro_flows.models.traces import NO_DENSITY
from pyro_flows.training.objective import Objective
from pyro_flows.training.optimizers import MakeOptimizer, Optimizers, adam
from pyro_flows.training.random_state import capture_random_state, restore_random_state
from pyro_flows.training.recording import Recorder, RecordingSettings
from pyro_flows.training.state import Point, TrainingState, set_leaves
from pyro_flows.training.step import step_gradient

__all__ = ["Trainer", "TrainerSettings"]


@dataclass(frozen=True)
class TrainerSettings(RecordingSettings):
    """Adam, its clipping and its learning-rate schedule within a cycle; with those of :class:`RecordingSettings`.

    Values without a source are heuristics; ``tests/benchmarks/`` measures their joint effect.

    Attributes:
        clip: Largest gradient norm, in running medians, > 0; longer gradients are scaled down to it.
        skip: Gradient norm, in running medians, above which a step is skipped, > ``clip``.
        norm_memory: Number of steps over which the running median of gradient norms is taken, >= 1.
        warmup: Fraction of a cycle in which the learning rate rises linearly, in (0, 1).
        final_rate: Ratio of the learning rate at the end of a cycle to its peak, in (0, 1]; it falls by half a cosine.
            Loshchilov, Hutter. SGDR: Stochastic gradient descent with warm restarts. ICLR 2017. arXiv:1608.03983,
            eq. (5).
        window: Number of steps whose mean loss is compared with that of the best such window, >= 2.
        divergence: Number of standard deviations of a loss by which this mean may exceed the best one, in addition to
            one nat, > 0; above that, training has diverged.
        betas: Adam's betas. With the default second one, 0.999, the first gradients, which are the largest by far,
            would affect thousands of steps.
        table_eps: Adam's eps for the parameter tables of local latents, in nats per unit of their parameters, > 0. A
            row is updated once per pass; gradients below eps move it in proportion to their size, since steps by the
            gradient's sign would not converge.
        max_failures: Number of first steps without a finite loss and gradient after which training gives up, >= 1.
        initial_temperature: Temperature at which annealing begins, >= 1; it falls geometrically to 1 in half of the
            cycle. Rezende, Mohamed. Variational inference with normalizing flows. ICML 2015. arXiv:1505.05770,
            eq. (20), for annealing.
    """

    clip: float = 2.0
    skip: float = 20.0
    norm_memory: int = 100
    warmup: float = 0.05
    final_rate: float = 0.01
    window: int = 100
    divergence: float = 10.0
    betas: tuple[float, float] = (0.9, 0.99)
    table_eps: float = 0.1
    max_failures: int = 10
    initial_temperature: float = 30.0

    def rate(self, progress: float) -> float:
        """Ratio of the learning rate to its peak, after a fraction of the cycle in [0, 1]: rises linearly, then falls
        by half a cosine."""
        if progress < self.warmup:
            return (progress + 1e-3) / (self.warmup + 1e-3)
        down = (progress - self.warmup) / (1.0 - self.warmup)
        return self.final_rate + (1.0 - self.final_rate) * 0.5 * (1.0 + math.cos(math.pi * down))

    def inverse_temperature(self, progress: float) -> float:
        """Factor of the log joint, in (0, 1], after a fraction of an annealed cycle in [0, 1]."""
        return min(1.0, self.initial_temperature ** (2 * progress - 1))


class Trainer:
    """Trains an objective by Adam, or by another optimizer at the same schedule.

    Args:
        objective: The objective to maximize.
        num_particles: Number of particles per step, >= 1.
        learning_rate: Peak learning rate of the first cycle, > 0.
        tables: Parameters with sparse gradients: a step updates the rows of its mini-batch only.
        compile: Whether steps are compiled: True, False, or ``"auto"``, which compiles where that saves time.
        settings: Constants of the optimizer, and of recording and compilation.
        make: Makes the optimizer of all other parameters than ``tables``; None takes Adam.

    Attributes:
        state: State of the run.
        skipped_at: Sites without a finite log density after the first step without one, in words.
        wishes: What this process wants after the next step, such as to stop; a function that gives them.
        wanted: What any process wanted at the last step.
    """

    def __init__(
        self,
        objective: Objective,
        num_particles: int,
        learning_rate: float,
        tables: Sequence[Tensor] = (),
        compile: bool | str = False,
        settings: TrainerSettings | None = None,
        make: MakeOptimizer | None = None,
    ) -> None:
        self.settings = settings or TrainerSettings()
        self.objective = objective
        self.num_particles = num_particles
        here = self.snapshot()
        self.state = TrainingState(learning_rate, initial_point=here, best_point=here)
        self.skipped_at = ""
        self.wishes: Callable[[], list[bool]] = list
        self.wanted: list[bool] = []
        parts = objective.parts
        self._elbo = objective.elbo(num_particles if objective.subsampled else -(-num_particles // parts.count))
        self._norms: deque[float] = deque(maxlen=self.settings.norm_memory)
        self._tables = tables
        self._recorder = Recorder(objective, self._elbo, compile, bool(tables), self.settings)
        self._make = adam(self.settings.betas) if make is None else make
        self._optimizers: Optimizers | None = None  # between two cycles

    def freeze(self) -> TrainingState:
        """Write into the state all that :meth:`resume` needs, between two steps; returns it with the rows of all
        processes, in the first one."""
        state, objective = self.state, self.objective
        shards = objective.parts.shards
        state.norms = list(self._norms)
        state.point = self.snapshot()
        state.buffers = [buffer.detach().clone() for buffer in objective.buffers]
        state.moments = [] if self._optimizers is None else self._optimizers.moments()
        state.random = capture_random_state(objective.batches.generators)
        state.position = objective.batches.position
        if not objective.parts.is_whole:
            state.parts = objective.parts.freeze(objective.batches, objective.buffers)
        whole = replace(state)
        whole.change_points(objective.leaves, shards.whole)
        if self._optimizers is not None and shards.blocks:
            whole.moments = self._optimizers.moments(shards.whole)
        return whole

    def resume(self, state: TrainingState) -> None:
        """Go on from a state that :meth:`freeze` has completed, in this or another process; its points have the rows
        of this process."""
        self.state = state
        self._norms.extend(state.norms)
        if state.step_kind != "eager":
            points = (state.point, state.best_point, state.initial_point)
            self._recorder.resume(state, (partial(self.restore, point) for point in points))
        if state.step:
            self._optimizers = self._fresh_optimizers()
            self._optimizers.load(state.moments, self.objective.parts.shards.own)
        if state.position is not None and not state.parts:
            self.objective.batches.seek(state.position)
        self.restore_all()

    def _fresh_optimizers(self) -> Optimizers:
        # A part's mini-batch is scaled as all of them together are, before their mean is taken.
        eps = self.settings.table_eps * self.objective.scale / self.objective.parts.count
        return Optimizers(self.objective.parameters, self._tables, self._make, self.settings.betas, eps)

    def _choose_step_kind(self, steps_left: int) -> None:
        """Record or compile the step, if that saves time."""
        if self._recorder.choose(self.state, steps_left):
            before, self._optimizers = self._optimizers, self._fresh_optimizers()
            if before is not None:
                self._optimizers.join(self.objective.recorded_leaves, before)

    def snapshot(self) -> Point:
        """A copy of all parameters."""
        return [leaf.detach().clone() for leaf in self.objective.leaves]

    def restore(self, point: Point) -> None:
        """Set all parameters to a snapshot."""
        set_leaves(self.objective.leaves, point)

    @torch.no_grad()
    def restore_all(self) -> None:
        """Set parameters, buffers and random state to those of the state."""
        state = self.state
        self.restore(state.point)
        if state.random is not None:  # version 0.1.0 stored neither
            for buffer, value in zip(self.objective.buffers, state.buffers, strict=True):
                buffer.copy_(value)
            restore_random_state(state.random, self.objective.batches.generators)
        if state.parts:
            self.objective.parts.restore(state.parts, self.objective.batches, self.objective.buffers)

    def roll_back(self, point: Point) -> None:
        """On divergence, restore an earlier point and halve the learning rate of all later steps."""
        self.restore(point)
        self.state.learning_rate /= 2
        self.state.num_rollbacks += 1

    def cycle(self, length: int, after_step: Callable[[], None] = lambda: None, *, anneal: bool = False) -> None:
        """Take the remaining steps of a cycle, whose learning rate rises to its peak and then decays.

        If the mean loss exceeds the best one in the cycle by too much, parameters are rolled back to those of the best.

        Args:
            length: Number of steps of the cycle, of which ``state.step`` were already taken.
            after_step: Function that is called after each step.
            anneal: Whether the log joint is flattened at first, by a temperature that falls to 1 in half of the steps.

        Raises:
            RuntimeError: If none of the first ``max_failures`` steps has a finite loss and gradient.
            Exception: Any exception that the model raises then.
        """
        state, settings = self.state, self.settings
        if state.step == 0:
            self._optimizers = self._fresh_optimizers()
            state.num_losses, state.window_loss, state.window_spread = len(state.losses), math.inf, 0.0
            state.window_point = self.snapshot() if state.num_steps else state.initial_point  # one copy less
            if not anneal:
                self._choose_step_kind(length)
        for step in range(state.step, length):
            if anneal:
                self.objective.inverse_temperature = settings.inverse_temperature(step / length)
            was_counted = state.cost is not None
            self._step(state.learning_rate * settings.rate(step / length))
            state.step, state.num_steps = step + 1, state.num_steps + 1
            if state.step % settings.window == 0:
                self._look_back(may_roll_back=not anneal)
            if state.cost is not None and not (was_counted or anneal):
                self._choose_step_kind(length - state.step)
            after_step()
        self._optimizers = state.window_point = None

    def _look_back(self, *, may_roll_back: bool) -> None:
        """Keep the best window's point in the cycle, or go back to it."""
        state, settings = self.state, self.settings
        window = state.losses[max(state.num_losses, len(state.losses) - settings.window) :]
        loss = statistics.fmean(window) if window else math.inf
        spread = statistics.stdev(window) if len(window) > 1 else 0.0
        if loss < state.window_loss:
            state.window_loss, state.window_spread, state.window_point = loss, spread, None  # frees its memory
            state.window_point = self.snapshot()
        elif may_roll_back and not loss < state.window_loss + settings.divergence * state.window_spread + 1.0:
            assert state.window_point is not None
            self.roll_back(state.window_point)
            self._optimizers = self._fresh_optimizers()

    def _step(self, rate: float) -> None:
        state, settings = self.state, self.settings
        for parameter in self.objective.parameters:
            parameter.grad = None
        counts = self._recorder.counts(state)
        counter = OperationCounter()
        try:
            with counter if counts else nullcontext():
                loss, self.wanted, rows_norm = step_gradient(
                    self.objective, self._elbo, self._tables, (state.noise or 0, state.num_steps), self.wishes()
                )
        except NO_DENSITY:
            loss = rows_norm = math.nan
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"fit: expected memory for a step of {self.num_particles} particles, but it ran out "
                f"({first_line(error)}). The guide is as it was before that step. "
                f"Write num_particles={max(1, self.num_particles // 4)}, or pass mini-batches."
            ) from error
        found = [p for p in self.objective.parameters if p.grad is not None]
        gradients = [_entries(p) for p in found]
        shared = [each for p, each in zip(found, gradients, strict=True) if p not in self.objective.parts.shards]
        norm = torch.stack(torch._foreach_norm(shared)).norm().item() if shared else 0.0 if found else math.nan
        norm = math.hypot(norm, rows_norm)  # the same in all processes
        if not (math.isfinite(loss) and math.isfinite(norm)):
            state.num_skipped += 1
            if not state.losses and state.num_skipped >= settings.max_failures:
                raise RuntimeError(self.objective.without_density())
            if state.num_skipped == 1:
                self.skipped_at = self.objective.where_not_finite()
            return
        if counts:
            state.cost = self.objective.parts.processes.broadcast(counter.cost)
        state.losses.append(loss)
        median = statistics.median(self._norms) if self._norms else norm
        longest = settings.skip * median
        self._norms.append(min(norm, longest))  # so that the median adapts if gradients stay large
        if norm > longest:
            state.num_skipped += 1
            return
        if norm > settings.clip * median:
            torch._foreach_mul_(gradients, settings.clip * median / norm)
        assert self._optimizers is not None
        self._optimizers.step(rate)


def _entries(parameter: Tensor) -> Tensor:
    """Entries of a parameter's gradient, or its stored entries if it is sparse; may be changed in place."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()
