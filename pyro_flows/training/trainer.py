# SPDX-License-Identifier: Apache-2.0
"""L7. Optimizer steps that survive rare gradients: adaptive clipping, and a rollback on divergence."""

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

from pyro_flows.compiled.parameters import RecordingError
from pyro_flows.models.traces import NO_DENSITY
from pyro_flows.training.objective import Objective
from pyro_flows.training.state import Point, TrainingState

__all__ = ["Trainer", "TrainerSettings"]


@dataclass(frozen=True)
class TrainerSettings:
    """Adam, its clipping and its learning-rate schedule within a cycle; when steps are recorded and compiled.

    Values without a source are heuristics; ``tests/benchmarks/`` measures what they do together.

    Attributes:
        clip: Gradient norm in running medians above which a gradient is shortened to it, > 0.
        skip: Gradient norm in running medians above which a step is left out, > ``clip``.
        norm_memory: Number of steps whose gradient norms the running median is of, >= 1.
        warmup: Fraction of a cycle in which the learning rate rises linearly, in (0, 1).
        final_rate: Learning rate at the end of a cycle over the peak, in (0, 1]; the fall is half a cosine. Loshchilov,
            Hutter. SGDR: Stochastic gradient descent with warm restarts. ICLR 2017. arXiv:1608.03983, eq. (5).
        window: Number of steps after which their mean loss is compared with the best one, >= 2.
        divergence: Standard deviations of a loss that this mean may be above the best one, plus a nat, > 0.
        betas: Of Adam. The default second one, 0.999, remembers the first gradients, which are the largest by far, for
            thousands of steps.
        table_eps: Adam's eps for items' tables, in nats per unit of their parameters, > 0. Gradients below this move a
            row in proportion to their size. A row is seen once in a pass; by the sign of its gradient it would not
            converge.
        max_failures: Number of steps without a finite loss and gradient, before there was any, after which training
            gives up, >= 1.
        initial_temperature: Temperature at which annealing begins, >= 1; it falls geometrically to 1 in half of the
            cycle. Rezende, Mohamed. Variational inference with normalizing flows. ICML 2015. arXiv:1505.05770,
            eq. (20), for annealing.
        timed_steps: Number of steps after which steps are timed, the later half of them, >= 2.
        min_steps_to_record: Steps that must be left for a step to be recorded: recording takes as long as a hundred
            eager steps, and halves those that follow.
        min_seconds_to_record: Seconds that these must take.
        eager_saving: Share of an eager step's time that compilation saves.
        recorded_saving: Share of a recorded step's time that compilation saves.
        compile_seconds: Seconds that the compiler takes for an operation of the graph, on two cores.
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
        """Learning rate over its peak, after a share of the cycle in [0, 1]: linear up, then half a cosine down."""
        if progress < self.warmup:
            return (progress + 1e-3) / (self.warmup + 1e-3)
        down = (progress - self.warmup) / (1.0 - self.warmup)
        return self.final_rate + (1.0 - self.final_rate) * 0.5 * (1.0 + math.cos(math.pi * down))

    def inverse_temperature(self, progress: float) -> float:
        """What the log joint is multiplied by after a share of an annealed cycle in [0, 1]."""
        return min(1.0, self.initial_temperature ** (2 * progress - 1))


class Trainer:
    """Adam on an objective.

    Args:
        objective: What to maximize.
        num_particles: Draws a step, >= 1.
        learning_rate: Peak learning rate of the first cycle, > 0.
        tables: Those parameters whose gradient is sparse: a step moves the rows that it has seen.
        compile: Whether steps are compiled: True, False, or ``"auto"`` where that saves time.
        settings: Constants.

    Attributes:
        state: Where the run is.
    """

    def __init__(
        self,
        objective: Objective,
        num_particles: int,
        learning_rate: float,
        tables: Sequence[Tensor] = (),
        compile: bool | str = False,
        settings: TrainerSettings | None = None,
    ) -> None:
        self.settings = settings or TrainerSettings()
        self.objective = objective
        self.num_particles = num_particles
        here = self.snapshot()
        self.state = TrainingState(learning_rate, initial_point=here, best_point=here)
        self._elbo = objective.elbo(num_particles)
        self._norms: deque[float] = deque(maxlen=self.settings.norm_memory)
        self._tables = tables
        self._compile = compile
        self._seconds: deque[float] = deque(maxlen=self.settings.timed_steps // 2)

    def _fresh_optimizers(self) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        rate, betas = self.state.learning_rate, self.settings.betas
        tables = [p for p in self._parameters if any(p is table for table in self._tables)]
        dense = [p for p in self._parameters if all(p is not table for table in self._tables)]
        if dense:
            made.append(torch.optim.Adam(dense, lr=rate, betas=betas, fused=True))
        if tables:
            eps = self.settings.table_eps * self.objective.scale
            made.append(torch.optim.SparseAdam(tables, lr=rate, betas=betas, eps=eps))
        return made

    def _continued(self, before: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Adam of the vector that parameters have become, with their moments: without these its first steps would be
        as long as in a fresh run, at a learning rate that is not that of one."""
        made = self._fresh_optimizers()
        states: dict[Tensor, dict[str, Tensor]] = {}
        for optimizer in before:
            states.update(optimizer.state)
        steps = [state["step"] for state in states.values()]
        if steps:
            (vector,), leaves = self._parameters, self.objective.recorded_leaves
            moments = {
                name: torch.cat([(states[p][name] if p in states else torch.zeros_like(p)).reshape(-1) for p in leaves])
                for name in ("exp_avg", "exp_avg_sq")
            }
            made[0].state[vector] = {"step": max(steps).clone(), **moments}
        return made

    @property
    def _parameters(self) -> list[Tensor]:
        return self.objective.parameters

    def _record_or_compile(self, steps_left: int) -> bool:
        """Record steps, or compile what was recorded, if that pays; returns whether the parameters are others now."""
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
        """Go back to a snapshot."""
        for leaf, value in zip(self.objective.leaves, point, strict=True):
            leaf.copy_(value)

    def roll_back(self, point: Point) -> None:
        """On divergence, restore an earlier point and halve the learning rate, from here on."""
        self.restore(point)
        self.state.learning_rate /= 2
        self.state.num_rollbacks += 1

    def cycle(self, length: int, after_step: Callable[[], None] = lambda: None, *, anneal: bool = False) -> None:
        """Take the steps that are left of a cycle, whose learning rate rises to its peak and then decays.

        Where the mean loss diverges from the best in the cycle, parameters are rolled back to those of the best.

        Args:
            length: Number of steps of the cycle; those before ``state.step`` are done.
            after_step: Is called after each.
            anneal: Whether the log joint is flattened at first, by a temperature that falls to 1 in half of the steps.

        Raises:
            RuntimeError: If none of the first steps ever has a finite loss and gradient.
            Exception: Whatever the model raises then.
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
        gradients = [_entries(p) for p in self._parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            state.num_skipped += 1
            if not state.losses and state.num_skipped >= settings.max_failures:
                raise RuntimeError(self.objective.without_density())
            return
        state.losses.append(loss)
        median = statistics.median(self._norms) if self._norms else norm
        longest = settings.skip * median
        self._norms.append(min(norm, longest))  # so that the median follows where gradients grow for good
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
    """A gradient's entries, or those that are stored, in place."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()
