# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts: of many cheap Gaussian candidates, the one with the highest ELBO initializes the guide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.models.log_joint import LogJoint, Target, in_parts
from pyro_flows.starts.ascents import ascents, batched, distinct_points
from pyro_flows.starts.differences import mean_derivatives
from pyro_flows.starts.fixed_draws import FIXED_DRAWS, antithetic, fit_on_fixed_draws, scored
from pyro_flows.starts.lbfgs import LBFGS, gradient_and_hessian, local_factor

__all__ = [
    "GAUSSIAN",
    "Gaussian",
    "best_gaussian",
    "local_gaussians",
    "mean_field",
    "refined",
    "triangular",
]


@dataclass(frozen=True)
class GaussianSettings:
    """Settings of the search for a warm start's Gaussian.

    Attributes:
        isotropic_scales: Standard deviations of isotropic candidates.
        max_hessian_dim: Largest dimension at which Hessians at many points are worth their cost.
        max_newton_dim: Largest dimension at which those of a Newton iteration are.
        num_ranking_draws: Draws by which the better candidates are ranked; a first ranking of all takes a quarter.
        num_elbo_draws: Draws by which the ELBOs of the finalists are compared.
        num_finalists: Number of finalists.
        max_z_score: Standard errors of its ELBO below the best one after which a candidate is dropped.
        expensive: Number of a model's items above which a draw is too expensive for deterministic fits.
        small_gap: Half the variance of log weights, which approximates the gap, in nats, below which there is no
            refinement.
        good_gap: Gap in nats below which no full covariance is fitted.
        max_full_rank_dim: Largest dimension at which a full covariance is fitted.
        num_draws_per_row: Fixed draws of such a fit, per row of the covariance.
        num_newton_steps: Largest number of Newton steps on an ELBO.
        num_newton_draws: Draws over which gradient and Hessian are averaged.
        num_newton_draws_large: The same above ``max_hessian_dim``.
        gradients_per_row: Number of gradients that take as long as a row of a Hessian.
        num_newton_rows: Divided by the dimension, number of further draws where a Hessian is cheap.
        newton_shares: Fractions of each step that are tried.
        newton_gain: Gain in nats below which the iteration stops.
        newton_trust: Largest factor by which a step may change a variance.
        difference: Step of differences of gradients in a head's noise space, where a target is about one wide.
    """

    isotropic_scales: tuple[float, ...] = (0.1, 0.5)
    max_hessian_dim: int = 200
    max_newton_dim: int = 2000
    num_ranking_draws: int = 32
    num_elbo_draws: int = 128
    num_finalists: int = 12
    max_z_score: float = 4.0
    expensive: int = 2000
    small_gap: float = 0.05
    good_gap: float = 0.5
    max_full_rank_dim: int = 64
    num_draws_per_row: int = 16
    num_newton_steps: int = 8
    num_newton_draws: int = 64
    num_newton_draws_large: int = 16
    gradients_per_row: int = 8
    num_newton_rows: int = 2048
    newton_shares: tuple[float, ...] = (1.0, 0.3)
    newton_gain: float = 0.02
    newton_trust: float = 10.0
    difference: float = 0.01


