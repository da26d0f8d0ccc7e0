# SPDX-License-Identifier: Apache-2.0
"""L1. The planar map."""

from __future__ import annotations

import math

import torch
from pyro.distributions.transforms.planar import ConditionedPlanar
from torch import Tensor

from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.bisection import solve_tanh
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["Planar"]


class Planar(FlowTransform):
    r"""Moves every point along one direction: :math:`y = x + \hat u \tanh(w^\top x + b)`.

    Uses Pyro's map, and Pyro's constraint :math:`w^\top \hat u = \mathrm{softplus}(w^\top u) - 1 > -1`, which makes it
    invertible. Pyro implements no inverse; along :math:`w` the map is an increasing function of one variable, so it is
    inverted here by bisection to full precision. Parameters O(D).

    Initialized to the identity: :math:`\hat u = 0` where :math:`w^\top u = \log(e - 1)` and :math:`u` is parallel to
    :math:`w`; :math:`w` is random, of length about 1.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional; otherwise b, u and w depend on it.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770, eq. (10)-(12) and
        appendix A.1.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        w = torch.randn(input_dim)
        # A direction of length near 1 also in one dimension, where a normal draw could be near 0.
        w = w / w.norm() * torch.empty(()).uniform_(0.75, 1.25)
        u = math.log(math.e - 1.0) * w / w.square().sum()
        self.bias_u_w = ContextParameters(torch.cat([torch.zeros(1), u, w]), context_dim)

    def _planar(self, context: Tensor | None) -> tuple[ConditionedPlanar, Tensor, Tensor, Tensor]:
        """Pyro's map, new for each call so that no cache persists; and bias ``(..., 1)``, u_hat and w ``(..., D)``."""
        bias, u, w = self.bias_u_w(context).split([1, self.input_dim, self.input_dim], -1)
        planar = ConditionedPlanar((bias, u, w))
        return planar, bias, planar.u_hat(u, w), w

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        planar = self._planar(context)[0]
        y = planar(x)
        return y, planar.log_abs_det_jacobian(x, y)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, bias, u_hat, w = self._planar(context)
        gain = (u_hat * w).sum(-1, keepdim=True)
        # Along w: s + gain tanh(s + b) = t with s = w^T x and t = w^T y.
        along = (w * y).sum(-1, keepdim=True)
        start = solve_tanh(along, gain, torch.ones_like(gain), bias)
        bent = torch.tanh(start + bias)
        slope = 1.0 + gain * (1.0 - bent.square())
        root = start - (start + gain * bent - along) / slope.detach()
        bent = torch.tanh(root + bias)
        slope = 1.0 + gain * (1.0 - bent.square())
        return y - u_hat * bent, -slope.squeeze(-1).log()

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        planar, bias, u_hat, w = self._planar(context)
        y = planar(x)
        with torch.no_grad():
            bent = torch.tanh((w * x).sum(-1, keepdim=True) + bias)
            slope = 1.0 - bent.square()
            gain = (u_hat * w).sum(-1, keepdim=True)
            det = 1.0 + slope * gain
            score = score + 2.0 * bent * slope * gain / det * w  # minus the gradient of the log-determinant
            # J = I + slope u_hat w^T, so J^-T by Sherman and Morrison.
            score = score - slope * (u_hat * score).sum(-1, keepdim=True) / det * w
        return y, planar.log_abs_det_jacobian(x, y), score
