# SPDX-License-Identifier: Apache-2.0
"""L4. Gaussians of a posterior over a field and a few hyperparameters: hundreds or thousands of coordinates that are
correlated with each other, such as the days of a time series, and the others that they depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.compiled.replay import Replay
from pyro_flows.models.log_joint import Target
from pyro_flows.models.traces import mean_of_kept
from pyro_flows.starts.differences import mean_derivatives
from pyro_flows.starts.fixed_draws import antithetic, minimize, scored
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian
from pyro_flows.starts.lbfgs import value_and_gradient

__all__ = ["FIELD_GAUSSIAN", "field_gaussian"]


@dataclass(frozen=True)
class FieldGaussianSettings:
    """Settings of the search for a Gaussian.

    Attributes:
        begin_scales: Standard deviations of the field's coordinates at the beginning, of which a smaller one is tried
            where a larger one gives no good Gaussian: draws that wide may have no density.
        num_rounds: Number of rounds, each of which finds the location, and then the field's covariance there.
        num_iterations: Iterations of L-BFGS for the first location.
        num_later_iterations: The same for each of the others.
        num_draws: Draws over which a log density or gradient is averaged, even.
        max_ahead: Largest multiple of a round's step of the others by which the next round begins ahead.
        min_curvature: Smallest eigenvalue of the others' precision.
        num_newton_rounds: Number of Newton steps on the ELBO of all coordinates.
        recentering_draws: Number of draws of each step of the location alone that follows them, even: the noise of the
            last one stays.
        difference: Step of differences of gradients in unconstrained space.
    """

    begin_scales: tuple[float, ...] = (0.7, 0.03)
    num_rounds: int = 4
    num_iterations: int = 60
    num_later_iterations: int = 25
    num_draws: int = 64
    max_ahead: float = 2.0
    min_curvature: float = 0.5
    num_newton_rounds: int = 6
    recentering_draws: tuple[int, ...] = (64, 64, 64, 256)
    difference: float = 1e-2


FIELD_GAUSSIAN = FieldGaussianSettings()


@torch.no_grad()
def field_gaussian(target: Target, begin: Tensor, field: slice, begin_scale: float) -> Gaussian | None:
    r"""A Gaussian with a full covariance, found from the inside of the field.

    The mode of a joint density says little about hyperparameters, and neither does a mean-field Gaussian: given a
    field, a scale may be known to a thousandth of its posterior's width. So at first the others, :math:`\theta`, are a
    point, with a Gaussian of the field that is integrated out (variational EM): rounds maximize :math:`E \log p(\theta,
    m + S \epsilon, x)` in :math:`\theta` and :math:`m` on fixed draws, and then set :math:`S S^\top` to the inverse of
    minus the mean Hessian. The precision of the others is what is left of theirs after the field's response to them.
    From there Newton's method on the ELBO of all coordinates is near its end; precisions are averaged over its steps.

    Rows of Hessians are differences of gradients, which cost less than second derivatives, at two mirrored draws.

    Args:
        target: The target.
        begin: Where to begin, ``(D,)``.
        field: The field's coordinates.
        begin_scale: Their standard deviation at the beginning, > 0.

    Returns:
        The Gaussian, with its ELBO; None if a precision is not positive definite.

    References:
        Beal, Ghahramani. The variational Bayesian EM algorithm. Bayesian Statistics 7, 2003. Opper, Archambeau. The
        variational Gaussian approximation revisited. Neural Computation 2009, eq. (13)-(14).
    """
    settings = FIELD_GAUSSIAN
    places = torch.arange(len(begin), device=begin.device)
    own, others = places[field], torch.cat([places[: field.start], places[field.stop :]])
    loc, factor = begin.clone(), begin_scale * torch.eye(len(own)).to(begin)
    point, shift = loc[others].requires_grad_(), torch.zeros_like(loc[own]).requires_grad_()
    noise = antithetic(settings.num_draws, shift.detach())

    def draws() -> Tensor:
        rows = (loc[own] + (shift + noise) @ factor.mT).to(loc)
        return loc.expand(len(noise), -1).index_copy(1, own, rows).index_copy(1, others, point.expand(len(noise), -1))

    @torch.enable_grad()
    def loss_and_gradients() -> list[Tensor]:
        loss = -mean_of_kept(target(draws()))
        return [loss.detach(), *torch.autograd.grad(loss, [point, shift])]

    evaluate, last = Replay(loss_and_gradients), None
    for number in range(settings.num_rounds):
        before = point.detach().clone()
        minimize(evaluate, [point, shift], settings.num_later_iterations if number else settings.num_iterations)
        step = point.detach() - before
        loc[own] += factor @ shift.detach()
        loc[others] = point.detach()
        shift.zero_()
        precision = _precision(target, _mirrored(loc, own, factor), own)
        found = None if precision is None else _factor_of(precision[:, own])
        if found is None:
            return None
        factor.copy_(found)
        if last is not None and number < settings.num_rounds - 1:
            # Steps of EM shorten by about the same factor each.
            share = (step @ last / last.square().sum()).clamp(0.0, settings.max_ahead / (1.0 + settings.max_ahead))
            point += share / (1.0 - share) * step
        last = step if number else None  # the first one comes from far away
    return _all_coordinates(target, loc, own, others, factor)


def _mirrored(loc: Tensor, own: Tensor, factor: Tensor) -> Tensor:
    """Two mirrored draws of the field, with the others at a point, ``(2, D)``."""
    noise = torch.randn(len(own), dtype=loc.dtype, device=loc.device)
    moved = factor @ noise
    return torch.stack([loc.index_add(0, own, sign * moved) for sign in (1.0, -1.0)])


def _all_coordinates(target: Target, loc: Tensor, own: Tensor, others: Tensor, factor: Tensor) -> Gaussian | None:
    """The Gaussian of all coordinates, from one of the field given the others."""
    rows = [_precision(target, _mirrored(loc, own, factor), others) for _ in range(2)]
    if any(part is None for part in rows):
        return None
    mean = torch.stack([part for part in rows if part is not None]).mean(0)
    root = mean[:, own] @ factor.double()
    followed = root @ root.mT  # by the field
    curvature, vectors = torch.linalg.eigh(mean[:, others] - followed)
    curvature = curvature.abs().clamp_min(FIELD_GAUSSIAN.min_curvature)
    inverse = torch.linalg.solve_triangular(factor.double(), torch.eye(len(own)).to(mean), upper=False)
    precision = torch.zeros(len(loc), len(loc)).to(mean)
    precision[own.unsqueeze(-1), own] = inverse.mT @ inverse
    precision[others.unsqueeze(-1), own] = mean[:, own]
    precision[own.unsqueeze(-1), others] = mean[:, own].mT
    precision[others.unsqueeze(-1), others] = followed + (vectors * curvature) @ vectors.mT
    return _refined(target, loc, precision)


def _refined(target: Target, loc: Tensor, precision: Tensor) -> Gaussian | None:
    """Newton's method on the ELBO, whose precisions are averaged; the best iterate."""
    factor = _factor_of(precision)
    if factor is None:
        return None
    (best,) = scored(target, [_recentered(target, Gaussian(loc, factor.to(loc)))], GAUSSIAN.num_elbo_draws, loc)
    for number in range(FIELD_GAUSSIAN.num_newton_rounds):
        noise = torch.randn_like(loc)
        wanted = _precision(target, best.push(torch.stack([noise, -noise])), torch.arange(len(loc), device=loc.device))
        if wanted is None:
            break
        mixed = torch.lerp(precision, wanted, 1.0 / (number + 2))
        factor = _factor_of(mixed)
        if factor is None:
            continue
        tried = _recentered(target, Gaussian(best.loc, factor.to(loc)))
        best, tried = scored(target, [best, tried], GAUSSIAN.num_elbo_draws, loc)
        if tried.elbo > best.elbo:
            best, precision = tried, mixed
    return best


