# SPDX-License-Identifier: Apache-2.0
"""L2. Block neural autoregressive flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int
from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.iaf import check_hidden
from pyro_flows.transforms import BlockAutoregressive, FlowTransform, Permutation

__all__ = ["BlockNAF"]


@dataclass(frozen=True, kw_only=True)
class BlockNAF(FlowSpec):
    """Block neural autoregressive flow (BNAF): monotone block triangular networks as gated residuals, layer by layer in
    alternating order.

    One pass to draw; cannot score values other than its own draws. Starts near the Gaussian, not at it. Parameters grow
    as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_factors: Hidden units per coordinate in each hidden layer; at least one entry, each >= 1.

    References:
        De Cao, Titov, Aziz. Block Neural Autoregressive Flow. UAI 2019. arXiv:1904.04676.
    """

    has_inverse: ClassVar[bool] = False
    identity_start: ClassVar[bool] = False

    num_transforms: int = 2
    hidden_factors: tuple[int, ...] = (8, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("BlockNAF", "num_transforms", self.num_transforms, 1)
        check_hidden("BlockNAF", "hidden_factors", self.hidden_factors)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        layers: list[FlowTransform] = []
        for index in range(self.num_transforms):
            layer = BlockAutoregressive(input_dim, context_dim, hidden_factors=self.hidden_factors)
            if index % 2 == 0 or input_dim == 1:
                layers.append(layer)
                continue
            # Last to first, and back, so that coordinates keep their places for the head.
            backwards = range(input_dim - 1, -1, -1)
            layers += [
                Permutation(input_dim, context_dim, permutation=backwards),
                layer,
                Permutation(input_dim, context_dim, permutation=backwards),
            ]
        return layers