GAUSSIAN = GaussianSettings()


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A candidate :math:`N(m, L L^T)` in unconstrained space.

    Attributes:
        loc: ``m``, ``(D,)``.
        factor: ``L``, lower triangular with a positive diagonal, ``(D, D)``; or only its diagonal, ``(D,)``.
        elbo: Estimate of its ELBO.
        log_weight_variance: Variance of its log weights.
    """

    loc: Tensor
    factor: Tensor
    elbo: float = -math.inf
    log_weight_variance: float = math.inf

    def push(self, noise: Tensor) -> Tensor:
        """Map standard normal noise, ``(S, D)``, to draws."""
        return self.loc + (noise * self.factor if self.factor.dim() == 1 else noise @ self.factor.mT)

    def distance(self, other: Gaussian) -> float:
        """Distance between the two locations, in standard deviations of this one, whose factor is a matrix."""
        difference = (other.loc - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factor, difference, upper=False).norm().item()

    def standard_error(self, count: int) -> float:
        """That of its ELBO from ``count`` draws, in nats; an upper bound for antithetic ones. Half the dimension is the
        variance of the energy of a normal, whose log weights have none."""
        return math.sqrt((self.log_weight_variance + len(self.loc) / 2) / count)

    @property
    def log_det(self) -> Tensor:
        """``log|det L|``, in float64."""
        return (self.factor if self.factor.dim() == 1 else self.factor.diagonal()).double().log().sum()

    @property
    def marginal_scale(self) -> Tensor:
        """Standard deviation of each coordinate, ``(D,)``."""
        return self.factor if self.factor.dim() == 1 else self.factor.square().sum(-1).sqrt()

    @property
    def conditional_scale(self) -> Tensor:
        """Standard deviation of each coordinate given the others, the scale of the best mean-field normal."""
        if self.factor.dim() == 1:
            return self.factor
        return torch.cholesky_inverse(self.factor.double()).diagonal().rsqrt().to(self.factor)


@torch.no_grad()
def best_gaussian(
    log_joint: LogJoint, init_loc: Tensor, init_scale: float, *, correlated: bool, paths: list[Tensor] | None = None
) -> Gaussian:
    r"""The best of many Gaussians by ELBO.

    Candidates are, in turn:

    - the guide's own initialization, :math:`N(z_0, s^2 I)`;
    - Gaussians with the local Hessian, and isotropic ones, along paths of ascent of the log joint from there, from
      around it and from draws of the prior: the mode of a centered hierarchy is at a scale of zero, where a Laplace
      approximation fails, but at an early point of the path it is useful. Of several modes, the ELBO prefers the one
      with the most mass;
    - if no local Hessian gives a good Gaussian, the best mean-field normal on fixed draws, and one with the Hessian
      there; above 200 dimensions, where Hessians at many points would take too long, this is the first one;
    - if the best so far has a gap, Newton steps on its ELBO (see ``refined``);
    - if that is poor too, the best normal with a full covariance on fixed draws.

    Args:
        log_joint: The target.
        init_loc: :math:`z_0`, ``(D,)``.
        init_scale: :math:`s`.
        correlated: Whether the guide can represent a correlated Gaussian; if not, all candidates are diagonal.
        paths: Points on the paths, as ``ascents`` gives them; None climbs them.

    Raises:
        RuntimeError: If no candidate has a finite ELBO; names the sites without a density at ``init_loc``.

    References:
        Zhang, Carpenter, Gelman, Vehtari. Pathfinder. JMLR 2022. arXiv:2108.03782, for ELBO-chosen path iterates.
        Giordano, Ingram, Broderick. Black Box Variational Inference with a Deterministic Objective. JMLR 2024.
        arXiv:2304.05527, for mean-field fits on fixed draws.
    """
    own = Gaussian(init_loc, torch.full_like(init_loc, init_scale))
    *looks, ends = map(distinct_points, ascents(log_joint, init_loc) if paths is None else paths)
    best = _best(log_joint, [own, *_around(log_joint, ends, correlated=correlated)])
    for points in looks:
        promising = points[_may_reach(best.elbo, log_joint, points)]
        best = _best(log_joint, [best, *_around(log_joint, promising, correlated=correlated)])
    if best.factor.dim() == 1 and log_joint.cost_per_draw < GAUSSIAN.expensive:
        fitted = [mean_field(log_joint, begin) for begin in (own, best)]
        found = [best, *(gaussian for gaussian in fitted if gaussian is not None)]
        for gaussian in found[1:]:
            found += local_gaussians(log_joint, gaussian.loc.unsqueeze(0), correlated=correlated)
        best = _best(log_joint, found)
    has_gap = not best.log_weight_variance / 2 < GAUSSIAN.small_gap
    affordable = len(init_loc) <= _max_newton_dim(log_joint) and log_joint.cost_per_draw < GAUSSIAN.expensive
    if correlated and has_gap and affordable:
        if len(init_loc) > GAUSSIAN.max_hessian_dim:
            best = _best(log_joint, [best, *_with_curvature(log_joint, best.loc.unsqueeze(0))])
        best = refined(log_joint, best)
    small = len(init_loc) <= GAUSSIAN.max_full_rank_dim and log_joint.cost_per_draw < GAUSSIAN.expensive
    if correlated and small and not best.log_weight_variance / 2 < GAUSSIAN.good_gap:
        full = _full_rank(log_joint, best)
        best = best if full is None else _best(log_joint, [best, full])
    if best.elbo == -math.inf:
        raise RuntimeError(log_joint.without_density(init_loc))
    return best


def _around(log_joint: Target, points: Tensor, *, correlated: bool) -> list[Gaussian]:
    """Isotropic Gaussians at each of the points, ``(R, D)``, and those with the local curvature."""
    scales = [scale * torch.ones_like(point) for point in points[:1] for scale in GAUSSIAN.isotropic_scales]
    isotropic = [Gaussian(point, scale) for point in points for scale in scales]
    return isotropic + local_gaussians(log_joint, points, correlated=correlated)


def _may_reach(elbo: float, log_joint: Target, points: Tensor) -> Tensor:
    """At which points, ``(R, D)``, a Gaussian with the local curvature may have such an ELBO, ``(R,)``.

    With curvatures as in :func:`local_factor`, its entropy is bounded, and for a quadratic its mean energy is at most
    half a nat per dimension above the one at the point: most points on the way up are far too low.
    """
    value = in_parts(log_joint, points)
    entropy = 0.5 * math.log(2 * math.pi * math.e / LBFGS.min_curvature)
    return value + points.shape[-1] * (entropy + 0.5) >= elbo


def local_gaussians(log_joint: Target, points: Tensor, *, correlated: bool) -> list[Gaussian]:
    """Gaussians with the local curvature at each of the points, ``(R, D)``."""
    if len(points) == 0 or points.shape[-1] > GAUSSIAN.max_hessian_dim:
        return []
    gaussians = _with_curvature(log_joint, points)
    return gaussians if correlated else [replace(g, factor=g.conditional_scale) for g in gaussians]


def _max_newton_dim(log_joint: Target) -> int:
    """Largest dimension of a Newton iteration."""
    return GAUSSIAN.max_newton_dim if log_joint.is_vectorized else GAUSSIAN.max_hessian_dim


def _with_curvature(log_joint: Target, points: Tensor) -> list[Gaussian]:
    """Gaussians with the local curvature at each of the points, in any dimension."""
    parts = points.unsqueeze(1).split(log_joint.chunk)
    target, sizes, most = batched(log_joint), log_joint.sizes, log_joint.chunk
    factors = torch.cat([local_factor(target, part, sizes, most) for part in parts]).squeeze(1)
    usable = factors.isfinite().flatten(1).all(-1)
    return [Gaussian(*pair) for pair in zip(points[usable], factors[usable].to(points), strict=True)]


def _best(log_joint: LogJoint, found: list[Gaussian]) -> Gaussian:
    """The candidate with the highest ELBO, by a few draws of each, more of the better ones, and most of the best."""
    for count, keep in (
        (GAUSSIAN.num_ranking_draws // 4, 4 * GAUSSIAN.num_finalists),
        (GAUSSIAN.num_ranking_draws, GAUSSIAN.num_finalists),
        (GAUSSIAN.num_elbo_draws, 1),
    ):
        found = sorted(scored(log_joint, found, count, found[0].loc), key=lambda gaussian: -gaussian.elbo)[:keep]
        found = [g for g in found if not g.elbo < found[0].elbo - GAUSSIAN.max_z_score * g.standard_error(count)]
    return found[0]


@torch.no_grad()
def refined(
    log_joint: Target, begin: Gaussian, moving: Tensor | None = None, *, by_differences: bool = False
) -> Gaussian:
    r"""Newton's method for the ELBO of a normal with a full covariance, continued while the ELBO increases.

    At the optimum, the mean gradient over its draws is zero, and minus the mean Hessian is its precision.

    Args:
        log_joint: The target.
        begin: Initial Gaussian.
        moving: Indices of the coordinates to optimize; None means all. The others must be independent of them in
            ``begin``, and are left unchanged.
        by_differences: Whether Hessians are differences of gradients, as they are where not all coordinates move.

    Returns:
        The best iterate, with its ELBO.

    References:
        Opper, Archambeau. The variational Gaussian approximation revisited. Neural Computation 2009, eq. (13)-(14).
    """
    factor = begin.factor if begin.factor.dim() == 2 else begin.factor.diag()
    (best,) = scored(log_joint, [replace(begin, factor=factor)], GAUSSIAN.num_elbo_draws, begin.loc)
    moving = torch.arange(len(begin.loc), device=begin.loc.device) if moving is None else moving
    if not 0 < len(moving) <= _max_newton_dim(log_joint):
        return best
    if len(moving) > GAUSSIAN.max_hessian_dim:
        count = GAUSSIAN.num_newton_draws_large
    else:
        count = GAUSSIAN.num_newton_draws + GAUSSIAN.num_newton_rows // len(begin.loc)
    count = log_joint.affordable(count, GAUSSIAN.gradients_per_row * len(moving))
    for _ in range(GAUSSIAN.num_newton_steps):
        tried = _newton(log_joint, best, moving, count, by_differences=by_differences)
        found = scored(log_joint, [best, *tried], GAUSSIAN.num_elbo_draws, begin.loc)
        was, best = found[0].elbo, max(found, key=lambda gaussian: gaussian.elbo)
        if not best.elbo > was + GAUSSIAN.newton_gain:
            break
    return best


def _newton(log_joint: Target, begin: Gaussian, moving: Tensor, count: int, *, by_differences: bool) -> list[Gaussian]:
    """Gaussians after fractions of a Newton step; none if the target has no derivatives there."""
    draws = begin.push(antithetic(count, begin.loc))

    # Draws with their mirror images. Few where they are large: a batch would take more memory, and no less time.
    at_once = 2 if len(moving) > GAUSSIAN.max_hessian_dim else max(2, log_joint.chunk)
    pairs = draws.unflatten(0, (2, -1))
    parts = [part.flatten(0, 1) for part in pairs.tensor_split(-(-len(draws) // at_once), 1)]
    try:
        means = [
            (len(part), _mean_derivatives(log_joint, part, moving, by_differences=by_differences)) for part in parts
        ]
    except RuntimeError:
        return []
    found = [(count, *mean) for count, mean in means if mean is not None]
    if not found:
        return []
    usable = sum(count for count, _, _ in found)
    gradient, hessian = (sum(count * each[k] for count, *each in found) / usable for k in (0, 1))
    factor = begin.factor[moving][:, moving].double()
    slope = factor.mT @ gradient
    curvature, vectors = torch.linalg.eigh(-factor.mT @ hessian @ factor)
    curvature = curvature.clamp(1.0 / GAUSSIAN.newton_trust, GAUSSIAN.newton_trust)
    tried = []
    for share in GAUSSIAN.newton_shares:
        root = vectors / curvature.pow(0.5 * share)
        moved = share * (root @ (root.mT @ slope))
        moved = moved * (share * math.sqrt(len(moved)) / moved.norm()).clamp_max(1.0)
        # factor @ root is a factor of the covariance, though not a triangular one.
        whole = begin.factor.clone()
        whole[moving.unsqueeze(-1), moving] = triangular(factor @ root).to(whole)
        tried.append(Gaussian(begin.loc.index_add(0, moving, (factor @ moved).to(begin.loc)), whole))
    return tried


def triangular(root: Tensor) -> Tensor:
    """The lower triangular factor, with a positive diagonal, of the covariance ``R R^T``, ``(D, D)``."""
    below = torch.linalg.qr(root.mT).R.mT
    return below * below.diagonal().sign()


def _mean_derivatives(
    log_joint: Target, draws: Tensor, moving: Tensor, *, by_differences: bool
) -> tuple[Tensor, Tensor] | None:
    """Gradient and Hessian with respect to some coordinates, averaged over the draws that have them; None if none does.

    Raises:
        RuntimeError: If the target has no second derivative, and all coordinates are asked for.
    """
    if by_differences or len(moving) < draws.shape[-1]:
        # Inside of a head, whose second derivatives go through factorizations.
        found = mean_derivatives(log_joint, draws, moving, GAUSSIAN.difference, log_joint.chunk)
        return None if found is None else (found[0][moving], found[1][:, moving])
    gradient, hessian = gradient_and_hessian(batched(log_joint), draws.unsqueeze(1), log_joint.sizes, log_joint.chunk)
    usable = (gradient.isfinite().all(-1) & hessian.isfinite().flatten(2).all(-1)).squeeze(1)
    return (gradient[usable].mean((0, 1)), hessian[usable].mean((0, 1))) if usable.any() else None


def mean_field(log_joint: Target, begin: Gaussian) -> Gaussian | None:
    """The mean-field normal that maximizes the ELBO on fixed draws; None if that fails."""
    loc = begin.loc.clone().requires_grad_()
    log_scale = begin.conditional_scale.log().requires_grad_()
    parameters = [loc, log_scale]
    if not fit_on_fixed_draws(
        log_joint, lambda noise: (loc + log_scale.exp() * noise, log_scale.sum()), parameters, loc
    ):
        return None
    return Gaussian(loc.detach().clone(), log_scale.detach().exp())


def _full_rank(log_joint: LogJoint, begin: Gaussian) -> Gaussian | None:
    """The full-rank normal that maximizes the ELBO on fixed draws, fitted in the coordinates of ``begin``."""
    factor = begin.factor if begin.factor.dim() == 2 else begin.factor.diag()
    count = GAUSSIAN.num_draws_per_row * len(begin.loc)
    if log_joint.affordable(count, FIXED_DRAWS.num_iterations) < count:
        return None  # of fewer draws, it would be a fit to their noise
    shift = torch.zeros_like(begin.loc, requires_grad=True)
    log_scale = torch.zeros_like(begin.loc, requires_grad=True)
    below = torch.zeros_like(factor, requires_grad=True)

    def inner() -> Tensor:
        return below.tril(-1) + log_scale.exp().diag()

    def push(noise: Tensor) -> tuple[Tensor, Tensor]:
        return begin.loc + (shift + noise @ inner().mT) @ factor.mT, log_scale.sum() + factor.diagonal().log().sum()

    if not fit_on_fixed_draws(log_joint, push, [shift, log_scale, below], begin.loc, count):
        return None
    return Gaussian(begin.loc + factor @ shift.detach(), factor @ inner().detach())
