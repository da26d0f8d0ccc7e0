# SPDX-License-Identifier: Apache-2.0
"""L2. Gaussian families: the affine head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.registry import register
from pyro_flows.transforms import FlowTransform

__all__ = ["DiagonalNormal", "FullRankNormal", "LowRankNormal"]


@register("diagonal_normal")
@dataclass(frozen=True, kw_only=True)
class DiagonalNormal(FlowSpec):
    """Mean-field Gaussian: what ``AutoNormal`` fits. O(D)."""

    correlates: ClassVar[bool] = False
    best_for: ClassVar[str] = "baseline"
    draw_cost: ClassVar[str] = "one pass, O(D)"

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return []


@register("low_rank_normal")
@dataclass(frozen=True, kw_only=True)
class LowRankNormal(DiagonalNormal):
    """Gaussian with a few correlated directions: diagonal plus low rank. O(D sqrt(D)), capped at rank 20."""

    best_for: ClassVar[str] = "correlated Gaussians, large D"
    draw_cost: ClassVar[str] = "one pass, O(D rank), rank at most 20"
    parameters: ClassVar[str] = "O(D √D) to rank 20"

    head: str = "low_rank"


@register("full_rank_normal")
@dataclass(frozen=True, kw_only=True)
class FullRankNormal(DiagonalNormal):
    """Gaussian with any covariance: what ``AutoMultivariateNormal`` fits. O(D^2)."""

    best_for: ClassVar[str] = "correlated Gaussians"
    practical_dim: ClassVar[int | None] = 1000
    draw_cost: ClassVar[str] = "one pass, O(D²)"
    parameters: ClassVar[str] = "O(D²)"

    head: str = "full_rank"
