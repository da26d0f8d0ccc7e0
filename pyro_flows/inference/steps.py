# SPDX-License-Identifier: Apache-2.0
"""L4. Optimiser steps that survive rare gradients: clipping that adapts, and a way back from divergence."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.guides.log_joint import NO_DENSITY
from pyro_flows.inference.objective import Objective

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

Point = dict[Tensor, Tensor]


class Trainer:
    """Adam on an objective.

    Args:
        objective: What to maximise.
        num_particles: Draws a step.
        peak_rate: Largest learning rate.
        tables: Those parameters whose gradient is sparse: a step moves the rows that it has seen.

    Attributes:
        steps: Steps so far.
        losses: The finite ones among their losses.
        skipped: Steps that were left out.
        rollbacks: Returns to the best point.
    """

    def __init__(
        self, objective: Objective, num_particles: int, peak_rate: float, tables: Sequence[Tensor] = ()
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
        self._parameters = objective.parameters
        self._tables = [p for p in self._parameters if any(p is table for table in tables)]
        self._dense = [p for p in self._parameters if all(p is not table for table in tables)]

    def _fresh_optimizers(self) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        if self._dense:
            made.append(torch.optim.Adam(self._dense, lr=self.peak_rate, betas=BETAS))
        if self._tables:
            eps = TABLE_EPS * self.objective.scale
            made.append(torch.optim.SparseAdam(self._tables, lr=self.peak_rate, betas=BETAS, eps=eps))
        return made

    def snapshot(self) -> Point:
        """A copy of all parameters."""
        return {p: p.detach().clone() for p in self._parameters}

    @torch.no_grad()
    def restore(self, point: Point) -> None:
        """Go back to a snapshot."""
        for parameter, value in point.items():
            parameter.copy_(value)

    def cycle(self, length: int, rate: float, after_step: Callable[[], None]) -> None:
        """So many steps, with a rate that rises to ``rate`` and falls to a hundredth of it.

        Raises:
            RuntimeError: If none of the first steps ever has a finite loss.
        """
        best_loss, best_spread, best_point = math.inf, 0.0, self.snapshot()
        optimizers = self._fresh_optimizers()
        first = len(self.losses)
        for step in range(length):
            self._step(optimizers, rate * _schedule(step / length))
            after_step()
            if step % WINDOW == WINDOW - 1:
                window = self.losses[max(first, len(self.losses) - WINDOW) :]
                loss = statistics.fmean(window) if window else math.inf
                spread = statistics.stdev(window) if len(window) > 1 else 0.0
                if loss < best_loss:
                    best_loss, best_spread, best_point = loss, spread, self.snapshot()
                elif not loss < best_loss + TOLERANCE * best_spread + 1.0:
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
        norm = torch.stack([g.norm() for g in gradients]).norm().item() if gradients else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            if not self.losses and self.skipped >= MAX_FAILURES:
                raise RuntimeError(
                    f"fit: expected a finite loss in the first {MAX_FAILURES} steps, but got none. Pass an init_loc_fn "
                    "to the guide that gives values where the model has a finite density."
                )
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
