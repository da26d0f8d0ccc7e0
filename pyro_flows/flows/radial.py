# SPDX-License-Identifier: Apache-2.0
"""L2. Radial flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer
from pyro_flows.flows.registry import register
from pyro_flows.transforms import FlowTransform, Radial

__all__ = ["RadialFlow"]


@register("radial")
@dataclass(frozen=True, kw_only=True)
class RadialFlow(FlowSpec):
    """Radial flow: each layer moves mass towards a center or away. O(D) parameters; weak in many dimensions.

    Args:
        num_transforms: Number of radial maps, >= 1.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770.
    """

    best_for: ClassVar[str] = "teaching; mass around centers"
    practical_dim: ClassVar[int | None] = 20
    draw_cost: ClassVar[str] = "one pass; eight maps"
    tails: ClassVar[str] = "Gaussian: a draw moves by a bounded amount"

    num_transforms: int = integer(8, low=1)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Radial(input_dim, context_dim) for _ in range(self.num_transforms)]
