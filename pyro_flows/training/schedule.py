# SPDX-License-Identifier: Apache-2.0
"""L7. The schedule of :func:`~pyro_flows.fit`: learning-rate cycles with decay, each as long as all previous ones,
until the ELBO has converged."""

from __future__ import annotations

import math
import statistics
import time

import torch

from pyro_flows.guides import AutoFlowGuide
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.cycles import ScheduleSettings
from pyro_flows.training.estimates import Estimate
from pyro_flows.training.interrupts import Interrupts
from pyro_flows.training.modes import weigh_modes
from pyro_flows.training.monitor import FitProgress, Monitor
from pyro_flows.training.state import TrainingState
from pyro_flows.training.trainer import Trainer

__all__ = ["Schedule"]

INTERRUPTED = "interrupted"
CALLBACK = "the callback asked for it"


class Schedule:
    """Trains in cycles, keeps the best point, and stops on convergence.

    Args:
        trainer: The trainer that takes the steps.
        num_steps: Number of steps of a single cycle, >= 1; None stops on convergence.
        checkpoint: The file to resume from and to write to.
        interrupts: Hears Ctrl-C.
        anneal: Whether the first cycle begins with a flattened log joint.
        monitor: The progress bar and the user's callback.
        settings: Lengths of cycles, and criteria of convergence.
        gap_to_leave: Gap in nats above which a wider flow goes on; None if there is none that can. Where all cycles
            to come would leave more, these steps are not taken.

    Attributes:
        earlier_cycles: Number of cycles of the parts of the run before, which the user sees counted along.
    """

    def __init__(
        self,
        trainer: Trainer,
        num_steps: int | None,
        checkpoint: Checkpoint,
        interrupts: Interrupts,
        *,
        anneal: bool,
        monitor: Monitor,
        settings: ScheduleSettings | None = None,
        gap_to_leave: float | None = None,
    ) -> None:
        self.settings = settings or ScheduleSettings()
        self.trainer = trainer
        self.objective = trainer.objective
        self.checkpoint = checkpoint
        self.interrupts = interrupts
        self.anneal = anneal
        self.monitor, self.num_steps = monitor, num_steps
        self.earlier_cycles = 0
        self._gap_to_leave = gap_to_leave
        self._processes = trainer.objective.parts.processes
        # Heeded by all processes after the same step: Ctrl-C in any, and the first one's clock.
        trainer.wishes = lambda: [interrupts.is_pending, interrupts.is_late, checkpoint.is_due]

    @property
    def was_stopped(self) -> bool:
        """Whether the user has stopped the run, by Ctrl-C or in the callback."""
        return self.trainer.state.reason in (INTERRUPTED, CALLBACK)

    def _lengths(self) -> list[int]:
        return self.settings.lengths(self.num_steps, long=self.objective.subsampled or self.anneal)

    def begin(self) -> None:
        """Estimate the initial guide's ELBO, and save the beginning of the run."""
        state = self.trainer.state
        state.lengths = self._lengths()
        # With mini-batches the same noise each time, since the noise of estimates would exceed any gain.
        state.seed = self._draw_seed() if self.objective.subsampled else None
        state.noise = None if self.objective.parts.is_whole else self._draw_seed()
        try:
            estimate = self._estimate()
        except KeyboardInterrupt:
            self._count_interruption()
            estimate = self._estimate()
        state.initial_estimate = state.best_estimate = estimate
        self.save()

    def resume(self, state: TrainingState) -> None:
        """Go on from a state, whose run this call may extend.

        Raises:
            ValueError: If the run has more steps than this call asks for, or another way to stop and is not finished.
        """
        trainer, former = self.trainer, self.checkpoint.run.options
        if former is None:  # version 0.1.0 wrote neither options nor estimates
            trainer.resume(state)
            state.lengths = self._lengths()
            self._estimate_again()
            return
        if self.num_steps != former.num_steps and not self._extends(state, former.num_steps):
            steps = former.num_steps if former.num_steps is not None else state.num_steps
            finished = "" if state.kept else ", which is not finished,"
            raise self.checkpoint.error(
                f"to be resumed with more steps, or as many, but its run{finished} has num_steps={former.num_steps} "
                f"(and took {state.num_steps}), and got {self.num_steps}",
                f"Pass num_steps={former.num_steps} for the same run, more than {steps} to go on after it, or another "
                "path for a new run.",
            )
        if state.kept:
            self.restore(state)
        else:
            trainer.resume(state)

    def restore(self, state: TrainingState) -> None:
        """Take the state of a finished run."""
        self.trainer.state = state
        self.trainer.restore_all()

    def _extends(self, state: TrainingState, former: int | None) -> bool:
        """Add the steps that this call asks for in addition; returns whether that is possible."""
        if not state.kept:
            if former is None or self.num_steps is None or self.num_steps < sum(state.lengths):
                return False
            state.lengths.append(self.num_steps - sum(state.lengths))
            state.reason = ""  # it may have done all steps, but the final comparison
            return True
        if self.num_steps is not None and self.num_steps <= state.num_steps:
            return False
        done = state.lengths[: state.cycle]
        more = self._lengths() if self.num_steps is None else [self.num_steps - state.num_steps]
        state.lengths = [*done, *more]
        if state.kept == "start":
            state.best_point, state.best_estimate, state.initial_is_best = state.point, state.initial_estimate, True
        state.kept, state.reason, state.step = "", "", 0
        return True

    def _estimate_again(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        trainer.restore(state.initial_point)
        state.initial_estimate = state.best_estimate = self._estimate()
        if not state.initial_is_best:
            trainer.restore(state.best_point)
            state.best_estimate = self._estimate()
        trainer.restore(state.point)

    def _draw_seed(self) -> int:
        return self._processes.broadcast(int(torch.randint(2**31, ())))

    def _estimate(self) -> Estimate:
        return self.objective.estimate(self.trainer.state.seed)

    def _best(self) -> Estimate:
        found = self.trainer.state.best_estimate
        assert found is not None
        return found

    def save(self) -> None:
        """Write the checkpoint, if there is one."""
        if self.checkpoint.path is None:
            return
        state = self.trainer.state
        reason = state.reason
        state.reason = "" if reason == INTERRUPTED else reason  # from the file, the run goes on
        try:
            self.checkpoint.save(self.trainer.freeze())
        finally:
            state.reason = reason

    def _count_interruption(self) -> None:
        """Note that the run was interrupted; raises ``KeyboardInterrupt`` if it was before."""
        self.interrupts.heed()
        self.trainer.state.reason = INTERRUPTED

    def train(self) -> bool:
        """Run to the end, or until Ctrl-C.

        Returns:
            Whether the trained point has yet to be compared with the initial one.

        Raises:
            KeyboardInterrupt: At the second Ctrl-C; the best parameters until then are kept.
        """
        objective, state = self.objective, self.trainer.state
        if state.kept:
            return False
        assert state.initial_estimate is not None
        judged = self.num_steps is None and not objective.trains_model
        is_close = state.initial_estimate.variance / 2 < self.settings.max_gap_of_start
        if judged and not self.anneal and not state.reason and state.initial_is_best and is_close:
            state.reason = "the start is the posterior, as far as its draws can tell"
        try:
            while not state.reason:
                if state.cycle == len(state.lengths):
                    state.reason = f"all {sum(state.lengths)} steps done"
                    break
                self._one_cycle(state.lengths[state.cycle], judged=judged)
            if state.reason != INTERRUPTED:
                self.save()
        except KeyboardInterrupt:
            self._stop()
        self.trainer.restore(state.best_point)
        return not objective.trains_model and not state.initial_is_best

    def _stop(self) -> None:
        """After Ctrl-C: save the state to go on from, and keep the better one of the current and the best point."""
        try:
            self._count_interruption()
            self.save()
            now = self._estimate()
            if self.objective.prefers(now, self._best()):
                self._keep(now)
        except KeyboardInterrupt:
            self._keep_by_losses()
            self.trainer.restore(self.trainer.state.best_point)
            raise

    def _keep_by_losses(self) -> None:
        """Keep the current point without an estimate, if the losses of the latest steps are not higher than the best
        estimate's."""
        objective, trainer, state = self.objective, self.trainer, self.trainer.state
        recent = state.losses[state.num_losses :][-trainer.settings.window :] if state.step else []
        if len(recent) < 2:
            return
        error = statistics.stdev(recent) / math.sqrt(len(recent)) if objective.subsampled else 0.0
        is_annealed = self.anneal and state.cycle == 0
        if objective.trains_model or is_annealed or -statistics.fmean(recent) + 2 * error > self._best().mean:
            state.best_point, state.initial_is_best = trainer.snapshot(), False

    def _one_cycle(self, length: int, *, judged: bool) -> None:
        objective, trainer, state = self.objective, self.trainer, self.trainer.state
        done = sum(state.lengths[: state.cycle])
        anneal = self.anneal and state.cycle == 0
        total = state.num_steps + length - state.step
        self.monitor.begin_cycle(self.earlier_cycles + state.cycle + 1, state.num_steps, total)
        trainer.cycle(length, self._after_step, anneal=anneal)
        self._check_agreement()
        weigh_modes(objective)
        now = self._estimate()
        gain, error = now.gain_over(self._best())
        is_worse = gain < -2 * error and not objective.trains_model
        if objective.trains_model or objective.prefers(now, self._best()) or anneal:
            self._keep(now)
        target = self.settings.target_gap
        if target is not None and self.objective.gap(target) < target:
            state.reason = f"the gap is below {target:g} nats"
        elif judged and self._has_converged(now):
            state.gap = now.variance / 2
            state.reason = f"converged: log weights have a standard deviation of {math.sqrt(now.variance):.3f} nats"
        elif is_worse:
            trainer.roll_back(state.best_point)
        elif done >= self.settings.patience and self._is_for_a_wider_flow(now, gain):
            state.reason = f"further steps would leave a gap of more than {self._gap_to_leave:g} nats"
        elif self.num_steps is None and done >= self.settings.patience and not self._is_worth_more(gain, error):
            if target is not None and self._gained_before():  # a gap is left: once more, at a lower rate
                state.learning_rate /= 2
            elif error == math.inf:
                state.reason = f"the ELBO has no estimate after {length} steps: some draws have no finite log density"
            else:
                found = f"{max(gain, 0.0):.3f} +/- {error:.3f} nats"
                state.reason = f"converged: the last {length} steps gained {found}, below tolerance"
        elif objective.subsampled or objective.trains_model:
            state.learning_rate /= 2
        state.last_gain = gain if state.cycle else 0.0
        state.cycle, state.step = state.cycle + 1, 0
        if self._wants_to_stop(now) and not state.reason:
            state.reason = CALLBACK

    def _wants_to_stop(self, now: Estimate) -> bool:
        """Report a cycle to the user's callback; returns whether it wants the run to stop."""
        state, best = self.trainer.state, self._best()
        progress = FitProgress(
            cycle=self.earlier_cycles + state.cycle,
            step=state.num_steps,
            elbo=now.mean,
            elbo_se=now.error,
            best_elbo=best.mean,
            learning_rate=state.learning_rate,
            seconds=time.perf_counter() - self.monitor.begin,
            objective=self.objective.kind,
        )
        with self.objective.parts.shards.joined(self.monitor.has_callback):
            wants = self.monitor.end_cycle(progress)
        return any(self._processes.gather(wants))

    def _is_worth_more(self, gain: float, error: float) -> bool:
        """Whether a cycle gained more than the tolerance, and the next one will, if gains go on falling as they did."""
        state = self.trainer.state
        if gain < max(self._tolerance(state.lengths[state.cycle]), 2 * error):
            return False
        ahead = state.lengths[state.cycle + 1 : state.cycle + 2]
        return gain * self._falls(gain) > 0.5 * self._tolerance(sum(ahead))

    def _falls(self, gain: float) -> float:
        """Ratio of the gain of the next cycle to this one's, if gains go on falling as they did."""
        last = self.trainer.state.last_gain
        return min(gain / last, 1.0) if last > 0 else 1.0

    def _is_for_a_wider_flow(self, now: Estimate, gain: float) -> bool:
        """Whether all cycles to come will probably leave too large a gap, which a wider flow may close."""
        if self._gap_to_leave is None:
            return False
        gain, cycles = max(gain, 0.0), len(self.trainer.state.lengths) - self.trainer.state.cycle
        falls = self._falls(gain)
        enough = self._gap_to_leave + sum(gain * falls**cycle for cycle in range(1, cycles))
        if not now.variance / 2 > enough:  # this costs no draws
            return False
        gap = self.objective.gap()
        if not enough < gap < math.inf:
            return False
        self.trainer.state.gap = gap
        return True

    def _gained_before(self) -> bool:
        """Whether the cycle before this one gained more than the tolerance, or is the first, which tells nothing."""
        state = self.trainer.state
        return state.cycle < 2 or state.last_gain >= self._tolerance(state.lengths[state.cycle - 1])

    def _tolerance(self, length: int) -> float:
        """Tolerance of the gain of so many steps, in nats."""
        return self._min_gain() / self._lengths()[0] * length

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
        state = self.trainer.state
        state.best_estimate, state.best_point, state.initial_is_best = now, self.trainer.snapshot(), False

    def _check_agreement(self) -> None:
        """Raise RuntimeError if the parameters of processes differ, which have taken the same steps."""
        point = [leaf.detach() for leaf in self.objective.leaves if leaf not in self.objective.parts.shards]
        norms = self._processes.gather(torch.stack(torch._foreach_norm(point)).tolist() if point else [])
        if any(norm != norms[0] for norm in norms):
            raise RuntimeError(
                "fit: expected the parameters of all processes to be the same after the same steps, but they differ. "
                "Do not change them between steps in one process only, as in a callback, and run on equal processors."
            )

    def _after_step(self) -> None:
        """Update the progress bar, write a checkpoint if one is due, and heed Ctrl-C."""
        state = self.trainer.state
        self.monitor.step(state.losses, state.num_steps, self.objective.title)
        *wishes, is_due = self.trainer.wishes() if self._processes.size == 1 else self.trainer.wanted
        self.interrupts.raise_pending(wishes)
        if is_due:
            self.save()

    def finish(self, compare: bool) -> tuple[str, Estimate]:
        """Keep the initial or the trained point: that with the higher ELBO on fresh draws, or without ``compare`` the
        current one. Returns ``"start"`` or ``"flow"``, and its ELBO."""
        state = self.trainer.state
        if state.kept:
            assert state.final_estimate is not None
            return state.kept, state.final_estimate
        kept, best = "start" if state.initial_is_best else "flow", self._best()
        if compare:
            try:
                kept, best = self._compare()
            except KeyboardInterrupt:
                self.trainer.restore(state.best_point)
                self._count_interruption()
        if state.reason != INTERRUPTED:
            state.kept, state.final_estimate = kept, best
            self.save()
        return kept, best

    def _compare(self) -> tuple[str, Estimate]:
        """Keep the initial or the trained point, which is the current one; without a second look at the initial one
        where an earlier one tells, since estimates may take as long as a cycle."""
        state = self.trainer.state
        seed = self._draw_seed()
        trained, earlier = self.objective.estimate(seed), state.initial_estimate
        assert earlier is not None
        clear = self.settings.clear_errors * math.hypot(trained.error, earlier.error)
        if trained.mean - earlier.mean > clear and not self.objective.subsampled:
            return "flow", trained
        self.trainer.restore(state.initial_point)
        initial = self.objective.estimate(seed)
        if not self.objective.prefers(trained, initial):
            return "start", initial
        self.trainer.restore(state.best_point)
        return "flow", trained
