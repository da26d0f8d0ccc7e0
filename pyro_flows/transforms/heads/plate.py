# SPDX-License-Identifier: Apache-2.0
"""L1. The affine head of a plate's local latents: partial pooling of each item with its parents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.context import ContextLayout
from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads.affine import AffineHead
from pyro_flows.transforms.heads.base import decode_gaussian
from pyro_flows.transforms.heads.pooling import INIT_SHARE, init_share, pool, unpool
from pyro_flows.transforms.networks import CenteredNetwork, powerprop

__all__ = ["PlateHead"]


class PlateHead(AffineHead):
    r"""Elementwise :math:`y = m + \sigma \odot x`, where :math:`m, \sigma` are those of a product of two Gaussians.

    One Gaussian, :math:`N(a(g), s(g)^2)`, is shared by all items of a plate and depends on an item's parent latents
    :math:`g` (globals, a parent group); the other, :math:`N(m_i, s_i^2)`, is the item's site approximation:

    .. math::
        \sigma^{-2} = \gamma s(g)^{-2} + s_i^{-2}, \qquad m = \sigma^2 (\gamma s(g)^{-2} a(g) + s_i^{-2} m_i).

    This is the exact conditional posterior of a Gaussian hierarchy, including funnels and unequal groups, if the shared
    Gaussian is the prior and the site approximation the item's likelihood. With :math:`\gamma \to 0` it is a free
    Gaussian for each item. The prior is used where it is known; where it is not, location and log-scale of the shared
    Gaussian are linear in :math:`g` (and :math:`\gamma = 1`), plus a part that is bilinear in :math:`g` and the item's
    features, for covariates in its prior. With a known prior these shift the item's site approximation. A small network
    of :math:`g` and the features adds a nonlinear correction.

    The context is an :class:`~pyro_flows.transforms.context.ItemContext` as one vector. Its site approximation is
    relative to a reference Gaussian that all items share, with the location in units of ``unit``.

    Args:
        input_dim: Length of an item's vector.
        parent_dim: Length of the latents that an item depends on; may be 0.
        feature_dim: Length of an item's features.
        known: Which coordinates have a known prior, ``(input_dim,)``; None means none.
        hidden_dims: Widths of the network's hidden layers; if empty, there is no network.
        log_scale_bound: Bound on what ``parents`` adds to a log-scale, > 0.

    References:
        Gelman, Hill. Data Analysis Using Regression and Multilevel Models. 2007, eq. (12.1), for partial pooling.
    """

    known: Tensor
    context_layout: ContextLayout

    def __init__(
        self,
        input_dim: int,
        *,
        parent_dim: int,
        feature_dim: int,
        known: Tensor | None = None,
        hidden_dims: tuple[int, ...] = (32, 32),
        log_scale_bound: float = 2.0,
    ) -> None:
        super().__init__(input_dim)
        self.log_scale_bound = FixedParameter(torch.tensor(float(log_scale_bound)))
        self.has_prior = known is not None and bool(known.any())
        self.context_layout = ContextLayout(parent_dim, feature_dim, input_dim, self.has_prior)
        self.context_dim = self.context_layout.size
        self.register_buffer("known", known if known is not None else torch.zeros(input_dim, dtype=torch.bool))
        self.unit = FixedParameter(torch.ones(input_dim))
        if self.has_prior:
            self.log_share = nn.Parameter(torch.zeros(input_dim))
        if parent_dim:
            self.slope = nn.Parameter(torch.zeros(2 * input_dim, parent_dim))
            self.tilt = nn.Parameter(torch.zeros(2 * input_dim, feature_dim * parent_dim))
            self.network = None
            if hidden_dims:
                self.network = CenteredNetwork(self.context_layout.network_dim, hidden_dims, 2 * input_dim)

    @torch.no_grad()
    def initialize_items(
        self,
        loc: Tensor,
        scale: Tensor,
        prior: Tensor | None = None,
        *,
        max_share: float = INIT_SHARE,
        in_scales: bool = False,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Initialize every item to ``N(loc, diag(scale)^2)``.

        Args:
            loc: Locations, ``(..., input_dim)``, one for each item.
            scale: Scales, ``(..., input_dim)``, or ``(input_dim,)`` for all items.
            prior: Initial location and log-scale of the prior, ``(2 * input_dim,)`` or one for each item, if any is
                known.
            max_share: Largest share of the precision that the prior has; its factor is 1 unless that exceeds this.
            in_scales: Whether an optimizer's steps are in units of the items' scales, for an initialization near their
                posteriors, or in the latents' own units, as in ``AutoNormal``.
            mean: Mean over all items, ``(items, n)`` to ``(n,)``, which may be more than those here; None takes these.

        Returns:
            The items' site approximations, ``(..., 2 * input_dim)``.
        """
        mean = mean or (lambda values: values.mean(0))
        center = mean(loc.reshape(-1, self.input_dim))
        typical = scale if scale.dim() == 1 else mean(scale.reshape(-1, self.input_dim).log()).exp()
        # Half of the precision each, where the other Gaussian is free and initialized at the center.
        reference = math.sqrt(2.0) * typical
        site_loc, site_log_scale = unpool(loc, scale, center, reference.log())
        if self.has_prior:
            assert prior is not None
            prior_loc, prior_log_scale = prior.chunk(2, -1)
            typical_log_scale = mean(prior_log_scale.reshape(-1, self.input_dim))
            log_share = init_share(typical, typical_log_scale, max_share)
            prior_log_scale = prior_log_scale - 0.5 * powerprop(log_share)
            pooled_loc, pooled_log_scale = unpool(loc, scale, prior_loc, prior_log_scale)
            site_loc = torch.where(self.known, pooled_loc, site_loc)
            site_log_scale = torch.where(self.known, pooled_log_scale, site_log_scale)
            reference = torch.where(self.known, typical, reference)
            self.log_share.copy_(torch.where(self.known, log_share, 0.0))
        self.initialize(center, reference)
        self.unit.copy_(reference if in_scales else torch.ones_like(reference))
        site_loc = (site_loc - center) / self.unit
        return torch.cat([site_loc, (site_log_scale - reference.log()).expand_as(site_loc)], -1)

    def gaussian_parameters(self) -> Iterator[nn.Parameter]:
        yield from super().gaussian_parameters()
        if self.has_prior:
            yield self.log_share

    def _gaussian(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert context is not None
        parents, features, site, prior = self.context_layout.split(context)
        site_loc, site_log_scale = site.chunk(2, -1)
        loc, scale, log_scale = decode_gaussian(self.raw.value)
        site_loc = torch.addcmul(loc, self.unit.detach(), site_loc)
        site_log_scale = log_scale + site_log_scale
        if parents.shape[-1]:
            shared = F.linear(parents, powerprop(self.slope))
            if features.shape[-1]:
                pairs = (features.unsqueeze(-1) * parents.unsqueeze(-2)).flatten(-2)
                shared = shared + F.linear(pairs, powerprop(self.tilt))
            shift, more = shared.chunk(2, -1)
            if self.has_prior:
                site_loc = site_loc + torch.where(self.known, scale * shift, 0.0)
            loc = torch.addcmul(loc, scale, shift)
            log_scale = log_scale + self._bounded(more)
        if self.has_prior:
            prior_loc, prior_log_scale = prior.chunk(2, -1)
            loc = torch.where(self.known, prior_loc, loc)
            known_log_scale = prior_log_scale - 0.5 * powerprop(self.log_share)
            log_scale = torch.where(self.known, known_log_scale, log_scale)
        mean, pooled, _ = pool(loc, log_scale, site_loc, site_log_scale)
        if parents.shape[-1] and self.network is not None:
            shift, more = self.network(torch.cat([parents, features], -1)).chunk(2, -1)
            pooled = pooled + self._bounded(more)
            mean = torch.addcmul(mean, pooled.exp(), shift)
        return mean, pooled.exp(), pooled.sum(-1)

    def _bounded(self, log_scale: Tensor) -> Tensor:
        bound = self.log_scale_bound.detach()
        return bound * torch.tanh(log_scale / bound)
