# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts of heads that know priors: the likelihood factor, from derivatives of the log joint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts.lbfgs import gradient_and_hessian
from pyro_flows.transforms import LinearMixedHead

__all__ = ["fit_likelihood"]


@dataclass(frozen=True)
class LikelihoodSettings:
    """Settings of likelihood factors that are derived from the log joint.

    Attributes:
        precision_step: Step of finite differences of the likelihood's precision in the other coordinates, in units of
            their scales.
        min_share: Smallest precision of a likelihood factor, relative to the prior's.
    """

    precision_step: float = 0.3
    min_share: float = 1e-4


SETTINGS = LikelihoodSettings()


@torch.no_grad()
def fit_likelihood(log_joint: LogJoint, head: LinearMixedHead, center: Tensor, scale: Tensor) -> bool:
    """Set a head's likelihood factor to a local approximation of the likelihood, from second derivatives at a point.

    The approximation is exact if the likelihood is Gaussian in the coordinates with known priors, with a precision that
    another latent scales.

    Args:
        log_joint: The target.
        head: The head; the location of its other coordinates is set to the point.
        center: The point, ``(D,)``.
        scale: Scales of the other coordinates, ``(D,)``.

    Returns:
        Whether the factor was set: the target must have finite second derivatives at the point.
    """
    free, pooled = head.order.tensor_split([head.count_free])
    step = SETTINGS.precision_step * scale[free]
    shifts = torch.zeros(2 * len(free) + 1, len(center), dtype=center.dtype, device=center.device)
    shifts[1:, free] = torch.cat([step.diag(), -step.diag()])
    points = center + shifts

    def likelihood(z: Tensor) -> Tensor:
        z = z.squeeze(1)
        return (log_joint(z).double() - head.log_prior(z)).unsqueeze(1)

    try:
        gradient, hessian = (part.squeeze(1) for part in gradient_and_hessian(likelihood, points.unsqueeze(1)))
    except RuntimeError:
        return False
    if not (gradient.isfinite().all() and hessian.isfinite().all()):
        return False
    _, log_scale = head.prior(center[free])
    unit = log_scale.double().exp()
    precisions = -hessian[:, pooled][:, :, pooled] * unit.unsqueeze(-1) * unit
    curvature, vectors = torch.linalg.eigh(0.5 * (precisions[0] + precisions[0].mT))
    scaled = (vectors * curvature.clamp_min(SETTINGS.min_share)) @ vectors.mT
    precision = scaled / unit.unsqueeze(-1) / unit
    trace = precisions.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(SETTINGS.min_share * len(pooled))
    above, below = trace[1:].log().chunk(2)
    factor = torch.linalg.cholesky(precision)
    away = torch.cholesky_solve(gradient[0, pooled].unsqueeze(-1), factor).squeeze(-1)
    log_precision_slope = (below - above) / (4.0 * step.double())
    # The gradient is K (b - z): it changes with the other coordinates by b, and by K where b is not z.
    slope = torch.cholesky_solve(hessian[0][pooled][:, free], factor) + 2.0 * torch.outer(away, log_precision_slope)
    like = center
    head.set_likelihood(
        (center[free], scale[free]),
        center[pooled] + away.to(like),
        precision,
        slope.to(like),
        log_precision_slope.to(like),
    )
    return True
