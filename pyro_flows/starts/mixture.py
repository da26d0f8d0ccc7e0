# SPDX-License-Identifier: Apache-2.0
"""L4. Warm start of a mixture base: a component on each mode that ascents of the log joint find."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.flows.bases import spread_components
from pyro_flows.flows.noise import DiagonalNormalMixture
from pyro_flows.models.log_joint import LogJoint, in_parts
from pyro_flows.starts.ascents import ASCENTS, ascents, climb, distinct_points
from pyro_flows.starts.fixed_draws import antithetic, scored
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian, local_gaussians, refined

__all__ = ["MixtureStart", "best_mixture", "modes_above"]


@dataclass(frozen=True)
class MixtureSettings:
    """Settings of the search for modes.

    Attributes:
        num_prior: Number of ascents from draws of the prior, where many draws cost as much as one. A mode with a tenth
            of the mass is missed in 3 % of the cases.
        mode_distance: Two points belong to the same mode if each is within this many standard deviations of the other's
            Gaussian.
        num_rounds: Number of times that ascents which ended in several modes go on.
        min_weight: Share of the mass below which a mode is omitted.
        max_modes: Largest number of modes with a component each.
    """

    num_prior: int = 32
    mode_distance: float = 3.0
    num_rounds: int = 4
    min_weight: float = 1e-3
    max_modes: int = 24

    @property
    def min_log_weight(self) -> float:
        """Logarithm of ``min_weight``, in nats."""
        return math.log(self.min_weight)


SETTINGS = MixtureSettings()


@dataclass(frozen=True, eq=False)
class MixtureStart:
    r"""A mixture :math:`\sum_k w_k N(m + L \mu_k, L \, \mathrm{diag}(\sigma_k)^2 L^T)` in unconstrained space.

    Attributes:
        loc: ``m``, ``(D,)``; the mixture's mean.
        factor: ``L``, lower triangular with a positive diagonal, ``(D, D)``; or only its diagonal, ``(D,)``.
            In these coordinates the mixture has mean 0 and variance 1.
        locs: ``mu``, ``(K, D)``.
        scales: ``sigma``, ``(K, D)``.
        weights: ``w``, ``(K,)``.
    """

    loc: Tensor
    factor: Tensor
    locs: Tensor
    scales: Tensor
    weights: Tensor

    def elbo(self, log_joint: LogJoint) -> float:
        """The mixture's ELBO, from equally many draws of each component, with common noise."""
        noise = antithetic(GAUSSIAN.num_elbo_draws, self.loc)
        eps = self.locs.unsqueeze(1) + self.scales.unsqueeze(1) * noise  # (K, draws, D)
        draws = Gaussian(self.loc, self.factor).push(eps.flatten(0, 1))
        energy = in_parts(log_joint, draws).reshape(eps.shape[:-1])
        diagonal = self.factor if self.factor.dim() == 1 else self.factor.diagonal()
        log_q = DiagonalNormalMixture(self.locs, self.scales, self.weights.log()).log_prob(eps)
        value = (energy - log_q).double().mean(-1) @ self.weights.double() + diagonal.double().log().sum()
        return value.item() if value.isfinite() else -math.inf


@torch.no_grad()
def best_mixture(
    log_joint: LogJoint, init_loc: Tensor, count: int | None = None, *, correlated: bool, elbo: float = -math.inf
) -> MixtureStart | None:
    r"""A mixture with a component on each mode that ascents of the log joint find, weighted by mass; None if there is
    only one mode, or too many dimensions for Hessians.

    Each mode has the Gaussian of its local curvature, or the best one near it. A component keeps the diagonal part of
    its covariance, in the coordinates in which the average covariance is the identity. If modes do not overlap, the
    weights of highest ELBO are :math:`w_k \propto \exp(\mathrm{ELBO}_k)`; with Gaussian modes these are their shares of
    the mass. Excess components share the heaviest modes.

    Args:
        log_joint: The target.
        init_loc: The guide's initial location, ``(D,)``.
        count: Number of components K, >= 2; None takes one for each mode.
        correlated: Whether the guide can represent a correlated ``L``.
        elbo: ELBO of the best Gaussian that is known, which the evidence is above.
    """
    limit = count or SETTINGS.max_modes
    modes = modes_above(log_joint, ascents(log_joint, init_loc, SETTINGS.num_prior, math.inf)[-1], elbo, limit)
    if len(modes) > 1:
        modes = _distinct([_refined(log_joint, mode) for mode in modes], limit)
        modes = [mode for mode in modes if mode.elbo >= modes[0].elbo + SETTINGS.min_log_weight]
    if len(modes) < 2:
        return None
    weights = torch.tensor([mode.elbo for mode in modes], dtype=torch.float64, device=init_loc.device).softmax(0)
    locs = torch.stack([mode.loc for mode in modes]).double()
    factors = torch.stack([mode.factor for mode in modes]).double()
    precisions = torch.cholesky_inverse(factors)
    if correlated:
        factor, info = torch.linalg.cholesky_ex(torch.einsum("k,kij->ij", weights, factors @ factors.mT))
        if info:
            return None
    else:
        factor = (weights @ precisions.diagonal(dim1=-2, dim2=-1).reciprocal()).sqrt().diag()
    loc = weights @ locs
    locs = torch.linalg.solve_triangular(factor, (locs - loc).mT, upper=False).mT
    scales = (factor.mT @ precisions @ factor).diagonal(dim1=-2, dim2=-1).rsqrt()
    spread = (weights @ (locs.square() + scales.square())).sqrt()
    locs, scales, factor = locs / spread, scales / spread, factor * spread
    copies = _copies(weights.tolist(), count or len(modes))
    pieces = [spread_components(number, loc) for number in copies]
    repeats = torch.tensor(copies, device=init_loc.device)
    locs, scales = (rows.repeat_interleave(repeats, 0) for rows in (locs, scales))
    locs = locs + scales * torch.cat([piece[0] for piece in pieces])
    scales = scales * torch.cat([piece[1] for piece in pieces])
    weights = (weights / repeats).repeat_interleave(repeats, 0)
    parts = (loc, factor if correlated else factor.diagonal(), locs, scales, weights)
    return MixtureStart(*(part.to(init_loc.dtype) for part in parts))


