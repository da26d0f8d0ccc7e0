# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts of bases other than the normal: tails are fitted before layers, and weights along with layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_flows.flows import Flow
from pyro_flows.flows.bases import MixtureBase
from pyro_flows.flows.noise import base_score
from pyro_flows.models.log_joint import LogJoint, in_parts

__all__ = ["fit_modes", "fit_tails"]


@dataclass(frozen=True)
class BaseSettings:
    """Settings of the fit of a base, by a few steps of Adam.

    Attributes:
        num_steps: Number of steps.
        num_draws: Draws per step.
        learning_rate: Initial learning rate; it decays to a hundredth of this.
        num_elbo_draws: Draws by which the ELBO after the fit is compared with that before it.
        negligible_gap: Half the variance of log weights is the gap, where they are nearly constant; below this many
            nats there is nothing left to gain.
    """

    num_steps: int = 200
    num_draws: int = 64
    learning_rate: float = 0.03
    num_elbo_draws: int = 512
    negligible_gap: float = 1e-3


SETTINGS = BaseSettings()

# The ELBO of a flow, from a given number of draws, with gradients.
Estimate = Callable[[LogJoint, Flow, int], Tensor]


def fit_tails(log_joint: LogJoint, flow: Flow) -> None:
    """Train only a Student-t base and the head, in place, on path gradients; undone unless the ELBO increases.

    A spline that is trained along with the tails imitates them inside of its box. That leaves little to gain for the
    base, and the tails outside of the box undetermined.

    Args:
        log_joint: The target.
        flow: The flow, at a warm start.
    """
    _train(log_joint, flow, [flow.base, flow.head], _by_draws)


def fit_modes(log_joint: LogJoint, flow: Flow) -> None:
    r"""Train a flow with a mixture base, in place, stratified by component; undone unless the ELBO increases.

    With :math:`f = \log p - \log q`, the ELBO is :math:`\sum_k w_k E_k f`, estimated from equally many draws of each
    component. Weights then have a useful gradient even where modes are well separated, unlike with draws of the
    mixture. Locations, scales and layers have path gradients.

    Args:
        log_joint: The target.
        flow: The flow, at a warm start.
    """
    _train(log_joint, flow, [flow], _by_components)


@torch.enable_grad()
def _train(log_joint: LogJoint, flow: Flow, parts: list[nn.Module], estimate: Estimate) -> None:
    was, variance = _elbo(log_joint, flow)
    if variance / 2 < SETTINGS.negligible_gap:
        return
    before = copy.deepcopy(flow.state_dict())
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=SETTINGS.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, SETTINGS.num_steps)
    for _ in range(SETTINGS.num_steps):
        loss = -estimate(log_joint, flow, SETTINGS.num_draws)
        if loss.isfinite():
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.grad = None
    if not _elbo(log_joint, flow)[0] > was:
        flow.load_state_dict(before)


def _by_draws(log_joint: LogJoint, flow: Flow, count: int) -> Tensor:
    """The ELBO from ``count`` draws, with path gradients."""
    distribution = flow()
    draws = distribution.rsample(torch.Size([count]))
    return (log_joint(draws) - distribution.score_parts(draws).entropy_term).mean()


def _by_components(log_joint: LogJoint, flow: Flow, count: int) -> Tensor:
    """The ELBO from ``count`` draws in total, equally many of each component."""
    base = flow.base
    assert isinstance(base, MixtureBase)
    size = len(base.locs)
    noise = torch.randn(count // size + 1, *base.locs.shape, dtype=base.locs.dtype, device=base.locs.device)
    eps = (base.locs + base.log_scales.exp() * noise).flatten(0, 1)  # (draws * K, D)
    base_dist = flow.base_dist
    draws, ladj, score = flow.transform.forward_with_score(eps, base_score(base_dist, eps))
    energy = log_joint(draws)
    path = energy - (draws * score).sum(-1)
    value = (energy - base_dist.log_prob(eps) + ladj).detach()
    weights = base.logits.softmax(-1)
    path, value = (term.reshape(-1, size).mean(0) for term in (path - path.detach(), value))  # (K,)
    return weights.detach() @ path + weights @ value


@torch.no_grad()
def _elbo(log_joint: LogJoint, flow: Flow) -> tuple[float, float]:
    """Mean and variance of log weights."""
    distribution = flow()
    draws = distribution.rsample(torch.Size([SETTINGS.num_elbo_draws]))
    energy = in_parts(log_joint, draws)
    weights = (energy - distribution.log_prob(draws)).double()
    return weights.mean().item(), weights.var().item()
