# SPDX-License-Identifier: Apache-2.0
"""L4. Mean derivatives over mirrored draws, of which second ones are differences of first ones: they cost less, and
work where an operation has no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.starts.lbfgs import value_and_gradient

__all__ = ["mean_derivatives"]


@dataclass(frozen=True)
class DifferenceSettings:
    """Settings of differences.

    Attributes:
        values_per_pass: Largest number of values in the draws of one pass; limits memory.
    """

    values_per_pass: int = 2**20


SETTINGS = DifferenceSettings()


def mean_derivatives(
    target: Callable[[Tensor], Tensor],
    draws: Tensor,
    rows: Tensor,
    step: float,
    most: int = SETTINGS.values_per_pass,
) -> tuple[Tensor, Tensor] | None:
    """Gradient, ``(D,)``, and some rows of the Hessian, ``(len(rows), D)``, averaged over draws, in float64.

    The rows at a draw and at its mirror image are differences in opposite directions, so that third derivatives cancel.

    Args:
        target: Log density, ``(S, D)`` to ``(S,)``; each entry depends on its own vector only.
        draws: ``(S, D)``, of which the second half mirrors the first one.
        rows: Indices of the rows, ``(R,)``.
        step: Step of the differences, > 0.
        most: Number of evaluations of the target that may be made at once.

    Returns:
        None if no draw has derivatives; those that have none are left out.
    """
    count, dim = draws.shape
    value, at = value_and_gradient(target, draws)
    usable = value.isfinite()
    sign = torch.where(torch.arange(count, device=draws.device) < count // 2, 1.0, -1.0).to(draws)
    total = torch.zeros(len(rows), count, dim, dtype=torch.float64, device=draws.device)
    many = max(1, min(SETTINGS.values_per_pass // draws.numel(), most // count))
    for some, found in zip(rows.split(many), total.split(many), strict=True):
        moves = step * torch.eye(dim, dtype=draws.dtype, device=draws.device)[some].unsqueeze(1) * sign.unsqueeze(-1)
        values, gradients = value_and_gradient(target, (draws + moves).flatten(0, 1))
        found.copy_((gradients.unflatten(0, (-1, count)) - at).double() * (sign / step).unsqueeze(-1))
        usable = usable & values.unflatten(0, (-1, count)).isfinite().all(0)
    if not usable.any():
        return None
    return at[usable].double().mean(0), total[:, usable].mean(1)
