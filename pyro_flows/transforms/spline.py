# SPDX-License-Identifier: Apache-2.0
"""L1. The elementwise rational-quadratic spline, which spline couplings and spline autoregressive maps also use."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows._checks import check_positive, checked, integer
from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["RationalQuadratic", "Spline"]

# Smallest width and height of a bin as a share of the average bin, and smallest slope at a knot. Larger than the usual
# 1e-3 (Durkan et al., section 4.1): a flatter piece is a spike in the density, whose score is noise.
MIN_BIN_SHARE = 0.05
MIN_SLOPE = 0.01
# softplus(SLOPE_OFFSET) + MIN_SLOPE == 1, so raw parameters of zero make the identity.
SLOPE_OFFSET = math.log(math.expm1(1.0 - MIN_SLOPE))
# Gauss-Hermite nodes and weights for the moments of a spline of standard normal noise.
NODES = (-3.750439717725742, -2.366759410734541, -1.154405394739968, 0.0)
WEIGHTS = (5.4826885597221875e-4, 3.075712396758645e-2, 2.401231786050127e-1, 16 / 35)


@functools.lru_cache
@torch.inference_mode(False)  # cached, and also used in training
def _quadrature(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All nodes and their weights."""
    nodes = torch.tensor([*NODES, *(-x for x in NODES[2::-1])], dtype=dtype, device=device)
    return nodes, torch.tensor([*WEIGHTS, *WEIGHTS[2::-1]], dtype=dtype, device=device)


