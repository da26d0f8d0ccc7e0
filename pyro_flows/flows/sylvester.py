# SPDX-License-Identifier: Apache-2.0
"""L2. The Sylvester flow."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_flows._checks import check_int
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import FlowTransform, Sylvester

__all__ = ["SylvesterFlow"]


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

    num_transforms: int = 4
    num_ortho: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("SylvesterFlow", "num_transforms", self.num_transforms, 1)
        check_int("SylvesterFlow", "num_ortho", self.num_ortho, 1)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Sylvester(input_dim, context_dim, num_ortho=self.num_ortho) for _ in range(self.num_transforms)]