def _recentered(target: Target, gaussian: Gaussian) -> Gaussian:
    """The Gaussian with its location where the mean gradient is zero, nearly."""
    for count in FIELD_GAUSSIAN.recentering_draws:
        noise = antithetic(count, gaussian.loc)
        step = gaussian.factor.mT @ value_and_gradient(target, gaussian.push(noise))[1].mean(0)
        step = step * (math.sqrt(len(step)) / step.norm()).clamp_max(1.0)
        gaussian = replace(gaussian, loc=gaussian.loc + gaussian.factor @ step)
    return gaussian


def _precision(target: Target, draws: Tensor, rows: Tensor) -> Tensor | None:
    """Rows of minus the Hessian, averaged over two mirrored draws, ``(2, D)``: ``(len(rows), D)``, in float64; None if
    they are not finite."""
    found = mean_derivatives(target, draws, rows, FIELD_GAUSSIAN.difference)
    return None if found is None or not found[1].isfinite().all() else -found[1]


def _factor_of(precision: Tensor) -> Tensor | None:
    """The lower triangular factor of the inverse of a matrix that is symmetric up to rounding; None if that is not
    positive definite."""
    symmetric = 0.5 * (precision + precision.mT)
    upper, info = torch.linalg.cholesky_ex(symmetric.flip(0, 1))
    if info:
        return None
    identity = torch.eye(len(symmetric)).to(symmetric)
    return torch.linalg.solve_triangular(upper.flip(0, 1).mT, identity, upper=False)
