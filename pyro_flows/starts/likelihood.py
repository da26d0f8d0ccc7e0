# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts of heads that know priors: the likelihood factor, from derivatives of the log joint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts.fixed_draws import antithetic
from pyro_flows.starts.gaussian import GAUSSIAN
from pyro_flows.starts.lbfgs import gradient_and_hessian
from pyro_flows.transforms import FullPrecisionHead, Head, LinearMixedHead

__all__ = ["LIKELIHOOD", "affordable_draws", "draws_given", "fit_likelihood", "fit_skew", "seen_coordinates"]


@dataclass(frozen=True)
class LikelihoodSettings:
    """Settings of likelihood factors that are derived from the log joint.

    Attributes:
        precision_step: Step of finite differences of the likelihood's precision in the other coordinates, in units of
            their scales.
        num_draws: Number of draws over which derivatives are averaged.
        min_share: Smallest precision of a likelihood factor, relative to the prior's.
        max_correlation: Largest correlation, in absolute value, of coordinates that the likelihood does not correlate.
        min_gain_of_skew: Gain in nats below which a likelihood factor is not skewed, since steps take longer then.
    """

    precision_step: float = 0.3
    num_draws: int = 32
    min_share: float = 1e-4
    max_correlation: float = 0.01
    min_gain_of_skew: float = 0.01


LIKELIHOOD = LikelihoodSettings()


@torch.no_grad()
def fit_likelihood(
    log_joint: LogJoint, head: LinearMixedHead, center: Tensor, scale: Tensor, seen: Tensor, *, by_draws: bool = False
) -> bool:
    """Set a head's likelihood factor to a local approximation of the likelihood, from second derivatives at a point.

    The approximation is exact if the likelihood is Gaussian in the coordinates with known priors, with a precision that
    another latent scales. With averages over the head's draws, it tends to the factor that maximizes the ELBO (Opper,
    Archambeau. The variational Gaussian approximation revisited. Neural Computation 2009, eq. (13)-(14)).

    Args:
        log_joint: The target.
        head: The head; the location of its other coordinates is set to the point.
        center: The point, ``(D,)``.
        scale: Scales of the other coordinates, ``(D,)``.
        seen: On which other coordinates the likelihood may depend, by :func:`seen_coordinates`.
        by_draws: Whether to average derivatives over draws of the head given the other coordinates, instead of those at
            the point.

    Returns:
        Whether the factor was set: the target must have finite second derivatives at the point.
    """
    free, pooled = head.order.tensor_split([head.count_free])
    moved, step = free[seen], LIKELIHOOD.precision_step * scale[free[seen]]
    shifts = torch.zeros(2 * len(moved), len(center), dtype=center.dtype, device=center.device)
    shifts[:, moved] = torch.cat([step.diag(), -step.diag()])
    around = draws_given(head, center, free, affordable_draws(log_joint, center)) if by_draws else center.unsqueeze(0)
    count = len(around)
    points = torch.cat([around, center + shifts])

    derivatives = _likelihood_derivatives(log_joint, head, points)
    if derivatives is None:
        return False
    gradients, hessians = derivatives
    gradient, hessian = gradients[:count].mean(0), hessians[:count].mean(0)
    _, log_scale = head.full_prior(center[free])
    unit = log_scale.double().exp()
    own = -hessian[pooled][:, pooled] * unit.unsqueeze(-1) * unit
    curvature, vectors = torch.linalg.eigh(0.5 * (own + own.mT))
    scaled = (vectors * curvature.clamp_min(LIKELIHOOD.min_share)) @ vectors.mT
    precision = scaled / unit.unsqueeze(-1) / unit
    curvatures = -hessians[count:].diagonal(dim1=-2, dim2=-1)[:, pooled] * unit.square()
    above, below = curvatures.sum(-1).clamp_min(LIKELIHOOD.min_share * len(pooled)).log().chunk(2)
    factor = torch.linalg.cholesky(precision)
    away = torch.cholesky_solve(gradient[pooled].unsqueeze(-1), factor).squeeze(-1)
    log_precision_slope = hessian.new_zeros(len(free))
    log_precision_slope[seen] = (below - above) / (4.0 * step.double())
    # The gradient is K (b - z): it changes with the other coordinates by b, and by K where b is not z.
    slope = torch.cholesky_solve(hessian[pooled][:, free], factor) + 2.0 * torch.outer(away, log_precision_slope)
    like = center
    head.set_likelihood(
        (center[free], scale[free]),
        around.mean(0)[pooled] + away.to(like),
        precision,
        slope.to(like),
        log_precision_slope.to(like),
    )
    return True


