# SPDX-License-Identifier: Apache-2.0
"""L2. Neural autoregressive flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int
from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.iaf import alternating_order, check_hidden
from pyro_flows.transforms import FlowTransform, NeuralAutoregressive

__all__ = ["NAF"]


@dataclass(frozen=True, kw_only=True)
class NAF(FlowSpec):
    """Neural autoregressive flow (NAF, deep sigmoidal flow): each coordinate through a mixture of sigmoids that follows
    the noise of those before it, layer by layer in alternating order.

    One pass to draw; cannot score values other than its own draws. No box, unlike splines. Starts within 0.01 of the
    Gaussian, not at it. Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_dims: Widths of each masked network's hidden layers, at least one; raised to twice the flow's
            dimension where below it.
        num_units: Sigmoids per coordinate, >= 2; one alone is affine.

    References:
        Huang, Krueger, Lacoste, Courville. Neural Autoregressive Flows. ICML 2018. arXiv:1804.00779.
    """

    has_inverse: ClassVar[bool] = False
    identity_start: ClassVar[bool] = False

    num_transforms: int = 2
    hidden_dims: tuple[int, ...] = (64, 64)
    num_units: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("NAF", "num_transforms", self.num_transforms, 1)
        check_hidden("NAF", "hidden_dims", self.hidden_dims)
        check_int("NAF", "num_units", self.num_units, 2)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [
            NeuralAutoregressive(
                input_dim,
                context_dim,
                hidden_dims=self.hidden_dims,
                num_units=self.num_units,
                order=alternating_order(index, input_dim),
            )
            for index in range(self.num_transforms)
        ]
