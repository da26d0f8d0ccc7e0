# SPDX-License-Identifier: Apache-2.0
"""L3. Warm start of a Student-t base: its tails and the head's Gaussian are fitted before the layers between them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pyro_flows.flows import Flow
from pyro_flows.guides.log_joint import LogJoint

__all__ = ["fit_tails"]

NUM_STEPS, NUM_DRAWS, RATE = 200, 64, 0.03
# Draws by which the result is compared with the start.
SCORE_DRAWS = 512


@torch.enable_grad()
def fit_tails(log_joint: LogJoint, flow: Flow) -> None:
    """Train base and head alone, in place, on path gradients; undone where the ELBO does not rise.

    A spline that starts together with the tails bends its box into a likeness of them, which leaves little to gain, and
    the true ones outside of the box to chance.

    Args:
        log_joint: The target.
        flow: The flow, at a warm start.
    """
    parts = (flow.base, flow.head)
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    was = _elbo(log_joint, flow)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, NUM_STEPS)
    for _ in range(NUM_STEPS):
        loss = -_terms(log_joint, flow, NUM_DRAWS).mean()
        if loss.isfinite():
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.grad = None
    if not _elbo(log_joint, flow) > was:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)


def _terms(log_joint: LogJoint, flow: Flow, count: int) -> Tensor:
    """Log weights of so many draws, ``(count,)``, with path gradients."""
    distribution = flow()
    draws = distribution.rsample(torch.Size([count]))
    weights: Tensor = log_joint(draws) - distribution.score_parts(draws).entropy_term
    return weights


@torch.no_grad()
def _elbo(log_joint: LogJoint, flow: Flow) -> float:
    distribution = flow()
    draws = distribution.rsample(torch.Size([SCORE_DRAWS]))
    energy = torch.cat([log_joint(part) for part in draws.split(log_joint.chunk)])
    return (energy - distribution.log_prob(draws)).double().mean().item()
