# SPDX-License-Identifier: Apache-2.0
"""L1. Heads of a joint flow over a linear mixed model: the likelihood factor is linear in the free coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads.base import encode_gaussian
from pyro_flows.transforms.heads.conditional_gaussian import ConditionalGaussianHead

__all__ = ["LinearMixedHead"]


class LinearMixedHead(ConditionalGaussianHead):
    r"""Base of heads whose pooled coordinates depend on free ones only, as does their likelihood factor, with location
    :math:`b_0 + G (y_f - f_0)` and precision :math:`e^{-2 u^\top (y_f - f_0)} K_0`.

    This is the exact conditional posterior of a linear mixed model, including a latent noise scale. :math:`G` and
    :math:`u` are initialized to zero, set by :meth:`set_likelihood` and not trained.

    Args:
        known: Which coordinates have a known prior, ``(D,)``.
        slope: Slopes of prior locations, then log-scales, ``(2 D, D)``; the latter depend on free coordinates only.
        bias: Intercepts of prior locations, then log-scales, ``(2 D,)``.

    References:
        Papaspiliopoulos, Stumpf-Fetizon, Zanella. Scalable Bayesian computation for crossed and nested hierarchical
        models. Electronic Journal of Statistics 2023. arXiv:2103.10875, section 2, for the conditional posterior.
    """

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        super().__init__(known, slope, bias)
        assert not self.slope[1][:, self.count_free :].any(), "scales of priors depend on pooled coordinates"
        free, pooled = self.sizes = [self.count_free, len(known) - self.count_free]
        # G and u, under the names in saved guides.
        self.own_slope = FixedParameter(torch.zeros(pooled, free))
        self.own_tilt = FixedParameter(torch.zeros(free))

    @torch.no_grad()
    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = 1e-3) -> None:
        super().initialize(loc, scale, max_share)
        self.own_slope.zero_()
        self.own_tilt.zero_()

    @torch.no_grad()
    def set_likelihood(
        self, free: tuple[Tensor, Tensor], loc: Tensor, precision: Tensor, slope: Tensor, log_precision_slope: Tensor
    ) -> None:
        """Set the likelihood factor; the priors' shares are set to 1.

        Args:
            free: Location and scale of the coordinates without a known prior, in order.
            loc: Location of the others at that location, ``b_0``, ``(P,)``.
            precision: Their precision there, positive definite, ``(P, P)``; a diagonal head keeps only the diagonal.
            slope: ``G``, ``(P, F)``.
            log_precision_slope: ``u``, ``(F,)``.
        """
        scale = precision.diagonal().rsqrt()
        self._set_sites(free, (loc, scale.to(loc)))
        self.own_slope.copy_(slope)
        self.own_tilt.copy_(log_precision_slope)
        self.set_origin()

    def _set_sites(self, free: tuple[Tensor, Tensor], pooled: tuple[Tensor, Tensor]) -> None:
        """Set locations and scales of site approximations, without an origin, and the priors' shares to 1."""
        ordered = (torch.cat(parts) for parts in zip(free, pooled, strict=True))
        self.raw.set(encode_gaussian(*(self._restored(part) for part in ordered)))
        self.log_share.zero_()
        self.origin.zero_()

    def full_prior(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`prior` of all pooled coordinates, whatever the head uses of it at the moment."""
        return self.prior(free)

    @property
    def own_densities(self) -> list[slice]:
        """Coordinates, in the original order, of sites that :meth:`log_prior` leaves out, since only the model computes
        their priors as precisely as it does."""
        return []

    def log_prior(self, y: Tensor) -> Tensor:
        """Log density of the known priors up to a constant, not tempered by their share, at values in the original
        order, ``(..., D)``; without :attr:`own_densities`."""
        raise NotImplementedError
