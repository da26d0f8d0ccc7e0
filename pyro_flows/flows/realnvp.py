# SPDX-License-Identifier: Apache-2.0
"""L2. RealNVP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int, check_sizes
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import AffineCouplings, FlowTransform

__all__ = ["RealNVP"]


@dataclass(frozen=True, kw_only=True)
class RealNVP(FlowSpec):
    """Real-valued non-volume-preserving flow (RealNVP): affine couplings. Cheap in both directions.

    Args:
        num_transforms: Number of couplings, >= 2; half of the coordinates move in each.
        hidden_dims: Widths of each conditioner's hidden layers.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017. arXiv:1605.08803.
    """

    min_dim: ClassVar[int] = 2

    num_transforms: int = 8
    hidden_dims: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("RealNVP", "num_transforms", self.num_transforms, 2)
        check_sizes("RealNVP", "hidden_dims", self.hidden_dims)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [
            AffineCouplings(input_dim, context_dim, num_transforms=self.num_transforms, hidden_dims=self.hidden_dims)
        ]
