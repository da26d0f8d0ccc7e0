# SPDX-License-Identifier: Apache-2.0
"""L1. Affine couplings of the coordinates that belong to one item, with networks for each item."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows._checks import check_positive, checked, integer, optional
from pyro_flows.transforms.base import FlowTransform, as_rows
from pyro_flows.transforms.networks import HEAD_SLOPE, Packed, powerprop, reference_noise

__all__ = ["ItemCouplings"]


class ItemCouplings(FlowTransform):
    r"""Affine couplings within items: :math:`y_{ij} = x_{ij} e^{s_{ij}} + t_{ij}`, where :math:`s_{ij}` and
    :math:`t_{ij}` are functions of the item's other coordinates and of a few coordinates that all items share.

    Where each item has several latents, such as a weight and its scale, what they do to each other is most of what a
    Gaussian misses, and different for each item. A network that all items share would need some hidden units for each
    of them; here an item has a small one of its own, so that the cost is linear in the number of items.

    The coordinates of an item are transformed in turn. Networks are centered over standard normal inputs
    (:class:`~pyro_flows.transforms.networks.CenteredNetwork`), and their outputs are initialized to zero: the map is
    the identity then. Log-scales are bounded by :math:`c \tanh(\cdot / c)`. All weights are one parameter, ``packed``.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector.
        items: Which coordinates are an item's, ``(num_items, m)`` with m >= 2; each at most once.
        shared: Coordinates that networks read as well, ``(G,)``, none of which is an item's. None means none.
        num_transforms: Number of couplings, >= 1; None takes ``max(4, m)``.
        hidden_dim: Width of the hidden layer of each network, >= 1.
        log_scale_bound: Bound :math:`c` on the absolute log-scale of a coupling, > 0.

    Raises:
        ValueError: If indices are out of range, or one is there twice.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017. arXiv:1605.08803, eq. (7)-(8),
        for affine couplings.
    """

    coordinates: Tensor
    shared: Tensor
    others: Tensor
    back: Tensor
    reference: Tensor

    @checked(
        num_transforms=optional(integer(1)),
        hidden_dim=integer(1),
        log_scale_bound=check_positive,
    )
    def __init__(
        self,
        input_dim: int,
        items: Tensor,
        shared: Tensor | None = None,
        *,
        num_transforms: int | None = None,
        hidden_dim: int = 8,
        log_scale_bound: float = 2.0,
    ) -> None:
        super().__init__(input_dim)
        items = torch.as_tensor(items, dtype=torch.long)
        shared = items.new_zeros(0) if shared is None else torch.as_tensor(shared).to(items)
        if items.dim() != 2 or items.shape[1] < 2 or not len(items):
            raise ValueError(
                f"ItemCouplings: expected items of shape (num_items, m) with m >= 2, but got {tuple(items.shape)}. "
                "Give each item's coordinates as a row."
            )
        used = torch.cat([items.flatten(), shared])
        if len(used.unique()) < len(used) or not 0 <= int(used.min()) <= int(used.max()) < input_dim:
            raise ValueError(
                f"ItemCouplings: expected items and shared to hold coordinates in [0, {input_dim - 1}], each once, but "
                f"got {used.tolist()}. Leave out coordinates that are neither."
            )
        self.num_items, self.length = items.shape
        self.num_transforms = max(4, self.length) if num_transforms is None else num_transforms
        self.log_scale_bound = float(log_scale_bound)
        width = self.length - 1 + len(shared)
        lead = (self.num_transforms, self.num_items)
        self.packed = Packed(
            [
                torch.randn(*lead, width, hidden_dim) / math.sqrt(width),
                torch.randn(*lead, 1, hidden_dim),
                torch.zeros(*lead, hidden_dim, 2),
                torch.zeros(*lead, 1, 2),
            ]
        )
        is_other = torch.ones(input_dim, dtype=torch.bool, device=items.device)
        is_other[items.flatten()] = False
        by_column = items.T.flatten()
        self.register_buffer("coordinates", by_column, persistent=False)
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("others", is_other.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("back", torch.cat([by_column, self.others]).argsort(), persistent=False)
        self.register_buffer("reference", reference_noise(width))

    def _layers(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """For each coupling, the coordinate that it transforms, and the weights and biases of its networks, the last
        bias of which centers them."""
        weight, bias, head, head_bias = self.packed()
        head = powerprop(head, HEAD_SLOPE) / math.sqrt(head.shape[-2])
        center = F.silu(self.reference @ weight + bias).mean(-2, keepdim=True)
        head_bias = powerprop(head_bias, HEAD_SLOPE) - center @ head
        for index, layer in enumerate(zip(weight, bias, head, head_bias, strict=True)):
            yield index % self.length, layer

    def _columns(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """The coordinates of all items, m of ``(num_items, N)``; and the shared ones, ``(N, G)``."""
        found = rows.index_select(-1, self.coordinates).view(-1, self.length, self.num_items).permute(1, 2, 0)
        return list(found.unbind(0)), rows.index_select(-1, self.shared)

    def _rows(self, columns: list[Tensor], rows: Tensor) -> Tensor:
        """Invert :meth:`_columns`: rows, with the items' coordinates replaced."""
        own = torch.stack(columns).permute(2, 0, 1).flatten(1)
        return torch.cat([own, rows.index_select(-1, self.others)], -1).index_select(-1, self.back)

    def _condition(
        self, columns: list[Tensor], shared: Tensor, place: int, layer: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Shift and log-scale of the coordinate at a place, ``(num_items, N)`` each."""
        weight, bias, head, head_bias = layer
        inputs = torch.stack([column for index, column in enumerate(columns) if index != place], -1)
        if shared.shape[-1]:
            inputs = torch.cat([inputs, shared.expand(self.num_items, *shared.shape)], -1)
        hidden = F.silu(torch.baddbmm(bias, inputs, weight))
        shift, log_scale = torch.baddbmm(head_bias, hidden, head).unbind(-1)
        return shift, self.log_scale_bound * torch.tanh(log_scale / self.log_scale_bound)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, _ = as_rows(x, None)
        columns, shared = self._columns(rows)
        total = torch.zeros_like(columns[0])
        for place, layer in self._layers():
            shift, log_scale = self._condition(columns, shared, place, layer)
            columns[place] = torch.addcmul(shift, columns[place], log_scale.exp())
            total = total + log_scale
        return self._rows(columns, rows).reshape(x.shape), total.sum(0).reshape(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, _ = as_rows(y, None)
        columns, shared = self._columns(rows)
        total = torch.zeros_like(columns[0])
        for place, layer in reversed(list(self._layers())):
            shift, log_scale = self._condition(columns, shared, place, layer)
            columns[place] = (columns[place] - shift) * (-log_scale).exp()
            total = total - log_scale
        return self._rows(columns, rows).reshape(y.shape), total.sum(0).reshape(y.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, _ = as_rows(x, None)
        score_rows = score.reshape(rows.shape)
        columns, shared = self._columns(rows)
        scores, score_shared = self._columns(score_rows)
        total = torch.zeros_like(columns[0])
        for place, layer in self._layers():
            # What this coupling reads, apart from what earlier ones have read: gradients are of this coupling alone.
            columns, seen = [column.view_as(column) for column in columns], shared.view_as(shared)
            shift, log_scale = self._condition(columns, seen, place, layer)
            moved = torch.addcmul(shift, columns[place], log_scale.exp())
            inputs = [index for index in range(self.length) if index != place]
            with torch.no_grad():
                scores[place] = scores[place] * (-log_scale).exp()
            # The networks' graph exists already: one vector-Jacobian product through it is the only cost.
            *through, through_shared = torch.autograd.grad(
                (moved, log_scale),
                [*(columns[index] for index in inputs), seen],
                (scores[place], torch.ones_like(log_scale)),
                retain_graph=True,
                allow_unused=not len(self.shared),
            )
            for index, effect in zip(inputs, through, strict=True):
                scores[index] = scores[index] - effect
            if len(self.shared):
                score_shared = score_shared - through_shared
            columns[place] = moved
            total = total + log_scale
        if len(self.shared):
            score_rows = score_rows.index_copy(-1, self.shared, score_shared)
        y, ladj = self._rows(columns, rows), total.sum(0)
        return y.reshape(x.shape), ladj.reshape(x.shape[:-1]), self._rows(scores, score_rows).reshape(x.shape)
