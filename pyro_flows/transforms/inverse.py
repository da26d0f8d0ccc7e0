# SPDX-License-Identifier: Apache-2.0
"""L1. The inverse of a transform, as a transform."""

from __future__ import annotations

from torch import Tensor

from pyro_flows._checks import check_type
from pyro_flows.transforms.base import FlowTransform

__all__ = ["Inverse"]


class Inverse(FlowTransform):
    r"""The inverse of another transform: :math:`y = f^{-1}(x)`.

    Swaps the cheap and the expensive direction. The inverse of an inverse autoregressive map (one pass to sample, one
    per dimension to score) is a masked autoregressive map (one pass per dimension to sample, one pass to score).

    Args:
        transform: The map to invert; its parameters are shared, not copied.

    Raises:
        NotImplementedError: If ``transform`` has no inverse.
    """

    def __init__(self, transform: FlowTransform) -> None:
        check_type("Inverse", "transform", transform, FlowTransform)
        if not transform.has_inverse:
            raise NotImplementedError(
                f"Inverse: expected a transform with an inverse, but got {type(transform).__name__}. "
                "Use one whose `has_inverse` is true."
            )
        super().__init__(transform.input_dim, transform.context_dim)
        self.transform = transform

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(y, context)
