# SPDX-License-Identifier: Apache-2.0
"""L2. The Sylvester flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer
from pyro_flows.flows.registry import register
from pyro_flows.transforms import FlowTransform, Sylvester

__all__ = ["SylvesterFlow"]


@register("sylvester")
@dataclass(frozen=True, kw_only=True)
class SylvesterFlow(FlowSpec):
    """Sylvester flow: each layer moves mass along several directions. O(D num_ortho) parameters.

    Args:
        num_transforms: Number of Sylvester maps, >= 1.
        num_ortho: Number of directions per map, >= 1; at most ``input_dim`` are used.

    References:
        Van den Berg, Hasenclever, Tomczak, Welling. Sylvester Normalizing Flows for Variational Inference. UAI 2018.
        arXiv:1803.05649.
    """

    best_for: ClassVar[str] = "a few directions of skew in many dimensions"
    draw_cost: ClassVar[str] = "one pass; four maps"
    tails: ClassVar[str] = "Gaussian: a draw moves by a bounded amount"

    num_transforms: int = integer(4, low=1)
    num_ortho: int = integer(8, low=1)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Sylvester(input_dim, context_dim, num_ortho=self.num_ortho) for _ in range(self.num_transforms)]
