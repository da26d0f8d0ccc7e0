# SPDX-License-Identifier: Apache-2.0
"""L7. Optimizer steps that are robust to rare large gradients: adaptive clipping, and a rollback on divergence."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows._checks import Settings
from pyro_flows._memory import DoesNotFit, first_line, is_out_of_memory
from pyro_flows.compiled.parameters import RecordingError
from pyro_flows.models.traces import NO_DENSITY
from pyro_flows.training.objective import Objective
from pyro_flows.training.optimizers import MakeOptimizer, adam, carry_over
from pyro_flows.training.state import Point, TrainingState

__all__ = ["Trainer", "TrainerSettings"]


@dataclass(frozen=True)
class TrainerSettings(Settings):
    """Adam, its clipping and its learning-rate schedule within a cycle; when steps are recorded and compiled.

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
        max_failures: Number of steps, from the first on, without a finite loss and gradient after which training gives
            up, >= 1.
        initial_temperature: Temperature at which annealing begins, >= 1; it falls geometrically to 1 in half of the
            cycle. Rezende, Mohamed. Variational inference with normalizing flows. ICML 2015. arXiv:1505.05770,
            eq. (20), for annealing.
        timed_steps: Number of steps, the later half of which is timed, before steps may be recorded, >= 2.
        min_steps_to_record: Smallest number of remaining steps for which a step is recorded: recording takes as long as
            a hundred eager steps, and halves the time of those that follow.
        min_seconds_to_record: Smallest time in seconds that the remaining steps would take.
        eager_saving: Fraction of an eager step's time that compilation saves.
        recorded_saving: Fraction of a recorded step's time that compilation saves.
        compile_seconds: Seconds that the compiler takes per operation of the graph, on two cores.
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
    timed_steps: int = 20
    min_steps_to_record: int = 200
    min_seconds_to_record: float = 2.0
    eager_saving: float = 0.85
    recorded_saving: float = 0.7
    compile_seconds: float = 0.009

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
        self._elbo = objective.elbo(num_particles)
        self._norms: deque[float] = deque(maxlen=self.settings.norm_memory)
        self._tables = tables
        self._compile = compile
        self._make = adam(self.settings.betas) if make is None else make
        self._seconds: deque[float] = deque(maxlen=self.settings.timed_steps // 2)

    def _fresh_optimizers(self) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        rate, betas = self.state.learning_rate, self.settings.betas
        tables = [p for p in self._parameters if any(p is table for table in self._tables)]
        dense = [p for p in self._parameters if all(p is not table for table in self._tables)]
        if dense:
            made.append(self._make(dense))
        if tables:
            eps = self.settings.table_eps * self.objective.scale
            made.append(torch.optim.SparseAdam(tables, lr=rate, betas=betas, eps=eps))
        return made

    def _continued(self, before: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Optimizers of the vector of the parameters, in the state of those before."""
        made = self._fresh_optimizers()
        (vector,) = self._parameters
        carry_over(before, self.objective.recorded_leaves, vector, made[0])
        return made

    @property
    def _parameters(self) -> list[Tensor]:
        return self.objective.parameters

    def _record_or_compile(self, steps_left: int) -> bool:
        """Record the step, or compile the recorded one, if that saves time; returns whether the parameters changed to a
        single vector."""
        settings = self.settings
        asked = self._compile is True
        if self._compile is False or not (asked or len(self._seconds) == self._seconds.maxlen):
            return False
        ahead = steps_left * statistics.median(self._seconds) if self._seconds else math.inf
        is_new = self.objective.graph is None
        if is_new:
            pays = steps_left >= settings.min_steps_to_record and ahead >= settings.min_seconds_to_record
            if not (asked or pays):
                return False
            try:
                if self._tables:
                    raise RecordingError("items have parameters of their own, of which a step moves a few rows")
                self.objective.record(self._elbo)
            except RecordingError as error:
                self._compile = False
                if asked:
                    warnings.warn(f"fit: takes eager steps, since {error}.", stacklevel=4)
                return False
        graph = self.objective.graph
        assert graph is not None
        saving = settings.eager_saving if is_new else settings.recorded_saving
        if asked or ahead * saving > graph.num_operations * settings.compile_seconds:
            self._compile = False
            try:
                self.objective.compile()
                return is_new
            except RuntimeError as error:
                if asked:
                    warnings.warn(f"fit: runs its recorded step without compilation, since {error}.", stacklevel=4)
        if is_new:
            graph.script(*self.objective.batches.first)
            self._seconds.clear()
        return is_new

    def snapshot(self) -> Point:
        """A copy of all parameters."""
        return [leaf.detach().clone() for leaf in self.objective.leaves]

    @torch.no_grad()
    def restore(self, point: Point) -> None:
        """Set all parameters to a snapshot."""
        for leaf, value in zip(self.objective.leaves, point, strict=True):
            leaf.copy_(value)

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
        best_loss, best_spread, best_point = math.inf, 0.0, self.snapshot()
        optimizers = self._fresh_optimizers()
        first, num_losses = state.step, len(state.losses)
        for step in range(first, length):
            if not anneal and step in (first, first + settings.timed_steps) and self._record_or_compile(length - step):
                optimizers = self._continued(optimizers)
            if anneal:
                self.objective.inverse_temperature = settings.inverse_temperature(step / length)
            begin = time.perf_counter()
            self._step(optimizers, state.learning_rate * settings.rate(step / length))
            self._seconds.append(time.perf_counter() - begin)
            state.step = step + 1
            after_step()
            if state.step % settings.window == 0:
                window = state.losses[max(num_losses, len(state.losses) - settings.window) :]
                loss = statistics.fmean(window) if window else math.inf
                spread = statistics.stdev(window) if len(window) > 1 else 0.0
                if loss < best_loss:
                    best_loss, best_spread, best_point = loss, spread, self.snapshot()
                elif not anneal and not loss < best_loss + settings.divergence * best_spread + 1.0:
                    self.roll_back(best_point)
                    optimizers = self._fresh_optimizers()

    def _step(self, optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
        state, settings = self.state, self.settings
        state.num_steps += 1
        for parameter in self._parameters:
            parameter.grad = None
        try:
            loss = self.objective.gradient(self._elbo)
        except NO_DENSITY:
            loss = math.nan
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"fit: expected memory for a step of {self.num_particles} particles, but it ran out "
                f"({first_line(error)}). The guide is as it was before that step. "
                f"Write num_particles={max(1, self.num_particles // 4)}, or pass mini-batches."
            ) from error
        gradients = [_entries(p) for p in self._parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            state.num_skipped += 1
            if not state.losses and state.num_skipped >= settings.max_failures:
                raise RuntimeError(self.objective.without_density())
            if state.num_skipped == 1:
                self.skipped_at = self.objective.where_not_finite()
            return
        state.losses.append(loss)
        median = statistics.median(self._norms) if self._norms else norm
        longest = settings.skip * median
        self._norms.append(min(norm, longest))  # so that the median adapts if gradients stay large
        if norm > longest:
            state.num_skipped += 1
            return
        if norm > settings.clip * median:
            torch._foreach_mul_(gradients, settings.clip * median / norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def _entries(parameter: Tensor) -> Tensor:
    """Entries of a parameter's gradient, or its stored entries if it is sparse; may be changed in place."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()
