# SPDX-License-Identifier: Apache-2.0
"""L7. The constants of :func:`~pyro_flows.fit`, and what is chosen by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pyro_flows._checks import Settings, constant, integer, optional
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.training.cycles import ScheduleSettings
from pyro_flows.training.estimates import EstimateSettings
from pyro_flows.training.objective import Objective
from pyro_flows.training.trainer import TrainerSettings
from pyro_flows.training.verdict import VerdictSettings
from pyro_flows.training.weighted_objective import WeightedSettings
from pyro_flows.training.wider import WiderSettings

__all__ = ["FitSettings"]


@dataclass(frozen=True)
class FitSettings(Settings):
    """Constants of :func:`fit`: values of its arguments where these are None, and constants of its parts.

    Values without a source are heuristics; ``tests/benchmarks/`` measures their joint effect.

    Attributes:
        rate_warm: Learning rate from a warm start, > 0.
        rate_warm_many: The same for guides of more than ``many_dimensions`` dimensions.
        rate_cold: Learning rate without a warm start, > 0.
        rate_annealed: Learning rate with annealing, which has to find modes that lie far apart, > 0.
        rate_amortized: Learning rate of encoders, > 0.
        many_dimensions: Number of global latents above which ``rate_warm_many`` holds.
        warm_start_batches: Number of mini-batches from which local latents are warm-started, at most.
        min_particles: Smallest number of particles per step on the full data, >= 1. Between this and
            ``max_particles``, a step has as many particles as can share its operations at next to no cost.
        max_particles: Largest number of particles per step on the full data, >= ``min_particles``.
        values_per_step: Number of values of sites, and of elements of a triangular matrix that each draw has, that a
            step takes at next to no cost.
        minibatch_particles: Particles per step with mini-batches, >= 1.
        few_particles: Particles per step where they run one by one, or with mini-batches of more than ``many_items``,
            >= 1.
        many_items: Size of the largest latent site in a mini-batch.
        checkpoint_interval: Seconds between two checkpoints within a cycle, >= 0.
        num_parts: Number of parts of a step, >= 1, a multiple of the number of processes; None takes one for each
            process. Particles, or mini-batches, are divided into parts with noise of their own, and gradients are
            averaged, on any number of processes alike.
        estimates: Settings of ELBO estimates.
        trainer: Settings of optimizer steps.
        verdict: Settings of the first verdict.
        schedule: Settings of learning-rate cycles and convergence.
        wider: Settings of a wider flow.
        weighted: Settings of objectives other than the ELBO.
    """

    rate_warm: float = 2e-2
    rate_warm_many: float = 1e-2
    rate_cold: float = 1e-2
    rate_annealed: float = 4e-2
    rate_amortized: float = 2e-3
    many_dimensions: int = 50
    warm_start_batches: int = 1000
    min_particles: int = 16
    max_particles: int = 128
    values_per_step: int = 2**16
    minibatch_particles: int = 8
    few_particles: int = 2
    many_items: int = 1000
    checkpoint_interval: float = 60.0
    num_parts: int | None = constant(None, optional(integer(1)))
    estimates: EstimateSettings = field(default_factory=EstimateSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    verdict: VerdictSettings = field(default_factory=VerdictSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    wider: WiderSettings = field(default_factory=WiderSettings)
    weighted: WeightedSettings = field(default_factory=WeightedSettings)

    def learning_rate(self, guide: Callable[..., Any], *, warm: bool, anneal: bool) -> float:
        """Peak learning rate of the first cycle.

        Args:
            guide: The guide.
            warm: Whether it had a warm start.
            anneal: Whether the log joint is flattened at first.
        """
        if warm:
            assert isinstance(guide, AutoFlowGuide)
            return self.rate_warm if guide.latent_dim <= self.many_dimensions else self.rate_warm_many
        amortized = isinstance(guide, AutoFlowGuide) and len(guide.posterior.encoders) > 0
        return self.rate_amortized if amortized else self.rate_annealed if anneal else self.rate_cold

    def num_particles(self, objective: Objective) -> int:
        """Number of particles per step."""
        if not objective.vectorized or (objective.subsampled and objective.num_items > self.many_items):
            return self.few_particles
        if objective.subsampled:
            return self.minibatch_particles
        return max(self.min_particles, min(self.max_particles, self._affordable(objective, 1)))

    def num_wider_particles(self, objective: Objective, num_particles: int) -> int:
        """Number of particles per step of a wider flow, from that of the flow before: ``wider.more_particles`` times as
        many, as long as a step has no more than as many times ``values_per_step`` values, which bounds memory."""
        factor = self.wider.more_particles
        affordable = min(self.max_particles, self._affordable(objective, factor))
        return max(num_particles, min(affordable, factor * num_particles))

    def _affordable(self, objective: Objective, factor: int) -> int:
        """Number of draws in a step of ``factor`` times ``values_per_step`` values."""
        joint = objective.guide.posterior.joint if isinstance(objective.guide, AutoFlowGuide) else None
        matrices = 0 if joint is None else joint.flow.head.factored_entries
        return factor * self.values_per_step // (objective.num_values + matrices // 2)

    def wider_schedule(self, target_gap: float) -> ScheduleSettings:
        """Cycles of a wider flow: until its gap is small enough, or does not fall any more."""
        wider = self.wider
        return replace(
            self.schedule,
            first_cycle=wider.first_cycle,
            max_steps=wider.max_steps,
            min_gain=wider.min_gain,
            target_gap=target_gap,
        )
