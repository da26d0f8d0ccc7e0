# SPDX-License-Identifier: Apache-2.0
"""L7. A run of :func:`~pyro_flows.fit`: cycles of a falling rate, until another one is not worth it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_flows.guides import AutoFlowGuide
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.objective import Estimate
from pyro_flows.training.trainer import Trainer
from pyro_flows.transforms.preconditioner import look_again

__all__ = ["Run"]

# A run is a few cycles, in each of which the rate falls to a hundredth; the next one is as long as all before it. With
# mini-batches the first is longer, to get rid of the noise that it begins with; annealed, to have time to cool. There,
# there may be more of them.
CYCLE, CYCLE_LONG = 250, 1000
MAX_STEPS, MAX_STEPS_LONG = 4000, 8000
# Steps before a cycle that gains nothing is the last.
PATIENCE = 250
# A cycle whose gain is below this, in nats, or below so much for every local latent, times its length over that of the
# first, or below two standard errors, is the last; so is one after which the next is expected to bring less than half
# of what it would have to.
MIN_GAIN, MIN_LOCAL_GAIN = 0.005, 1e-4
# Half the variance of log weights is the gap, where they are nearly constant: below MIN_GAIN no cycle can gain enough.
# A start that is no more than a Gaussian has to be closer, since all of its gap may be in a mean.
NEGLIGIBLE_GAP = 1e-3
# Below this there is no room for a tail that matters; above it, tails are looked at before a run has arrived.
TAILLESS_GAP = 1e-4
INTERRUPTED = "interrupted"
# What a checkpoint holds.
STATE = ("cycle", "step", "last_gain", "rate", "reason", "seed", "start", "best_point", "start_is_best")
TRAINER_STATE = ("steps", "losses", "skipped", "rollbacks")


class Run:
    """Trains, keeps the best point, and knows when to stop.

    Args:
        trainer: Makes the steps.
        num_steps: Number of steps, in one cycle; None stops by itself.
        checkpoint: Where to go on from, and to write to.
        anneal: Whether the first cycle begins with a flattened log joint.
        progress: Whether to show a bar.

    Attributes:
        start_estimate: The ELBO at the start.
        reason: Why it stopped.
    """

    def __init__(
        self, trainer: Trainer, num_steps: int | None, checkpoint: Checkpoint, *, anneal: bool, progress: bool
    ) -> None:
        self.trainer = trainer
        self.objective = trainer.objective
        self.checkpoint = checkpoint
        self.anneal = anneal
        self.progress = progress
        self.num_steps = num_steps
        long = self.objective.subsampled or anneal
        self.lengths = [num_steps or (CYCLE_LONG if long else CYCLE)]
        while num_steps is None and sum(self.lengths) < (MAX_STEPS_LONG if long else MAX_STEPS):
            self.lengths.append(sum(self.lengths))
        # With mini-batches the same noise each time: differences between estimates would drown any gain.
        self.seed = int(torch.randint(2**31, ())) if self.objective.subsampled else None
        self.rate = trainer.peak_rate
        self.cycle = self.step = 0
        self.last_gain = 0.0  # of a cycle, but for the first, whose gain depends on the start
        self.reason = ""
        self.start = self.best_point = trainer.snapshot()
        self.start_is_best = True
        if checkpoint.exists:
            self._resume(checkpoint.load(self.objective.leaves))
        else:
            self.start_estimate = self.best = self.objective.estimate(self.seed)

    def _resume(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        for name in TRAINER_STATE:
            setattr(self.trainer, name, state[name])
        if self.reason == INTERRUPTED:
            self.reason = ""
        self.trainer.restore(self.start)
        if isinstance(self.objective.guide, AutoFlowGuide):
            look_again(self.objective.guide)  # the warm start was another process's
        self.start_estimate = self.best = self.objective.estimate(self.seed)
        if not self.start_is_best:
            self.trainer.restore(self.best_point)
            self.best = self.objective.estimate(self.seed)
        self.trainer.restore(state["point"])

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in STATE}
        state |= {name: getattr(self.trainer, name) for name in TRAINER_STATE}
        self.checkpoint.save({**state, "point": self.trainer.snapshot()})

    def train(self) -> bool:
        """Run to the end, or until Ctrl-C; returns whether the trained point has to be compared with the start."""
        objective, trainer = self.objective, self.trainer
        judged = self.num_steps is None and not objective.trains_model
        if (
            judged
            and not self.anneal
            and not self.reason
            and self.start_is_best
            and self.start_estimate.variance / 2 < NEGLIGIBLE_GAP
        ):
            self.reason = "the start is the posterior, as far as its draws can tell"
        try:
            while not self.reason:
                if self.cycle == len(self.lengths):
                    self.reason = f"all {sum(self.lengths)} steps done"
                    break
                self._one_cycle(self.lengths[self.cycle], judged=judged)
        except KeyboardInterrupt:
            self.reason = INTERRUPTED
            now = objective.estimate(self.seed)
            if objective.prefers(now, self.best):
                self._keep(now)
        trainer.restore(self.best_point)
        return not objective.trains_model and not self.start_is_best

    def _one_cycle(self, length: int, *, judged: bool) -> None:
        objective, trainer = self.objective, self.trainer
        done = sum(self.lengths[: self.cycle])
        with tqdm(
            total=length,
            initial=self.step,
            desc=f"cycle {self.cycle + 1}",
            disable=not self.progress,
            mininterval=0.5,
        ) as bar:
            trainer.cycle(
                length,
                self.rate,
                lambda step: self._advance(bar, step),
                first=self.step,
                anneal=self.anneal and self.cycle == 0,
            )
        now = objective.estimate(self.seed)
        gain, error = now.gain_over(self.best)
        if objective.trains_model or objective.prefers(now, self.best) or (self.anneal and self.cycle == 0):
            self._keep(now)
        if judged and self._has_arrived(now):
            self.reason = f"the log weights of its draws vary by {math.sqrt(now.variance):.3f} nats, next to nothing"
        elif gain < -2 * error and not objective.trains_model:
            trainer.restore(self.best_point)
            trainer.rollbacks += 1
            self.rate /= 2
        elif self.num_steps is None and done >= PATIENCE and not self._is_worth_more(gain, error):
            self.reason = f"the last {length} steps gained {max(gain, 0.0):.3f} nats, not worth as many more"
        elif objective.subsampled or objective.trains_model:
            self.rate /= 2
        self.last_gain = gain if self.cycle else 0.0
        self.cycle, self.step = self.cycle + 1, 0

    def _is_worth_more(self, gain: float, error: float) -> bool:
        """Whether a cycle was worth its steps, and the next one will be if gains go on falling as they did."""
        wanted = _min_gain(self.objective.guide) / self.lengths[0]
        if gain < max(wanted * self.lengths[self.cycle], 2 * error):
            return False
        falls = min(gain / self.last_gain, 1.0) if self.last_gain > 0 else 1.0
        ahead = self.lengths[self.cycle + 1 : self.cycle + 2]
        return gain * falls > 0.5 * wanted * sum(ahead)

    def _has_arrived(self, now: Estimate) -> bool:
        """Whether log weights hardly vary; that of rare draws does not show in their variance, but in the tail."""
        gap = now.variance / 2
        if gap >= MIN_GAIN or gap < TAILLESS_GAP:
            return gap < MIN_GAIN
        return self.objective.subsampled or not self.objective.vectorized or self.objective.has_light_tails()

    def _keep(self, now: Estimate) -> None:
        self.best, self.best_point, self.start_is_best = now, self.trainer.snapshot(), False

    def _advance(self, bar: Any, step: int) -> None:
        """After each step: the bar, and the checkpoint."""
        bar.update()
        self.step = step
        if self.checkpoint.is_due:
            self._save()
        if self.trainer.steps % 50 == 0:
            recent = self.trainer.losses[-200:]
            half = len(recent) // 2
            trend = statistics.fmean(recent[:half] or [0.0]) - statistics.fmean(recent[half:] or [0.0])
            bar.set_postfix_str(f"ELBO {-statistics.fmean(recent[half:]):.3f}, trend {trend:+.3f}")

    def finish(self, compare: bool) -> tuple[str, Estimate]:
        """Which of the start and the trained point is kept, and its ELBO.

        Args:
            compare: Whether the higher ELBO on fresh draws, from the same noise and mini-batches, decides.
        """
        kept, best = "start" if self.start_is_best else "flow", self.best
        if compare:
            seed = int(torch.randint(2**31, ()))
            best = self.objective.estimate(seed)
            self.trainer.restore(self.start)
            gaussian = self.objective.estimate(seed)
            if self.objective.prefers(best, gaussian):
                self.trainer.restore(self.best_point)
            else:
                kept, best = "start", gaussian
        self._save()
        return kept, best


def _min_gain(guide: Callable[..., Any]) -> float:
    """See ``MIN_GAIN``."""
    blocks = guide.posterior.blocks() if isinstance(guide, AutoFlowGuide) else ()
    num_local = sum(block.layout.num_items * block.layout.latent_dim for block in blocks if block.items is not None)
    return max(MIN_GAIN, MIN_LOCAL_GAIN * num_local)
