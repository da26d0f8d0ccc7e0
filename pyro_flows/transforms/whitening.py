# SPDX-License-Identifier: Apache-2.0
"""L1. A fixed affine map around a flow: where a warm start leaves the posterior's location, scales and correlations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_flows.transforms.base import FlowTransform

__all__ = ["Whitening"]


class Whitening(FlowTransform):
    r""":math:`y = m + L x` with :math:`L` lower triangular, the identity until :meth:`set` is called. Not trained.

    A step of Adam moves every parameter by the learning rate. In a posterior whose narrowest direction is a thousandth
    of its widest that is either nothing or a hundred standard deviations, unless what is trained lives in
    coordinates in which the posterior is about a standard normal.

    ``m`` and ``L`` are parameters, so that Pyro's parameter store keeps them, but have no gradient.

    Args:
        input_dim: Length of the transformed vector. Cost and size O(D^2).
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim, 0)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.factor = nn.Parameter(torch.eye(input_dim))

    @torch.no_grad()
    def set(self, loc: Tensor, factor: Tensor) -> None:
        """Set ``m``, ``(D,)``, and ``L``, ``(D, D)``, lower triangular with a positive diagonal."""
        self.loc.copy_(loc)
        self.factor.copy_(factor)

    def standardize(self, y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """As ``AffineHead.standardize``, for a Gaussian ``N(loc, diag(scale)^2)`` under this map."""
        factor = self.factor.detach().tril()
        variance = (factor * scale).square().sum(-1)
        return (y - self.loc.detach() - factor @ loc) * torch.rsqrt(1.0 + variance)

    def _fixed(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``m``, ``L`` and ``log|det L|``."""
        factor = self.factor.detach().tril()
        return self.loc.detach(), factor, factor.diagonal().abs().log().sum().expand(like.shape[:-1])

    def _unmix(self, rows: Tensor, factor: Tensor, *, upper: bool) -> Tensor:
        """``rows @ factor^-1``."""
        flat = rows.reshape(-1, self.input_dim)
        return torch.linalg.solve_triangular(factor, flat, upper=upper, left=False).reshape(rows.shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, factor, ladj = self._fixed(x)
        return loc + x @ factor.mT, ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, factor, ladj = self._fixed(y)
        return self._unmix(y - loc, factor.mT, upper=True), -ladj

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, factor, ladj = self._fixed(x)
        return loc + x @ factor.mT, ladj, self._unmix(score, factor, upper=False)
