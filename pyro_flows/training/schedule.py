# SPDX-License-Identifier: Apache-2.0
"""L7. The schedule of :func:`~pyro_flows.fit`: learning-rate cycles with decay, each as long as all previous ones,
until the ELBO has converged."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from pyro_flows._checks import Settings
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.monitor import FitProgress, Monitor
from pyro_flows.training.objective import Estimate
from pyro_flows.training.trainer import Trainer
from pyro_flows.transforms.preconditioner import look_again

__all__ = ["Schedule", "ScheduleSettings"]

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """Lengths of cycles, and criteria of convergence.

    A cycle is the last one if its gain is below a tolerance or below two standard errors, or if the next one, by
    geometric extrapolation of the gains, is expected to gain less than half of its own tolerance. Values without a
    source are heuristics; ``tests/benchmarks/`` measures their joint effect.

    Attributes:
        first_cycle: Number of steps of the first cycle, >= 1.
        first_cycle_long: The same with mini-batches, to average over more of their noise, and with annealing, to cool
            slowly.
        max_steps: Approximate number of steps of all cycles at most; a cycle that has begun is finished.
        max_steps_long: The same with mini-batches or annealing.
        patience: Number of steps after which a cycle whose gain is below tolerance is the last.
        min_gain: Tolerance of the ELBO gain of the first cycle, in nats, > 0; for longer cycles in proportion to their
            length. Welandawe, Andersen, Vehtari, Huggins. A framework for improving the reliability of black-box
            variational inference. JMLR 25, 2024. arXiv:2203.15945, for stopping where the predicted gain is less than
            its cost.
        min_gain_per_latent: The same for each local latent, in nats; the larger of the two tolerances holds.
        max_gap_of_start: Gap in nats below which the initial guide is not trained. The gap is half the variance of log
            weights, where they are nearly constant. Lower than ``min_gain``, since the whole gap of a Gaussian may be
            an error of one mean.
        max_gap_without_tail: Gap in nats below which the tail of the importance weights is not checked. Between this
            and ``min_gain`` a guide has converged if its importance weights have a light tail.
    """

    first_cycle: int = 250
    first_cycle_long: int = 1000
    max_steps: int = 4000
    max_steps_long: int = 8000
    patience: int = 250
    min_gain: float = 0.005
    min_gain_per_latent: float = 1e-4
    max_gap_of_start: float = 1e-3
    max_gap_without_tail: float = 1e-4

    def lengths(self, num_steps: int | None, *, long: bool) -> list[int]:
        """Numbers of steps of all cycles.

        Args:
            num_steps: Number of steps of a single cycle, >= 1; None makes several cycles.
            long: Whether there are mini-batches, or annealing.
        """
        lengths = [num_steps or (self.first_cycle_long if long else self.first_cycle)]
        while num_steps is None and sum(lengths) < (self.max_steps_long if long else self.max_steps):
            lengths.append(sum(lengths))
        return lengths


class Schedule:
    """Trains in cycles, keeps the best point, and stops on convergence.

    Args:
        trainer: The trainer that takes the steps.
        num_steps: Number of steps of a single cycle, >= 1; None stops on convergence.
        checkpoint: The file to resume from and to write to.
        anneal: Whether the first cycle begins with a flattened log joint.
        monitor: The progress bar and the user's callback.
        settings: Lengths of cycles, and criteria of convergence.

    Attributes:
        initial_estimate: ELBO estimate before training.
        best_estimate: Highest ELBO estimate so far.
        lengths: Numbers of steps of the cycles.
    """

    def __init__(
        self,
        trainer: Trainer,
        num_steps: int | None,
        checkpoint: Checkpoint,
        *,
        anneal: bool,
        monitor: Monitor,
        settings: ScheduleSettings | None = None,
    ) -> None:
        self.settings = settings or ScheduleSettings()
        self.trainer = trainer
        self.objective = trainer.objective
        self.checkpoint = checkpoint
        self.anneal = anneal
        self.monitor = monitor
        self.num_steps = num_steps
        self.lengths = self.settings.lengths(num_steps, long=self.objective.subsampled or anneal)
        # With mini-batches the same noise each time, since the noise of estimates would exceed any gain.
        trainer.state.seed = int(torch.randint(2**31, ())) if self.objective.subsampled else None
        if checkpoint.exists:
            self._resume()
        else:
            self.initial_estimate = self.best_estimate = self._estimate()

    def _resume(self) -> None:
        trainer = self.trainer
        state = trainer.state = self.checkpoint.load(self.objective.leaves, self.objective.guide)
        if state.reason == INTERRUPTED:
            state.reason = ""
        trainer.restore(state.initial_point)
        if isinstance(self.objective.guide, AutoFlowGuide):
            look_again(self.objective.guide)  # the warm start was in another process
        self.initial_estimate = self.best_estimate = self._estimate()
        if not state.initial_is_best:
            trainer.restore(state.best_point)
            self.best_estimate = self._estimate()
        trainer.restore(state.point)

    def _estimate(self) -> Estimate:
        return self.objective.estimate(self.trainer.state.seed)

    def _save(self) -> None:
        if self.checkpoint.path is not None:
            self.trainer.state.point = self.trainer.snapshot()
            self.checkpoint.save(self.trainer.state)

    def train(self) -> bool:
        """Run to the end, or until Ctrl-C.

        Returns:
            Whether the trained point has yet to be compared with the initial one.
        """
        objective, state = self.objective, self.trainer.state
        judged = self.num_steps is None and not objective.trains_model
        is_close = self.initial_estimate.variance / 2 < self.settings.max_gap_of_start
        if judged and not self.anneal and not state.reason and state.initial_is_best and is_close:
            state.reason = "the start is the posterior, as far as its draws can tell"
        try:
            while not state.reason:
                if state.cycle == len(self.lengths):
                    state.reason = f"all {sum(self.lengths)} steps done"
                    break
                self._one_cycle(self.lengths[state.cycle], judged=judged)
        except KeyboardInterrupt:
            state.reason = INTERRUPTED
            now = self._estimate()
            if objective.prefers(now, self.best_estimate):
                self._keep(now)
        self.trainer.restore(state.best_point)
        return not objective.trains_model and not state.initial_is_best

    def _one_cycle(self, length: int, *, judged: bool) -> None:
        objective, trainer, state = self.objective, self.trainer, self.trainer.state
        done = sum(self.lengths[: state.cycle])
        anneal = self.anneal and state.cycle == 0
        self.monitor.begin_cycle(state.cycle + 1, done + state.step, done + length)
        trainer.cycle(length, self._after_step, anneal=anneal)
        now = self._estimate()
        gain, error = now.gain_over(self.best_estimate)
        is_worse = gain < -2 * error and not objective.trains_model
        if objective.trains_model or objective.prefers(now, self.best_estimate) or anneal:
            self._keep(now)
        if judged and self._has_converged(now):
            state.reason = f"converged: log weights have a standard deviation of {math.sqrt(now.variance):.3f} nats"
        elif is_worse:
            trainer.roll_back(state.best_point)
        elif self.num_steps is None and done >= self.settings.patience and not self._is_worth_more(gain, error):
            state.reason = f"converged: the last {length} steps gained {max(gain, 0.0):.3f} nats, below tolerance"
        elif objective.subsampled or objective.trains_model:
            state.learning_rate /= 2
        state.last_gain = gain if state.cycle else 0.0
        state.cycle, state.step = state.cycle + 1, 0
        if self._wants_to_stop(now) and not state.reason:
            state.reason = "the callback asked for it"

    def _wants_to_stop(self, now: Estimate) -> bool:
        """Report a cycle to the user's callback; returns whether it wants the run to stop."""
        state, best = self.trainer.state, self.best_estimate
        progress = FitProgress(
            cycle=state.cycle,
            step=state.num_steps,
            elbo=now.mean,
            elbo_se=now.error,
            best_elbo=best.mean,
            learning_rate=state.learning_rate,
            seconds=time.perf_counter() - self.monitor.begin,
        )
        return self.monitor.end_cycle(progress)

    def _is_worth_more(self, gain: float, error: float) -> bool:
        """Whether a cycle gained more than the tolerance, and the next one will, if gains go on falling as they did."""
        state = self.trainer.state
        tolerance = self._min_gain() / self.lengths[0]  # a step
        if gain < max(tolerance * self.lengths[state.cycle], 2 * error):
            return False
        falls = min(gain / state.last_gain, 1.0) if state.last_gain > 0 else 1.0
        ahead = self.lengths[state.cycle + 1 : state.cycle + 2]
        return gain * falls > 0.5 * tolerance * sum(ahead)

    def _min_gain(self) -> float:
        guide = self.objective.guide
        blocks = guide.posterior.blocks() if isinstance(guide, AutoFlowGuide) else ()
        num_local = sum(block.layout.num_items * block.layout.latent_dim for block in blocks if block.items is not None)
        return max(self.settings.min_gain, self.settings.min_gain_per_latent * num_local)

    def _has_converged(self, now: Estimate) -> bool:
        """Whether log weights hardly vary; since rare draws do not show in the variance, the tail is checked too."""
        gap = now.variance / 2
        if gap >= self.settings.min_gain or gap < self.settings.max_gap_without_tail:
            return gap < self.settings.min_gain
        return self.objective.subsampled or not self.objective.vectorized or self.objective.has_light_tails()

    def _keep(self, now: Estimate) -> None:
        self.best_estimate = now
        self.trainer.state.best_point, self.trainer.state.initial_is_best = self.trainer.snapshot(), False

    def _after_step(self) -> None:
        """Update the progress bar, and write a checkpoint if one is due."""
        state = self.trainer.state
        self.monitor.step(state.losses, state.num_steps)
        if self.checkpoint.is_due:
            self._save()

    def finish(self, compare: bool) -> tuple[str, Estimate]:
        """Keep the initial or the trained point; returns ``"start"`` or ``"flow"``, and its ELBO.

        Args:
            compare: Whether to choose the point with the higher ELBO on fresh draws, from the same noise and
                mini-batches; otherwise the current one is kept.
        """
        state = self.trainer.state
        kept, best = "start" if state.initial_is_best else "flow", self.best_estimate
        if compare:
            seed = int(torch.randint(2**31, ()))
            best = self.objective.estimate(seed)
            self.trainer.restore(state.initial_point)
            initial = self.objective.estimate(seed)
            if self.objective.prefers(best, initial):
                self.trainer.restore(state.best_point)
            else:
                kept, best = "start", initial
        self._save()
        return kept, best
