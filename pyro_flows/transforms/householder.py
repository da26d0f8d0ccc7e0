# SPDX-License-Identifier: Apache-2.0
"""L1. Householder reflections: a learnable rotation."""

from __future__ import annotations

import torch
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["Householder"]


class Householder(FlowTransform):
    r"""A product of reflections, :math:`y = H_K \cdots H_1 x` with :math:`H_k = I - 2 u_k u_k^\top / \|u_k\|^2`.

    Volume preserving. A rotation leaves a standard normal unchanged: put a scale before it. Cost and parameters
    O(D num_reflections). Pyro initializes reflections at random; here they are initialized as equal pairs, which
    cancel, so the map is initialized to the identity.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector, at least 2.
        context_dim: Length of the context vector. 0 means unconditional; otherwise the reflections depend on it.
        num_reflections: Number of reflections; even, at least 2.

    References:
        Tomczak, Welling. Improving Variational Auto-Encoders using Householder Flow. 2016. arXiv:1611.09630, eq. (9).
    """

    @checked(num_reflections=integer(1))
    def __init__(self, input_dim: int, context_dim: int = 0, *, num_reflections: int = 8) -> None:
        super().__init__(input_dim, context_dim)
        directions = torch.nn.functional.normalize(torch.randn(num_reflections // 2, input_dim), dim=-1)
        self.directions = ContextParameters(directions.repeat_interleave(2, 0), context_dim)

    def _householder(self, context: Tensor | None) -> ConditionedHouseholder:
        """Pyro's map, newly made for each call so that no cache persists."""
        return ConditionedHouseholder(self.directions(context))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._householder(context)(x), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._householder(context)._inverse(y), y.new_zeros(y.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        householder = self._householder(context)
        y = householder(x)
        with torch.no_grad():
            score = householder(score)  # J is orthogonal, so J^-T = J
        return y, x.new_zeros(x.shape[:-1]), score
