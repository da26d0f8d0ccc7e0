# SPDX-License-Identifier: Apache-2.0
"""L1. The head of a joint flow over a linear mixed model with a likelihood that factorizes over its effects."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms.heads.linear_mixed import LinearMixedHead
from pyro_flows.transforms.heads.multilevel import MultilevelHead

__all__ = ["DiagonalPrecisionHead"]


class DiagonalPrecisionHead(LinearMixedHead, MultilevelHead):
    r"""A :class:`MultilevelHead` of two levels, with a likelihood factor that depends on the free coordinates,
    :math:`N(b_0 + G (y_f - f_0),\, s^2 e^{2 u^\top (y_f - f_0)})`.

    This is the exact conditional posterior of a linear mixed model in which each datum depends on one effect.

    Args:
        known: Which coordinates have a known prior, ``(D,)``.
        slope: Slopes of prior locations, then log-scales, in free coordinates, ``(2 D, D)``.
        bias: Intercepts of prior locations, then log-scales, ``(2 D,)``.
    """

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        super().__init__(known, slope, bias)
        assert not self.slope[..., self.count_free :].any(), "priors depend on pooled coordinates"

    def log_prior(self, y: Tensor) -> Tensor:
        """Log density of the known priors, not tempered by their share, at values in the original order,
        ``(..., D)``."""
        free, pooled = self._ordered(y).double().split(self.sizes, -1)
        loc, log_scale = self.prior(free.to(self.bias))
        noise = (pooled - loc) * (-log_scale).exp()
        return -log_scale.sum(-1) - 0.5 * noise.square().sum(-1)

    def _pool(self, parents: Tensor, rows: slice, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
        away = self._away(parents[..., : self.count_free])
        loc = F.linear(away, self.own_slope.detach(), loc)
        log_scale = log_scale + (away @ self.own_tilt.detach()).unsqueeze(-1)
        return super()._pool(parents, rows, loc, log_scale)

    def _score_in_parents(self, pooled_score: Tensor, weight: Tensor, to_log_scale: Tensor, to_loc: Tensor) -> Tensor:
        """Includes the likelihood factor, whose location b and log-scale s have d m / d b = w, d m / d s =
        -2 w (1 - w) (b - a) and d log sigma / d s = w."""
        by_prior = super()._score_in_parents(pooled_score, weight, to_log_scale, to_loc)
        by_scale = (weight * to_log_scale - to_loc).sum(-1, keepdim=True) * self.own_tilt
        by_likelihood = (pooled_score * weight) @ self.own_slope + by_scale
        return by_prior + F.pad(by_likelihood, (0, self.sizes[1]))
