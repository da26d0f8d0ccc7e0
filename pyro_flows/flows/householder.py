# SPDX-License-Identifier: Apache-2.0
"""L2. The Householder flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows._checks import check_int
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import DiagonalAffine, FlowTransform, Householder

__all__ = ["HouseholderFlow"]


@dataclass(frozen=True, kw_only=True)
class HouseholderFlow(FlowSpec):
    """Householder flow: a scaled normal, turned by learnt reflections: a Gaussian. O(D num_reflections) parameters.

    Args:
        num_reflections: Number of reflections; even, >= 2.

    References:
        Tomczak, Welling. Improving Variational Auto-Encoders using Householder Flow. 2016. arXiv:1611.09630.
    """

    min_dim: ClassVar[int] = 2

    num_reflections: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("HouseholderFlow", "num_reflections", self.num_reflections, 2)
        if self.num_reflections % 2:
            raise ValueError(
                f"HouseholderFlow: expected num_reflections to be even, but got {self.num_reflections}. "
                "Pairs of equal reflections are how the flow starts at the identity."
            )

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        # The reflections turn a standard normal into itself: without a scale before them they do nothing.
        return [
            DiagonalAffine(input_dim, context_dim),
            Householder(input_dim, context_dim, num_reflections=self.num_reflections),
        ]
