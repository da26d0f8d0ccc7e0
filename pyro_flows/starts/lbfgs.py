# SPDX-License-Identifier: Apache-2.0
"""L4. Batched L-BFGS: many ascents of one log density at once, and local curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_flows.compiled.replay import Replay

__all__ = ["LBFGS", "gradient_and_hessian", "hessian_rows", "lbfgs_paths", "local_factor", "value_and_gradient"]


@dataclass(frozen=True)
class LbfgsSettings:
    """Settings of batched L-BFGS, and of Hessians.

    Attributes:
        history: Number of pairs (step, gradient difference) in the history.
        sufficient: Constant of the Armijo condition: the fraction of the gain predicted by the slope that a step must
            achieve.
        cut: Factor by which the step is shortened otherwise.
        num_cuts_to_forget: Number of cuts after which the history is cleared, and the gradient used as direction.
        max_cuts: Number of cuts after which the ascent ends.
        as_high: Ascents within this many nats of the highest one count as equally high.
        max_step: Largest step length, in unconstrained space.
        min_curvature: Smallest curvature of a local Gaussian: its standard deviations are at most 10.
        rows_per_pass: Rows of a Hessian per backward pass: the cost of a pass is per operation.
        values_per_pass: Largest number of values in the rows of one pass; limits their number.
        difference: Step of finite differences of gradients in unconstrained space; these need not be exact.
    """

    history: int = 10
    sufficient: float = 1e-4
    cut: float = 0.25
    num_cuts_to_forget: int = 6
    max_cuts: int = 12
    as_high: float = 0.01
    max_step: float = 5.0
    min_curvature: float = 0.01
    rows_per_pass: int = 32
    values_per_pass: int = 2**19
    difference: float = 3e-3


LBFGS = LbfgsSettings()

Target = Callable[[Any], Tensor]


def lbfgs_paths(
    target: Target,
    init_loc: Tensor,
    num_steps: int,
    tolerance: float = 0.0,
    patience: float = math.inf,
    *,
    replays: bool = True,
) -> Iterator[Tensor]:
    """Paths of a batch of L-BFGS ascents, with one batched gradient of the target per iteration.

    Line searches are independent: while one ascent tries a shorter step, the others proceed.

    Args:
        target: Log density, ``(R, N, d)`` to ``(R, N)``; each entry depends on its own vector only.
        init_loc: Initial points, ``(R, N, d)``.
        num_steps: Largest number of iterations.
        tolerance: Ascents end once the predicted gain of every step, in nats, is below this.
        patience: The other ascents are stopped after this multiple of the iterations that the highest of the R ascents
            took to converge. Omit it if the R ascents are of different functions.
        replays: Whether evaluations are recorded, and repeated without Python.

    Yields:
        The current points after each iteration, ``(R, N, d)``.
    """
    own = partial(value_and_gradient, target)
    evaluate = Replay(own) if replays else own
    z, (value, gradient) = init_loc, evaluate(init_loc)
    steps = gradient_differences = z.new_zeros((0, *z.shape))
    direction, slope, step = _next_step(gradient, steps, gradient_differences)
    cuts = torch.zeros_like(value)
    leader_went = 0
    for number in range(num_steps):
        goes_on = (slope > tolerance) & (cuts < LBFGS.max_cuts)
        arrived = torch.where(goes_on, -torch.inf, value)
        if (arrived.amax(0) < value.amax(0) - LBFGS.as_high).any():
            leader_went = number
        if not goes_on.any() or number > patience * (leader_went + 1):
            return
        trial = z + step * direction
        trial_value, trial_gradient = evaluate(trial)
        # From a point without density, any point with a density is an improvement.
        better = (trial_value >= value + LBFGS.sufficient * step.squeeze(-1) * slope) & (trial_value.abs() < torch.inf)
        better &= trial_gradient.isfinite().all(-1)
        moved = better.unsqueeze(-1)
        steps = _remember(steps, trial - z, moved)
        gradient_differences = _remember(gradient_differences, gradient - trial_gradient, moved)
        z, gradient = torch.where(moved, trial, z), torch.where(moved, trial_gradient, gradient)
        value, cuts = torch.where(better, trial_value, value), torch.where(better, 0.0, cuts + 1.0)
        forget = cuts == LBFGS.num_cuts_to_forget
        steps, gradient_differences = (
            torch.where(forget.unsqueeze(-1), 0.0, memory) for memory in (steps, gradient_differences)
        )
        ahead, promised, first = _next_step(gradient, steps, gradient_differences)
        renewed = better | forget
        direction = torch.where(renewed.unsqueeze(-1), ahead, direction)
        slope = torch.where(renewed, promised, slope)
        step = torch.where(renewed.unsqueeze(-1), first, LBFGS.cut * step)
        yield z


def _next_step(gradient: Tensor, steps: Tensor, gradient_differences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Direction, slope along it, and the initial step size, ``(R, N, 1)``."""
    direction = _two_loops(gradient, steps, gradient_differences)
    direction = torch.where((direction * gradient).sum(-1, keepdim=True) > 0, direction, gradient)
    has_moved = (steps != 0).any(-1, keepdim=True).any(0)
    longest = torch.where(has_moved, LBFGS.max_step, 1.0)
    step = (longest / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    return direction, (direction * gradient).sum(-1), step


def _remember(memory: Tensor, new: Tensor, moved: Tensor) -> Tensor:
    """Append a vector to the history, ``(history, R, N, d)``, of the ascents that moved; newest last."""
    if len(memory) < LBFGS.history:
        memory = torch.cat([torch.zeros_like(new).unsqueeze(0), memory])
    return torch.where(moved, torch.cat([memory[1:], new.unsqueeze(0)]), memory)


def local_factor(
    target: Target, points: Tensor, sizes: Sequence[int] | None = None, most: int = LBFGS.values_per_pass
) -> Tensor:
    """Cholesky factors of minus the inverse Hessian, made positive definite.

    Args:
        target: Log density, ``(R, N, d)`` to ``(R, N)``; each entry depends on its own vector only. With ``sizes``, it
            takes both the vectors and a list of their parts.
        points: Where, ``(R, N, d)``.
        sizes, most: See :func:`gradient_and_hessian`.

    Returns:
        ``(R, N, d, d)`` in float64, lower triangular; NaN where the Hessian is not finite.
    """
    hessian = _hessian(target, points, sizes, most)
    finite = hessian.isfinite().flatten(2).all(-1)[..., None, None]
    if not finite.all():  # second derivatives of log-sum-exp and the like underflow, first ones do not
        hessian = torch.where(finite, hessian, _difference_hessian(target, points))
        finite = hessian.isfinite().flatten(2).all(-1)[..., None, None]
    safe = torch.where(finite, 0.5 * (hessian + hessian.mT), torch.eye(hessian.shape[-1]).to(hessian))
    curvature, vectors = torch.linalg.eigh(safe)
    covariance = (vectors / curvature.abs().clamp_min(LBFGS.min_curvature).unsqueeze(-2)) @ vectors.mT
    factor, info = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.mT))
    return torch.where(finite & (info == 0)[..., None, None], factor, torch.nan)


