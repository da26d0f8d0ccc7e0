# SPDX-License-Identifier: Apache-2.0
"""L1. From coordinates that are centered at their parents to standardized ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms.base import FlowTransform

__all__ = ["NonCentering"]


class NonCentering(FlowTransform):
    r"""Standardizes some coordinates: :math:`z_i = (y_i - a_i(y)) \, e^{-t_i(y)}`, with locations :math:`a` and
    log-scales :math:`t` that are linear in the other coordinates, which stay as they are.

    Many models write an effect as :math:`a + e^t z` with a standard normal :math:`z`, which helps samplers. Where the
    data say something of the effect, scale and :math:`z` are a funnel; the effect itself has a conditional posterior
    that is close to a Gaussian, whatever the scale. With this map outermost, the layers before it see the effect.

    Has no parameters.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        rows: Indices of the standardized coordinates, ``(P,)``.
        slope: Slopes of their locations, then of their log-scales, ``(2 P, D)``, zero in columns of ``rows``.

    References:
        Papaspiliopoulos, Roberts, Sköld. A General Framework for the Parametrization of Hierarchical Models.
        Statistical Science 22(1), 2007, section 2.
    """

    rows: Tensor
    slope: Tensor

    def __init__(self, rows: Tensor, slope: Tensor) -> None:
        super().__init__(slope.shape[-1])
        self.register_buffer("rows", rows)
        self.register_buffer("slope", slope)

    def location_and_log_scale(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``a`` and ``t``, both ``(..., P)``."""
        loc, log_scale = F.linear(y, self.slope).chunk(2, -1)
        return loc, log_scale

    def _standardized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The standardized coordinates, and their log-scales, both ``(..., P)``."""
        loc, log_scale = self.location_and_log_scale(x)
        return (x.index_select(-1, self.rows) - loc) * (-log_scale).exp(), log_scale

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        standard, log_scale = self._standardized(x)
        return x.index_copy(-1, self.rows, standard), -log_scale.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.location_and_log_scale(y)
        effect = torch.addcmul(loc, log_scale.exp(), y.index_select(-1, self.rows))
        return y.index_copy(-1, self.rows, effect), log_scale.sum(-1)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        standard, log_scale = self._standardized(x)
        with torch.no_grad():
            to_effect = score.index_select(-1, self.rows)
            to_standard = to_effect * log_scale.exp()
            # The inverse's log-determinant adds one to each log-scale's derivative.
            to_log_scale = to_standard * standard + 1.0
            through = torch.cat([to_effect, to_log_scale], -1) @ self.slope
            score = (score + through).index_copy(-1, self.rows, to_standard)
        return x.index_copy(-1, self.rows, standard), -log_scale.sum(-1), score
