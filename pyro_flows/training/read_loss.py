# SPDX-License-Identifier: Apache-2.0
"""L7. The loss of a step by what was read of a model, in place of thousands of operations of a loop over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_flows._random import seeded
from pyro_flows._recording import is_recording
from pyro_flows.compiled.cost import OperationCounter
from pyro_flows.guides.auto import AutoFlowGuide
from pyro_flows.models.log_joint import log_jacobian
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.state_chains import read_state_chain

if TYPE_CHECKING:
    from pyro_flows.training.objective import Objective

__all__ = ["read_loss"]


@dataclass(frozen=True)
class ReadLossSettings:
    """When a model is read.

    Attributes:
        min_operations: Number of operations of a run of the model up to which they are recorded themselves.
    """

    min_operations: int = 500


SETTINGS = ReadLossSettings()


def read_loss(objective: Objective, num_particles: int) -> Callable[..., Tensor] | None:
    """The loss of a step on the log density of a chain of states as it was read of the model. The states of a loop over
    time take a dozen operations then, where those of the model would be recorded one by one.

    Its value, and the gradient in the parameters of the guide, are those of
    :class:`~pyro_flows.VectorizedTrace_ELBO`, from the same noise.

    Args:
        objective: The ELBO of a model and a guide.
        num_particles: Number of draws.

    Returns:
        The loss, a function of the model's arguments; None where the model has no such chain or few operations, and
        where a step takes a part of the data, has another loss, scales the model or trains it.
    """
    guide, batches = objective.guide, objective.batches
    is_partial = objective.subsampled or objective.trains_model or objective.enumerates or objective.parts.plate
    is_elbo = objective.kind == "elbo" and objective.inverse_temperature == 1.0
    if is_partial or not is_elbo or not isinstance(guide, AutoFlowGuide):
        return None
    posterior = guide.posterior
    if posterior.joint is None or len(posterior.local):
        return None
    layout = posterior.joint.layout
    recorder = RunRecorder(objective.model, *batches.first, layout, live=True)

    @torch.no_grad()
    def run_model() -> None:
        with seeded(0), pyro.validation_enabled(False):
            recorder.scored(recorder.points[0].split(layout.sizes))

    try:
        with OperationCounter() as counter:
            run_model()
    except Exception:  # a model may raise anything at unlikely values, or where the guide draws some latents only
        return None
    if counter.cost.operations <= SETTINGS.min_operations:
        return None
    read = read_state_chain(recorder)
    if read is None:
        return None

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        assert posterior.joint is not None
        if not is_recording():
            run_model()  # the graph's guard has to see what the model reads
        distribution = posterior.joint.distribution(path_gradient=guide.path_gradient, filtered=True)
        distribution = distribution.expand([num_particles])
        if num_particles > 1:
            distribution = distribution.stratified()
        draws = distribution.rsample()
        log_joint = read.log_density(draws) + log_jacobian(layout, draws)
        return (distribution.score_parts(draws).entropy_term - log_joint).mean()

    return loss
