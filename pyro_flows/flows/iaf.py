# SPDX-License-Identifier: Apache-2.0
"""L2. Inverse autoregressive flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int, check_positive, check_sizes
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import AffineAutoregressive, FlowTransform

__all__ = ["IAF", "alternating_order", "check_hidden"]


@dataclass(frozen=True, kw_only=True)
class IAF(FlowSpec):
    """Inverse autoregressive flow (IAF): each coordinate affine given the noise of those before it, layer by layer in
    alternating order.

    One pass to draw and to score the draw; up to a pass per dimension and layer to score another value. Contains
    every full-rank Gaussian. Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_dims: Widths of each masked network's hidden layers, at least one; raised to twice the flow's
            dimension where below it.
        log_scale_bound: Largest absolute log-scale of one layer, > 0.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling. Improving Variational Inference with Inverse
        Autoregressive Flow. NeurIPS 2016. arXiv:1606.04934.
    """

    min_dim: ClassVar[int] = 2

    num_transforms: int = 2
    hidden_dims: tuple[int, ...] = (64, 64)
    log_scale_bound: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_int(owner, "num_transforms", self.num_transforms, 1)
        check_hidden(owner, "hidden_dims", self.hidden_dims)
        check_positive(owner, "log_scale_bound", self.log_scale_bound)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [
            AffineAutoregressive(
                input_dim,
                context_dim,
                hidden_dims=self.hidden_dims,
                log_scale_bound=self.log_scale_bound,
                order=alternating_order(index, input_dim),
            )
            for index in range(self.num_transforms)
        ]


def alternating_order(index: int, input_dim: int) -> list[int]:
    """First to last in even layers, last to first in odd ones, so that every coordinate meets every other."""
    order = list(range(input_dim))
    return order if index % 2 == 0 else order[::-1]


def check_hidden(owner: str, name: str, value: tuple[int, ...]) -> None:
    """Raise ValueError unless ``value`` is a tuple of at least one integer >= 1."""
    check_sizes(owner, name, value)
    if not value:
        raise ValueError(f"{owner}: expected {name} to have at least one entry, but got (). Use (64,).")
