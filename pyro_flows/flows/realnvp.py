# SPDX-License-Identifier: Apache-2.0
"""L2. RealNVP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer, widths
from pyro_flows.flows.registry import register
from pyro_flows.transforms import AffineCouplings, FlowTransform

__all__ = ["RealNVP"]


@register("realnvp")
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
    best_for: ClassVar[str] = "smooth dependence; large D"
    practical_dim: ClassVar[int | None] = 3000
    draw_cost: ClassVar[str] = "one pass; eight couplings"
    tails: ClassVar[str] = r"Gaussian given the other coordinates; each coupling scales by at most :math:`e^{\pm 1}`"
    parameters: ClassVar[str] = "O(D) at fixed widths"

    num_transforms: int = integer(8, low=2)
    hidden_dims: tuple[int, ...] = widths((64, 64))

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [
            AffineCouplings(input_dim, context_dim, num_transforms=self.num_transforms, hidden_dims=self.hidden_dims)
        ]
