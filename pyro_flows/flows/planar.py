# SPDX-License-Identifier: Apache-2.0
"""L2. Planar flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer
from pyro_flows.flows.registry import register
from pyro_flows.transforms import FlowTransform, Planar

__all__ = ["PlanarFlow"]


@register("planar")
@dataclass(frozen=True, kw_only=True)
class PlanarFlow(FlowSpec):
    """Planar flow: each layer moves mass along one direction. O(D) parameters; weak in many dimensions.

    Args:
        num_transforms: Number of planar maps, >= 1.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770.
    """

    best_for: ClassVar[str] = "teaching; one direction of skew a layer"
    practical_dim: ClassVar[int | None] = 20
    draw_cost: ClassVar[str] = "one pass; eight maps"
    tails: ClassVar[str] = "Gaussian: a draw moves by a bounded amount"

    num_transforms: int = integer(8, low=1)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Planar(input_dim, context_dim) for _ in range(self.num_transforms)]
