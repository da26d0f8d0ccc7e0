# SPDX-License-Identifier: Apache-2.0
"""L1. The model-ordered affine map: each block of coordinates is an affine map of its own noise, steered by the
blocks before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.affine import SHIFT_RATE
from pyro_flows.transforms.base import FlowTransform, expand_context
from pyro_flows.transforms.networks import CenteredNetwork, eased

__all__ = ["SiteOrderedAffine"]

# Blocks up to this size get a dense triangular factor; above it parameters would grow as the square.
MAX_DENSE_BLOCK = 256


class _Block(nn.Module):
    """How one block's location and log-scale follow the coordinates before it (and the context)."""

    def __init__(
        self, given_dim: int, size: int, hidden_dims: Sequence[int], rank: int | None, log_scale_bound: float
    ) -> None:
        super().__init__()
        self.log_scale_bound = log_scale_bound
        self.project = None
        if rank is not None and given_dim > rank:
            self.project = nn.Parameter(torch.randn(rank, given_dim) / math.sqrt(given_dim))
        self.network = CenteredNetwork(given_dim, hidden_dims, 2 * size)
        self.skip = nn.Parameter(torch.zeros(3 * size, given_dim if self.project is None else self.project.shape[0]))
        self.shift = nn.Parameter(torch.zeros(size))

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        linear = given if self.project is None else F.linear(given, self.project)
        loc, shift, log_scale = F.linear(linear, eased(self.skip)).chunk(3, -1)
        bent_shift, bent_log_scale = self.network(given).chunk(2, -1)
        log_scale = self.log_scale_bound * torch.tanh((log_scale + bent_log_scale) / self.log_scale_bound)
        return torch.addcmul(loc, log_scale.exp(), shift + bent_shift + SHIFT_RATE * self.shift), log_scale


class SiteOrderedAffine(FlowTransform):
    r"""Blocks :math:`s = 1, \dots, S` in model order, each affine in its own noise:

    .. math::
        y_s = B_s y_{<s} + e^{l_s(y_{<s})} \odot (e^{a_s} \odot C_s x_s + r_s(y_{<s})), \qquad
        l_s = c \tanh(\tilde l_s / c),

    with :math:`C_s` unit lower triangular, :math:`a_s` free, and :math:`r_s, \tilde l_s` a linear map plus a small
    network, all zero at the start. It contains every full-rank Gaussian (the linear part), every non-centred hierarchy
    and Neal's funnel exactly. What is nonlinear in the location is scaled by the conditional scale, so that an error of
    the network shrinks with the neck of a funnel. Drawing takes one short step a block; scoring a value is one parallel
    pass.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional.
        block_sizes: Sizes of the blocks in order; they add up to ``input_dim``.
        hidden_dims: Widths of each block's network.
        rank: Rank of the linear parts; None means full rank. With a rank, parameters are linear in ``input_dim``.
        log_scale_bound: Bound :math:`c` on the absolute conditional log-scale, > 0. A funnel needs about 5.

    References:
        Ko, Domke. Model-Informed Flows for Bayesian Inference. NeurIPS 2025. arXiv:2505.24243, for the order and
        the affine conditionals on earlier latents with a translation inside the scale.
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        block_sizes: Sequence[int],
        hidden_dims: Sequence[int] = (32, 32),
        rank: int | None = None,
        log_scale_bound: float = 7.0,
    ) -> None:
        super().__init__(input_dim, context_dim)
        assert sum(block_sizes) == input_dim, (block_sizes, input_dim)
        self.block_sizes = tuple(block_sizes)
        self.blocks = nn.ModuleDict()
        self.below_diagonal = nn.ParameterDict()
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        start = 0
        for index, size in enumerate(self.block_sizes):
            if start + context_dim > 0:
                self.blocks[str(index)] = _Block(start + context_dim, size, hidden_dims, rank, log_scale_bound)
            if 1 < size <= MAX_DENSE_BLOCK:
                self.below_diagonal[str(index)] = nn.Parameter(torch.zeros(size, size))
            start += size

    def _factor(self, index: int) -> Tensor | None:
        """``C_s``, or None for the identity."""
        key = str(index)
        if key not in self.below_diagonal:
            return None
        below = self.below_diagonal[key]
        return eased(below.tril(-1)) + torch.eye(below.shape[0], dtype=below.dtype, device=below.device)

    def _steer(self, index: int, given: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """``B_s y_<s + e^l_s r_s`` and ``l_s``, or None where there is nothing to condition on."""
        key = str(index)
        if key not in self.blocks:
            return None
        if context is not None:
            given = torch.cat([expand_context(context, given), given], -1)
        loc_log_scale: tuple[Tensor, Tensor] = self.blocks[key](given)
        return loc_log_scale

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, total, _ = self._forward(x, None, context)
        return y, total

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, total, score_y = self._forward(x, score, context)
        assert score_y is not None
        return y, total, score_y

    def _forward(self, x: Tensor, score: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        total = x.new_zeros(x.shape[:-1])
        y = x[..., :0]
        scores: list[Tensor] = []
        through: list[Tensor] = []
        free_log_scales = eased(self.log_scale).split(self.block_sizes, -1)
        start = 0
        for index, (part, log_scale) in enumerate(zip(x.split(self.block_sizes, -1), free_log_scales, strict=True)):
            size = part.shape[-1]
            factor = self._factor(index)
            mixed = part if factor is None else part @ factor.mT
            if score is not None:
                score_s = score[..., start : start + size]
                if factor is not None:
                    score_s = _solve_rows(factor.detach(), score_s, upper=False)
            steer = self._steer(index, y, context)
            if steer is not None:
                loc, more = steer
                log_scale = log_scale + more
            mixed = mixed * log_scale.exp()
            total = total + log_scale.sum(-1)
            if score is not None:
                with torch.no_grad():
                    score_s = score_s * (-log_scale).exp()
                    weight = torch.addcmul(torch.ones_like(mixed), score_s, mixed)
                if steer is not None and start > 0:
                    # d log q / d y_<s, through this block's conditioner alone.
                    through += torch.autograd.grad((loc, log_scale), y, (score_s, weight), retain_graph=True)
                scores.append(score_s)
            if steer is not None:
                mixed = mixed + loc
            y = mixed if start == 0 else torch.cat([y, mixed], -1)
            start += size
        if score is None:
            return y, total, None
        score_y = torch.cat(scores, -1).detach().clone()
        for gradient in through:
            score_y[..., : gradient.shape[-1]] -= gradient
        return y, total, score_y

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        free_log_scale = eased(self.log_scale)
        inverse_scales = (-free_log_scale).exp().split(self.block_sizes, -1)
        total = y.new_zeros(y.shape[:-1]) - free_log_scale.sum()
        parts = []
        start = 0
        for index, size in enumerate(self.block_sizes):
            part = y[..., start : start + size]
            steer = self._steer(index, y[..., :start], context)
            if steer is not None:
                loc, log_scale = steer
                part = (part - loc) * (-log_scale).exp()
                total = total - log_scale.sum(-1)
            part = part * inverse_scales[index]
            factor = self._factor(index)
            parts.append(part if factor is None else _solve_rows(factor.mT, part, upper=True))
            start += size
        return torch.cat(parts, -1), total


def _solve_rows(factor: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    """``rows @ inv(factor)`` for any number of leading dimensions."""
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.linalg.solve_triangular(factor, flat, upper=upper, left=False).reshape(rows.shape)
