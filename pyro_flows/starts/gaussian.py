# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts: many cheap Gaussians, the best of which by ELBO becomes the guide's start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.compiled.replay import Replay
from pyro_flows.models.log_joint import LogJoint, Target
from pyro_flows.models.traces import mean_of_kept
from pyro_flows.starts.lbfgs import gradient_and_hessian, lbfgs_paths, local_factor

__all__ = [
    "EXPENSIVE",
    "SCORE_DRAWS",
    "Gaussian",
    "antithetic",
    "ascents",
    "best_gaussian",
    "elbo_of",
    "fit_on_fixed_draws",
    "local_gaussians",
    "refined",
    "scored",
]

# Climbs from around the start and from draws of the prior: where a draw is dear, and elsewhere.
FEW_NEAR, FEW_PRIOR = 1, 1
NEAR, PRIOR = 3, 12
SPREAD = 0.7
# Steps of a climb, the gain in nats below which it has arrived, and after how many its point is looked at.
NUM_STEPS, ARRIVED = 150, 1e-4
LOOKS = (2, 5, 12, 35, 150)
# Once the highest has arrived, the others get half as many steps again.
PATIENCE = 1.5
ISOTROPIC_SCALES = (0.1, 0.5)
# Points of ascents that are nearer to each other than this, in units of the unconstrained latents, are one.
SAME = 1e-3
# Above this dimension Hessians cost more than they give: one backward pass a coordinate.
HESSIAN_DIM = 200
# Draws by which the better candidates are ranked (all, by a quarter of them), and by which the first few are compared.
RANK_DRAWS, SCORE_DRAWS, SHORT_LIST = 32, 128, 12
# A draw of a model with more items than this is too dear for deterministic fits.
EXPENSIVE = 2000
# Half the variance of log weights is about the gap, in nats: a Gaussian with less needs no refinement, and no full-rank
# fit.
SMALL_GAP, GOOD_GAP = 0.05, 0.5
FULL_RANK_DIM = 64
# Fixed antithetic draws and iterations of deterministic fits; a covariance takes more of them than it has rows.
FIXED_DRAWS, DRAWS_A_ROW = 64, 16
FIXED_ITERATIONS, FIXED_ROUNDS = 150, 2
# Newton's steps on an ELBO: how many at most, by so many draws, and more where a Hessian is cheap; the shares of each
# step that are tried, and the gain in nats below which one is the last; by how much, squared, a step may change a
# standard deviation.
NEWTON_STEPS, NEWTON_DRAWS, NEWTON_ROWS = 8, 64, 2048
NEWTON_SHARES, NEWTON_GAIN, NEWTON_TRUST = (1.0, 0.3), 0.02, 10.0
# What the line search of L-BFGS is told where the model has no density.
FORBIDDEN = 1e15


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A candidate :math:`N(m, L L^T)` in unconstrained space.

    Attributes:
        loc: ``m``, ``(D,)``.
        factor: ``L``, lower triangular with a positive diagonal, ``(D, D)``; or its diagonal, ``(D,)``, and no more.
        elbo: Estimate of its ELBO.
        log_weight_variance: Variance of its log weights.
    """

    loc: Tensor
    factor: Tensor
    elbo: float = -math.inf
    log_weight_variance: float = math.inf

    def push(self, noise: Tensor) -> Tensor:
        """Standard normal noise, ``(S, D)``, to draws."""
        return self.loc + (noise * self.factor if self.factor.dim() == 1 else noise @ self.factor.mT)

    @property
    def conditional_scale(self) -> Tensor:
        """Standard deviation of each coordinate given the others; a mean-field normal is no wider than that."""
        if self.factor.dim() == 1:
            return self.factor
        return torch.cholesky_inverse(self.factor.double()).diagonal().rsqrt().to(self.factor)


@torch.no_grad()
def best_gaussian(log_joint: LogJoint, start: Tensor, init_scale: float, *, correlated: bool) -> Gaussian:
    r"""The best of many Gaussians by ELBO.

    - the guide's own start, :math:`N(z_0, s^2 I)`;
    - along ascents of the log joint from there, from around it and from draws of the prior, Gaussians with the local
      Hessian, and isotropic ones: the mode of a centered hierarchy is at a scale of zero, where a Laplace approximation
      is worthless, but an early point of the climb is fine. Of several modes, the ELBO prefers that with most mass;
    - where no local Hessian is any good, the best mean-field normal on fixed draws, and a Hessian there;
    - where the best so far has a gap, Newton's steps on its ELBO (see :func:`refined`);
    - where that is poor too, the best normal of any covariance on fixed draws.

    Args:
        log_joint: The target.
        start: :math:`z_0`, ``(D,)``.
        init_scale: :math:`s`.
        correlated: Whether the guide can hold a correlated Gaussian; if not, all are made of independent coordinates.

    Raises:
        RuntimeError: If no candidate has a finite ELBO; names the sites without a density at the start.

    References:
        Zhang, Carpenter, Gelman, Vehtari. Pathfinder. JMLR 2022. arXiv:2108.03782, for ELBO-chosen path iterates.
        Giordano, Ingram, Broderick. Black Box Variational Inference with a Deterministic Objective. JMLR 2024.
        arXiv:2304.05527, for mean-field fits on fixed draws.
    """
    ones = torch.ones_like(start)
    own = Gaussian(start, init_scale * ones)
    found = [own]
    for points in map(_distinct_points, ascents(log_joint, start)):
        found += [Gaussian(loc, scale * ones) for loc in points for scale in ISOTROPIC_SCALES]
        found += local_gaussians(log_joint, points, correlated=correlated)
    best = _best(log_joint, found)
    if best.factor.dim() == 1 and log_joint.cost_per_draw < EXPENSIVE:
        fitted = [_mean_field(log_joint, begin) for begin in (own, best)]
        found = [best, *(gaussian for gaussian in fitted if gaussian is not None)]
        for gaussian in found[1:]:
            found += local_gaussians(log_joint, gaussian.loc.unsqueeze(0), correlated=correlated)
        best = _best(log_joint, found)
    if correlated and log_joint.cost_per_draw < EXPENSIVE and not best.log_weight_variance / 2 < SMALL_GAP:
        best = refined(log_joint, best)
    small = len(start) <= FULL_RANK_DIM and log_joint.cost_per_draw < EXPENSIVE
    if correlated and small and not best.log_weight_variance / 2 < GOOD_GAP:
        full = _full_rank(log_joint, best)
        best = best if full is None else _best(log_joint, [best, full])
    if best.elbo == -math.inf:
        raise RuntimeError(log_joint.without_density(start))
    return best


def ascents(log_joint: LogJoint, start: Tensor, prior: int = PRIOR) -> list[Tensor]:
    """Points on the way up, ``(number of ascents, D)`` at each look. From ``prior`` draws of the prior, if cheap.

    The last look is at where they have arrived.
    """
    many = log_joint.is_vectorized and log_joint.cost_per_draw == 1
    near, prior = (NEAR, prior) if many else (FEW_NEAR, FEW_PRIOR)
    around = start + SPREAD * torch.randn(near, len(start), dtype=start.dtype, device=start.device)
    begins = torch.stack([start, *around, *(draw.to(start) for draw in log_joint.from_prior(prior))])
    begins = begins[begins.isfinite().all(-1)]
    looks, points = [], begins
    steps = lbfgs_paths(_batched(log_joint), begins.unsqueeze(1), NUM_STEPS, ARRIVED, PATIENCE)
    for number, ascended in enumerate(steps, 1):
        points = ascended.squeeze(1)
        if number in LOOKS:
            looks.append(points)
    return looks if looks and looks[-1] is points else [*looks, points]


def _distinct_points(points: Tensor) -> Tensor:
    """Those of ``(R, D)`` that are not where an earlier one is: ascents meet at a mode."""
    near = torch.cdist(points, points, p=torch.inf) < SAME
    return points[~near.tril(-1).any(-1)]


def _batched(log_joint: Target) -> Callable[[Tensor], Tensor]:
    """As :func:`lbfgs_paths` wants it: ``(R, 1, D)`` to ``(R, 1)``."""
    return lambda z: log_joint(z.squeeze(1)).unsqueeze(1)


def local_gaussians(log_joint: Target, points: Tensor, *, correlated: bool) -> list[Gaussian]:
    """Gaussians with the local curvature at each of ``(R, D)``."""
    if points.shape[-1] > HESSIAN_DIM:
        return []
    factors = local_factor(_batched(log_joint), points.unsqueeze(1)).squeeze(1)
    usable = factors.isfinite().flatten(1).all(-1)
    gaussians = [Gaussian(*pair) for pair in zip(points[usable], factors[usable].to(points), strict=True)]
    return gaussians if correlated else [replace(g, factor=g.conditional_scale) for g in gaussians]


def _best(log_joint: LogJoint, found: list[Gaussian]) -> Gaussian:
    """The highest ELBO, by a few draws of each, more of the better ones, and yet more of the best."""
    for count, keep in ((RANK_DRAWS // 4, 4 * SHORT_LIST), (RANK_DRAWS, SHORT_LIST), (SCORE_DRAWS, 1)):
        found = sorted(scored(log_joint, found, count), key=lambda gaussian: -gaussian.elbo)[:keep]
    return found[0]


def scored(log_joint: Target, found: list[Gaussian], count: int) -> list[Gaussian]:
    """Candidates with their ELBO and variance of log weights, from as many draws of each."""
    noise = antithetic(count, found[0].loc)
    draws = torch.cat([gaussian.push(noise) for gaussian in found])  # (candidates * count, D)
    energy = torch.cat([log_joint(part) for part in draws.split(log_joint.chunk)]).double().reshape(len(found), count)
    diagonals = torch.stack([g.factor if g.factor.dim() == 1 else g.factor.diagonal() for g in found])
    elbos = mean_of_kept(energy) + diagonals.double().log().sum(-1) + _entropy(noise)
    weights = energy + 0.5 * noise.double().square().sum(-1)
    variances = mean_of_kept((weights - mean_of_kept(weights).unsqueeze(-1)).square())
    elbos = torch.where(elbos.isfinite(), elbos, -torch.inf)
    return [
        replace(gaussian, elbo=elbo, log_weight_variance=variance)
        for gaussian, elbo, variance in zip(found, elbos.tolist(), variances.tolist(), strict=True)
    ]


def _entropy(noise: Tensor) -> float:
    return 0.5 * noise.shape[-1] * math.log(2 * math.pi * math.e)


def antithetic(count: int, like: Tensor) -> Tensor:
    """Standard normal draws, half of which mirror the other half, ``(count, D)``.

    Their second moments are those of a standard normal, in all directions where that can be, so that ELBOs of
    Gaussians are exact for Gaussian targets: the best of many noisy ones would be the luckiest.
    """
    half = torch.randn(count // 2, len(like), dtype=torch.float64, device=like.device)
    if len(half) > len(like):
        factor = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half]).to(like.dtype)


@torch.no_grad()
def refined(log_joint: Target, begin: Gaussian, moving: Tensor | None = None) -> Gaussian:
    r"""Newton's method for the ELBO of a normal of any covariance, which goes on while that rises.

    At the best one, the mean gradient over its draws is zero, and minus the mean Hessian is its precision.

    Args:
        log_joint: The target.
        begin: Where to begin.
        moving: The coordinates in question; those left out, independent of them at the beginning, stay as they are.

    Returns:
        The best one seen, with its ELBO.

    References:
        Opper, Archambeau. The variational Gaussian approximation revisited. Neural Computation 2009, eq. (13)-(14).
    """
    factor = begin.factor if begin.factor.dim() == 2 else begin.factor.diag()
    (best,) = scored(log_joint, [replace(begin, factor=factor)], SCORE_DRAWS)
    moving = torch.arange(len(begin.loc), device=begin.loc.device) if moving is None else moving
    if len(moving) > HESSIAN_DIM:
        return best
    count = NEWTON_DRAWS + NEWTON_ROWS // len(begin.loc)
    for _ in range(NEWTON_STEPS):
        tried = _newton(log_joint, best, moving, max(2, min(count, log_joint.chunk) // 2 * 2))
        found = scored(log_joint, [best, *tried], SCORE_DRAWS)
        was, best = found[0].elbo, max(found, key=lambda gaussian: gaussian.elbo)
        if not best.elbo > was + NEWTON_GAIN:
            break
    return best


def _newton(log_joint: Target, begin: Gaussian, moving: Tensor, count: int) -> list[Gaussian]:
    """Where shares of a step lead; none if the target has no derivatives there."""
    draws = begin.push(antithetic(count, begin.loc))

    def target(part: Tensor) -> Tensor:
        return log_joint(draws.index_copy(-1, moving, part.squeeze(1))).unsqueeze(1)

    try:
        gradient, hessian = gradient_and_hessian(target, draws[:, moving].unsqueeze(1))
    except RuntimeError:
        return []
    usable = (gradient.isfinite().all(-1) & hessian.isfinite().flatten(2).all(-1)).squeeze(1)
    if not usable.any():
        return []
    factor = begin.factor[moving][:, moving].double()
    slope = factor.mT @ gradient[usable].mean((0, 1))
    curvature, vectors = torch.linalg.eigh(-factor.mT @ hessian[usable].mean((0, 1)) @ factor)
    curvature = curvature.clamp(1.0 / NEWTON_TRUST, NEWTON_TRUST)
    found = []
    for share in NEWTON_SHARES:
        root = vectors / curvature.pow(0.5 * share)
        moved = share * (root @ (root.mT @ slope))
        moved = moved * (share * math.sqrt(len(moved)) / moved.norm()).clamp_max(1.0)
        # factor @ root is a factor of the covariance, though not a triangular one.
        below = torch.linalg.qr((factor @ root).mT).R.mT
        below = below * below.diagonal().sign()
        whole = begin.factor.clone()
        whole[moving.unsqueeze(-1), moving] = below.to(whole)
        found.append(Gaussian(begin.loc.index_add(0, moving, (factor @ moved).to(begin.loc)), whole))
    return found


def _minimize(loss_and_gradients: Callable[[], Sequence[Tensor]], parameters: list[Tensor], count: int) -> None:
    """So many iterations of L-BFGS, whose line search steps back from where the model has no density."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=count, max_eval=2 * count + 5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, *gradients = loss_and_gradients()
        is_finite = bool(loss.isfinite())
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.nan_to_num(0.0, 0.0, 0.0).contiguous() if is_finite else torch.zeros_like(p)
        return loss if is_finite else loss.new_tensor(FORBIDDEN)

    optimizer.step(closure)  # type: ignore[arg-type]


