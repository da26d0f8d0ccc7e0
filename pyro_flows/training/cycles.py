# SPDX-License-Identifier: Apache-2.0
"""L7. Learning-rate cycles of a run: how long they are, and when one is the last."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_flows._checks import Settings, check_positive, constant, optional

__all__ = ["ScheduleSettings"]


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """Lengths of cycles, and criteria of convergence.

    A cycle is the last one if its gain is below a tolerance or below two standard errors, or if the next one, by
    geometric extrapolation of the gains, is expected to gain less than half of its own tolerance. Where a gap above a
    target is left, the next cycle is tried at half the rate first; where all cycles to come, by this extrapolation,
    would leave one that a wider flow may close, the cycle is the last. Values without a source are heuristics;
    ``tests/benchmarks/`` measures their joint effect.

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
        clear_errors: Standard errors by which the trained ELBO has to exceed an earlier estimate of the initial one, to
            be kept without one from the same noise.
        target_gap: Gap in nats by importance weights, > 0, below which a cycle is the last one; None for no such bound.
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
    clear_errors: float = 10.0
    target_gap: float | None = constant(None, optional(check_positive))

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
