# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts of heads that know predictors: their likelihood factors, from derivatives of what follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.models.linear_predictors import RecordedLikelihood
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts.likelihood import LIKELIHOOD, affordable_draws, draws_given
from pyro_flows.transforms import LinearPredictorHead

__all__ = ["fit_factors", "skew_factors"]


@torch.no_grad()
def fit_factors(
    log_joint: LogJoint,
    head: LinearPredictorHead,
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
    offset, slope = head.predictor.read(center)
    count = affordable_draws(log_joint, center)
    around = draws_given(head, center, free, count) if by_draws else center.unsqueeze(0)
    values = offset + around[:, own] @ slope.mT
    least = LIKELIHOOD.min_share / slope.square().sum(-1).clamp_min(torch.finfo(slope.dtype).tiny)

    def factors_at(point: Tensor) -> Tensor:
        """Locations and log-scales, ``(2, K)``, with the other coordinates at a point and the same predictors."""
        gradient, curvature = (part.mean(0) for part in _derivatives(likelihood, point, values))
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
def skew_factors(head: LinearPredictorHead, likelihood: RecordedLikelihood, center: Tensor) -> bool:
    """Skew a head's likelihood factors as the likelihood is: third derivatives are differences of second ones.

    Args:
        head: The head, with likelihood factors.
        likelihood: What follows the predictors.
        center: A point, at which the other coordinates are taken, ``(D,)``.

    Returns:
        Whether they were skewed: the likelihood must have finite derivatives there.
    """
    free, own = head.order.tensor_split([head.count_free])
    offset, slope = head.predictor.read(center)
    values = offset + draws_given(head, center, free, LIKELIHOOD.num_draws)[:, own] @ slope.mT
    mean, sd = values.mean(0), values.std(0)
    above, below = _derivatives(likelihood, center, torch.stack([mean + sd, mean - sd]))[1]
    skew = (3.0 * head.factor_origin[1]).exp() * (above - below) / (6.0 * sd)
    if not skew.isfinite().all():
        return False
    head.set_skew(center[free], skew)
    return True


@torch.enable_grad()
def _derivatives(likelihood: RecordedLikelihood, point: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives of the log likelihood in each predictor at their values, ``(S, K)``, with the other
    coordinates at a point; the second exact where it is a sum over predictors, and else without a bias."""
    values = values.detach().requires_grad_()
    signs = torch.randint_like(values, 2) * 2.0 - 1.0
    log_density = likelihood(point.expand(len(values), -1), values).sum()
    (gradient,) = torch.autograd.grad(log_density, values, create_graph=True)
    (product,) = torch.autograd.grad((gradient * signs).sum(), values)
    return gradient.detach(), product * signs
