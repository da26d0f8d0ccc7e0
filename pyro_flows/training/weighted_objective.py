# SPDX-License-Identifier: Apache-2.0
"""L7. Objectives other than the ELBO: what :class:`~pyro_flows.training.weighted.WeightedLoss` maximizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist

from pyro_flows._checks import Settings, constant, integer
from pyro_flows._random import forked
from pyro_flows.models.traces import Call, run_quietly, sample_nodes
from pyro_flows.training.batches import Batches
from pyro_flows.training.estimates import Estimate, EstimateSettings
from pyro_flows.training.objective import Objective
from pyro_flows.training.weighted import FORWARD_KL, IMPORTANCE_WEIGHTED, WeightedLoss

__all__ = ["ELBO", "OBJECTIVES", "WeightedObjective", "WeightedSettings", "check_weighted"]

ELBO = Objective.kind
OBJECTIVES = (ELBO, IMPORTANCE_WEIGHTED, FORWARD_KL)


@dataclass(frozen=True)
class WeightedSettings(Settings):
    """Number of draws that are weighted against each other.

    Attributes:
        bound_draws: Draws of an importance-weighted bound, >= 2. The more, the closer it is to the log evidence for
            any guide, and the less it says of the guide.
        forward_draws: Draws of a self-normalized estimate of the forward KL, >= 2. Its bias is inversely proportional
            to them, and it is at most their logarithm.
    """

    bound_draws: int = constant(16, integer(2))
    forward_draws: int = constant(256, integer(2))


class WeightedObjective(Objective):
    """An importance-weighted bound, or the negative forward KL, in nats; both are to be maximized.

    Args:
        kind: ``"importance_weighted"`` or ``"forward_kl"``.
        model: The model.
        guide: The guide, trained by the ELBO.
        batches: Their arguments.
        settings: Number of draws of estimates.
        weighted: Number of draws that are weighted against each other.
    """

    def __init__(
        self,
        kind: str,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batches: Batches,
        settings: EstimateSettings,
        weighted: WeightedSettings,
    ) -> None:
        super().__init__(model, guide, batches, settings)
        self.kind = kind
        self.title = "bound" if kind == IMPORTANCE_WEIGHTED else "-KL"
        self.num_draws = weighted.bound_draws if kind == IMPORTANCE_WEIGHTED else weighted.forward_draws

    def elbo(self, num_particles: int) -> WeightedLoss:
        """The loss of ``num_particles`` draws, in whole sets."""
        assert self.batched is not None
        return WeightedLoss(self.batched, self.kind, self.num_draws, max(1, num_particles // self.num_draws))

    def _programs(self, elbo: Any, part: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self.model, self.guide  # the loss decides how the guide draws

    def estimate(self, seed: int | None = None) -> Estimate:
        """Estimate it without gradients; ``seed`` is that of the noise."""
        found = super().estimate(seed)
        if self.kind == FORWARD_KL and math.isfinite(found.mean):
            return found._replace(variance=2.0 * max(0.0, -found.mean))  # of log weights, where they hardly vary
        return found

    def prefers(self, now: Estimate, before: Estimate) -> bool:
        """Whether an estimate is not significantly lower than an earlier one."""
        gain, error = now.gain_over(before)
        return gain > -2 * error


def check_weighted(kind: str, objective: Objective) -> None:
    """Refuse models and guides whose draws cannot be weighted against each other.

    Args:
        kind: The objective that was asked for.
        objective: Model, guide and data.

    Raises:
        NotImplementedError: With mini-batches, where draws cannot share a run of the model, or where the guide has
            sites that are discrete, points, or not reparameterized.
    """
    asked = f"for objective='{kind}'"
    if objective.subsampled:
        raise NotImplementedError(
            f"fit: expected all data at once {asked}, since a mini-batch does not know the weight of a draw, but got "
            "mini-batches. Leave the objective out."
        )
    if not objective.parts.is_whole:
        raise NotImplementedError(
            f"fit: expected one process {asked}, since draws are weighted against each other, but got several. Write "
            "distributed=False, or leave the objective out."
        )
    if objective.obstacle:
        raise NotImplementedError(
            f"fit: expected a model that can be run at many draws at once {asked}, but {objective.obstacle}. Write "
            "that line for tensors, or leave the objective out."
        )
    with forked():
        nodes = sample_nodes(run_quietly(objective.guide, Call(*objective.batches.first)))
    fixed = next((name for name, node in nodes.items() if not node["fn"].has_rsample), None)
    if fixed is not None:
        raise NotImplementedError(
            f"fit: expected a guide with reparameterized draws {asked}, but those of site '{fixed}' are not. Take "
            "AutoFlowGuide(model), or leave the objective out."
        )
    if all(isinstance(node["fn"], dist.Delta) for node in nodes.values()):
        raise NotImplementedError(
            f"fit: expected a guide with a density {asked}, but {type(objective.guide).__name__} is a point. Take "
            "AutoFlowGuide(model)."
        )
