# SPDX-License-Identifier: Apache-2.0
"""L7. Weights of the modes of a mixture, by importance weights of its draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.guides import AutoFlowGuide
from pyro_flows.importance.psis import pareto_smooth
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.posterior.joint import JointBlock
from pyro_flows.training.objective import Objective

__all__ = ["weigh_modes"]


@dataclass(frozen=True)
class ModeSettings:
    """How weights of modes are estimated.

    Attributes:
        num_draws: Number of draws, from which a weight is known to a percent or two.
        min_weight: Smallest weight of a component, > 0.
    """

    num_draws: int = 10_000
    min_weight: float = 1e-6


SETTINGS = ModeSettings()


@torch.no_grad()
def weigh_modes(objective: Objective) -> None:
    r"""Give the components of a guide's mixture the mass that the posterior has at each of them.

    Of modes far apart, gradients of the weights are almost always zero and seldom large: training does not find the
    weights, and may lose those that it began with. Importance weights :math:`w_i` of draws :math:`z_i` give them at
    once, :math:`\pi_k = \sum_i w_i r_k(z_i) / \sum_i w_i` with the share :math:`r_k` of a component in the density: a
    step of expectation maximization. They are kept if the ELBO gains from them. Nothing happens to other guides, nor
    with mini-batches.

    Args:
        objective: The objective, the guide of which is changed in place.

    References:
        Cappé, Douc, Guillin, Marin, Robert. Adaptive importance sampling in general mixture classes. Statistics and
        Computing 2008. arXiv:0710.4242.
    """
    guide = objective.guide
    if objective.subsampled or objective.trains_model or not objective.vectorized:
        return
    if not isinstance(guide, AutoFlowGuide) or guide.posterior.joint is None or len(guide.posterior.local):
        return
    joint, processes = guide.posterior.joint, objective.parts.processes
    base = joint.flow.base
    if base.num_components == 1:
        return
    found = processes.broadcast(_weights(objective, joint))
    seed = processes.broadcast(int(torch.randint(2**31, ())))
    before, was = base.weights, objective.estimate(seed)
    base.set_weights(found.clamp(min=SETTINGS.min_weight))
    gain, _ = objective.estimate(seed).gain_over(was)
    if not gain > 0.0:  # or NaN
        base.set_weights(before)


def _weights(objective: Objective, joint: JointBlock) -> Tensor:
    """Shares of the posterior, ``(K,)``."""
    base = joint.flow.base
    mixture = base(joint.layout.init_loc)
    log_joint = LogJoint(objective.model, joint.layout, *objective.batches.first)
    noise = mixture.rsample(torch.Size((SETTINGS.num_draws,)))
    found = []
    for part in noise.split(log_joint.chunk):
        z, ladj = joint.flow.transform.forward_and_ladj(part)
        found.append((log_joint(z) + ladj - mixture.log_prob(part)).double().nan_to_num(-torch.inf))
    weights = pareto_smooth(torch.cat(found)).log_weights.exp()
    return (weights / weights.sum()) @ base.shares(noise).double()