def _hessian(target: Target, points: Tensor, sizes: Sequence[int] | None, most: int) -> Tensor:
    """``(R, N, d, d)``; NaN if the target has no second derivative."""
    try:
        return gradient_and_hessian(target, points, sizes, most)[1]
    except RuntimeError:
        return torch.full((*points.shape, points.shape[-1]), torch.nan, dtype=torch.double, device=points.device)


def gradient_and_hessian(
    target: Target, points: Tensor, sizes: Sequence[int] | None = None, most: int = LBFGS.values_per_pass
) -> tuple[Tensor, Tensor]:
    """Derivatives of the target in float64, ``(R, N, d)`` and ``(R, N, d, d)``, in few backward passes.

    The Hessian is symmetric, so that those of a part are with respect to itself and the parts after it only: given its
    hyperparameters, no derivative of a Gaussian process goes through the factorization of its covariance.

    Args:
        target: Log density, ``(R, N, d)`` to ``(R, N)``; each entry depends on its own vector only. With ``sizes``, it
            takes a list of the parts of the vectors.
        points: Where, ``(R, N, d)``.
        sizes: Lengths of the parts, those first on which the densities of others depend; None for the whole vectors.
        most: Number of evaluations of the target, R N each time, that may be made at once.

    Raises:
        RuntimeError: If the target has no second derivative.
    """
    at_once = most // points[..., 0].numel()
    pass_rows = max(1, min(LBFGS.rows_per_pass, at_once, LBFGS.values_per_pass // points.numel()))
    with torch.enable_grad():
        parts = [part.detach().requires_grad_() for part in points.split([*(sizes or (points.shape[-1],))], -1)]
        value = _total(target(parts if sizes else parts[0]))
        found = torch.autograd.grad(value, parts, create_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parts, strict=True)]
        if not any(gradient.requires_grad for gradient in gradients):
            raise RuntimeError("gradient_and_hessian: expected a target with second derivatives, but it has none.")
        hessian = points.new_zeros((*points.shape, points.shape[-1]), dtype=torch.double)
        end = 0
        for group in _groups([part.shape[-1] for part in parts], pass_rows):
            gradient, after = torch.cat(gradients[group], -1), parts[group.start :]
            start, end = end, end + gradient.shape[-1]
            if gradient.requires_grad:
                units = torch.eye(end - start, dtype=points.dtype, device=points.device)
                passes = [_backward(gradient, after, some) for some in units.split(pass_rows)]
                rows = torch.cat(passes).movedim(0, -2).double()  # (R, N, end - start, d - start)
                hessian[..., start:end, start:] = rows
                hessian[..., start:, start:end] = rows.mT
    return torch.cat(gradients, -1).detach().double(), hessian


def hessian_rows(
    target: Target, points: Tensor, num_leaves: int, most: int = LBFGS.rows_per_pass
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of a target whose last P coordinates are leaves, without second derivatives in each other.

    Args:
        target: Log density, ``(S, d)`` to ``(S,)``; each entry depends on its own vector only.
        points: Where, ``(S, d)``.
        num_leaves: P.
        most: Number of evaluations that may be made at once.

    Returns:
        In float64, the gradient, ``(S, d)``; the Hessian's rows of the F coordinates that are no leaves, ``(S, F, d)``;
        and the leaves' second derivatives, ``(S, P)``.

    Raises:
        RuntimeError: If the target has no second derivative.
    """
    free = points.shape[-1] - num_leaves
    pass_rows = max(1, min(LBFGS.rows_per_pass, most // len(points), LBFGS.values_per_pass // points.numel()))
    with torch.enable_grad():
        parts = [part.detach().requires_grad_() for part in points.split([free, num_leaves], -1)]
        gradients = torch.autograd.grad(_total(target(torch.cat(parts, -1))), parts, create_graph=True)
        units = torch.eye(free, dtype=points.dtype, device=points.device)
        passes = [_backward(gradients[0], parts, some) for some in units.split(pass_rows)]
        ones = torch.ones(1, num_leaves, dtype=points.dtype, device=points.device)
        (leaves,) = _backward(gradients[1], parts[1:], ones)
    return torch.cat(gradients, -1).detach().double(), torch.cat(passes).movedim(0, -2).double(), leaves.double()


def _groups(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of consecutive parts: as many as have the rows of one backward pass, or a larger one alone."""
    begin = rows = 0
    for index, size in enumerate(sizes):
        if rows and rows + size > most:
            yield slice(begin, index)
            begin, rows = index, 0
        rows += size
    yield slice(begin, len(sizes))


def _backward(gradient: Tensor, parts: Sequence[Tensor], directions: Tensor) -> Tensor:
    """Products of directions, ``(K, size)``, with the rows of the Hessian that are the derivatives of ``gradient``,
    ``(R, N, size)``, in some parts: ``(K, R, N, sum of their lengths)``; vectorized where torch supports it."""
    many = directions.reshape(-1, *(1,) * (gradient.dim() - 1), gradient.shape[-1]).expand(-1, *gradient.shape)
    derivative = partial(torch.autograd.grad, gradient, parts, retain_graph=True, allow_unused=True)
    found: Sequence[Tensor | None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some operation is not vectorized
            found = derivative(many, is_grads_batched=True)
    except RuntimeError:  # an operation without vectorization; or without a second derivative, which then raises below
        each = zip(*(derivative(one) for one in many), strict=True)
        found = [None if rows[0] is None else torch.stack(rows) for rows in each]
    # Parts that these rows do not depend on, as of independent sites, have none.
    shapes = [(*many.shape[:-1], part.shape[-1]) for part in parts]
    return torch.cat([many.new_zeros(s) if r is None else r for r, s in zip(found, shapes, strict=True)], -1)


def _difference_hessian(target: Target, points: Tensor) -> Tensor:
    """Hessian by central differences of gradients, ``(R, N, d, d)``."""
    rows = []
    for step in LBFGS.difference * torch.eye(points.shape[-1], dtype=points.dtype, device=points.device):
        above, below = (value_and_gradient(target, points + sign * step)[1] for sign in (1.0, -1.0))
        rows.append((above - below) / (2.0 * LBFGS.difference))
    return torch.stack(rows, -1).double()


def _total(value: Tensor) -> Tensor:
    return torch.where(value.isfinite(), value, 0.0).sum()


@torch.enable_grad()
def value_and_gradient(target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value, minus infinity for NaN, and gradient, 0 where there is none; ``(R, N)`` and ``(R, N, d)``."""
    z = z.detach().requires_grad_()
    value = target(z)
    total = _total(value)
    gradient = torch.autograd.grad(total, z)[0] if total.requires_grad else torch.zeros_like(z)
    return torch.where(value.isnan(), -torch.inf, value.detach()), gradient.nan_to_num(0.0, 0.0, 0.0)


def _two_loops(gradient: Tensor, steps: Tensor, gradient_differences: Tensor) -> Tensor:
    """Inverse Hessian times gradient (Nocedal and Wright, Numerical Optimization, algorithm 7.4), row by row."""
    direction = gradient
    memory: list[tuple[Tensor, ...]] = []
    scale: Tensor | float = 1.0
    for step, difference in zip(steps.flip(0), gradient_differences.flip(0), strict=True):
        curvature = (step * difference).sum(-1, keepdim=True)
        usable = curvature > 1e-10 * difference.square().sum(-1, keepdim=True)
        rho = torch.where(usable, 1.0 / torch.where(usable, curvature, 1.0), 0.0)
        alpha = rho * (step * direction).sum(-1, keepdim=True)
        direction = direction - alpha * difference
        if not memory:
            scale = torch.where(usable, curvature / difference.square().sum(-1, keepdim=True).clamp_min(1e-30), 1.0)
        memory.append((step, difference, rho, alpha))
    direction = scale * direction
    for step, difference, rho, alpha in reversed(memory):
        beta = rho * (difference * direction).sum(-1, keepdim=True)
        direction = direction + step * (alpha - beta)
    return direction
