# SPDX-License-Identifier: Apache-2.0
"""L1. A transform of the leading coordinates of a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows._checks import check_type
from pyro_flows.transforms.base import FlowTransform

__all__ = ["Leading"]


class Leading(FlowTransform):
    """Maps the leading coordinates by a transform, and leaves the others as they are.

    Args:
        input_dim: Length of the vector.
        inner: An unconditional transform of at most so many coordinates, of which the score can be pushed through.

    Raises:
        TypeError: If ``inner`` is not a FlowTransform.
        ValueError: If it is longer than the vector, or conditional.
    """

    def __init__(self, input_dim: int, inner: FlowTransform) -> None:
        super().__init__(input_dim)
        check_type("Leading", "inner", inner, FlowTransform)
        if inner.input_dim > input_dim or inner.context_dim:
            raise ValueError(
                f"Leading: expected an unconditional transform of at most {input_dim} coordinates, but got one of "
                f"{inner.input_dim} with a context of {inner.context_dim}."
            )
        self.inner = inner
        self.has_inverse = inner.has_inverse  # type: ignore[misc]
        self.one_pass_inverse = inner.one_pass_inverse  # type: ignore[misc]
        self.has_score = inner.has_score  # type: ignore[misc]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = self.inner.input_dim
        return x[..., :count], x[..., count:]

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, rest = self._split(x)
        y, ladj = self.inner.forward_and_ladj(first)
        return torch.cat([y, rest], -1), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, rest = self._split(y)
        x, ladj = self.inner.inverse_and_ladj(first)
        return torch.cat([x, rest], -1), ladj

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (first, rest), (own, other) = self._split(x), self._split(score)
        y, ladj, own = self.inner.forward_with_score(first, own)
        return torch.cat([y, rest], -1), ladj, torch.cat([own, other], -1)