def _mean_field(log_joint: LogJoint, begin: Gaussian) -> Gaussian | None:
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
    """The normal of any covariance that maximizes the ELBO on fixed draws, sought in the coordinates of another."""
    factor = begin.factor if begin.factor.dim() == 2 else begin.factor.diag()
    dim = len(begin.loc)
    shift = torch.zeros_like(begin.loc, requires_grad=True)
    log_scale = torch.zeros_like(begin.loc, requires_grad=True)
    below = torch.zeros_like(factor, requires_grad=True)

    def inner() -> Tensor:
        return below.tril(-1) + log_scale.exp().diag()

    def push(noise: Tensor) -> tuple[Tensor, Tensor]:
        return begin.loc + (shift + noise @ inner().mT) @ factor.mT, log_scale.sum() + factor.diagonal().log().sum()

    if not fit_on_fixed_draws(log_joint, push, [shift, log_scale, below], begin.loc, DRAWS_A_ROW * dim):
        return None
    return Gaussian(begin.loc + factor @ shift.detach(), factor @ inner().detach())


def fit_on_fixed_draws(
    log_joint: Target,
    push: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: list[Tensor],
    like: Tensor,
    count: int = FIXED_DRAWS,
    rounds: int = FIXED_ROUNDS,
) -> bool:
    """Maximize the ELBO of a transport map on a few fixed draws, in place.

    Args:
        log_joint: The target.
        push: Noise, ``(S, D)``, to draws and the log-determinant of each.
        parameters: Leaves of the map.
        like: A tensor of shape ``(D,)``, dtype and device of the draws.
        count: Number of draws, even; the more a map can do, the more it takes to hold it to the posterior.
        rounds: How often L-BFGS is run, each time afresh: a later run forgets the curvature of the way.

    Returns:
        Whether all parameters are finite.
    """
    noise = antithetic(count, like)

    @torch.enable_grad()
    def loss_and_gradients() -> list[Tensor]:
        draws, ladj = push(noise)
        loss = -mean_of_kept(log_joint(draws) + ladj)
        return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]

    evaluate = Replay(loss_and_gradients)
    for _ in range(rounds):
        _minimize(evaluate, parameters, FIXED_ITERATIONS)
        if not all(parameter.isfinite().all() for parameter in parameters):
            return False
    return True


@torch.no_grad()
def elbo_of(log_joint: Target, push: Callable[[Tensor], tuple[Tensor, Tensor]], noise: Tensor) -> float:
    """ELBO of a transport map of standard normal noise, ``(S, D)``; minus infinity where the model has no density."""
    draws, ladj = push(noise)
    elbo = mean_of_kept((log_joint(draws) + ladj).double()).item() + _entropy(noise)
    return elbo if math.isfinite(elbo) else -math.inf
