# SPDX-License-Identifier: Apache-2.0
"""L1. The model-ordered affine map: each block of coordinates is an affine map of its noise, given the blocks before
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows._checks import check_widths, checked, integer, optional
from pyro_flows.transforms.base import FlowTransform, as_rows
from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.networks import INPUT_BOUND, POWERPROP_SLOPE, Packed, paced, powerprop, reference_noise

__all__ = ["SiteOrderedAffine"]

# Blocks up to this size get a dense triangular factor; above it parameters would grow as the square.
MAX_DENSE_BLOCK = 256
# Of the trained tensors, those that a Gaussian has too: log-scales, triangular factors, linear parts of conditioners.
LINEAR_PARTS = (0, 1, 4)


class _Conditioners(NamedTuple):
    """The conditioners of S blocks with D coordinates in total, as functions of up to G parents each.

    Attributes:
        hidden: First layers, ``(S H, G)``, zero where a block would depend on itself or those after it.
        hidden_bias: ``(S H,)``.
        inner: Further layers, each ``(S, H', H)`` and ``(S, H')``.
        heads: Last layers, for shifts and log-scales, each ``(2 size, H')``.
        linear: The linear parts, for locations, shifts and log-scales of each block in turn, ``(3 D, G)``; or their
            inner factors if they are of low rank, ``(S rank, G)``.
        outer: In the latter case the outer factors, each ``(3 size, rank)``.
        bias: Offsets that center the networks, ``(3 D,)``.
        shift: Free parts of the shifts, ``(D,)``.
        log_scale_bound: ``c``.
    """

    hidden: Tensor
    hidden_bias: Tensor
    inner: list[tuple[Tensor, Tensor]]
    heads: tuple[Tensor, ...]
    linear: Tensor
    outer: tuple[Tensor, ...]
    bias: Tensor
    shift: Tensor
    log_scale_bound: Tensor


class _Weights(NamedTuple):
    """All trained parameters, as the map uses them.

    Attributes:
        log_scale: ``a``, ``(input_dim,)``.
        below: ``C_s - I`` of each block, or None for zero.
        conditioners: None where no block is conditional.
    """

    log_scale: Tensor
    below: list[Tensor | None]
    conditioners: _Conditioners | None


class SiteOrderedAffine(FlowTransform):
    r"""Affine map of blocks :math:`s = 1, \dots, S` in model order, each affine in its own noise:

    .. math::
        y_s = B_s y_{<s} + e^{l_s(y_{<s})} \odot (e^{a_s} \odot C_s x_s + r_s(y_{<s})), \qquad
        l_s = c \tanh(\tilde l_s / c),

    with :math:`C_s` unit lower triangular, :math:`a_s` free, and :math:`r_s, \tilde l_s` a linear map plus a small
    network, all initialized to zero. It contains every full-rank Gaussian (the linear part), every non-centered
    hierarchy and Neal's funnel exactly. The nonlinear part of the location is scaled by the conditional scale, so that
    an error of the network shrinks with the neck of a funnel. Sampling takes one short step per block; scoring a value
    is one parallel pass.

    The cost of a draw is per operation, and that of an optimizer's step per parameter: the weights of all blocks are in
    one tensor per layer, and all layers in one parameter, ``packed``; the effect of a block on later ones is added to
    all of their inputs at once. Networks are centered over standard normal inputs, and their last layers are scaled and
    powerpropagated, as in :class:`~pyro_flows.transforms.networks.CenteredNetwork`.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional.
        block_sizes: Sizes of the blocks in order; they add up to ``input_dim``.
        hidden_dims: Widths of each block's network.
        rank: Rank of the linear parts; None means full rank, which is also used if no block has more parents than
            ``rank``. With a rank, the number of parameters is linear in ``input_dim``.
        log_scale_bound: Bound :math:`c` on the absolute conditional log-scale, > 0. Neal's funnel needs about 5, but a
            scale of up to :math:`e^5` can cause equally large outliers early in training. It is stored with the
            weights, which depend on it.

    References:
        Ko, Domke. Model-Informed Flows for Bayesian Inference. NeurIPS 2025. arXiv:2505.24243, for the order and
        the affine conditionals on earlier latents with a translation inside the scale.
    """

    reference: Tensor
    is_parent: Tensor
    row_is_parent: Tensor
    block_of_head: Tensor
    bias_of_row: Tensor
    is_below: Tensor

    @checked(block_sizes=check_widths, rank=optional(integer(1)))
    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        block_sizes: Sequence[int],
        hidden_dims: Sequence[int] = (32, 32),
        rank: int | None = None,
        log_scale_bound: float = 2.0,
    ) -> None:
        super().__init__(input_dim, context_dim)
        if sum(block_sizes) != input_dim:
            raise ValueError(
                f"SiteOrderedAffine: expected block_sizes to add up to input_dim, {input_dim}, but got {block_sizes}."
            )
        self.block_sizes = tuple(block_sizes)
        self.rank = rank
        self.log_scale_bound = FixedParameter(torch.tensor(float(log_scale_bound)))
        dense = [torch.ones(size, size).tril(-1).bool().flatten() for size in self.block_sizes if _is_dense(size)]
        is_below = torch.cat([torch.zeros(0).bool(), *dense])
        self.register_buffer("is_below", is_below, persistent=False)
        # The first block has no parents but a context.
        self.sizes = self.block_sizes if context_dim else self.block_sizes[1:]
        conditioners = self._add_conditioners(hidden_dims) if self.sizes else []
        parts = [torch.zeros(input_dim), torch.zeros(len(is_below)), *conditioners]
        # Of the linear parts, which make a Gaussian, a trust region limits steps of the value: at zero, the weight
        # takes a step ten times as long.
        units = [1.0 / POWERPROP_SLOPE if index in LINEAR_PARTS else 1.0 for index in range(len(parts))]
        self.packed = Packed(parts, units if self.rank is None else None)

    def _add_conditioners(self, hidden_dims: Sequence[int]) -> list[Tensor]:
        """Add the buffers of the conditioners; returns the initial values of the arguments of :meth:`_conditioners`."""
        count, dim = len(self.sizes), sum(self.sizes)
        width = self.context_dim + self.input_dim - self.block_sizes[-1]
        if self.rank is not None and width <= self.rank:
            self.rank = None
        starts = [self.context_dim + self.input_dim - sum(self.sizes[index:]) for index in range(count)]
        layers = []
        fan_in = torch.tensor(starts, dtype=torch.get_default_dtype()).unsqueeze(-1)
        for size_in, size_out in pairwise([width, *hidden_dims]):
            weight, bias = 2.0 * torch.rand(count, size_out, size_in) - 1.0, 2.0 * torch.rand(count, size_out) - 1.0
            layers += [weight * fan_in.rsqrt().unsqueeze(-1), bias * fan_in.rsqrt()]
            fan_in = torch.full((count, 1), float(size_out))
        heads, shift = torch.zeros(2 * dim, hidden_dims[-1]), torch.zeros(dim)
        linear = torch.zeros(3 * dim, width if self.rank is None else self.rank)
        project = torch.randn(count * (self.rank or 0), width) / math.sqrt(width)
        self.register_buffer("reference", reference_noise(width))

        sizes = torch.tensor(self.sizes)
        is_parent = torch.arange(width) < torch.tensor(starts).unsqueeze(-1)  # (S, G)
        rows = 3 * sizes if self.rank is None else torch.full_like(sizes, self.rank)
        bent = torch.cat([torch.arange(3 * size) >= size for size in self.sizes])  # of the linear parts' rows
        self.register_buffer("is_parent", is_parent.unsqueeze(1), persistent=False)
        self.register_buffer("row_is_parent", is_parent.repeat_interleave(rows, 0), persistent=False)
        self.register_buffer(
            "block_of_head", torch.arange(count).repeat_interleave(2 * sizes).unsqueeze(-1), persistent=False
        )
        self.register_buffer("bias_of_row", bent.cumsum(0) * bent, persistent=False)  # 0: none, as for locations
        return [heads, shift, linear, project, *layers]

    def _weights(self) -> _Weights:
        log_scale, below, *conditioners = self.packed()
        return _Weights(
            self._paced(log_scale), self._below(below), self._conditioners(*conditioners) if conditioners else None
        )

    def _paced(self, weight: Tensor) -> Tensor:
        """Powerpropagated weights of the linear parts. Where these are of low rank, weights are thousands, and those
        that have grown should go on to grow faster: with gradients of the values, all of them follow the noise."""
        return paced(weight) if self.rank is None else powerprop(weight)

    def _conditioners(
        self, heads: Tensor, shift: Tensor, linear: Tensor, project: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor
    ) -> _Conditioners:
        """Conditioners from their trained tensors: ``project`` is empty where the linear parts have full rank, and the
        last ones are weights and biases of the networks in turn."""
        hidden = (weight * self.is_parent).flatten(0, 1)
        inner = list(zip(rest[::2], rest[1::2], strict=True))
        heads = powerprop(heads) / math.sqrt(heads.shape[-1])
        linear = self._paced(linear)
        outer: tuple[Tensor, ...] = ()
        if self.rank is not None:
            linear, outer = project, linear.split([3 * size for size in self.sizes])
        linear = linear * self.row_is_parent
        center = self._networks(self.reference, hidden, bias.flatten(), inner).mean(1)
        centering = (heads @ center.mT).gather(-1, self.block_of_head).squeeze(-1)
        centering = F.pad(-centering, (1, 0)).index_select(0, self.bias_of_row)
        by_block = heads.split([2 * size for size in self.sizes])
        bound = self.log_scale_bound.detach()
        return _Conditioners(hidden, bias.flatten(), inner, by_block, linear, outer, centering, shift, bound)

    def _networks(
        self, parents: Tensor, hidden: Tensor, bias: Tensor, inner: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Last hidden layers of all networks, ``(S, N, H')``."""
        found = F.silu(F.linear(parents, hidden, bias)).unflatten(-1, (len(self.sizes), -1)).transpose(0, 1)
        for inner_weight, inner_bias in inner:
            found = F.silu(torch.baddbmm(inner_bias.unsqueeze(1), found, inner_weight.mT))
        return found

    def _condition(self, parents: Tensor, use: _Conditioners) -> tuple[Tensor, Tensor]:
        """Locations and log-scales of all conditional blocks from their parents, in one pass."""
        networks = self._networks(parents.clamp(-INPUT_BOUND, INPUT_BOUND), use.hidden, use.hidden_bias, use.inner)
        if self.rank is None:
            linear = F.linear(parents, use.linear, use.bias)
        else:
            parts = zip(F.linear(parents, use.linear).split(self.rank, -1), use.outer, strict=True)
            linear = torch.cat([part @ weight.mT for part, weight in parts], -1) + use.bias
        found = []
        for rows, hidden, head, size in zip(
            linear.split([3 * size for size in self.sizes], -1), networks.unbind(0), use.heads, self.sizes, strict=True
        ):
            loc, bent = rows.split([size, 2 * size], -1)
            found.append((loc, *torch.addmm(bent, hidden, head.mT).chunk(2, -1)))
        loc, shift, log_scale = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        log_scale = _bounded(log_scale, use.log_scale_bound)
        return torch.addcmul(loc, log_scale.exp(), shift + use.shift), log_scale

    def _draw(self, noise: Tensor, context: Tensor | None, use: _Conditioners) -> tuple[Tensor, Tensor]:
        """Values, block by block, and conditional log-scales of the conditional ones.

        Args:
            noise: ``e^a C x`` and the free part of the shift.
            context: Context of each row.
            use: The conditioners.
        """
        widths = self.block_sizes[:-1] if context is None else (self.context_dim, *self.block_sizes[:-1])
        effects = zip(use.hidden.split(widths, -1), use.linear.split(widths, -1), strict=True)
        # Partial sums for all later blocks: first-layer inputs of their networks, and outputs of their linear parts.
        hidden = use.hidden_bias
        linear = use.bias if self.rank is None else torch.zeros_like(use.linear[:, 0])

        def condition_on(value: Tensor) -> None:
            nonlocal hidden, linear
            to_hidden, to_linear = next(effects)
            clamped = value.clamp(-INPUT_BOUND, INPUT_BOUND)
            hidden = torch.addmm(hidden, clamped, to_hidden[-hidden.shape[-1] :].mT)
            linear = torch.addmm(linear, value, to_linear[-linear.shape[-1] :].mT)

        parts = list(noise.split(self.block_sizes, -1))
        values: list[Tensor] = []
        log_scales: list[Tensor] = []
        if context is not None:
            condition_on(context)
        else:
            values.append(parts.pop(0))
            condition_on(values[0])
        layers = [(weight.unbind(0), bias.unbind(0)) for weight, bias in use.inner]
        biases = use.bias.split([3 * size for size in self.sizes])
        for index, (size, part, head) in enumerate(zip(self.sizes, parts, use.heads, strict=True)):
            width, rows = len(use.hidden_bias) // len(self.sizes), self.rank or 3 * size
            own, hidden = hidden.split([width, hidden.shape[-1] - width], -1)
            effect, linear = linear.split([rows, linear.shape[-1] - rows], -1)
            if self.rank is not None:
                effect = torch.addmm(biases[index], effect, use.outer[index].mT)
            own = F.silu(own)
            for weights, bias in layers:
                own = F.silu(F.linear(own, weights[index], bias[index]))
            loc, bent = effect.split([size, 2 * size], -1)
            shift, log_scale = torch.addmm(bent, own, head.mT).chunk(2, -1)
            log_scales.append(_bounded(log_scale, use.log_scale_bound))
            values.append(torch.addcmul(loc, log_scales[-1].exp(), shift + part))
            if hidden.shape[-1]:
                condition_on(values[-1])
        return torch.cat(values, -1), torch.cat(log_scales, -1)

    def _below(self, entries: Tensor) -> list[Tensor | None]:
        """``C_s - I`` of each block, or None for zero, from the squares of dense blocks end to end."""
        squares = [size**2 for size in self.block_sizes if _is_dense(size)]
        found = iter((self._paced(entries) * self.is_below).split(squares) if squares else ())
        return [next(found).view(size, size) if _is_dense(size) else None for size in self.block_sizes]

    def _by_block(
        self, function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, below: list[Tensor | None]
    ) -> Tensor:
        """Apply a function of rows and ``C_s - I`` to each block of ``(N, D)`` that has the latter."""
        if all(matrix is None for matrix in below):
            return rows
        parts = zip(rows.split(self.block_sizes, -1), below, strict=True)
        return torch.cat([part if matrix is None else function(part, matrix) for part, matrix in parts], -1)

    def _padded(self, conditional: Tensor) -> Tensor:
        """Prepend zeros for the first block, if that is not conditional."""
        return F.pad(conditional, (self.input_dim - conditional.shape[-1], 0))

    def _forward(self, x: Tensor, context: Tensor | None, weights: _Weights) -> tuple[Tensor, Tensor]:
        """Values and log-scales of rows."""
        free, below, use = weights
        mixed = self._by_block(_times_transposed, x, below)
        if use is None:
            return mixed * free.exp(), free.expand_as(mixed)
        noise = torch.addcmul(self._padded(use.shift), mixed, free.exp())
        y, log_scale = self._draw(noise, context, use)
        return y, free + self._padded(log_scale)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_scale = self._forward(*as_rows(x, context), self._weights())
        return y.reshape(x.shape), log_scale.sum(-1).reshape(x.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, around = as_rows(x, context)
        _, below, use = weights = self._weights()
        y, log_scale = self._forward(rows, around, weights)
        with torch.no_grad():
            own = self._by_block(_times_inverse, score.reshape(rows.shape), below) * (-log_scale).exp()
        if use is not None:
            # d log q / d y_<s, through the conditioners only.
            before = y[..., : -self.block_sizes[-1]].detach().requires_grad_()
            loc, conditional = self._condition(_beside(around, before), use)
            with torch.no_grad():
                to_loc = own[..., -loc.shape[-1] :]
                to_log_scale = torch.addcmul(torch.ones_like(loc), to_loc, y[..., -loc.shape[-1] :] - loc)
            (through,) = torch.autograd.grad((loc, conditional), before, (to_loc, to_log_scale), retain_graph=True)
            own = own - F.pad(through, (0, self.block_sizes[-1]))
        return y.reshape(x.shape), log_scale.sum(-1).reshape(x.shape[:-1]), own.reshape(x.shape)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, around = as_rows(y, context)
        free, below, use = self._weights()
        log_scale = free.expand_as(rows)
        if use is not None:
            loc, conditional = self._condition(_beside(around, rows[..., : -self.block_sizes[-1]]), use)
            rows, log_scale = rows - self._padded(loc), log_scale + self._padded(conditional)
        x = self._by_block(_times_transposed_inverse, rows * (-log_scale).exp(), below)
        return x.reshape(y.shape), -log_scale.sum(-1).reshape(y.shape[:-1])


def _bounded(log_scale: Tensor, bound: Tensor) -> Tensor:
    return bound * torch.tanh(log_scale / bound)


def _is_dense(size: int) -> bool:
    return 1 < size <= MAX_DENSE_BLOCK


def _beside(context: Tensor | None, rows: Tensor) -> Tensor:
    return rows if context is None else torch.cat([context, rows], -1)


def _times_transposed(rows: Tensor, below: Tensor) -> Tensor:
    """``rows @ (I + below).T``."""
    return torch.addmm(rows, rows, below.mT)


def _times_inverse(rows: Tensor, below: Tensor) -> Tensor:
    """``rows @ inv(I + below)``."""
    return torch.linalg.solve_triangular(below, rows, upper=False, left=False, unitriangular=True)


def _times_transposed_inverse(rows: Tensor, below: Tensor) -> Tensor:
    """``rows @ inv(I + below).T``."""
    return torch.linalg.solve_triangular(below.mT, rows, upper=True, left=False, unitriangular=True)