def modes_above(
    log_joint: LogJoint, points: Tensor, elbo: float = -math.inf, limit: int = SETTINGS.max_modes
) -> list[Gaussian]:
    """The Gaussians of the curvature at end points of ascents, ``(R, D)``, of highest ELBO, one for each mode; none in
    too many dimensions. Some ascents may have come to a stop on the way: where there are several, they go on, before
    those of too little mass are dropped, given an ELBO that is known already."""
    # Of many observations, a climb from each point takes too long.
    is_cheap = log_joint.affordable(GAUSSIAN.num_elbo_draws, ASCENTS.num_steps) == GAUSSIAN.num_elbo_draws
    modes = _modes_at(log_joint, points, elbo, limit, keep_light=is_cheap)
    for _ in range(SETTINGS.num_rounds):
        if len(modes) < 2:
            break
        was, modes = modes, _modes_at(log_joint, _ascended(log_joint, modes), elbo, limit)
        if len(modes) == len(was) and all(map(_is_at, modes, was)):
            break
    return modes


def _is_at(one: Gaussian, other: Gaussian) -> bool:
    return bool(((one.loc - other.loc).abs() < ASCENTS.same_point).all())


def _ascended(log_joint: LogJoint, modes: list[Gaussian]) -> Tensor:
    """Where ascents from several Gaussians end, ``(R, D)``, in coordinates in which each is standard normal: ridges, on
    which the others came to a stop, are as wide there as they are long."""
    locs, factors = torch.stack([mode.loc for mode in modes]), torch.stack([mode.factor for mode in modes])

    def points(x: Tensor) -> Tensor:
        return locs + (factors @ x.unsqueeze(-1)).squeeze(-1)

    return points(climb(lambda x: log_joint(points(x)), torch.zeros_like(locs))[-1])


def _modes_at(
    log_joint: LogJoint, points: Tensor, elbo: float, limit: int, *, keep_light: bool = False
) -> list[Gaussian]:
    """The Gaussians of the curvature at some points, ``(R, D)``, of highest ELBO, one for each mode; those of too
    little mass only with ``keep_light``, as climbs from there may go on to more."""
    found = local_gaussians(log_joint, distinct_points(points), correlated=True)
    if not found:
        return []
    found = scored(log_joint, found, GAUSSIAN.num_elbo_draws, points[0])
    if not keep_light:
        # Laplace's approximation too: on curved ridges, ELBOs are hundreds of nats below the mass, and noise.
        heights = in_parts(log_joint, torch.stack([gaussian.loc for gaussian in found])).double()
        masses = heights + torch.stack([g.log_det for g in found]) + 0.5 * len(points[0]) * math.log(2 * math.pi)
        least = max(elbo, *(gaussian.elbo for gaussian in found)) + SETTINGS.min_log_weight
        found = [g for g, mass in zip(found, masses.tolist(), strict=True) if max(mass, _mass(g)) >= least]
    return _distinct(found, limit)


def _mass(gaussian: Gaussian) -> float:
    """Logarithm of the mass near a Gaussian, by its ELBO, and by half the variance of log weights, if that is small."""
    return gaussian.elbo + min(gaussian.log_weight_variance / 2, -SETTINGS.min_log_weight)


def _refined(log_joint: LogJoint, mode: Gaussian) -> Gaussian:
    """The best Gaussian near a mode, where that of its curvature leaves a gap."""
    return mode if mode.log_weight_variance / 2 < GAUSSIAN.small_gap else refined(log_joint, mode)


def _distinct(found: list[Gaussian], count: int) -> list[Gaussian]:
    """The Gaussians of highest ELBO, one for each mode."""
    modes: list[Gaussian] = []
    for gaussian in sorted(found, key=lambda gaussian: -gaussian.elbo):
        if len(modes) == count or not gaussian.elbo > -math.inf:
            break
        if all(max(gaussian.distance(mode), mode.distance(gaussian)) > SETTINGS.mode_distance for mode in modes):
            modes.append(gaussian)
    return modes


def _copies(weights: list[float], count: int) -> list[int]:
    """Number of components for each mode: one, plus its proportional share of the others (d'Hondt)."""
    copies = [1] * len(weights)
    for _ in range(count - len(weights)):
        heaviest = max(range(len(weights)), key=lambda mode: weights[mode] / copies[mode])
        copies[heaviest] += 1
    return copies
