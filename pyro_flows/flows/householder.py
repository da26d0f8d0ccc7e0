# SPDX-License-Identifier: Apache-2.0
"""L2. The Householder flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyro_flows._checks import check_int
from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.registry import register
from pyro_flows.transforms import DiagonalAffine, FlowTransform, Householder

__all__ = ["HouseholderFlow"]


def _check_reflections(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is an even integer >= 2."""
    check_int(owner, name, value, 2)
    if value % 2:
        raise ValueError(
            f"{owner}: expected {name} to be even, but got {value}. "
            "Pairs of equal reflections are how the flow starts at the identity."
        )


@register("householder")
@dataclass(frozen=True, kw_only=True)
class HouseholderFlow(FlowSpec):
    """Householder flow: a Gaussian, a scaled normal rotated by learned reflections. O(D num_reflections) parameters.

    Args:
        num_reflections: Number of reflections; even, >= 2.

    References:
        Tomczak, Welling. Improving Variational Auto-Encoders using Householder Flow. 2016. arXiv:1611.09630.
    """

    min_dim: ClassVar[int] = 2
    best_for: ClassVar[str] = "correlated Gaussians, large D"
    draw_cost: ClassVar[str] = "one pass; a step a reflection"

    num_reflections: int = field(default=8, metadata={"check": _check_reflections})

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        # Reflections leave a standard normal unchanged: without a scale before them they have no effect.
        return [
            DiagonalAffine(input_dim, context_dim),
            Householder(input_dim, context_dim, num_reflections=self.num_reflections),
        ]
