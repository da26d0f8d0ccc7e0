# SPDX-License-Identifier: Apache-2.0
"""L1. Base of coupling layers: which coordinates each transforms, and all conditioner networks, stacked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms.base import FlowTransform, as_rows
from pyro_flows.transforms.networks import HEAD_SLOPE, Packed, powerprop, reference_noise

__all__ = ["Couplings"]


class Couplings(FlowTransform):
    r"""A stack of couplings: :math:`y_a = x_a`, and :math:`y_b = f(x_b;\, \phi(x_a))` elementwise.

    Pyro's couplings always condition on the same half and need a ``Permute`` between them, whose permutation is lost on
    save. Here the parts of a random order are transformed in turn: each coupling transforms the last part given all
    others, and then moves it to the front; after a round of all parts a new order is used. The orders are buffers.
    Coordinates of one part do not interact within its round, so a round of three parts leaves out a ninth of all
    triples of coordinates, and one of two parts a quarter.

    All weights of all couplings are one parameter, ``packed``. The networks are centered over standard normal inputs
    (see :class:`~pyro_flows.transforms.networks.CenteredNetwork`), and their last hidden layer is scaled by
    :math:`1/H`: Adam moves each weight by the learning rate, so a sum over H of them would move H times as fast, and
    couplings should only refine what the other layers have learned.

    The networks' outputs are initialized to zero. A subclass implements :meth:`_map` and :meth:`_unmap`, which must be
    the identity for outputs of zero.

    Args:
        input_dim: Length of the transformed vector, at least 2.
        context_dim: Length of the context vector. 0 means unconditional.
        num_transforms: Number of couplings; at least 1.
        hidden_dims: Widths of each network's hidden layers.
        count_raw: Number of network outputs per transformed coordinate.
        num_parts: Number of parts, at least 2; capped at ``input_dim``.
    """

    orders: Tensor
    final_order: Tensor
    reference: Tensor

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        *,
        num_transforms: int,
        hidden_dims: Sequence[int],
        count_raw: int,
        num_parts: int = 2,
    ) -> None:
        super().__init__(input_dim, context_dim)
        num_parts = min(num_parts, input_dim)
        self.split_dim = input_dim - math.ceil(input_dim / num_parts)
        sizes = [self.split_dim + context_dim, *hidden_dims, count_raw * (input_dim - self.split_dim)]
        layers = []
        for layer, (size_in, size_out) in enumerate(pairwise(sizes)):
            bound = 0.0 if layer == len(hidden_dims) else 1.0 / math.sqrt(size_in)
            for shape in ((num_transforms, size_out, size_in), (num_transforms, size_out)):
                layers.append(torch.empty(shape).uniform_(-bound, bound))
        self.packed = Packed(layers)

        # Indices are relative to the order that the previous round left, so a round costs one gather.
        self.num_parts = num_parts
        current = torch.arange(input_dim)
        orders = []
        for first in range(0, num_transforms, num_parts):
            order = torch.randperm(input_dim)
            orders.append(current.argsort()[order])
            moved = min(num_parts, num_transforms - first) * (input_dim - self.split_dim)
            current = order.roll(moved)
        self.register_buffer("orders", torch.stack(orders))
        self.register_buffer("final_order", current.argsort())
        self.register_buffer("reference", reference_noise(sizes[0]))

    def _map(self, b: Tensor, raw: Tensor, *, with_slope: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map the transformed part; returns it, elementwise log-slopes and, if requested, their derivatives in ``b``.

        Shape:
            - b: ``(..., n)``.
            - raw: ``(..., count_raw * n)``.
        """
        raise NotImplementedError

    def _unmap(self, b: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`_map`; returns the part and the elementwise log-slopes of the inverse."""
        raise NotImplementedError

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The unchanged and the transformed part. Two slices would fill two vectors with zeros in the backward pass."""
        return x.split([self.split_dim, x.shape[-1] - self.split_dim], -1)

    def _layers(self) -> Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]:
        """For each coupling, its round's order or None, and [weight, bias, ...], the last bias of which centers it."""
        *inner, weight, bias = self.packed()
        hidden = self.reference.expand(len(bias), *self.reference.shape)
        for w, b in zip(inner[::2], inner[1::2], strict=True):
            hidden = F.silu(torch.baddbmm(b.unsqueeze(1), hidden, w.mT))
        weight = powerprop(weight, HEAD_SLOPE) / hidden.shape[-1]
        bias = powerprop(bias, HEAD_SLOPE) - (weight * hidden.mean(1, keepdim=True)).sum(-1)
        columns = [column.unbind(0) for column in (*inner, weight, bias)]
        orders: list[Tensor | None] = [None] * len(columns[0])
        orders[:: self.num_parts] = self.orders.unbind(0)
        return zip(orders, zip(*columns, strict=True), strict=True)

    def _condition(self, a: Tensor, layer: Sequence[Tensor], context: Tensor | None) -> Tensor:
        """Conditioner network: raw parameters from the unchanged coordinates, in rows."""
        hidden = a if context is None else torch.cat([a, context], -1)
        *inner, weight, bias = layer
        for w, b in zip(inner[::2], inner[1::2], strict=True):
            hidden = F.silu(F.linear(hidden, w, b))
        return F.linear(hidden, weight, bias)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, around = as_rows(x, context)
        log_slopes = []
        for order, layer in self._layers():
            if order is not None:
                rows = rows.index_select(-1, order)
            a, b = self._parts(rows)
            b, log_slope, _ = self._map(b, self._condition(a, layer, around))
            rows = torch.cat([b, a], -1)
            log_slopes.append(log_slope)
        y, total = rows.index_select(-1, self.final_order), torch.cat(log_slopes, -1).sum(-1)
        return y.reshape(x.shape), total.reshape(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, around = as_rows(y, context)
        log_slopes = []
        rows = rows[:, self.final_order.argsort()]
        for order, layer in reversed(list(self._layers())):
            b, a = rows.split([rows.shape[-1] - self.split_dim, self.split_dim], -1)
            b, log_slope = self._unmap(b, self._condition(a, layer, around))
            rows = torch.cat([a, b], -1)
            if order is not None:
                rows = rows[:, order.argsort()]
            log_slopes.append(log_slope)
        return rows.reshape(y.shape), torch.cat(log_slopes, -1).sum(-1).reshape(y.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, around = as_rows(x, context)
        score = score.reshape(rows.shape)
        log_slopes = []
        for order, layer in self._layers():
            if order is not None:
                rows, score = rows.index_select(-1, order), score.index_select(-1, order)
            a, b = self._parts(rows)
            b, log_slope, d_log_slope = self._map(b, self._condition(a, layer, around), with_slope=True)
            with torch.no_grad():
                score_a, score_b = self._parts(score)
                if d_log_slope is not None:
                    score_b = score_b - d_log_slope
                score_b = score_b * (-log_slope).exp()
            # The network's graph exists already: one vector-Jacobian product through it is the only cost.
            (through_a,) = torch.autograd.grad(
                (b, log_slope), a, (score_b, torch.ones_like(log_slope)), retain_graph=True
            )
            score = torch.cat([score_b, score_a - through_a], -1)
            rows = torch.cat([b, a], -1)
            log_slopes.append(log_slope)
        y, total = rows.index_select(-1, self.final_order), torch.cat(log_slopes, -1).sum(-1)
        score = score.index_select(-1, self.final_order)
        return y.reshape(x.shape), total.reshape(x.shape[:-1]), score.reshape(x.shape)
