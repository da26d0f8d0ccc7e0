# SPDX-License-Identifier: Apache-2.0
"""L1. The affine head of a joint flow over a hierarchy whose data tell each coordinate by itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.heads.affine import AffineHead
from pyro_flows.transforms.heads.conditional_gaussian import ConditionalGaussianHead

__all__ = ["DiagonalPrecisionHead"]


class DiagonalPrecisionHead(ConditionalGaussianHead):
    r"""As :class:`ConditionalGaussianHead`, with likelihood factor that follow the coordinates without a known prior,
    :math:`N(b_0 + G (y_f - f_0),\, s^2 e^{2 u^\top (y_f - f_0)})`.

    That is the exact conditional posterior of a linear mixed model in which each datum is of one effect, a noise scale
    that is a latent included. :math:`G` and :math:`u` are zero at the start, set by :meth:`set_likelihood` and not
    trained.

    Args:
        known: As for :class:`ConditionalGaussianHead`.
        slope: Likewise, but priors follow coordinates that are not known alone.
        bias: Likewise.

    References:
        Papaspiliopoulos, Stumpf-Fetizon, Zanella. Scalable Bayesian computation for crossed and nested hierarchical
        models. Electronic Journal of Statistics 2023. arXiv:2103.10875, section 2, for the conditional posterior.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"origin", "own_slope", "own_tilt"})

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        super().__init__(known, slope, bias)
        assert len(self.sizes) == 2, "priors follow priors"
        free, pooled = self.sizes
        self.own_slope = nn.Parameter(torch.zeros(pooled, free))
        self.own_tilt = nn.Parameter(torch.zeros(free))

    @torch.no_grad()
    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = 1e-3) -> None:
        super().initialize(loc, scale, max_share)
        self.own_slope.zero_()
        self.own_tilt.zero_()

    @torch.no_grad()
    def set_likelihood(
        self, free: tuple[Tensor, Tensor], loc: Tensor, precision: Tensor, slope: Tensor, log_precision_slope: Tensor
    ) -> None:
        """Set the likelihood factor; priors get their full share.

        Args:
            free: Location and scale of the coordinates without a known prior, in order.
            loc: Location of the others at that location, ``b_0``, ``(P,)``.
            precision: Their precision there, positive definite, ``(P, P)``, of which this class keeps the diagonal.
            slope: ``G``, ``(P, F)``.
            log_precision_slope: ``u``, ``(F,)``.
        """
        scale = precision.diagonal().rsqrt()
        ordered = torch.cat([free[0], loc]), torch.cat([free[1], scale.to(loc)])
        AffineHead.initialize(self, *(self._restored(part) for part in ordered))
        self.log_share.zero_()
        self.origin.zero_()
        self.own_slope.copy_(slope)
        self.own_tilt.copy_(log_precision_slope)
        self.set_origin()

    def log_prior(self, y: Tensor) -> Tensor:
        """Log density of the known priors, with their full share, at values in their own order, ``(..., D)``."""
        free, pooled = self._ordered(y).double().split(self.sizes, -1)
        loc, log_scale = self.prior(free.to(self.bias))
        noise = (pooled - loc) * (-log_scale).exp()
        return -log_scale.sum(-1) - 0.5 * noise.square().sum(-1)

    def _away(self, free: Tensor) -> Tensor:
        """How far the coordinates without a known prior are from where the likelihood factor were set."""
        return free - self.origin[0].detach().index_select(0, self.order[: self.count_free])

    def _pool(self, parents: Tensor, rows: slice, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
        away = self._away(parents[..., : self.count_free])
        loc = F.linear(away, self.own_slope.detach(), loc)
        log_scale = log_scale + (away @ self.own_tilt.detach()).unsqueeze(-1)
        return super()._pool(parents, rows, loc, log_scale)

    def _through(self, own: Tensor, weight: Tensor, spread: Tensor, pull: Tensor) -> Tensor:
        """Also by way of the likelihood factor, whose location b and log-scale s have d m / d b = w, d m / d s =
        -2 w (1 - w) (b - a) and d log sigma / d s = w."""
        followed = (own * weight) @ self.own_slope + (weight * spread - pull).sum(-1, keepdim=True) * self.own_tilt
        return super()._through(own, weight, spread, pull) + F.pad(followed, (0, self.sizes[1]))
