# SPDX-License-Identifier: Apache-2.0
"""L1. The affine head of a joint flow over a hierarchy: what the data say of a coordinate, pooled with its prior given
the coordinates before it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.heads.affine import AffineHead, decode_gaussian
from pyro_flows.transforms.heads.plate import INIT_SHARE, init_share, pool, unpool
from pyro_flows.transforms.networks import powerprop

__all__ = ["ConditionalGaussianHead"]

# More levels than this are drawn by solving a system, which costs as much as so many passes.
MAX_LEVELS = 4


class ConditionalGaussianHead(AffineHead):
    r"""Affine head in which coordinates with a known Gaussian prior :math:`N(a(y), e^{2 t(y)})` pool it with their own:

    .. math::
        y = m + \sigma x, \qquad
        \sigma^{-2} = \gamma e^{-2 t(y)} + s^{-2}, \qquad m = \sigma^2 (\gamma e^{-2 t(y)} a(y) + s^{-2} b),

    elementwise, with :math:`a, t` linear in other coordinates, which come first. All others are
    :math:`y = b + s x`. With :math:`\gamma = 1` this is the exact conditional posterior of a Gaussian hierarchy, in
    which a funnel's neck follows from its body; where the site approximation is narrow, as at the start, it is
    mean-field. Drawing takes a pass for each level of the hierarchy, scoring a value one. Of many levels, as in a
    random walk, whose scales follow free coordinates only, the locations are the solution of one triangular system.

    The site approximations may be relative to others, ``origin``, which are not trained: see :meth:`set_origin`.

    Args:
        known: Which coordinates have a known prior, ``(D,)``.
        slope: Of prior locations, then log-scales, ``(2 D, D)``; zero in rows that are not known. Follows a hierarchy:
            no coordinate depends on itself by way of others.
        bias: Likewise, ``(2 D,)``.

    Raises:
        ValueError: If the dependencies have a cycle.

    References:
        Papaspiliopoulos, Roberts, Skold. A general framework for the parametrization of hierarchical models.
        Statistical Science 2007. arXiv:0708.3797, for partial non-centering.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"origin"})
    is_outermost: ClassVar[bool] = True  # priors are those of the latents

    order: Tensor
    restore: Tensor
    slope: Tensor
    bias: Tensor

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        dim = len(known)
        super().__init__(dim)
        levels = _levels(known, slope)
        order = torch.cat(levels)
        self.sizes = [len(level) for level in levels]
        self.count_free = self.sizes[0]
        self.in_order = bool((order == torch.arange(dim)).all())
        self.register_buffer("order", order)
        self.register_buffer("restore", order.argsort())
        # Rows and columns in the order in which coordinates are drawn.
        pooled = order[self.count_free :]
        self.register_buffer("slope", slope.unflatten(0, (2, dim))[:, pooled][..., order].contiguous())
        self.register_buffer("bias", bias.unflatten(0, (2, dim))[:, pooled].contiguous())
        self.is_solved = len(levels) > MAX_LEVELS and not self.slope[1, :, self.count_free :].any()
        self.log_share = nn.Parameter(torch.zeros(dim - self.count_free))
        self.origin = nn.Parameter(torch.zeros(2, dim))  # locations and log-scales

    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = INIT_SHARE) -> None:
        """Start where a mean-field Gaussian is, ``N(loc, diag(scale)^2)``.

        Args:
            loc: ``(D,)``.
            scale: ``(D,)``.
            max_share: Largest share of the precision that priors have at ``loc``, in (0, 1); it is a Gaussian up to
                their share.
        """
        prior = F.linear(loc[self.order], self.slope.flatten(0, 1), self.bias.flatten())
        prior_loc, prior_log_scale = prior.chunk(2)
        pooled = self.order[self.count_free :]
        log_share = init_share(scale[pooled], prior_log_scale, max_share)
        shared_log_scale = prior_log_scale - 0.5 * powerprop(log_share)
        site_loc, site_log_scale = unpool(loc[pooled], scale[pooled], prior_loc, shared_log_scale)
        super().initialize(loc.index_copy(0, pooled, site_loc), scale.index_copy(0, pooled, site_log_scale.exp()))
        with torch.no_grad():
            self.log_share.copy_(log_share)
            self.origin.zero_()

    @torch.no_grad()
    def set_origin(self) -> None:
        """Take the site approximations of now for the origin, so that a step of an optimizer is one in their scales.

        Elsewhere a step is one in the latents' own units, in which a posterior may be a thousandth wide.
        """
        loc, scale = self.gaussian()
        self.origin.copy_(torch.stack([loc, scale.log()]))
        super().initialize(torch.zeros_like(loc), torch.ones_like(loc))

    def gaussian(self) -> tuple[Tensor, Tensor]:
        loc, scale, _ = self._decode(self.raw.value, self.origin.detach())
        return loc, scale

    @staticmethod
    def _decode(raw: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Locations, scales and log-scales of site approximations."""
        loc, scale, log_scale = decode_gaussian(raw)
        unit = origin[1].exp()
        return torch.addcmul(origin[0], unit, loc), scale * unit, log_scale + origin[1]

    def _ordered(self, value: Tensor) -> Tensor:
        return value if self.in_order else value.index_select(-1, self.order)

    def _restored(self, value: Tensor) -> Tensor:
        return value if self.in_order else value.index_select(-1, self.restore)

    def _site_approximations(self) -> tuple[Tensor, Tensor, Tensor]:
        """Locations, scales and log-scales of the coordinates' site approximations, in order."""
        return self._decode(self._ordered(self.raw.value), self._ordered(self.origin.detach()))

    def prior(self, parents: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Locations and log-scales of the priors of pooled coordinates, some or all, given those drawn before."""
        slope, bias = self.slope[:, rows, : parents.shape[-1]], self.bias[:, rows]
        loc, log_scale = F.linear(parents, slope.flatten(0, 1), bias.flatten()).chunk(2, -1)
        return loc, log_scale

    def _pool(self, parents: Tensor, rows: slice, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
        """Pooled location and log-scale, the weight of the site approximation, and how far it is from the prior."""
        prior_loc, prior_log_scale = self.prior(parents, rows)
        prior_log_scale = prior_log_scale - 0.5 * powerprop(self.log_share[rows])
        return *pool(prior_loc, prior_log_scale, loc, log_scale), loc - prior_loc

    def _through(self, own: Tensor, weight: Tensor, spread: Tensor, pull: Tensor) -> Tensor:
        r"""What the pooled coordinates' densities say of the coordinates that they follow, :math:`-\partial \log q`.

        With w the weight of the site approximation, at location b, and the prior at location a and log-scale t, the
        pooled location and log-scale have :math:`\partial m / \partial a = 1 - w`, :math:`\partial m / \partial t =
        2 w (1 - w) (b - a)` and :math:`\partial \log\sigma / \partial t = 1 - w`; both are linear in those coordinates.

        Args:
            own: Their scores.
            weight: ``w``.
            spread: Derivatives in :math:`\log\sigma`.
            pull: Derivatives in :math:`m`, times that of :math:`m` in ``t``.
        """
        rest = 1.0 - weight
        return torch.cat([own * rest, rest * spread + pull], -1) @ self.slope.flatten(0, 1)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """In order: values, summed log-scale, and what a score needs of the pooled coordinates."""
        by_level = zip(*(part.split(self.sizes, -1) for part in (*self._site_approximations(), x)), strict=True)
        loc, scale, log_scale, noise = next(by_level)
        y = torch.addcmul(loc, scale, noise)
        total = log_scale.sum(-1).expand(x.shape[:-1])
        if self.is_solved:
            rest = (part[..., self.count_free :] for part in (*self._site_approximations()[::2], x))
            y, pooled, known = self._solved(y, *rest)
            return y, total + pooled.sum(-1), (scale, *known)
        parts = []
        start = 0
        for site_loc, _, site_log_scale, noise in by_level:
            rows = slice(start, start + len(site_loc))
            mean, pooled, weight, offset = self._pool(y, rows, site_loc, site_log_scale)
            sigma = pooled.exp()
            y = torch.cat([y, torch.addcmul(mean, sigma, noise)], -1)
            total = total + pooled.sum(-1)
            parts.append((sigma, weight, offset))
            start = rows.stop
        joined = parts[0] if len(parts) == 1 else tuple(torch.cat(part, -1) for part in zip(*parts, strict=True))
        return y, total, (scale, *joined)

    def _solved(
        self, free: Tensor, site_loc: Tensor, site_log_scale: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        r"""All levels at once, given the free coordinates: values, log-scales of the pooled ones, and as above.

        With A the slopes of locations in pooled coordinates and c what free ones add to them, the pooled coordinates
        are the solution of :math:`(I - (1 - w) A)\, y = (1 - w) c + w b + \sigma x`.
        """
        mean, pooled, weight, _ = self._pool(free, slice(None), site_loc, site_log_scale)
        slope = self.slope[0, :, self.count_free :]
        system = torch.eye(len(slope), dtype=slope.dtype, device=slope.device) - (1.0 - weight).unsqueeze(-1) * slope
        sigma = pooled.exp()
        right = torch.addcmul(mean, sigma, noise).unsqueeze(-1)
        y = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).squeeze(-1)
        y = torch.cat([free, y], -1)
        return y, pooled, (sigma, weight, site_loc - self.prior(y)[0])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, total, _ = self._forward(self._ordered(x))
        return self._restored(y), total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self._ordered(y)
        loc, scale, log_scale = self._site_approximations()
        free = self.count_free
        mean, pooled, *_ = self._pool(y, slice(None), loc[free:], log_scale[free:])
        x = torch.cat([(y[..., :free] - loc[:free]) / scale[:free], (y[..., free:] - mean) * (-pooled).exp()], -1)
        return self._restored(x), -(log_scale[:free].sum(-1) + pooled.sum(-1))

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._ordered(x)
        y, total, (scale, sigma, weight, offset) = self._forward(x)
        with torch.no_grad():
            free = self.count_free
            score = self._ordered(score)
            own = score[..., free:] / sigma
            spread = 1.0 + score[..., free:] * x[..., free:]
            through = self._through(own, weight, spread, 2.0 * own * offset * weight * (1.0 - weight))
            score = torch.cat([score[..., :free] / scale, own], -1) - through
        return self._restored(y), total, self._restored(score)


def _levels(known: Tensor, slope: Tensor) -> list[Tensor]:
    """Coordinates by level: the free ones, those whose priors depend on these alone, and so on."""
    depends = (slope.unflatten(0, (2, len(known))) != 0).any(0)  # (D, D): row on column
    done = ~known
    levels = [done.nonzero().squeeze(-1)]
    while not done.all():
        ready = ~done & ~(depends & ~done).any(-1)
        if not ready.any():
            raise ValueError(
                "ConditionalGaussianHead: expected a hierarchy, but the dependencies of the priors have a cycle."
            )
        levels.append(ready.nonzero().squeeze(-1))
        done = done | ready
    return levels
