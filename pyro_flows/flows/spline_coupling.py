# SPDX-License-Identifier: Apache-2.0
"""L2. Neural spline flow with couplings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer, positive, widths
from pyro_flows.flows.registry import register
from pyro_flows.transforms import FlowTransform, SplineCouplings

__all__ = ["SplineCoupling"]


@register("spline_coupling")
@dataclass(frozen=True, kw_only=True)
class SplineCoupling(FlowSpec):
    """Neural spline flow, RQ-NSF (C): rational-quadratic spline couplings. Flexible, one pass in both directions.

    Args:
        num_transforms: Number of couplings, >= 2; half of the coordinates move in each.
        hidden_dims: Widths of each network's hidden layers.
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032.
    """

    min_dim: ClassVar[int] = 2
    best_for: ClassVar[str] = "bent and multimodal posteriors, both directions cheap"
    practical_dim: ClassVar[int | None] = 1000
    draw_cost: ClassVar[str] = "one pass; four couplings"
    tails: ClassVar[str] = "as ``spline``"
    parameters: ClassVar[str] = "O(D) at fixed widths"

    num_transforms: int = integer(4, low=2)
    hidden_dims: tuple[int, ...] = widths((64, 64))
    count_bins: int = integer(8, low=2, high=128)
    bound: float = positive(5.0)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [
            SplineCouplings(
                input_dim,
                context_dim,
                num_transforms=self.num_transforms,
                hidden_dims=self.hidden_dims,
                count_bins=self.count_bins,
                bound=self.bound,
            )
        ]
