# SPDX-License-Identifier: Apache-2.0
"""L1. The preconditioner of a posterior with leaves, coordinates that are independent of each other given the
others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.preconditioner import Preconditioner, solve_rows
from pyro_flows.transforms.skewed import SkewedNoise

__all__ = ["LeafPreconditioner"]


class _Leaves(NamedTuple):
    """Locations less ``m`` and scales of the leaves given the free coordinates' noise, and its two factors in each
    product."""

    loc: Tensor
    scale: Tensor
    left: Tensor
    right: Tensor


class LeafPreconditioner(Preconditioner):
    r"""Maps noise :math:`x = (x_f, x_l)` of free coordinates and of leaves to

    .. math::
        y_f = m_f + L x_f, \qquad
        y_l = m_l + S x_f + W ((A x_f) \odot (B x_f)) + e^{U x_f} \odot s \odot h(x_l),

    with :math:`L` lower triangular and the map h of :class:`~pyro_flows.transforms.skewed.SkewedNoise`. The identity
    until :meth:`set` is called. Not trained; see :class:`Preconditioner`.

    A Gaussian whose precision is diagonal among the leaves has this form with :math:`W = U = 0`, at a cost that is
    linear in their number. Their conditional locations bend, though, as those of abilities do with the difficulties and
    slopes of the items that they are seen by; to second order, each is the sum of products of two linear functions. And
    they are skewed, each by a third of its log density's third derivative.

    Args:
        input_dim: Length of the transformed vector.
        num_leaves: Number of its last coordinates that are leaves, in [1, input_dim - 1].
        num_products: Number H of products.
    """

    @checked(num_leaves=integer(1), num_products=integer(0))
    def __init__(self, input_dim: int, num_leaves: int, num_products: int = 0) -> None:
        super().__init__(input_dim)
        if num_leaves >= input_dim:
            raise ValueError(
                f"LeafPreconditioner: expected fewer leaves than coordinates, but got {num_leaves} of {input_dim}."
            )
        free = input_dim - num_leaves
        self.sizes = [free, num_leaves]
        self.factor = FixedParameter(torch.eye(free))
        self.scale = FixedParameter(torch.ones(num_leaves))
        self.slope = FixedParameter(torch.zeros(num_leaves, free))
        self.log_scale_slope = FixedParameter(torch.zeros(num_leaves, free))
        self.left = FixedParameter(torch.zeros(num_products, free))
        self.right = FixedParameter(torch.zeros(num_products, free))
        self.bend = FixedParameter(torch.zeros(num_leaves, num_products))
        self.skew = FixedParameter(torch.zeros(num_leaves))

    @property
    def num_products(self) -> int:
        """Number of products."""
        return len(self.left)

    @torch.no_grad()
    def set(self, loc: Tensor, factor: Tensor, slope: Tensor, scale: Tensor) -> None:
        """Set the map of a Gaussian.

        Args:
            loc: ``m``, ``(D,)``.
            factor: ``L``, lower triangular with a positive diagonal, ``(F, F)``.
            slope: ``S``, ``(P, F)``.
            scale: ``s``, positive, ``(P,)``.
        """
        self.reset()
        for parameter, value in zip((self.loc, self.factor, self.slope, self.scale), (loc, factor, slope, scale)):
            parameter.copy_(value)
        self.is_identity = False

    @torch.no_grad()
    def bend_leaves(
        self,
        loc: Tensor,
        slope: Tensor,
        scale: Tensor,
        log_scale_slope: Tensor,
        left: Tensor,
        right: Tensor,
        bend: Tensor,
    ) -> None:
        """Set the map of the leaves anew.

        Args:
            loc: ``m_l``, ``(P,)``.
            slope: ``S``, ``(P, F)``.
            scale: ``s``, positive, ``(P,)``.
            log_scale_slope: ``U``, ``(P, F)``.
            left: ``A``, ``(H, F)``.
            right: ``B``, ``(H, F)``.
            bend: ``W``, ``(P, H)``.
        """
        self.loc[self.sizes[0] :].copy_(loc)
        own = self.slope, self.scale, self.log_scale_slope, self.left, self.right, self.bend
        for parameter, value in zip(own, (slope, scale, log_scale_slope, left, right, bend), strict=True):
            parameter.copy_(value)
        self.is_identity = False

    @torch.no_grad()
    def skew_leaves(self, skew: Tensor) -> None:
        """Skew the leaves, after :meth:`set`: ``kappa``, ``(P,)``."""
        self.skew.copy_(skew)

    @torch.no_grad()
    def reset(self) -> None:
        self.loc.zero_()
        self.factor.copy_(torch.eye(len(self.factor)))
        self.scale.fill_(1.0)
        for parameter in (self.slope, self.log_scale_slope, self.left, self.right, self.bend, self.skew):
            parameter.zero_()
        self.is_identity = True

    def look(self) -> None:
        unit = torch.eye(len(self.factor), dtype=self.factor.dtype, device=self.factor.device)
        others = self.loc, self.slope, self.log_scale_slope, self.bend, self.skew
        is_linear = all(not parameter.any() for parameter in others)
        self.is_identity = is_linear and torch.equal(self.factor.detach(), unit) and bool((self.scale == 1.0).all())

    def _factor(self) -> Tensor:
        return self.factor.detach().tril()

    def _leaves(self, noise: Tensor) -> _Leaves:
        left, right = noise @ self.left.detach().mT, noise @ self.right.detach().mT
        loc = noise @ self.slope.detach().mT + (left * right) @ self.bend.detach().mT
        scale = (noise @ self.log_scale_slope.detach().mT).exp() * self.scale.detach()
        return _Leaves(loc, scale, left, right)

    def _ladj(self, scale: Tensor) -> Tensor:
        return self.factor.detach().diagonal().abs().log().sum() + scale.log().sum(-1)

    def _skewed(self, own: Tensor) -> SkewedNoise:
        return SkewedNoise.at(own, self.skew.detach())

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.is_identity:
            return super().forward_and_ladj(x)
        y, leaves, skewed = self._draw(x)
        return y, self._ladj(leaves.scale * skewed.slope)

    def _draw(self, x: Tensor) -> tuple[Tensor, _Leaves, SkewedNoise]:
        noise, own = x.split(self.sizes, -1)
        leaves, skewed = self._leaves(noise), self._skewed(own)
        y = torch.cat([noise @ self._factor().mT, leaves.loc + leaves.scale * skewed.value], -1)
        return self.loc.detach() + y, leaves, skewed

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.is_identity:
            return super().inverse_and_ladj(y)
        free, own = (y - self.loc.detach()).split(self.sizes, -1)
        noise = solve_rows(free, self._factor().mT, upper=True)
        leaves = self._leaves(noise)
        own = SkewedNoise.inverse((own - leaves.loc) / leaves.scale, self.skew.detach())
        return torch.cat([noise, own], -1), -self._ladj(leaves.scale * self._skewed(own).slope)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.is_identity:
            return super().forward_with_score(x, score)
        y, leaves, skewed = self._draw(x)
        ladj = self._ladj(leaves.scale * skewed.slope)
        with torch.no_grad():
            to_noise, to_own = score.split(self.sizes, -1)
            to_own = (to_own - skewed.curvature / skewed.slope) / skewed.slope
            own = to_own / leaves.scale
            # The transpose of the derivative of the leaves in the free noise, and the log-determinant's gradient.
            bent = own @ self.bend
            through = own @ self.slope + (bent * leaves.right) @ self.left + (bent * leaves.left) @ self.right
            through = through + (1.0 + to_own * skewed.value) @ self.log_scale_slope
            score = torch.cat([solve_rows(to_noise - through, self._factor(), upper=False), own], -1)
        return y, ladj, score

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The linear part, as for standard normal noise."""
        noise, own = x.split(self.sizes, -1)
        scale = self.scale.detach()
        leaves = noise @ self.slope.detach().mT + scale * own
        return torch.cat([noise @ self._factor().mT, leaves], -1), self._ladj(scale)

    def _variance(self, scale: Tensor) -> Tensor:
        free, own = scale.split(self.sizes, -1)
        leaves = (self.slope.detach() * free).square().sum(-1) + (self.scale.detach() * own).square()
        return torch.cat([(self._factor() * free).square().sum(-1), leaves], -1)
