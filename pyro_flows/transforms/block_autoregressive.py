# SPDX-License-Identifier: Apache-2.0
"""L1. The block autoregressive map (BNAF), onto all of R^D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows._checks import check_widths, checked
from pyro_flows.transforms.autoregressive import AutoregressiveTransform

__all__ = ["BlockAutoregressive"]

# Initial weight of the network relative to the identity, and the factor by which its logarithm is trained faster: an
# Adam step changes every parameter by the learning rate, and the gate may have to change by two decades.
INIT_GATE = 0.05
GATE_RATE = 3.0


class _BlockLinear(nn.Module):
    r"""Affine map of ``dim`` groups of units, lower triangular in the groups, with positive diagonal blocks.

    Rows are weight-normalized: a row is :math:`e^{g} w / \|w\|`.
    """

    on_diagonal: Tensor
    below_diagonal: Tensor

    def __init__(self, dim: int, size_in: int, size_out: int) -> None:
        super().__init__()
        self.dim, self.size_in, self.size_out = dim, size_in, size_out
        group_out = torch.arange(dim).repeat_interleave(size_out).unsqueeze(-1)
        group_in = torch.arange(dim).repeat_interleave(size_in)
        self.register_buffer("on_diagonal", group_out == group_in)
        self.register_buffer("below_diagonal", group_out > group_in)
        # This standard deviation keeps the sum over a row's free entries of order one in every group.
        fan_in = (group_out + 1) * size_in
        below = torch.randn(dim * size_out, dim * size_in) / fan_in.to(torch.get_default_dtype()).sqrt()
        self.weight_below = nn.Parameter(below.masked_fill(~self.below_diagonal, 0.0))
        self.log_weight_diagonal = nn.Parameter(0.5 * torch.randn(dim, size_out, size_in))
        self.log_norm = nn.Parameter(torch.zeros(dim * size_out))
        self.bias = nn.Parameter(torch.empty(dim * size_out).uniform_(-1.0, 1.0))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight matrix, ``(dim size_out, dim size_in)``, and the logs of its diagonal blocks,
        ``(dim, size_out, size_in)``."""
        diagonal = self.log_weight_diagonal.exp()
        # (dim, size_out, dim, size_in), filled where the two groups agree.
        spread = torch.diag_embed(diagonal.permute(1, 2, 0)).permute(2, 0, 3, 1)
        weight = torch.where(self.below_diagonal, self.weight_below, 0.0) + spread.reshape_as(self.weight_below)
        norm = weight.norm(dim=-1)
        log_scale = self.log_norm - norm.log()
        return weight * log_scale.exp().unsqueeze(-1), self.log_weight_diagonal + log_scale.reshape(self.dim, -1, 1)

    def forward(self, x: Tensor, log_slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map ``(..., dim * size_in)`` to ``(..., dim * size_out)``.

        ``log_slope`` holds the log-derivatives of each group's units in the group's own coordinate,
        ``(..., dim, size_in)``; None for the coordinates themselves. It is returned as ``(..., dim, size_out)``.
        """
        weight, log_diagonal = self.weights()
        out = F.linear(x, weight, self.bias)
        if log_slope is None:
            return out, log_diagonal.squeeze(-1).expand(x.shape[:-1] + log_diagonal.shape[:-1])
        # Product in log space. The largest term is taken out, so the sum holds one term that is no smaller than a
        # normalized weight.
        largest = log_slope.detach().amax(-1, keepdim=True)
        product = torch.einsum("dij,...dj->...di", log_diagonal.exp(), (log_slope - largest).exp())
        return out, product.log() + largest


def _log_tanh_slope(value: Tensor) -> Tensor:
    """``log(1 - tanh(value)^2)`` without cancellation."""
    return 2.0 * (math.log(2.0) - value - F.softplus(-2.0 * value))


class BlockAutoregressive(AutoregressiveTransform):
    r"""A monotone network for all coordinates at once, as a gated residual (BNAF):

    .. math::
        y = x + L x + \gamma \odot f(x), \qquad \gamma > 0,

    where :math:`L` is strictly lower triangular and :math:`f` is a tanh network whose weights are block triangular
    (:math:`f_i` sees :math:`x_{\le i}`) with positive diagonal blocks, so that :math:`f_i` increases in :math:`x_i`.
    The residual makes the map onto :math:`\mathbb{R}^D`: :math:`f` is bounded, and Pyro's ``BlockAutoregressive``,
    which is :math:`f` alone, gives a density that is zero outside a box. Slopes are at least 1; an affine head sets
    the overall scale. The linear part, which is not in the paper, makes correlated Gaussians easy to learn; :math:`f`
    alone, being bounded, is slow to learn them.

    Initialized near the identity (gates of 0.05), not at it. Sampling takes one pass; there is no inverse in closed
    form.

    Args:
        input_dim: Length of the transformed vector, at least 1.
        context_dim: Length of the context vector, which enters the first layer. 0 means unconditional.
        hidden_factors: Hidden units per coordinate in each hidden layer, each >= 1; at least one layer.

    References:
        De Cao, Titov, Aziz. Block Neural Autoregressive Flow. UAI 2019. arXiv:1904.04676, section 3.
    """

    has_inverse: ClassVar[bool] = False

    @checked(hidden_factors=check_widths)
    def __init__(self, input_dim: int, context_dim: int = 0, *, hidden_factors: Sequence[int] = (8, 8)) -> None:
        super().__init__(input_dim, context_dim)
        if not hidden_factors:
            raise ValueError(
                "BlockAutoregressive: expected hidden_factors to have at least one entry, but got none. Use (8, 8)."
            )
        sizes = [1, *hidden_factors, 1]
        self.layers = nn.ModuleList(_BlockLinear(input_dim, size_in, size_out) for size_in, size_out in pairwise(sizes))
        self.log_gate = nn.Parameter(torch.full((input_dim,), math.log(INIT_GATE) / GATE_RATE))
        self.linear = nn.Parameter(torch.zeros(input_dim, input_dim)) if input_dim > 1 else None
        self.context_layer = nn.Linear(context_dim, input_dim * sizes[1], bias=False) if context_dim else None

    def _map(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, log_slope = self.layers[0](x, None)
        if self.context_layer is not None:
            hidden = hidden + self.context_layer(context)
        for layer in self.layers[1:]:
            log_slope = log_slope + _log_tanh_slope(hidden).reshape((*x.shape, -1))
            hidden, log_slope = layer(torch.tanh(hidden), log_slope)
        straight = x
        if self.linear is not None:
            straight = x + F.linear(x / math.sqrt(self.input_dim), self.linear.tril(-1))
        log_gate = GATE_RATE * self.log_gate
        # d(x + gate f) = 1 + exp(log gate + log f'), in log space.
        return torch.addcmul(straight, log_gate.exp(), hidden), F.softplus(log_gate + log_slope.squeeze(-1))
