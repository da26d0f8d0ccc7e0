# SPDX-License-Identifier: Apache-2.0
"""L2. Neural spline flow, autoregressive."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_flows._checks import check_int, check_positive
from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.iaf import alternating_order, check_hidden
from pyro_flows.transforms import FlowTransform, SplineAutoregressive

__all__ = ["SplineAutoregressiveFlow"]


@dataclass(frozen=True, kw_only=True)
class SplineAutoregressiveFlow(FlowSpec):
    """Neural spline flow (NSF), autoregressive: each coordinate through a spline that follows the noise of those before
    it, layer by layer in alternating order.

    The most flexible conditionals at one pass to draw; up to a pass per dimension and layer to score another value.
    Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_dims: Widths of each masked network's hidden layers, at least one; raised to twice the flow's
            dimension where below it.
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032.
    """

    num_transforms: int = 2
    hidden_dims: tuple[int, ...] = (64, 64)
    count_bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "SplineAutoregressiveFlow"
        check_int(owner, "num_transforms", self.num_transforms, 1)
        check_hidden(owner, "hidden_dims", self.hidden_dims)
        check_int(owner, "count_bins", self.count_bins, 2, 128)
        check_positive(owner, "bound", self.bound)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [
            SplineAutoregressive(
                input_dim,
                context_dim,
                hidden_dims=self.hidden_dims,
                count_bins=self.count_bins,
                bound=self.bound,
                order=alternating_order(index, input_dim),
            )
            for index in range(self.num_transforms)
        ]
