# SPDX-License-Identifier: Apache-2.0
"""L7. Location and covariance of a guide's draws, whatever their tails."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["robust_shape"]


@dataclass(frozen=True)
class ShapeSettings:
    """Settings of robust estimates.

    Attributes:
        quantiles: Probabilities whose quantiles are, for a normal, a standard deviation below and above the median.
        clip: Standard deviations from the median at which draws are clipped, for their covariance.
        ridge: Number that is added to the diagonal of a correlation matrix, for its factorization.
    """

    quantiles: tuple[float, float] = (0.159, 0.841)
    clip: float = 4.0
    ridge: float = 1e-4


def robust_shape(packed: Tensor, settings: ShapeSettings = ShapeSettings()) -> tuple[Tensor, Tensor, Tensor]:
    """Medians ``(N, d)``, standard deviations ``(N, d)`` and Cholesky factors of covariances ``(N, d, d)`` of draws
    ``(S, N, d)``."""
    low, high = settings.quantiles
    levels = torch.tensor([low, 0.5, high], dtype=packed.dtype, device=packed.device)
    below, middle, above = packed.quantile(levels, 0)
    scale = (0.5 * (above - below)).clamp_min(torch.finfo(packed.dtype).tiny)
    standard = ((packed - middle) / scale).clamp(-settings.clip, settings.clip).movedim(0, 1)  # (N, S, d)
    correlation = standard.mT @ standard / len(packed) + settings.ridge * torch.eye(packed.shape[-1]).to(packed)
    return middle, scale, scale.unsqueeze(-1) * torch.linalg.cholesky(correlation)
