# SPDX-License-Identifier: Apache-2.0
"""L1. The autoregressive rational-quadratic spline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows._checks import check_positive, checked, integer
from pyro_flows.transforms.autoregressive import MaskedAutoregressive
from pyro_flows.transforms.spline import RationalQuadratic

__all__ = ["SplineAutoregressive"]


# A spline that is trained before the head has found the posterior can converge to a narrow part of it.
RAW_RATE = 0.2


class SplineAutoregressive(MaskedAutoregressive):
    r"""Autoregressive map of each coordinate by a monotone rational-quadratic spline, whose knots and slopes depend on
    the noise of the coordinates before it: :math:`y_i = \mathrm{RQS}(x_i;\, h_i(x_{<i}))`.

    Sampling takes one pass; scoring any other value takes up to ``input_dim`` passes. Pyro's helper with
    ``order="quadratic"`` raises; these splines are rational-quadratic.

    Initialized to the identity.

    Warning:
        Linear outside ``[-bound, bound]``; mean 0 and variance 1: put an affine layer after it to move or scale
        mass.

    Args:
        input_dim: Length of the transformed vector, at least 1.
        context_dim: Length of the context vector. 0 means unconditional.
        hidden_dims: Widths of the masked network's hidden layers; raised to ``2 * input_dim`` if smaller.
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.
        order: Coordinates from first to last. None means 0 to ``input_dim - 1``.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032, section 3.
    """

    @checked(count_bins=integer(2, 128), bound=check_positive)
    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        count_bins: int = 8,
        bound: float = 5.0,
        order: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim, torch.zeros(input_dim, 3 * count_bins - 1), hidden_dims, order)
        self.bound = bound

    def _univariate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope, _ = RationalQuadratic(RAW_RATE * params.mT, self.bound)(x)
        return y, log_slope

    def _univariate_inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope = RationalQuadratic(RAW_RATE * params.mT, self.bound).inverse(y)
        return x, -log_slope
