# SPDX-License-Identifier: Apache-2.0
"""L2. Elementwise splines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer, positive
from pyro_flows.flows.registry import register
from pyro_flows.transforms import FlowTransform, Spline

__all__ = ["ElementwiseSpline"]


@register("spline")
@dataclass(frozen=True, kw_only=True)
class ElementwiseSpline(FlowSpec):
    """One rational-quadratic spline per coordinate: any marginals, no dependence. The family for a single latent.

    Args:
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032.
    """

    correlates: ClassVar[bool] = False
    best_for: ClassVar[str] = "one latent; skewed marginals, no dependence"
    draw_cost: ClassVar[str] = "one pass, O(D)"
    tails: ClassVar[str] = "straight outside the box: Gaussian beyond 5 base standard deviations"

    count_bins: int = integer(16, low=2, high=128)
    bound: float = positive(5.0)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Spline(input_dim, context_dim, count_bins=self.count_bins, bound=self.bound)]
