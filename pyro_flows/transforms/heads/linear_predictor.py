# SPDX-License-Identifier: Apache-2.0
"""L1. The head of a joint flow over standard normal latents of which the data see affine functions."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads.correlated import LinearPredictor
from pyro_flows.transforms.heads.covariance import CovarianceHead
from pyro_flows.transforms.heads.full_precision import ConditionalPrior
from pyro_flows.transforms.networks import powerprop

__all__ = ["LinearPredictorHead"]


class LinearPredictorHead(CovarianceHead):
    r"""Standard normal latents :math:`z` of which the data see linear predictors :math:`g(y_f) + H(y_f) z` only, with
    any functions g and H of the free coordinates: an autoregression or a Gaussian process in terms of its innovations.

    Each predictor has a likelihood factor of its own, with location :math:`b_0 + G (y_f - f_0)` and log-scale
    :math:`s_0 + U (y_f - f_0)`, which may be skewed. Factors are set by :meth:`set_factors` and not trained. So z is
    Gaussian given the others, with the precision :math:`I + H^\top e^{-2 s} H`: the exact conditional posterior if the
    likelihood is Gaussian.

    Until :meth:`set_factors` is called it is mean-field, as a :class:`CovarianceHead` is.

    Args:
        input_dim: Number of coordinates, D.
        predictor: The coordinates z, and the predictors.
    """

    def __init__(self, input_dim: int, predictor: LinearPredictor) -> None:
        known = torch.zeros(input_dim, dtype=torch.bool)
        known[predictor.rows] = True
        super().__init__(known, torch.zeros(2 * input_dim, input_dim), torch.zeros(2 * input_dim))
        self.predictor = predictor
        count = predictor.num
        self.own_factor = FixedParameter(torch.zeros(0, 0))  # predictors are no coordinates
        self.skew = FixedParameter(torch.zeros(count))
        self.rest = FixedParameter(torch.zeros(count))
        # Locations and log-scales of factors, and their slopes.
        self.factor_origin = FixedParameter(torch.zeros(2, count))
        self.factor_slope = FixedParameter(torch.zeros(2, count, self.count_free))

    @property
    def factored_entries(self) -> int:
        return self.sizes[1] * self.predictor.num

    @torch.no_grad()
    def set_factors(self, free: tuple[Tensor, Tensor], origin: Tensor, slope: Tensor) -> None:
        """Set the likelihood factors; the prior's share is set to 1.

        Args:
            free: Location and scale of the free coordinates, in order.
            origin: Locations and log-scales of the factors there, ``(2, K)``.
            slope: Their slopes in the free coordinates, ``(2, K, F)``.
        """
        self._switch(full=True)
        rest = self.sizes[1]
        self._set_sites(free, (free[0].new_zeros(rest), free[1].new_ones(rest)))
        self.factor_origin.copy_(origin)
        self.factor_slope.copy_(slope)
        self.set_origin()
        self._set_gaussian()
        self._rotate()

    def predictors(self, point: Tensor, own: Tensor) -> Tensor:
        """Values of the predictors, ``(S, K)``, for values of z, ``(S, n)``, with the others at a point, ``(D,)``."""
        offset, slope = self.predictor.read(point)
        return offset + own @ slope.mT

    def prior_variances(self, point: Tensor) -> Tensor:
        """Their variances under the prior of z, ``(K,)``."""
        return self.predictor.read(point)[1].square().sum(-1)

    def _move_factors(self, shift: Tensor) -> None:
        loc, log_scale = self.factor_origin
        loc += log_scale.exp() * shift

    def _conditional(self, free: Tensor) -> ConditionalPrior:
        every = free.new_zeros(*free.shape[:-1], self.input_dim).index_copy(-1, self.order[: self.count_free], free)
        offset, slope = self.predictor.read(every)
        away = self._away(free)
        loc, log_scale = (
            origin + away @ rows.mT
            for origin, rows in zip(self.factor_origin.detach(), self.factor_slope.detach(), strict=True)
        )
        root_precision = (-log_scale).exp()
        prior_log_scale = (-0.5 * powerprop(self.log_share)).expand(*free.shape[:-1], -1)
        scale = prior_log_scale.exp()
        root = (scale.unsqueeze(-1) * slope.mT * root_precision.unsqueeze(-2)).double()
        pull = root_precision * (loc - offset)
        chain = self._chain().to(scale)
        return ConditionalPrior(
            torch.zeros_like(scale), scale, [], chain, self._factor(root, pull), prior_log_scale.sum(-1)
        )
