# SPDX-License-Identifier: Apache-2.0
"""L1. The affine autoregressive map (inverse autoregressive flow)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows._checks import checked
from pyro_flows.transforms.autoregressive import MaskedAutoregressive

__all__ = ["AffineAutoregressive"]


class AffineAutoregressive(MaskedAutoregressive):
    r"""Autoregressive map in which each coordinate is affine in its noise, given the noise of those before it:

    .. math::
        y_i = t_i(x_{<i}) + e^{l_i(x_{<i})} x_i, \qquad l = c \tanh(\tilde l / c).

    Sampling takes one pass; scoring any other value takes up to ``input_dim`` passes. The linear skip contains every
    full-rank Gaussian. Pyro's ``AffineAutoregressive`` clamps the log-scale but passes the gradient through unclamped,
    and its inverse fails in float64; here the bound is smooth and the inverse keeps the value's dtype.

    Initialized to the identity.

    Args:
        input_dim: Length of the transformed vector, at least 1; a single coordinate is conditional on the context
            only.
        context_dim: Length of the context vector. 0 means unconditional.
        hidden_dims: Widths of the masked network's hidden layers; raised to ``2 * input_dim`` if smaller.
        log_scale_bound: Bound :math:`c` on the absolute log-scale, > 0.
        order: Coordinates from first to last. None means 0 to ``input_dim - 1``.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling. Improving Variational Inference with Inverse
        Autoregressive Flow. NeurIPS 2016. arXiv:1606.04934, eq. (10).
    """

    @checked()
    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        log_scale_bound: float = 3.0,
        order: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim, torch.zeros(input_dim, 2), hidden_dims, order)
        self.log_scale_bound = log_scale_bound

    def _shift_log_scale(self, params: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``t`` and ``l``, of the shape of ``like``."""
        shift, log_scale = params.unbind(-1)
        log_scale = self.log_scale_bound * torch.tanh(log_scale / self.log_scale_bound)
        return shift.expand_as(like), log_scale.expand_as(like)

    def _univariate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_log_scale(params, x)
        return torch.addcmul(shift, log_scale.exp(), x), log_scale

    def _univariate_inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_log_scale(params, y)
        return (y - shift) * (-log_scale).exp(), log_scale
