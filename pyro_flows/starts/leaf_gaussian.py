# SPDX-License-Identifier: Apache-2.0
"""L4. Gaussians of a posterior with leaves, coordinates that are independent of each other given the others: Newton's
method at a cost that is linear in their number."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.models.log_joint import Target
from pyro_flows.starts.ascents import ASCENTS, climb, distinct_points
from pyro_flows.starts.fixed_draws import antithetic, scored
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian, mean_field, triangular
from pyro_flows.starts.lbfgs import LBFGS, hessian_rows, value_and_gradient

__all__ = ["LEAF_GAUSSIAN", "LeafGaussian", "best_leaf_gaussian", "diagonal"]


@dataclass(frozen=True)
class LeafGaussianSettings:
    """Settings of the search for a Gaussian.

    Attributes:
        num_paths: Number of ascents, of highest density, whose points are candidates.
        num_hessian_draws: Draws over which a Hessian is averaged, even: a pass for each of the other latents, each.
        num_gradient_draws: Draws over which a gradient is averaged, even.
        num_newton_steps: Largest number of Newton steps on an ELBO.
        num_recenterings: Number of steps of the location alone after each.
        poor_gap: Half the variance of log weights, in nats, above which a Gaussian from ascents is a poor one.
        newton_gain: Gain in nats below which the iteration stops, a few standard errors of an ELBO's estimate.
    """

    num_paths: int = 2
    num_hessian_draws: int = 4
    num_gradient_draws: int = 64
    num_newton_steps: int = 60
    num_recenterings: int = 3
    poor_gap: float = 5.0
    newton_gain: float = 0.1


LEAF_GAUSSIAN = LeafGaussianSettings()


class Precision(NamedTuple):
    """A precision matrix that is diagonal among the leaves: that of the F others, ``(F, F)``, ``(P, F)`` and that of
    the P leaves, ``(P,)``."""

    free: Tensor
    mixed: Tensor
    leaves: Tensor


@dataclass(frozen=True, eq=False)
class LeafGaussian:
    """A Gaussian :math:`y_f = m_f + L x_f`, :math:`y_l = m_l + S x_f + s x_l` in unconstrained space, in float64.

    Attributes:
        loc: ``m``, ``(D,)``.
        factor: ``L``, lower triangular with a positive diagonal, ``(F, F)``.
        slope: ``S``, ``(P, F)``.
        scale: ``s``, ``(P,)``.
        elbo: Estimate of its ELBO.
        log_weight_variance: Variance of its log weights.
    """

    loc: Tensor
    factor: Tensor
    slope: Tensor
    scale: Tensor
    elbo: float = -math.inf
    log_weight_variance: float = math.inf

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of :meth:`push`."""
        return self.factor.diagonal().log().sum() + self.scale.log().sum()

    @property
    def conditional_scale(self) -> Tensor:
        """Standard deviation of each coordinate given all others, ``(D,)``."""
        followed = self.slope / self.scale.unsqueeze(-1)
        root = torch.linalg.solve_triangular(
            self.factor, torch.cat([torch.eye(len(self.factor)).to(self.factor), followed]), upper=False, left=False
        )
        return torch.cat([root.square().sum(0).rsqrt(), self.scale])

    def push(self, noise: Tensor) -> Tensor:
        """Map standard normal noise, ``(S, D)``, to draws of its dtype."""
        return (self.loc + self.stretch(noise.double())).to(noise.dtype)

    def stretch(self, noise: Tensor) -> Tensor:
        """Map noise, ``(..., D)``, to differences from the location."""
        free, own = noise.split([len(self.factor), len(self.scale)], -1)
        return torch.cat([free @ self.factor.mT, free @ self.slope.mT + self.scale * own], -1)

    def pull_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient, ``(D,)``, in the coordinates of the noise."""
        free, own = gradient.split([len(self.factor), len(self.scale)], -1)
        return torch.cat([self.factor.mT @ free + self.slope.mT @ own, self.scale * own], -1)

    def pull(self, precision: Precision) -> Precision:
        """A precision in the coordinates of the noise."""
        carried = precision.mixed @ self.factor
        across = self.slope.mT @ carried
        free = self.factor.mT @ precision.free @ self.factor + across + across.mT
        free = free + self.slope.mT @ (precision.leaves.unsqueeze(-1) * self.slope)
        mixed = self.scale.unsqueeze(-1) * (carried + precision.leaves.unsqueeze(-1) * self.slope)
        return Precision(free, mixed, self.scale.square() * precision.leaves)

    def after(self, inner: LeafGaussian) -> LeafGaussian:
        """The Gaussian whose noise is drawn from another one."""
        slope = self.slope @ inner.factor + self.scale.unsqueeze(-1) * inner.slope
        loc = self.loc + self.stretch(inner.loc)
        return LeafGaussian(loc, self.factor @ inner.factor, slope, self.scale * inner.scale)


def diagonal(gaussian: Gaussian, num_leaves: int) -> LeafGaussian:
    """A mean-field normal."""
    scale = gaussian.factor.double()
    free = len(scale) - num_leaves
    return LeafGaussian(gaussian.loc.double(), scale[:free].diag(), scale.new_zeros(num_leaves, free), scale[free:])


@torch.no_grad()
def best_leaf_gaussian(target: Target, begins: Tensor, own: LeafGaussian, *, has_funnel: bool = False) -> LeafGaussian:
    """The best of a given Gaussian and those with the curvature along paths of ascent, refined by Newton's method.

    Args:
        target: The target.
        begins: Where ascents begin, ``(R, D)``.
        own: The given Gaussian.
        has_funnel: Whether ascents may end where a scale of the leaves is zero, and a Gaussian is locally the best.

    References:
        Opper, Archambeau. The variational Gaussian approximation revisited. Neural Computation 2009, eq. (13)-(14);
        Khan, Rue. The Bayesian learning rule. JMLR 2023. arXiv:2107.04562, for steps in natural parameters.
    """
    like, num_leaves = begins[0], len(own.scale)
    paths = climb(target, begins, ASCENTS.patience)
    highest = target(paths[-1]).nan_to_num(-math.inf).argsort(descending=True)[: LEAF_GAUSSIAN.num_paths]
    found = [own]
    for point in distinct_points(torch.cat([points[highest] for points in paths])):
        found += _at(target, point, num_leaves)
    found = scored(target, found, GAUSSIAN.num_ranking_draws, like)
    best, is_done = _refined(target, max(found, key=_elbo), like)
    if has_funnel or not (is_done and best.log_weight_variance / 2 < LEAF_GAUSSIAN.poor_gap):
        # A mean-field normal that is fitted from the outside is not caught in a funnel, unlike ascents.
        begin = Gaussian(own.loc.to(like), torch.cat([own.factor.diagonal(), own.scale]).to(like))
        fitted = mean_field(target, begin)
        if fitted is not None:
            around = [diagonal(fitted, num_leaves), *_at(target, fitted.loc, num_leaves)]
            found = scored(target, around, GAUSSIAN.num_ranking_draws, like)
            best = max(best, _refined(target, max(found, key=_elbo), like)[0], key=_elbo)
    return best


def _at(target: Target, point: Tensor, num_leaves: int) -> list[LeafGaussian]:
    """The Gaussian with the curvature at a point, ``(D,)``; none where the target has no second derivatives."""
    derivatives = _derivatives(target, point.unsqueeze(0), num_leaves)
    if derivatives is None:
        return []
    return [replace(_of_precision(derivatives[1], LBFGS.min_curvature, math.inf), loc=point.double())]


def _refined(target: Target, begin: LeafGaussian, like: Tensor) -> tuple[LeafGaussian, bool]:
    """Newton's method for the ELBO of a Gaussian, continued while it increases; and whether it came to an end. Where
    draws are run one by one, that is too expensive."""
    num_leaves, best, is_done = len(begin.scale), begin, False
    for _ in range(LEAF_GAUSSIAN.num_newton_steps if target.is_vectorized else 0):
        tried = _newton(target, best, antithetic(LEAF_GAUSSIAN.num_hessian_draws, like), num_leaves)
        # With common noise, differences are precise by few draws.
        found = scored(target, [best, *tried], GAUSSIAN.num_ranking_draws, like)
        was, best = found[0].elbo, max(found, key=_elbo)
        is_done = not best.elbo > was + LEAF_GAUSSIAN.newton_gain
        if is_done:
            break
    (best,) = scored(target, [best], GAUSSIAN.num_elbo_draws, like)
    return best, is_done


def _elbo(gaussian: LeafGaussian) -> float:
    return gaussian.elbo


def _newton(log_joint: Target, begin: LeafGaussian, noise: Tensor, num_leaves: int) -> list[LeafGaussian]:
    """Gaussians after fractions of a natural-gradient step on the ELBO, which is Newton's at its full length; none if
    the target has no derivatives there.

    Natural parameters move in a straight line: to the precision that is minus the mean Hessian.
    """
    derivatives = _derivatives(log_joint, begin.push(noise), num_leaves)
    if derivatives is None:
        return []
    slope, wanted = begin.pull_gradient(derivatives[0]), begin.pull(derivatives[1])
    free = len(begin.factor)
    unit = Precision(torch.eye(free).to(slope), torch.zeros_like(wanted.mixed), torch.ones_like(wanted.leaves))
    tried = []
    for share in GAUSSIAN.newton_shares:
        mixed = Precision(*(torch.lerp(was, now, share) for was, now in zip(unit, wanted, strict=True)))
        inner = _of_precision(mixed, 1.0 / GAUSSIAN.newton_trust, GAUSSIAN.newton_trust)
        step = inner.stretch(inner.pull_gradient(share * slope))
        step = step * (share * math.sqrt(len(step)) / step.norm()).clamp_max(1.0)
        moved = begin.after(LeafGaussian(step, inner.factor, inner.slope, inner.scale))
        tried += [moved, _recentered(log_joint, moved, noise[0])]
    return tried


def _recentered(log_joint: Target, gaussian: LeafGaussian, like: Tensor) -> LeafGaussian:
    """The Gaussian with its location where the mean gradient is zero, by steps that take no Hessian: the location
    depends on the covariance, with which a Newton step moves it together."""
    noise = antithetic(LEAF_GAUSSIAN.num_gradient_draws, like)
    for _ in range(LEAF_GAUSSIAN.num_recenterings):
        gradient = value_and_gradient(log_joint, gaussian.push(noise))[1]
        step = gaussian.pull_gradient(gradient.double().mean(0))
        step = step * (math.sqrt(len(step)) / step.norm()).clamp_max(1.0)
        gaussian = replace(gaussian, loc=gaussian.loc + gaussian.stretch(step))
    return gaussian


def _of_precision(precision: Precision, least: float, most: float) -> LeafGaussian:
    """The Gaussian about zero of a precision, whose eigenvalues are made positive and bounded: those of the leaves, and
    those of the others' marginal."""
    leaves = precision.leaves.abs().clamp(least, most)
    pull = precision.mixed / leaves.unsqueeze(-1)
    curvature, vectors = torch.linalg.eigh(precision.free - precision.mixed.mT @ pull)
    root = vectors / curvature.abs().clamp(least, most).sqrt()
    factor = triangular(root)
    return LeafGaussian(torch.zeros(len(factor) + len(leaves)).to(leaves), factor, -pull @ factor, leaves.rsqrt())


def _derivatives(log_joint: Target, draws: Tensor, num_leaves: int) -> tuple[Tensor, Precision] | None:
    """Gradient, and minus the Hessian, averaged over draws; None if there are none that are finite."""
    free = draws.shape[-1] - num_leaves
    found = []
    for draw in draws.split(1):  # a batch would take more memory, and no less time
        try:
            found.append(hessian_rows(log_joint, draw, num_leaves, log_joint.chunk))
        except RuntimeError:
            return None
    gradient, rows, leaves = (torch.cat(parts) for parts in zip(*found, strict=True))
    usable = gradient.isfinite().all(-1) & rows.isfinite().flatten(1).all(-1) & leaves.isfinite().all(-1)
    if not usable.any():
        return None
    mean = -rows[usable].mean(0)
    square = 0.5 * (mean[:, :free] + mean[:, :free].mT)
    return gradient[usable].mean(0), Precision(square, mean[:, free:].mT, -leaves[usable].mean(0))
