# SPDX-License-Identifier: Apache-2.0
"""L1. The affine head of a joint flow over a hierarchy whose data tell each coordinate by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.affine import AffineHead
from pyro_flows.transforms.networks import eased
from pyro_flows.transforms.partial_pooling import pool
from pyro_flows.transforms.prior_pooling import PriorPooling

__all__ = ["DiagonalPooling"]


class DiagonalPooling(PriorPooling):
    r"""As :class:`PriorPooling`, with own Gaussians that follow the coordinates without a known prior,
    :math:`N(b_0 + G (y_f - f_0),\, s^2 e^{2 u^\top (y_f - f_0)})`.

    That is the exact conditional posterior of a linear mixed model in which each datum is of one effect, a noise scale
    that is a latent included. :math:`G` and :math:`u` are zero at the start, set by :meth:`follow` and not trained.

    Args:
        known: As for :class:`PriorPooling`.
        slope: Likewise, but priors follow coordinates that are not known alone.
        bias: Likewise.

    References:
        Papaspiliopoulos, Stumpf-Fetizon, Zanella. Scalable Bayesian computation for crossed and nested hierarchical
        models. Electronic Journal of Statistics 2023. arXiv:2103.10875, section 2, for the conditional posterior.
    """

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        super().__init__(known, slope, bias)
        assert len(self.sizes) == 2, "priors follow priors"
        free, pooled = self.sizes
        # Parameters, so that Pyro's parameter store keeps them, but they have no gradient.
        self.own_slope = nn.Parameter(torch.zeros(pooled, free))
        self.own_tilt = nn.Parameter(torch.zeros(free))

    @torch.no_grad()
    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = 1e-3) -> None:
        super().initialize(loc, scale, max_share)
        self.own_slope.zero_()
        self.own_tilt.zero_()

    @torch.no_grad()
    def follow(self, free: tuple[Tensor, Tensor], loc: Tensor, precision: Tensor, slope: Tensor, tilt: Tensor) -> None:
        """Set the own Gaussians; priors get their full share.

        Args:
            free: Location and scale of the coordinates without a known prior, in order.
            loc: Location of the others at that location, ``b_0``, ``(P,)``.
            precision: Their precision there, positive definite, ``(P, P)``, of which this class keeps the diagonal.
            slope: ``G``, ``(P, F)``.
            tilt: ``u``, ``(F,)``.
        """
        scale = precision.diagonal().rsqrt()
        ordered = torch.cat([free[0], loc]), torch.cat([free[1], scale.to(loc)])
        AffineHead.initialize(self, *(self._restored(part) for part in ordered))
        self.log_share.zero_()
        self.origin.zero_()
        self.own_slope.copy_(slope)
        self.own_tilt.copy_(tilt)
        self.settle()

    def prior(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and log-scales of the priors given the others, in order."""
        slope, bias = self.slope[..., : self.count_free].flatten(0, 1), self.bias.flatten()
        loc, log_scale = F.linear(free, slope, bias).chunk(2, -1)
        return loc, log_scale

    def log_prior(self, y: Tensor) -> Tensor:
        """Log density of the known priors, with their full share, at values in their own order, ``(..., D)``."""
        free, pooled = self._ordered(y).double().split(self.sizes, -1)
        loc, log_scale = self.prior(free.to(self.bias))
        noise = (pooled - loc) * (-log_scale).exp()
        return -log_scale.sum(-1) - 0.5 * noise.square().sum(-1)

    def _away(self, free: Tensor) -> Tensor:
        """How far the coordinates without a known prior are from where the own Gaussians were set."""
        return free - self.origin[0].detach().index_select(0, self.order[: self.count_free])

    def _given(self, free: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
        """Location and log-scale of the pooled coordinates, the own Gaussian's weight, and its distance from the
        prior."""
        prior_loc, prior_log_scale = self.prior(free)
        away = self._away(free)
        own_loc = F.linear(away, self.own_slope.detach(), loc)
        own_log_scale = log_scale + (away @ self.own_tilt.detach()).unsqueeze(-1)
        found = pool(prior_loc, prior_log_scale - 0.5 * eased(self.log_share), own_loc, own_log_scale)
        return *found, own_loc - prior_loc

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        (loc, own_loc), (scale, _), (log_scale, own_log_scale) = (part.split(self.sizes, -1) for part in self._own())
        noise, rest = x.split(self.sizes, -1)
        free = torch.addcmul(loc, scale, noise)
        mean, pooled, weight, apart = self._given(free, own_loc, own_log_scale)
        sigma = pooled.exp()
        y = torch.cat([free, torch.addcmul(mean, sigma, rest)], -1)
        return y, log_scale.sum(-1) + pooled.sum(-1), (scale, sigma, weight, apart)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (loc, own_loc), (scale, _), (log_scale, own_log_scale) = (part.split(self.sizes, -1) for part in self._own())
        free, pooled = self._ordered(y).split(self.sizes, -1)
        mean, pooled_log_scale, *_ = self._given(free, own_loc, own_log_scale)
        x = torch.cat([(free - loc) / scale, (pooled - mean) * (-pooled_log_scale).exp()], -1)
        return self._restored(x), -(log_scale.sum(-1) + pooled_log_scale.sum(-1))

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._ordered(x)
        y, total, (scale, sigma, weight, apart) = self._forward(x)
        with torch.no_grad():
            score_free, score_rest = self._ordered(score).split(self.sizes, -1)
            own = score_rest / sigma
            # As in PriorPooling; with w the weight of the own Gaussian, at location b and log-scale s, also
            # d m / d b = w, d m / d s = -2 w (1 - w) (b - a) and d log sigma / d s = w.
            rest = 1.0 - weight
            spread = 1.0 + score_rest * x.split(self.sizes, -1)[1]
            pull = 2.0 * own * apart * weight * rest
            in_prior = torch.cat([own * rest, rest * spread + pull], -1)
            through = in_prior @ self.slope[..., : self.count_free].flatten(0, 1) + (own * weight) @ self.own_slope
            through = through + (weight * spread - pull).sum(-1, keepdim=True) * self.own_tilt
            score = torch.cat([score_free / scale - through, own], -1)
        return self._restored(y), total, self._restored(score)
