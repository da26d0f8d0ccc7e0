# SPDX-License-Identifier: Apache-2.0
"""L1. A fixed permutation, which is saved with the flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.transforms.base import FlowTransform

__all__ = ["Permutation"]


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

    def __init__(
        self, input_dim: int, context_dim: int = 0, *, permutation: Sequence[int] | Tensor | None = None
    ) -> None:
        super().__init__(input_dim, context_dim)
        order = torch.randperm(input_dim) if permutation is None else torch.as_tensor(permutation).long()
        if sorted(order.tolist()) != list(range(input_dim)):
            raise ValueError(
                f"Permutation: expected permutation to hold 0 to {input_dim - 1} once each, but got {order.tolist()}. "
                "Use torch.randperm(input_dim)."
            )
        self.register_buffer("permutation", order)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[..., self.permutation], x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y[..., self.permutation.argsort()], y.new_zeros(y.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.forward_and_ladj(x)
        return y, ladj, score.detach()[..., self.permutation]
