# SPDX-License-Identifier: Apache-2.0
"""L2. Planar flows."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_flows._checks import check_int
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import FlowTransform, Planar

__all__ = ["PlanarFlow"]


@dataclass(frozen=True, kw_only=True)
class PlanarFlow(FlowSpec):
    """Planar flow: each layer moves mass along one direction. O(D) parameters; weak in many dimensions.

    Args:
        num_transforms: Number of planar maps, >= 1.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770.
    """

    num_transforms: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("PlanarFlow", "num_transforms", self.num_transforms, 1)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Planar(input_dim, context_dim) for _ in range(self.num_transforms)]
