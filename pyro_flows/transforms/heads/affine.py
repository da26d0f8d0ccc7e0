# SPDX-License-Identifier: Apache-2.0
"""L1. Affine maps. They are families of their own (Gaussian guides) and the outermost layer of all others, which sets
location and scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.heads.base import Head, decode_gaussian

__all__ = ["AffineHead", "DiagonalAffine", "FullRankAffine", "LowRankAffine"]


class AffineHead(Head):
    r"""Base of :math:`y = m + \sigma \odot (A x)`, with :math:`A` initialized to the identity, up to subclasses."""

    def _gaussian(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale and summed log-scale."""
        loc, scale, log_scale = decode_gaussian(self.raw(context))
        return loc, scale, log_scale.sum(-1)

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """``A x`` and ``log|det A|``."""
        return x, 0.0

    def _unmix(self, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """``A^-1 y`` and ``log|det A|``."""
        return y, 0.0

    def _unmix_score(self, score: Tensor) -> Tensor:
        """``A^-T score``."""
        return score

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, scale, log_scale = self._gaussian(context)
        mixed, ladj = self._mix(x)
        return torch.addcmul(loc, scale, mixed), (log_scale + ladj).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, scale, log_scale = self._gaussian(context)
        x, ladj = self._unmix((y - loc) / scale)
        return x, -(log_scale + ladj).expand(x.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, scale, log_scale = self._gaussian(context)
        mixed, ladj = self._mix(x)
        with torch.no_grad():
            score = self._unmix_score(score) / scale
        return torch.addcmul(loc, scale, mixed), (log_scale + ladj).expand(x.shape[:-1]), score


class DiagonalAffine(AffineHead):
    r"""Elementwise :math:`y = m + \sigma \odot x`: the mean-field Gaussian. Cost and parameters O(D)."""


class FullRankAffine(AffineHead):
    r""":math:`y = m + \sigma \odot (L x)` with :math:`L` unit lower triangular: any Gaussian.

    Cost and parameters O(D^2). The log-determinant is that of the diagonal part.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        self.below_diagonal = nn.Parameter(torch.zeros(input_dim, input_dim))

    def _tril(self) -> Tensor:
        identity = torch.eye(self.input_dim, dtype=self.below_diagonal.dtype, device=self.below_diagonal.device)
        return self.below_diagonal.tril(-1) + identity

    def _mix(self, x: Tensor) -> tuple[Tensor, float]:
        return x @ self._tril().mT, 0.0

    def _unmix(self, y: Tensor) -> tuple[Tensor, float]:
        rows = y.reshape(-1, self.input_dim)
        return torch.linalg.solve_triangular(self._tril().mT, rows, upper=True, left=False).reshape(y.shape), 0.0

    def _unmix_score(self, score: Tensor) -> Tensor:
        rows = score.reshape(-1, self.input_dim)
        return torch.linalg.solve_triangular(self._tril(), rows, upper=False, left=False).reshape(score.shape)


class LowRankAffine(AffineHead):
    r""":math:`y = m + \sigma \odot (I + U V^\top) x`: a Gaussian with ``rank`` correlated directions.

    Cost and parameters O(D rank), by the matrix determinant lemma and the Woodbury identity. ``U`` is initialized to
    zero and ``V`` to random directions of unit length, since a symmetric ``U = V = 0`` would be a saddle point.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional.
        rank: Number of directions, in [1, input_dim].
    """

    @checked(rank=integer(1))
    def __init__(self, input_dim: int, context_dim: int = 0, *, rank: int) -> None:
        super().__init__(input_dim, context_dim)
        self.rank = rank
        self.left = nn.Parameter(torch.zeros(input_dim, rank))
        self.right = nn.Parameter(torch.randn(input_dim, rank) / math.sqrt(input_dim))

    @torch.no_grad()
    def set_directions(self, directions: Tensor, stretch: Tensor) -> None:
        r"""Set the map inside the scales to :math:`I + W \, \mathrm{diag}(s - 1) W^\top`.

        Args:
            directions: ``W``, ``(D, R)`` with orthonormal columns, R at most ``rank``.
            stretch: ``s``, positive, ``(R,)``.
        """
        used = len(stretch)
        self.left.zero_()
        self.left[:, :used].copy_(directions * (stretch - 1.0))
        self.right[:, :used].copy_(directions)

    def _capacitance(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.rank, dtype=self.left.dtype, device=self.left.device)
        capacitance = identity + self.right.mT @ self.left  # (rank, rank)
        return capacitance, torch.linalg.slogdet(capacitance).logabsdet

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + (x @ self.right) @ self.left.mT, self._capacitance()[1]

    def _unmix(self, y: Tensor) -> tuple[Tensor, Tensor]:
        capacitance, ladj = self._capacitance()
        inner = torch.linalg.solve(capacitance.mT, (y @ self.right).unsqueeze(-2), left=False).squeeze(-2)
        return y - inner @ self.left.mT, ladj

    def _unmix_score(self, score: Tensor) -> Tensor:
        inner = torch.linalg.solve(self._capacitance()[0], (score @ self.left).unsqueeze(-2), left=False).squeeze(-2)
        return score - inner @ self.right.mT
