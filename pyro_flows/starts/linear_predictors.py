# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts of heads that know predictors: their likelihood factors, from derivatives of what follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.models.log_joint import LogJoint
from pyro_flows.models.recorded_run import RecordedLikelihood
from pyro_flows.starts.likelihood import LIKELIHOOD, affordable_draws, draws_given
from pyro_flows.transforms import ChainHead, LinearPredictorHead

__all__ = ["derivatives", "fit_factors", "skew_factors"]

PredictorHead = LinearPredictorHead | ChainHead


@torch.no_grad()
def fit_factors(
    log_joint: LogJoint,
    head: PredictorHead,
    likelihood: RecordedLikelihood,
    center: Tensor,
    scale: Tensor,
    *,
    by_draws: bool = False,
) -> bool:
    """Set a head's likelihood factors to local approximations of the likelihood, at a point or averaged over draws, as
    :func:`~pyro_flows.starts.likelihood.fit_likelihood` does for coordinates.

    Args:
        log_joint: The target.
        head: The head; the location of its other coordinates is set to the point.
        likelihood: What follows the predictors.
        center: The point, ``(D,)``.
        scale: Scales of the other coordinates, ``(D,)``.
        by_draws: Whether to average derivatives over draws of the head given the other coordinates.

    Returns:
        Whether the factors were set: the likelihood must have finite derivatives there.
    """
    free, own = head.order.tensor_split([head.count_free])
    count = affordable_draws(log_joint, center)
    around = draws_given(head, center, free, count) if by_draws else center.unsqueeze(0)
    values = head.predictors(center, around[:, own])
    least = LIKELIHOOD.min_share / head.prior_variances(center).clamp_min(torch.finfo(values.dtype).tiny)

    def factors_at(point: Tensor) -> Tensor:
        """Locations and log-scales, ``(2, K)``, with the other coordinates at a point and the same predictors."""
        _, *parts = derivatives(likelihood, point.expand(len(values), -1), values)
        gradient, curvature = (part.mean(0) for part in parts)
        precision = torch.maximum(-curvature, least)
        return torch.stack([values.mean(0) + gradient / precision, -0.5 * precision.log()])

    step = LIKELIHOOD.precision_step * scale[free]
    moves = torch.zeros(len(free), len(center), dtype=center.dtype, device=center.device)
    moves[:, free] = step.diag()
    factors = factors_at(center)
    try:
        slopes = [(factors_at(center + move) - factors_at(center - move)) / (2.0 * move.sum()) for move in moves]
    except RuntimeError:  # operations without second derivatives
        return False
    slope_of_factors = torch.stack(slopes, -1)
    if not (factors.isfinite().all() and slope_of_factors.isfinite().all()):
        return False
    head.set_factors((center[free], scale[free]), factors, slope_of_factors)
    return True


@torch.no_grad()
def skew_factors(head: PredictorHead, likelihood: RecordedLikelihood, center: Tensor) -> bool:
    """Skew a head's likelihood factors as the likelihood is: third derivatives are differences of second ones.

    Args:
        head: The head, with likelihood factors.
        likelihood: What follows the predictors.
        center: A point, at which the other coordinates are taken, ``(D,)``.

    Returns:
        Whether they were skewed: the likelihood must have finite derivatives there.
    """
    free, own = head.order.tensor_split([head.count_free])
    values = head.predictors(center, draws_given(head, center, free, LIKELIHOOD.num_draws)[:, own])
    mean, sd = values.mean(0), values.std(0)
    above, below = derivatives(likelihood, center.expand(2, -1), torch.stack([mean + sd, mean - sd]))[2]
    skew = (3.0 * head.factor_origin[1]).exp() * (above - below) / (6.0 * sd)
    if not skew.isfinite().all():
        return False
    head.set_skew(center[free], skew)
    return True


def derivatives(likelihood: RecordedLikelihood, points: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log likelihood, ``(S,)``, and its first and second derivatives in each predictor, ``(S, K)``, at points,
    ``(S, D)``, and values of the predictors, ``(S, K)``; the second exact where it is a sum over predictors, and else
    without a bias. Differentiable where gradients are enabled."""
    is_differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if not values.requires_grad:
            values = values.detach().requires_grad_()
        signs = torch.randint_like(values, 2) * 2.0 - 1.0
        value = likelihood(points, values)
        (gradient,) = torch.autograd.grad(value.sum(), values, create_graph=True)
        total = (gradient * signs).sum() + 0.0 * values.sum()  # of a linear one, there is no second derivative
        (product,) = torch.autograd.grad(total, values, create_graph=is_differentiable)
    found = value, gradient, product * signs
    return found if is_differentiable else (value.detach(), gradient.detach(), found[2].detach())
