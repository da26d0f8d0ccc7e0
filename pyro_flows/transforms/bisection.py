# SPDX-License-Identifier: Apache-2.0
"""L1. Roots of increasing functions, for maps whose inverse has no closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["solve_tanh"]


@torch.no_grad()
def solve_tanh(target: Tensor, outer: Tensor, inner: Tensor, shift: Tensor) -> Tensor:
    r"""Solve :math:`z + r \tanh(s z + c) = t` for :math:`z`, elementwise and to the precision of the dtype.

    The left side increases in :math:`z` if :math:`r s > -1`, and the root lies within :math:`|r|` of :math:`t`, so
    bisection needs one step per bit of precision. Gradients are left to the caller: one Newton step on the result,
    with gradients enabled, has the derivatives of the root.

    Args:
        target: :math:`t`.
        outer: :math:`r`.
        inner: :math:`s`.
        shift: :math:`c`. All four broadcast against each other.
    """
    low = target - outer.abs() - inner * 0.0 - shift * 0.0
    high = 2.0 * target - low
    for _ in range(2 - math.floor(math.log2(torch.finfo(target.dtype).eps))):
        middle = 0.5 * (low + high)
        above = middle + outer * torch.tanh(inner * middle + shift) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)
