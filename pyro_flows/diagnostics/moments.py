# SPDX-License-Identifier: Apache-2.0
"""L7. Means and standard deviations of draws, plain and by importance weights, in one pass of bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Running moments of arrays whose first dimension is that of the draws.

    Weighted sums are kept in units of the largest weight so far, per item, so that nothing overflows.
    """

    def __init__(self) -> None:
        self._count = 0
        self._parts: list[Tensor] = []  # sum of z, of z^2, of w, of w z, of w z^2, all about the center

    def add(self, values: Tensor, log_weights: Tensor) -> None:
        """Add draws.

        Args:
            values: Draws, ``(S, *shape)``.
            log_weights: Log importance weights, ``(S, *shape)``; dimensions may be 1 where elements share a weight.
        """
        values, log_weights = values.double(), log_weights.to(values.device)
        top = log_weights.max(0).values
        if not self._count:
            self._center, self._top = values.mean(0), top
            self._parts = [torch.zeros_like(self._center) for _ in range(5)]
        new_top = torch.maximum(self._top, top)
        rescale = _exp(self._top - new_top)
        weights = _exp(log_weights - new_top)
        centered = values - self._center
        plain = (centered.sum(0), centered.square().sum(0))
        weighted = (weights.sum(0), (weights * centered).sum(0), (weights * centered.square()).sum(0))
        self._parts = [
            *(old + new for old, new in zip(self._parts[:2], plain, strict=True)),
            *(old * rescale + new for old, new in zip(self._parts[2:], weighted, strict=True)),
        ]
        self._top = new_top
        self._count += len(values)

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Unweighted mean and standard deviation of the draws."""
        first, second = (part / self._count for part in self._parts[:2])
        return self._center + first, (second - first.square()).clamp_min(0.0).sqrt()

    @property
    def weighted(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by self-normalized importance sampling."""
        total = self._parts[2]
        first, second = (part / total for part in self._parts[3:])
        return self._center + first, (second - first.square()).clamp_min(0.0).sqrt()


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.nan_to_num(-torch.inf, neginf=-torch.inf).exp()  # minus infinity less itself gives weight zero
