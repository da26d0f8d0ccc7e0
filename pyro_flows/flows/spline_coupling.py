# SPDX-License-Identifier: Apache-2.0
"""L2. Neural spline flow with couplings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int, check_positive, check_sizes
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import FlowTransform, SplineCouplings

__all__ = ["SplineCoupling"]


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

    num_transforms: int = 4
    hidden_dims: tuple[int, ...] = (64, 64)
    count_bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "SplineCoupling"
        check_int(owner, "num_transforms", self.num_transforms, 2)
        check_sizes(owner, "hidden_dims", self.hidden_dims)
        check_int(owner, "count_bins", self.count_bins, 2, 128)
        check_positive(owner, "bound", self.bound)

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
