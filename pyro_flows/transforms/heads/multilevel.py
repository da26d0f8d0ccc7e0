# SPDX-License-Identifier: Apache-2.0
"""L1. The head of a joint flow over a hierarchy of any depth, coordinate by coordinate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms.heads.conditional_gaussian import ConditionalGaussianHead
from pyro_flows.transforms.heads.pooling import pool
from pyro_flows.transforms.networks import powerprop

__all__ = ["MultilevelHead"]

# More levels than this are drawn by solving a linear system, which costs as much as this number of passes.
MAX_LEVELS = 4


class MultilevelHead(ConditionalGaussianHead):
    r"""Pools each coordinate separately, given those that its prior depends on:

    .. math::
        y = m + \sigma x, \qquad
        \sigma^{-2} = \gamma e^{-2 t(y)} + s^{-2}, \qquad m = \sigma^2 (\gamma e^{-2 t(y)} a(y) + s^{-2} b).

    With :math:`\gamma = 1` this is the exact conditional posterior of a Gaussian hierarchy, in which a funnel's neck
    follows from its body; where the site approximation is narrow, as at initialization, it is mean-field. Sampling
    takes one pass per level of the hierarchy, scoring a value one pass. If there are many levels, as in a random walk,
    and scales depend on free coordinates only, the locations are the solution of one triangular system.

    Args:
        known: Which coordinates have a known prior, ``(D,)``.
        slope: Slopes of prior locations, then log-scales, ``(2 D, D)``; dependencies must be acyclic.
        bias: Intercepts of prior locations, then log-scales, ``(2 D,)``.

    References:
        Papaspiliopoulos, Roberts, Skold. A general framework for the parametrization of hierarchical models.
        Statistical Science 2007. arXiv:0708.3797, for partial non-centering.
    """

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        super().__init__(known, slope, bias)
        self.is_solved = len(self.sizes) > MAX_LEVELS and not self.slope[1, :, self.count_free :].any()

    def _pool(self, parents: Tensor, rows: slice, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
        """Pooled location and log-scale, the weight of the site approximation, and its distance from the prior."""
        prior_loc, prior_log_scale = self.prior(parents, rows)
        prior_log_scale = prior_log_scale - 0.5 * powerprop(self.log_share[rows])
        return *pool(prior_loc, prior_log_scale, loc, log_scale), loc - prior_loc

    def _score_in_parents(self, pooled_score: Tensor, weight: Tensor, to_log_scale: Tensor, to_loc: Tensor) -> Tensor:
        r"""Gradient of the pooled coordinates' densities in their parents, :math:`-\partial \log q`.

        With w the weight of the site approximation, at location b, and the prior at location a and log-scale t, the
        pooled location and log-scale have :math:`\partial m / \partial a = 1 - w`, :math:`\partial m / \partial t =
        2 w (1 - w) (b - a)` and :math:`\partial \log\sigma / \partial t = 1 - w`; both are linear in those coordinates.

        Args:
            pooled_score: Scores of the pooled coordinates.
            weight: ``w``.
            to_log_scale: Derivatives in :math:`\log\sigma`.
            to_loc: Derivatives in :math:`m`, times that of :math:`m` in ``t``.
        """
        rest = 1.0 - weight
        slope = self.slope[..., : self.num_parents].flatten(0, 1)
        through = torch.cat([pooled_score * rest, rest * to_log_scale + to_loc], -1) @ slope
        missing = self.input_dim - self.num_parents
        return F.pad(through, (0, missing)) if missing else through

    def _draw_by_level(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """In order: values, summed log-scale, and intermediate results for the score of the pooled coordinates."""
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
        r"""All levels at once, given the free coordinates: values, log-scales of the pooled ones, and intermediates.

        With A the slopes of locations in pooled coordinates and c the part from free ones, the pooled coordinates
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

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, total, _ = self._draw_by_level(x)
        return y, total

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, log_scale = self._site_approximations()
        free = self.count_free
        mean, pooled, *_ = self._pool(y, slice(None), loc[free:], log_scale[free:])
        x = torch.cat([(y[..., :free] - loc[:free]) / scale[:free], (y[..., free:] - mean) * (-pooled).exp()], -1)
        return x, -(log_scale[:free].sum(-1) + pooled.sum(-1))

    def draw_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, total, (scale, sigma, weight, offset) = self._draw_by_level(x)
        with torch.no_grad():
            free = self.count_free
            pooled_score = score[..., free:] / sigma
            to_log_scale = 1.0 + score[..., free:] * x[..., free:]
            to_loc = 2.0 * pooled_score * offset * weight * (1.0 - weight)
            through = self._score_in_parents(pooled_score, weight, to_log_scale, to_loc)
            score = torch.cat([score[..., :free] / scale, pooled_score], -1) - through
        return y, total, score
