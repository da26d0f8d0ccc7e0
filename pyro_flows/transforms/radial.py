# SPDX-License-Identifier: Apache-2.0
"""L1. The radial map."""

from __future__ import annotations

import math

import torch
from pyro.distributions.transforms.radial import ConditionedRadial
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["Radial"]


class Radial(FlowTransform):
    r"""Moves every point towards a center or away: :math:`y = x + \beta\,(x - x_0) / (\alpha + \|x - x_0\|)`.

    Uses Pyro's map and constraints, :math:`\alpha = \mathrm{softplus}(\alpha') > 0` and
    :math:`\beta = \mathrm{softplus}(\beta') - \alpha > -\alpha`. Pyro implements no inverse; here the radius is found
    as the root of a quadratic equation. Parameters O(D).

    Initialized to the identity: :math:`\beta' = \alpha'`; the center is a standard normal draw.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional; otherwise all parameters depend on it.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770, eq. (14) and
        appendix A.2.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        start = math.log(math.e - 1.0)  # softplus(start) == 1
        self.center_alpha_beta = ContextParameters(
            torch.cat([torch.randn(input_dim), torch.full((2,), start)]), context_dim
        )

    def _split(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Center ``(..., D)``, and alpha' and beta' ``(..., 1)``."""
        center, alpha_prime, beta_prime = self.center_alpha_beta(context).split([self.input_dim, 1, 1], -1)
        return center, alpha_prime, beta_prime

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        radial = ConditionedRadial(self._split(context))  # new for each call, so that no cache persists
        y = radial(x)
        return y, radial.log_abs_det_jacobian(x, y)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        center, alpha_prime, beta_prime = self._split(context)
        alpha, alpha_plus_beta = F.softplus(alpha_prime), F.softplus(beta_prime)
        diff = y - center
        reach = diff.norm(dim=-1, keepdim=True)
        # r (1 + beta / (alpha + r)) = reach  <=>  r^2 + b r - alpha reach = 0, in the form without cancellation.
        b = alpha_plus_beta - reach
        product = alpha * reach
        root = (b.square() + 4.0 * product).sqrt()
        large = 0.5 * (torch.where(b > 0, b, -b) + root)
        radius = torch.where(b > 0, product / large, large)
        across = (alpha_plus_beta + radius) / (alpha + radius)  # 1 + beta h
        along = across - (alpha_plus_beta - alpha) * radius / (alpha + radius).square()
        ladj = (self.input_dim - 1) * across.log() + along.log()
        return center + diff / across, -ladj.squeeze(-1)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self._split(context)
        radial = ConditionedRadial(parameters)
        y = radial(x)
        with torch.no_grad():
            center, alpha_prime, beta_prime = parameters
            alpha = F.softplus(alpha_prime)
            beta = F.softplus(beta_prime) - alpha
            diff = x - center
            radius = diff.norm(dim=-1, keepdim=True)
            unit = diff / radius.clamp_min(torch.finfo(x.dtype).tiny)
            h = (alpha + radius).reciprocal()
            # J stretches by `along` along the radius and by `across` in every other direction.
            across = 1.0 + beta * h
            along = 1.0 + alpha * beta * h.square()
            d_ladj = -(self.input_dim - 1) * beta * h.square() / across - 2.0 * alpha * beta * h**3 / along
            score = score - d_ladj * unit
            score = score / across + (1.0 / along - 1.0 / across) * (unit * score).sum(-1, keepdim=True) * unit
        return y, radial.log_abs_det_jacobian(x, y), score