@functools.lru_cache
@torch.inference_mode(False)  # as above
def _before(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix that maps a column to its exclusive cumulative sums; faster than ``cumsum``."""
    return torch.ones(count, count, dtype=dtype, device=device).tril(-1)


class _Bins(NamedTuple):
    """The bin of every coordinate: left knot, 1 / width, bottom, average slope, and the slopes at its two knots."""

    left: Tensor
    per_width: Tensor
    bottom: Tensor
    slope: Tensor
    slope_left: Tensor
    slope_right: Tensor


class RationalQuadratic:
    r"""Monotone rational-quadratic splines, one for every coordinate, built from raw parameters.

    Each is linear outside ``[-bound, bound]``, and maps standard normal noise to mean 0 and variance 1 (by a
    quadrature with 7 nodes): location and scale are left to an affine layer. An unconstrained spline learns them as
    well, and stretches its box until tails pile up at the edges; one that is fixed at -1 and 1 produces outliers of
    hundreds of scales while the posterior is still far away. The identity if raw parameters are zero.

    Shape:
        - raw: ``(..., 3 * count_bins - 1, D)``: widths, heights, inner slopes. Coordinates come last, as they do in
          values, so that a compiler reads and writes many at once.
        - x, y: ``(..., D)``, broadcastable with ``raw`` without its last dimension but one.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032, eq. (4)-(8).
    """

    def __init__(self, raw: Tensor, bound: float) -> None:
        self.bound = bound
        self.count_bins = (raw.shape[-2] + 1) // 3
        lengths, inner = raw.split([2 * self.count_bins, self.count_bins - 1], -2)
        shares = lengths.unflatten(-2, (2, self.count_bins)).softmax(-2)
        shares = MIN_BIN_SHARE / self.count_bins + (1.0 - MIN_BIN_SHARE) * shares
        lengths = 2.0 * bound * shares
        knots = _before(self.count_bins, raw.dtype, raw.device) @ lengths - bound  # left edges; (..., 2, K, D)
        slopes = F.softplus(inner + SLOPE_OFFSET) + MIN_SLOPE
        width, height = lengths.unbind(-3)
        self.x_knots, self.y_knots = knots.unbind(-3)
        bins = _Bins(
            self.x_knots,
            1.0 / width,
            self.y_knots,
            height / width,
            F.pad(slopes, (0, 0, 1, 0), value=1.0),
            F.pad(slopes, (0, 0, 0, 1), value=1.0),
        )
        self._table = torch.stack(bins, -3)  # (..., 6, K, D)

    def _select(self, value: Tensor, knots: Tensor) -> _Bins:
        # Values that share a table are gathered from it side by side: from a copy for each, the backward pass would
        # fill as many copies with zeros.
        own = value.shape[value.dim() - knots.dim() + 1 :]
        beside = value.reshape(-1, *own).movedim(0, -2)  # (..., values, D)
        index = (beside.unsqueeze(-2) >= knots[..., 1:, :].unsqueeze(-3)).sum(-2)
        table = self._table.expand(*own[:-1], *self._table.shape[-3:-1], own[-1])
        picked = table.gather(-2, index.unsqueeze(-3).expand(*own[:-1], 6, *index.shape[-2:]))
        return _Bins(*(part.movedim(-2, 0).reshape(value.shape) for part in picked.unbind(-3)))

    def _nodes(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Quadrature nodes for coordinates of a shape, ``(7, *shape)``, and their weights."""
        nodes, weights = _quadrature(self.x_knots.dtype, self.x_knots.device)
        return nodes.reshape(-1, *(1,) * len(shape)).expand(-1, *shape), weights

    def _standardize(self, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the spline's output for standard normal noise, from its values at nodes."""
        y = y.movedim(0, -1)
        mean = y @ weights
        return mean, ((y - mean.unsqueeze(-1)).square() @ weights).sqrt()

    def _evaluate(self, x: Tensor, *, with_slope: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        clamped = x.clamp(-self.bound, self.bound)
        bins = self._select(clamped, self.x_knots)
        above = clamped - bins.left
        theta = above * bins.per_width
        rest = 1.0 - theta
        curvature = bins.slope_left + bins.slope_right - 2.0 * bins.slope
        denominator = bins.slope + curvature * (theta * rest)
        ratio = bins.slope / denominator
        # The clamp's excess is added back, for the identity beyond the box.
        y = bins.bottom + above * (bins.slope * theta + bins.slope_left * rest) * ratio + (x - clamped)
        numerator = bins.slope_right * theta**2 + 2.0 * bins.slope * (theta * rest) + bins.slope_left * rest**2
        log_slope = (numerator * ratio.square()).log()
        if not with_slope:
            return y, log_slope, None
        with torch.no_grad():
            bend = rest - theta
            d_numerator = bins.slope_right * theta + bins.slope * bend - bins.slope_left * rest
            d_log_slope = 2.0 * bins.per_width * (d_numerator / numerator - curvature * bend / denominator)
        return y, log_slope, d_log_slope * (clamped == x)

    def __call__(self, x: Tensor, *, with_slope: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map ``x``; returns ``y``, elementwise ``log dy/dx`` and, if requested, its derivative in ``x``, detached."""
        own = x.shape[x.dim() - self.x_knots.dim() + 1 :]
        nodes, weights = self._nodes(own)
        # Nodes and values in one pass, since its cost is per operation.
        found = self._evaluate(torch.cat([nodes, x.reshape(-1, *own)]), with_slope=with_slope)
        sizes = [len(nodes), len(found[0]) - len(nodes)]
        (at_nodes, y), (_, log_slope) = (part.split(sizes) for part in found[:2])
        d_log_slope = None if found[2] is None else found[2][len(nodes) :].reshape(x.shape)
        center, scale = self._standardize(at_nodes, weights)
        return ((y - center) / scale).reshape(x.shape), (log_slope - scale.log()).reshape(x.shape), d_log_slope

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map back; returns ``x`` and elementwise ``log dx/dy``."""
        nodes, weights = self._nodes((*self.x_knots.shape[:-2], self.x_knots.shape[-1]))
        center, scale = self._standardize(self._evaluate(nodes)[0], weights)
        y = y * scale + center
        clamped = y.clamp(-self.bound, self.bound)
        bins = self._select(clamped, self.y_knots)
        curvature = bins.slope_left + bins.slope_right - 2.0 * bins.slope
        above = (clamped - bins.bottom) * bins.per_width
        # Quadratic a theta^2 + b theta + c = 0 in the form without cancellation (eq. 6-8 and the text after them).
        a = bins.slope * (bins.slope - bins.slope_left) + above * curvature
        b = bins.slope * bins.slope_left - above * curvature
        c = -bins.slope * above
        # Positive in exact arithmetic; rounding can take it an ulp below zero.
        root = (b * b - 4.0 * a * c).clamp_min(0.0).sqrt()
        theta = 2.0 * c / (-b - root)
        rest = 1.0 - theta
        denominator = bins.slope + curvature * (theta * rest)
        numerator = bins.slope_right * theta**2 + 2.0 * bins.slope * (theta * rest) + bins.slope_left * rest**2
        log_slope = (numerator * (bins.slope / denominator).square()).log()
        x = bins.left + theta / bins.per_width + (y - clamped)
        return x, scale.log() - log_slope


class Spline(FlowTransform):
    r"""One rational-quadratic spline per coordinate.

    Pyro's ``Spline`` is initialized at random knots (a log-determinant of about -6 in five dimensions); this one at the
    identity. Changes marginals only; coordinates stay independent. Parameters O(D count_bins).

    Warning:
        Linear outside ``[-bound, bound]``; mean 0 and variance 1: put an affine layer after it to move or scale
        mass.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional.
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.
    """

    @checked(count_bins=integer(2), bound=check_positive)
    def __init__(self, input_dim: int, context_dim: int = 0, *, count_bins: int = 8, bound: float = 5.0) -> None:
        super().__init__(input_dim, context_dim)
        self.bound = bound
        self.raw = ContextParameters(torch.zeros(3 * count_bins - 1, input_dim), context_dim)

    def _spline(self, context: Tensor | None) -> RationalQuadratic:
        return RationalQuadratic(self.raw(context), self.bound)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_slope, _ = self._spline(context)(x)
        return y, log_slope.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self._spline(context).inverse(y)
        return x, log_slope.sum(-1)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_slope, d_log_slope = self._spline(context)(x, with_slope=True)
        assert d_log_slope is not None
        with torch.no_grad():
            score = (score - d_log_slope) * (-log_slope).exp()
        return y, log_slope.sum(-1), score
