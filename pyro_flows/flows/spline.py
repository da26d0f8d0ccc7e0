# SPDX-License-Identifier: Apache-2.0
"""L2. Elementwise splines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int, check_positive
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import FlowTransform, Spline

__all__ = ["ElementwiseSpline"]


@dataclass(frozen=True, kw_only=True)
class ElementwiseSpline(FlowSpec):
    """One rational-quadratic spline a coordinate: any marginals, no dependence. The family for a single latent.

    Args:
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032.
    """

    correlates: ClassVar[bool] = False

    count_bins: int = 16
    bound: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("ElementwiseSpline", "count_bins", self.count_bins, 2, 128)
        check_positive("ElementwiseSpline", "bound", self.bound)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Spline(input_dim, context_dim, count_bins=self.count_bins, bound=self.bound)]
