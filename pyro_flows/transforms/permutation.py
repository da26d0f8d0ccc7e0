# SPDX-License-Identifier: Apache-2.0
"""L1. A fixed permutation, which is saved with the flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows._checks import checked, shown
from pyro_flows.transforms.base import FlowTransform

__all__ = ["Permutation", "as_order"]


def as_order(owner: str, name: str, input_dim: int, order: Any) -> Tensor:
    """The indices 0 to ``input_dim - 1`` in a given order, as a tensor.

    Raises:
        ValueError: If they are not these, once each.
    """
    try:
        indices = torch.as_tensor(order)
        is_order = not indices.is_floating_point() and sorted(indices.tolist()) == list(range(input_dim))
    except (TypeError, ValueError, RuntimeError):  # not numbers
        is_order = False
    if not is_order:
        raise ValueError(
            f"{owner}: expected {name} to hold 0 to {input_dim - 1} once each, but got {shown(order)}. Use "
            "torch.arange(input_dim) or torch.randperm(input_dim)."
        )
    return indices.long()


class Permutation(FlowTransform):
    r"""Reorders coordinates: :math:`y_i = x_{\pi(i)}`; the log-determinant is 0.

    Used between autoregressive layers, so that the order differs between layers. Pyro's ``Permute`` does not save its
    permutation in the ``state_dict``, so a loaded flow is a different one; here it is a buffer.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector, which is ignored.
        permutation: The indices 0 to ``input_dim - 1`` in their new order. None draws a random order.

    Raises:
        ValueError: If ``permutation`` is not a permutation of ``range(input_dim)``.
    """

    permutation: Tensor

    @checked()
    def __init__(
        self, input_dim: int, context_dim: int = 0, *, permutation: Sequence[int] | Tensor | None = None
    ) -> None:
        super().__init__(input_dim, context_dim)
        random = torch.randperm(input_dim) if permutation is None else permutation
        self.register_buffer("permutation", as_order("Permutation", "permutation", input_dim, random))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[..., self.permutation], x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y[..., self.permutation.argsort()], y.new_zeros(y.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.forward_and_ladj(x)
        return y, ladj, score.detach()[..., self.permutation]
