# SPDX-License-Identifier: Apache-2.0
"""L7. Optimiser steps that survive rare gradients: clipping that adapts, and a way back from divergence."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.compiled.parameters import RecordingError
from pyro_flows.models.traces import NO_DENSITY
from pyro_flows.training.objective import Objective

__all__ = ["Trainer"]

# Gradients longer than this many running medians are shortened to it, or left out altogether.
CLIP, SKIP = 2.0, 20.0
MEMORY = 100
# Fraction of a cycle in which the rate rises, and what is left of it at the end.
WARM_UP, FINAL = 0.05, 0.01
# Steps after which a loss is compared with the best; how many of its own standard deviations above is a divergence.
WINDOW, TOLERANCE = 100, 10.0
# The default 0.999 remembers the first gradients, which are the largest by far, for thousands of steps.
BETAS = (0.9, 0.99)
# Adam's eps for items' tables, in nats per unit of their parameters: gradients below this move a row in proportion to
# their size. A row is seen once in a pass; by the sign of its gradient it would never come to rest.
TABLE_EPS = 0.1
MAX_FAILURES = 10
# Temperature at which annealing begins.
HOTTEST = 30.0
# Steps after which they are timed. Recording takes as long as a hundred eager steps, and halves those that follow: it
# is done if at least so many go on for so many seconds. Compiling saves most of a step, eager or recorded.
TIMED = 20
WORTH_RECORDING, WORTH_SECONDS = 200, 2.0
EAGER_SAVES, SCRIPT_SAVES = 0.85, 0.7
# Seconds that the compiler takes for an operation of the graph, about, on a machine of two cores.
COMPILE_SECONDS = 0.009

# Values of the objective's leaves, in order.
Point = list[Tensor]


class Trainer:
    """Adam on an objective.

    Args:
        objective: What to maximise.
        num_particles: Draws a step.
        peak_rate: Largest learning rate.
        tables: Those parameters whose gradient is sparse: a step moves the rows that it has seen.

        compile: Whether steps are compiled: True, False, or ``"auto"`` where that saves time.

    Attributes:
        steps: Steps so far.
        losses: The finite ones among their losses.
        skipped: Steps that were left out.
        rollbacks: Returns to the best point.
    """

    def __init__(
        self,
        objective: Objective,
        num_particles: int,
        peak_rate: float,
        tables: Sequence[Tensor] = (),
        compile: bool | str = False,
    ) -> None:
        self.objective = objective
        self.num_particles = num_particles
        self.peak_rate = peak_rate
        self.steps = 0
        self.losses: list[float] = []
        self.skipped = 0
        self.rollbacks = 0
        self._elbo = objective.elbo(num_particles)
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._tables = tables
        self._compile = compile
        self._seconds: deque[float] = deque(maxlen=TIMED // 2)

    def _fresh_optimizers(self) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        tables = [p for p in self._parameters if any(p is table for table in self._tables)]
        dense = [p for p in self._parameters if all(p is not table for table in self._tables)]
        if dense:
            made.append(torch.optim.Adam(dense, lr=self.peak_rate, betas=BETAS, fused=True))
        if tables:
            eps = TABLE_EPS * self.objective.scale
            made.append(torch.optim.SparseAdam(tables, lr=self.peak_rate, betas=BETAS, eps=eps))
        return made

    def _continued(self, before: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Adam of the vector that parameters have become, with their moments: without these its first steps would be
        as long as at the start, at a rate that is not that of the start."""
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

    def _speed_up(self, steps_left: int) -> bool:
        """Record steps, or compile what was recorded, if that pays; returns whether parameters are others now."""
        asked = self._compile is True
        if self._compile is False or not (asked or len(self._seconds) == TIMED // 2):
            return False
        ahead = steps_left * statistics.median(self._seconds) if self._seconds else math.inf
        is_new = self.objective.graph is None
        if is_new:
            if not asked and (steps_left < WORTH_RECORDING or ahead < WORTH_SECONDS):
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
        if asked or ahead * (EAGER_SAVES if is_new else SCRIPT_SAVES) > graph.num_operations * COMPILE_SECONDS:
            self._compile = False
            try:
                self.objective.compile()
                return is_new
            except RuntimeError as error:
                if asked:
                    warnings.warn(f"fit: runs its graph without machine code, since {error}.", stacklevel=4)
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

    def cycle(
        self, length: int, rate: float, after_step: Callable[[int], None], *, first: int = 0, anneal: bool = False
    ) -> None:
        """So many steps, with a rate that rises to ``rate`` and falls to a hundredth of it.

        Args:
            length: Number of steps.
            rate: The highest rate.
            after_step: Is told how many steps of the cycle are done.
            first: Where the cycle goes on, if it was broken off.
            anneal: Whether the log joint is flattened at first, by a temperature that falls to 1 in half of the steps.

        Raises:
            RuntimeError: If none of the first steps ever has a finite loss and gradient.
            Exception: Whatever the model raises then.
        """
        best_loss, best_spread, best_point = math.inf, 0.0, self.snapshot()
        optimizers = self._fresh_optimizers()
        begun = len(self.losses)
        for step in range(first, length):
            if not anneal and step in (first, first + TIMED) and self._speed_up(length - step):
                optimizers = self._continued(optimizers)
            if anneal:
                self.objective.power = min(1.0, HOTTEST ** (2 * step / length - 1))
            begin = time.perf_counter()
            self._step(optimizers, rate * _schedule(step / length))
            self._seconds.append(time.perf_counter() - begin)
            after_step(step + 1)
            if step % WINDOW == WINDOW - 1:
                window = self.losses[max(begun, len(self.losses) - WINDOW) :]
                loss = statistics.fmean(window) if window else math.inf
                spread = statistics.stdev(window) if len(window) > 1 else 0.0
                if loss < best_loss:
                    best_loss, best_spread, best_point = loss, spread, self.snapshot()
                elif not anneal and not loss < best_loss + TOLERANCE * best_spread + 1.0:
                    self.restore(best_point)
                    optimizers = self._fresh_optimizers()
                    self.rollbacks += 1
                    rate /= 2

    def _step(self, optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
        self.steps += 1
        for parameter in self._parameters:
            parameter.grad = None
        try:
            loss = self.objective.gradient(self._elbo)
        except NO_DENSITY:
            loss = math.nan
        gradients = [_entries(p) for p in self._parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            if not self.losses and self.skipped >= MAX_FAILURES:
                raise RuntimeError(self.objective.without_density())
            return
        self.losses.append(loss)
        median = statistics.median(self._norms) if self._norms else norm
        self._norms.append(min(norm, SKIP * median))  # so that the median follows where gradients grow for good
        if norm > SKIP * median:
            self.skipped += 1
            return
        if norm > CLIP * median:
            torch._foreach_mul_(gradients, CLIP * median / norm)
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


def _schedule(progress: float) -> float:
    """Share of the peak rate: linear up, then half a cosine down."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    down = (progress - WARM_UP) / (1.0 - WARM_UP)
    return FINAL + (1.0 - FINAL) * 0.5 * (1.0 + math.cos(math.pi * down))
