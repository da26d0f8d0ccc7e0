# SPDX-License-Identifier: Apache-2.0
"""L2. Gaussian families: the affine head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import FlowTransform

__all__ = ["DiagonalNormal", "FullRankNormal", "LowRankNormal"]


@dataclass(frozen=True, kw_only=True)
class DiagonalNormal(FlowSpec):
    """Mean-field Gaussian: what ``AutoNormal`` fits. O(D)."""

    correlates: ClassVar[bool] = False

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return []


@dataclass(frozen=True, kw_only=True)
class LowRankNormal(DiagonalNormal):
    """Gaussian with a few correlated directions: diagonal plus low rank. O(D sqrt(D)), capped at rank 20."""

    head: str = "low_rank"


@dataclass(frozen=True, kw_only=True)
class FullRankNormal(DiagonalNormal):
    """Gaussian with any covariance: what ``AutoMultivariateNormal`` fits. O(D^2)."""

    head: str = "full_rank"
