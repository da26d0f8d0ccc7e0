# SPDX-License-Identifier: Apache-2.0
"""L1. Fixed affine maps of a flow, which a warm start sets to the posterior's location, scales and correlations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.fixed import FixedParameter, ReadsFixed

__all__ = ["FullRankPreconditioner", "LowRankPreconditioner", "Preconditioner", "solve_rows"]


# Number of vectors by which a map is recognized as the identity.
PROBES = 512


class Preconditioner(ReadsFixed, FlowTransform):
    r"""Base of :math:`y = m + A x`, the identity until ``A`` and ``m`` are set, and not trained.

    A step of Adam moves every parameter by the learning rate. If the posterior's narrowest direction is a thousandth of
    its widest, that is either negligible or a hundred standard deviations, unless parameters are trained in coordinates
    in which the posterior is approximately standard normal.

    ``m`` and the parts of ``A`` are fixed parameters.
    """

    python_state: ClassVar[tuple[str, ...]] = ("is_identity",)

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim, 0)
        self.loc = FixedParameter(torch.zeros(input_dim))
        self.is_identity = True

    def reset(self) -> None:
        """Reset to the identity."""
        raise NotImplementedError

    def look(self) -> None:
        """Check again whether this is the identity, which costs nothing; for parameters that were set elsewhere."""
        probe = torch.eye(min(self.input_dim, PROBES), self.input_dim, dtype=self.loc.dtype, device=self.loc.device)
        probe[-1] += 1.0  # the last row combines all coordinates
        with torch.no_grad():
            self.is_identity = bool((self.loc == 0.0).all()) and torch.equal(self._mix(probe)[0], probe)

    def standardize(self, y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """As ``Head.standardize``, for a Gaussian ``N(loc, diag(scale)^2)`` under this map."""
        if self.is_identity:
            return (y - loc) * torch.rsqrt(1.0 + scale.square())
        return (y - self.loc.detach() - self._mix(loc)[0]) * torch.rsqrt(1.0 + self._variance(scale))

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``A x`` and ``log|det A|``."""
        raise NotImplementedError

    def _unmix(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``A^-1 y`` and ``log|det A|``."""
        raise NotImplementedError

    def _unmix_score(self, score: Tensor) -> Tensor:
        """``A^-T score``."""
        raise NotImplementedError

    def _variance(self, scale: Tensor) -> Tensor:
        """Diagonal of ``A diag(scale)^2 A^T``."""
        raise NotImplementedError

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.is_identity:
            return x, x.new_zeros(()).expand(x.shape[:-1])
        mixed, ladj = self._mix(x)
        return self.loc.detach() + mixed, ladj.expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.is_identity:
            return y, y.new_zeros(()).expand(y.shape[:-1])
        x, ladj = self._unmix(y - self.loc.detach())
        return x, -ladj.expand(y.shape[:-1])

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.forward_and_ladj(x)
        return y, ladj, score if self.is_identity else self._unmix_score(score)


class FullRankPreconditioner(Preconditioner):
    r""":math:`y = m + L x` with :math:`L` lower triangular, the identity until :meth:`set` is called. Not trained.

    See :class:`Preconditioner`.

    Args:
        input_dim: Length of the transformed vector. Cost and size O(D^2).
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.factor = FixedParameter(torch.eye(input_dim))

    @torch.no_grad()
    def set(self, loc: Tensor, factor: Tensor) -> None:
        """Set ``m``, ``(D,)``, and ``L``, ``(D, D)``, lower triangular with a positive diagonal."""
        self.loc.copy_(loc)
        self.factor.copy_(factor)
        self.is_identity = False

    def reset(self) -> None:
        self.set(torch.zeros_like(self.loc), torch.eye(self.input_dim))
        self.is_identity = True

    def _tril(self) -> tuple[Tensor, Tensor]:
        """``L`` and ``log|det L|``."""
        factor = self.factor.detach().tril()
        return factor, factor.diagonal().abs().log().sum()

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        factor, ladj = self._tril()
        return x @ factor.mT, ladj

    def _unmix(self, y: Tensor) -> tuple[Tensor, Tensor]:
        factor, ladj = self._tril()
        return solve_rows(y, factor.mT, upper=True), ladj

    def _unmix_score(self, score: Tensor) -> Tensor:
        return solve_rows(score, self._tril()[0], upper=False)

    def _variance(self, scale: Tensor) -> Tensor:
        return (self._tril()[0] * scale).square().sum(-1)


def solve_rows(rows: Tensor, factor: Tensor, *, upper: bool) -> Tensor:
    """``rows @ factor^-1``, for a triangular factor."""
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.linalg.solve_triangular(factor, flat, upper=upper, left=False).reshape(rows.shape)


class LowRankPreconditioner(Preconditioner):
    r""":math:`y = m + d \odot (I + U \, \mathrm{diag}(s - 1) U^\top) x` with orthonormal columns in :math:`U`: scales,
    and a few directions that are stretched or shrunk in addition. The identity until :meth:`set` is called. Not
    trained; see :class:`Preconditioner`.

    Args:
        input_dim: Length of the transformed vector.
        rank: Number of directions, in [1, input_dim]. Cost and size O(D rank).
    """

    @checked(rank=integer(1))
    def __init__(self, input_dim: int, rank: int) -> None:
        super().__init__(input_dim)
        self.rank = rank
        self.scale = FixedParameter(torch.ones(input_dim))
        self.directions = FixedParameter(torch.eye(input_dim, rank))
        self.stretch = FixedParameter(torch.ones(rank))

    @torch.no_grad()
    def set(self, loc: Tensor, scale: Tensor, directions: Tensor, stretch: Tensor) -> None:
        """Set the map.

        Args:
            loc: ``m``, ``(D,)``.
            scale: ``d``, positive, ``(D,)``.
            directions: ``U``, ``(D, R)`` with orthonormal columns, R at most ``rank``.
            stretch: ``s``, positive, ``(R,)``.
        """
        self.reset()
        used = len(stretch)
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.directions[:, :used].copy_(directions)
        self.directions[:, used:].zero_()
        self.stretch[:used].copy_(stretch)
        self.is_identity = False

    @torch.no_grad()
    def reset(self) -> None:
        self.loc.zero_()
        self.scale.fill_(1.0)
        self.directions.copy_(torch.eye(self.input_dim, self.rank))
        self.stretch.fill_(1.0)
        self.is_identity = True

    def _stretched(self, x: Tensor, stretch: Tensor) -> Tensor:
        """``x + U ((stretch - 1) * U^T x)``."""
        directions = self.directions.detach()
        return x + ((x @ directions) * (stretch - 1.0)) @ directions.mT

    def _ladj(self) -> Tensor:
        return self.scale.detach().log().sum() + self.stretch.detach().log().sum()

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale.detach() * self._stretched(x, self.stretch.detach()), self._ladj()

    def _unmix(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._stretched(y / self.scale.detach(), self.stretch.detach().reciprocal()), self._ladj()

    def _unmix_score(self, score: Tensor) -> Tensor:
        return self._stretched(score, self.stretch.detach().reciprocal()) / self.scale.detach()

    def _variance(self, scale: Tensor) -> Tensor:
        directions, variance = self.directions.detach(), scale.square()
        pulled = directions * (self.stretch.detach() - 1.0)  # U diag(s - 1)
        inner = pulled.mT @ (variance.unsqueeze(-1) * pulled)
        # diag of (I + P U^T) V (I + U P^T) with P U^T = U P^T symmetric.
        core = directions @ inner
        return self.scale.detach().square() * (
            variance * (1.0 + 2.0 * (pulled * directions).sum(-1)) + (core * directions).sum(-1)
        )