@torch.no_grad()
def fit_skew(log_joint: LogJoint, head: FullPrecisionHead, center: Tensor) -> bool:
    """Skew a head's likelihood factor as the likelihood is: third derivatives are differences of second ones.

    Args:
        log_joint: The target.
        head: The head, with a likelihood factor.
        center: A point, at which the coordinates without known priors are taken, ``(D,)``.

    Returns:
        Whether the factor was skewed: the likelihood must factorize over the coordinates with known priors, and have
        finite derivatives there.
    """
    factor = head.own_factor
    if (factor - factor.diagonal().diag()).abs().max() > LIKELIHOOD.max_correlation:
        return False
    free, pooled = head.order.tensor_split([head.count_free])
    drawn = draws_given(head, center, free, LIKELIHOOD.num_draws)[:, pooled]
    mean, sd = drawn.mean(0), drawn.std(0)
    derivatives = _likelihood_derivatives(
        log_joint, head, center.expand(2, -1).index_copy(1, pooled, torch.stack([mean + sd, mean - sd]))
    )
    if derivatives is None:
        return False
    above, below = derivatives[1].diagonal(dim1=-2, dim2=-1)[:, pooled].to(center)
    unit = head.gaussian()[1][pooled]
    head.set_skew(center[free], unit.pow(3) * (above - below) / (6.0 * sd))
    return True


def _likelihood_derivatives(log_joint: LogJoint, head: LinearMixedHead, points: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gradients and Hessians of the log likelihood, ``(S, D)`` and ``(S, D, D)``; None if they are not finite."""
    left_out = {name for name, where in log_joint.table.slices.items() if where in head.own_densities}

    def likelihood(z: Tensor) -> Tensor:
        z = z.squeeze(1)
        return (log_joint.without(left_out, z).double() - head.log_prior(z)).unsqueeze(1)

    try:
        parts = [
            gradient_and_hessian(likelihood, part.unsqueeze(1), most=log_joint.chunk)
            for part in points.split(log_joint.chunk)
        ]
    except RuntimeError:
        return None
    gradients, hessians = (torch.cat(part).squeeze(1) for part in zip(*parts, strict=True))
    return (gradients, hessians) if gradients.isfinite().all() and hessians.isfinite().all() else None


def affordable_draws(log_joint: LogJoint, center: Tensor) -> int:
    """Number of draws over which derivatives are averaged, of ``num_draws``, by what Hessians cost."""
    return log_joint.affordable(LIKELIHOOD.num_draws, GAUSSIAN.gradients_per_row * len(center))


def seen_coordinates(log_joint: LogJoint, head: LinearMixedHead, point: Tensor) -> Tensor:
    """Whether the likelihood of the coordinates with known priors may depend on each of a head's other ones,
    ``(head.count_free,)``; by a run of the model at a point, ``(D,)``."""
    free, pooled = head.order.tensor_split([head.count_free])
    slices = log_joint.table.slices.items()
    index = torch.arange(len(point), device=point.device)
    sites = {name for name, where in slices if torch.isin(index[where], pooled).all()}
    if sum(len(index[where]) for name, where in slices if name in sites) < len(pooled):
        return torch.ones_like(free, dtype=torch.bool)  # the density of a site is not its pooled coordinates' alone
    partners = log_joint.partners(sites, point)
    seen = [index[where] for name, where in slices if name in partners]
    return torch.isin(free, torch.cat(seen)) if seen else torch.zeros_like(free, dtype=torch.bool)


def draws_given(head: Head, center: Tensor, free: Tensor, count: int) -> Tensor:
    """Draws of the head, ``(count, D)``, with the other coordinates at a point."""
    loc, scale = head.gaussian()
    noise = antithetic(count, center)
    noise[:, free] = ((center - loc) / scale)[free]
    drawn, _ = head.forward_and_ladj(noise)
    return drawn
