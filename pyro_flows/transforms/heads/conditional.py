# SPDX-License-Identifier: Apache-2.0
r"""L1. Draws of the product of a standard normal prior and a likelihood factor, Gaussian or skewed.

A Gaussian factor has a precision :math:`B B^\top` and pulls with :math:`r` in its own directions, the columns of B, so
that the product is :math:`N(M^{-1} B r, M^{-1})`, :math:`M = I + B B^\top = C C^\top`. Its draws are
:math:`C^{-\top} (S r + x)`, with noise x and :math:`S = C^{-1} B`, and :math:`d = S^\top x` away from the mean in the
factor's directions, in units of the factor. A skewed factor pulls these more, or less:

.. math::
    z = C^{-\top} \big(S (r + s(d)) + x\big), \qquad
    s(d) = \frac{\kappa d^2}{1 + \sqrt{1 + \kappa^2 d^2}} \approx \frac{\kappa d^2}{2}.

The posterior of a likelihood whose third derivative is :math:`3 \kappa` in these units has such draws to first order.
Of all maps :math:`x + \nabla \phi(x)` from a standard normal to :math:`e^g` times its density, small ones have
:math:`L \phi = -g`, with the generator L of the Ornstein-Uhlenbeck process, which multiplies Hermite polynomials of
degree n by -n; and g has degree 3. The slope :math:`s'` is in (-1, 1), so that :math:`N = I + S
\operatorname{diag}(s') S^\top` is positive definite. The map is the gradient of a convex function then, and
:math:`|N|` its determinant relative to the Gaussian's.

References:
    Villani. Topics in Optimal Transportation. 2003, theorem 2.12, for maps that are gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.transforms.base import is_readable

__all__ = [
    "Factor",
    "Pull",
    "conditional_draw",
    "conditional_noise",
    "conditional_score",
    "newton",
    "relocated",
    "relocated_pull",
    "solved",
]


@dataclass(frozen=True)
class InverseSettings:
    """Settings of the inverse of a skewed factor's map.

    Attributes:
        num_steps: Largest number of Newton steps, of which those that do not reduce the residual are made shorter.
        tolerance: Power of the dtype's precision that is the largest residual before the last step, relative to noise.
    """

    num_steps: int = 40
    tolerance: float = 0.7


INVERSE = InverseSettings()


class Factor(NamedTuple):
    """A likelihood factor where the prior is standard normal.

    Attributes:
        root: ``B``, ``(..., n, k)``, in double precision.
        pull: ``r``, ``(..., k, 1)``.
        skew: ``kappa``, ``(..., k, 1)``; None for a Gaussian factor.
    """

    root: Tensor
    pull: Tensor
    skew: Tensor | None = None


def solved(root: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``C``, its inverse, ``S``, and ``-log|C|``, computed in the precision of ``B``."""
    factor = _cholesky(root)
    identity = torch.eye(root.shape[-2], dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    log_det = -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return factor.to(dtype), inverse.to(dtype), (inverse @ root).to(dtype), log_det.to(dtype)


def _precision(root: Tensor) -> Tensor:
    """``M``."""
    return torch.eye(root.shape[-2], dtype=root.dtype, device=root.device) + root @ root.mT


def _cholesky(root: Tensor) -> Tensor:
    """``C``."""
    return torch.linalg.cholesky_ex(_precision(root)).L


class Pull(NamedTuple):
    """``s``, its first and second derivative, and the root in it."""

    value: Tensor
    slope: Tensor
    curvature: Tensor
    length: Tensor

    @classmethod
    def at(cls, away: Tensor, skew: Tensor) -> Pull:
        scaled = skew * away
        length = (1.0 + scaled.square()).sqrt()
        return cls(scaled * away / (1.0 + length), scaled / length, skew / length.pow(3), length)


def _bent(shrunk: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Cholesky factor of ``N``, ``N^-1 S`` and ``log|N|``, for slopes ``s'``, ``(..., k, 1)``."""
    identity = torch.eye(shrunk.shape[-2], dtype=shrunk.dtype, device=shrunk.device)
    lower = torch.linalg.cholesky_ex(identity + (shrunk * slope.mT) @ shrunk.mT).L
    half = torch.linalg.solve_triangular(lower, shrunk, upper=False)
    log_det = 2.0 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return lower, torch.linalg.solve_triangular(lower.mT, half, upper=True), log_det


class _Draw(torch.autograd.Function):
    r"""A draw from noise x, the map's log-determinant, and, without derivatives, what scores take: C, and with a skewed
    factor the Cholesky factor of N and the gradient of :math:`\log|N|` in the noise.

    Torch's derivative of a Cholesky factor costs ten times as much as the factor. The one needed here comes from
    :math:`x u^\top`, of rank one, with u the gradient in the noise; its triangles times a matrix are cumulative sums. C
    is in double precision, since M may be ill-conditioned; :math:`C^{-1}`, S and N are at most 2 in norm, and have the
    dtype of the noise.

    Shape:
        - root, pull, skew: as in :class:`Factor`.
        - noise: ``(..., n, 1)``.

    References:
        Murray. Differentiation of the Cholesky decomposition. 2016. arXiv:1602.07527, eq. (10).
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, pull: Tensor, skew: Tensor | None, noise: Tensor) -> tuple[Tensor | None, ...]:
        factor, inverse, shrunk, log_det = solved(root, noise.dtype)
        lower, solution, tilt = None, None, None
        total = pull
        if skew is not None:
            more = Pull.at(shrunk.mT @ noise, skew)
            lower, solution, bend = _bent(shrunk, more.slope)
            tilt = shrunk @ (_inner(shrunk, solution) * more.curvature)
            log_det = log_det + bend
            total = pull + more.value
            ctx.mark_non_differentiable(lower, tilt)
        ctx.save_for_backward(root, pull, skew, noise, inverse, shrunk, solution)
        ctx.mark_non_differentiable(factor)
        return inverse.mT @ (shrunk @ total + noise), log_det, factor, lower, tilt

    @staticmethod
    def backward(ctx: Any, to_draw: Tensor, to_log_det: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        root, pull, skew, noise, inverse, shrunk, solution = ctx.saved_tensors
        for_second = torch.is_grad_enabled()  # the saved ones have no graph
        if for_second:
            _, inverse, shrunk, _ = solved(root, noise.dtype)
        to_log_det = to_log_det[..., None, None]
        to_mean = inverse @ to_draw
        dual = inverse.mT @ to_mean  # M^-1 times the gradient
        to_pull = shrunk.mT @ to_mean
        to_noise, to_shrunk, to_skew = to_mean, to_log_det * shrunk, None
        if skew is not None:
            away = shrunk.mT @ noise
            more = Pull.at(away, skew)
            if for_second:
                _, solution, _ = _bent(shrunk, more.slope)
            to_slope = to_log_det * _inner(shrunk, solution)
            to_away = to_pull * more.slope + to_slope * more.curvature
            length = more.length
            to_skew = to_pull * away.square() / (length * (1.0 + length)) + to_slope * away / length.pow(3)
            to_noise = to_noise + shrunk @ to_away
            pull = pull + more.value
            to_shrunk = to_log_det * (3.0 * shrunk - 2.0 * solution * (1.0 + more.slope).mT) - noise @ to_away.mT
        mean = shrunk @ pull
        # tril(x u^T) and its transpose times S, the diagonal once.
        rows = noise * shrunk
        above = rows.sum(-2, keepdim=True) - rows.cumsum(-2)
        total = noise * (to_noise * shrunk).cumsum(-2) + to_noise * above + to_shrunk
        total = total + to_mean @ (shrunk.mT @ mean).mT + mean @ to_pull.mT
        return (dual @ pull.mT - inverse.mT @ total).to(root.dtype), to_pull, to_skew, to_noise


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of the columns of two matrices, ``(..., k, 1)``."""
    return (one * other).sum(-2).unsqueeze(-1)


def conditional_draw(factor: Factor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """A draw, ``(..., n, 1)``, from noise of that shape, its log-determinant, and what :func:`conditional_score`
    takes."""
    found: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
    found = _Draw.apply(*factor, noise)  # type: ignore[no-untyped-call]
    return found


def conditional_score(score: Tensor, factor: Tensor, lower: Tensor | None, tilt: Tensor | None) -> Tensor:
    r"""The score of a draw from that of its noise, ``(..., n, 1)``: :math:`C N^{-1} (g - \nabla \log|N|)`."""
    if lower is not None and tilt is not None:
        score = torch.cholesky_solve(score - tilt, lower)
    return factor @ score


def conditional_noise(factor: Factor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`conditional_draw`: noise and its log-determinant."""
    cholesky = _cholesky(factor.root)
    shrunk = torch.linalg.solve_triangular(cholesky, factor.root, upper=False).to(draw)
    log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(draw)
    noise = cholesky.to(draw).mT @ draw - shrunk @ factor.pull
    if factor.skew is None:
        return noise, log_det
    noise = _unskewed(shrunk, noise, factor.skew)
    return noise, log_det - _bent(shrunk, Pull.at(shrunk.mT @ noise, factor.skew).slope)[2]


def _unskewed(shrunk: Tensor, moved: Tensor, skew: Tensor) -> Tensor:
    """Solve ``x + S s(S^T x) = moved``."""

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        more = Pull.at(shrunk.mT @ x, skew)
        return x + shrunk @ more.value - moved, more.slope

    def step(left: Tensor, slope: Tensor) -> Tensor:
        return torch.cholesky_solve(left, _bent(shrunk, slope)[0])

    return newton(moved, residual, step, dim=-2)


def newton(
    moved: Tensor,
    residual: Callable[[Tensor], tuple[Tensor, Tensor]],
    step: Callable[[Tensor, Tensor], Tensor],
    dim: int,
) -> Tensor:
    """Invert a map that is the gradient of a convex function by Newton's method; a last step, with its graph, has the
    derivatives of the solution.

    Args:
        moved: The map's value, of which the first guess is that it was not moved.
        residual: What the value at a point is too large, and slopes of which the Jacobian there is made.
        step: The Jacobian with such slopes, inverted, times a residual.
        dim: The dimension of a vector.
    """

    def size(vector: Tensor) -> Tensor:
        return vector.norm(dim=dim, keepdim=True)

    with torch.no_grad():
        x, (left, slope) = moved, residual(moved)
        share = torch.ones_like(size(left))
        enough = torch.finfo(x.dtype).eps ** INVERSE.tolerance * (1.0 + size(moved))
        for _ in range(INVERSE.num_steps):
            if is_readable(x) and bool((size(left) <= enough).all()):
                break
            tried = x - share * step(left, slope)
            now = residual(tried)
            better = size(now[0]) < size(left)
            x, left, slope = (
                torch.where(better, new, old) for new, old in zip((tried, *now), (x, left, slope), strict=True)
            )
            share = torch.where(better, (2.0 * share).clamp_max(1.0), 0.5 * share)
    return x - step(*residual(x))


class _Mean(torch.autograd.Function):
    r"""The mean of a draw with a Gaussian factor, in the factor's directions: :math:`B^\top M^{-1} B r`.

    Its derivative takes no more than M's factor. With that of ``torch.linalg.solve`` instead, a fused step crashed.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, pull: Tensor) -> Tensor:
        cholesky = _cholesky(root)
        ctx.save_for_backward(root, pull, cholesky)
        return (root.mT @ torch.cholesky_solve(root @ pull.to(root), cholesky)).to(pull)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        root, pull, cholesky = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            cholesky = _cholesky(root)
        both = torch.cat([pull, gradient], -1).to(root)
        solution = torch.cholesky_solve(root @ both, cholesky)
        rest = both - root.mT @ solution
        to_root = solution[..., :1] @ rest[..., 1:].mT + solution[..., 1:] @ rest[..., :1].mT
        return to_root, gradient - rest[..., 1:].to(gradient)


def relocated(factor: Factor, rest: Tensor) -> Factor:
    """A skewed factor at the mean of the product, rather than where it was set: :func:`relocated_pull`.

    Args:
        factor: The factor, with units of where it was set.
        rest: ``rho``, ``(k, 1)``.
    """
    root, pull, skew = factor
    assert skew is not None
    mean: Tensor = _Mean.apply(root, pull)  # type: ignore[no-untyped-call]
    unit, pull, skew = relocated_pull(pull, mean, skew, rest)
    return Factor(root * unit.mT.to(root), pull, skew)


def relocated_pull(pull: Tensor, mean: Tensor, skew: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""What the root of a skewed factor is multiplied by at the mean of the product, rather than where it was set, and
    its pull and skewness there: a Newton step.

    There the likelihood's gradient was :math:`r - t = \rho`, with t the mean in the factor's directions, and its third
    derivative :math:`3 \kappa`. Where t is by :math:`\delta` elsewhere, for another prior, the precision is
    :math:`\omega = 1 - s_{3\kappa}'(\delta)` times as high, which is positive, and the gradient the integral of that.

    Args:
        pull: ``r``, in units of where the factor was set, as are the others.
        mean: ``t``, the mean of the product with the Gaussian factor, from the same origin as the pull.
        skew: ``kappa``.
        rest: ``rho``.
    """
    gradient = pull - mean
    more = Pull.at(rest - gradient, 3.0 * skew)
    precision = 1.0 - more.slope
    unit = precision.sqrt()
    return unit, (gradient + more.value + precision * mean) / unit, skew / (more.length * unit).pow(3)
