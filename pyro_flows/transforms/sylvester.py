# SPDX-License-Identifier: Apache-2.0
"""L1. The Sylvester map."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.bisection import solve_tanh
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["Sylvester"]


class Sylvester(FlowTransform):
    r"""Many planar maps at once, along orthonormal directions: :math:`y = x + Q R \tanh(S Q^\top x + b)`.

    :math:`Q` has M orthonormal columns, the first M of a product of Householder reflections; :math:`R` and :math:`S`
    are upper triangular with diagonals in (-1, 1), so that the map is invertible and, with :math:`h'` the slope of tanh
    at the argument,

    .. math::
        \log|\det J| = \sum_i \log(1 + h'_i\, s_{ii}\, r_{ii}).

    Pyro's ``Sylvester`` evaluates :math:`x + \tanh(x S Q^\top + b) Q R`, which has a different log-determinant, so its
    ELBO can exceed the log evidence. Cost O(D M + M^2), parameters O(D M + M^2). The inverse solves the triangular
    system backwards, one scalar equation per coordinate.

    Initialized to the identity: :math:`R = 0`; :math:`Q` and :math:`S` are random.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional; otherwise all parameters depend on it.
        num_ortho: Number of columns of Q, at least 1; ``min(num_ortho, input_dim)`` are used.

    References:
        Van den Berg, Hasenclever, Tomczak, Welling. Sylvester Normalizing Flows for Variational Inference. UAI 2018.
        arXiv:1803.05649, eq. (9)-(13) and section 4.
    """

    triangle: Tensor

    @checked(num_ortho=integer(1))
    def __init__(self, input_dim: int, context_dim: int = 0, *, num_ortho: int = 8) -> None:
        super().__init__(input_dim, context_dim)
        self.num_ortho = min(num_ortho, input_dim)
        # This number of reflections gives every Q, up to the sign of one column, which R and S can absorb.
        self.num_reflections = min(self.num_ortho, input_dim - 1)
        size = self.num_ortho * (self.num_ortho + 1) // 2
        rows, columns = torch.triu_indices(self.num_ortho, self.num_ortho)
        index = torch.full((self.num_ortho, self.num_ortho), size)
        index[rows, columns] = torch.arange(size)
        self.register_buffer("triangle", index)  # where each entry of R or S is stored; below the diagonal: a zero
        self.sizes = [self.num_reflections * input_dim, size, size, self.num_ortho]
        init = torch.cat(
            [
                torch.randn(self.sizes[0]) / math.sqrt(input_dim),
                torch.zeros(size),
                torch.randn(size) / math.sqrt(self.num_ortho),
                torch.zeros(self.num_ortho),
            ]
        )
        self.u_r_s_b = ContextParameters(init, context_dim)

    def _upper(self, entries: Tensor) -> Tensor:
        """Upper triangular matrix ``(..., M, M)`` with tanh on the diagonal."""
        dense = F.pad(entries, (0, 1))[..., self.triangle]
        diagonal = dense.diagonal(dim1=-2, dim2=-1)
        return dense + torch.diag_embed(torch.tanh(diagonal) - diagonal)

    def _matrices(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q ``(..., D, M)``, R and S ``(..., M, M)``, b ``(..., M)``."""
        u, r, s, b = self.u_r_s_b(context).split(self.sizes, -1)
        u = F.normalize(u.unflatten(-1, (self.num_reflections, self.input_dim)), dim=-1)
        # H_1 ... H_n = I - U^T T U with T^-1 = I/2 + strictly upper part of U U^T: one small solve, no loop.
        half = 0.5 * torch.eye(self.num_reflections, dtype=u.dtype, device=u.device)
        inner = torch.linalg.solve_triangular((u @ u.mT).triu(1) + half, u[..., : self.num_ortho], upper=True)
        identity = torch.eye(self.input_dim, self.num_ortho, dtype=u.dtype, device=u.device)
        return identity - u.mT @ inner, self._upper(r), self._upper(s), b

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, r, s, b = self._matrices(context)
        bent = torch.tanh(_rows(_rows(x, q), s.mT) + b)
        return x + _rows(_rows(bent, r.mT), q.mT), _slopes(bent, r, s).log1p().sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, r, s, b = self._matrices(context)
        target = _rows(y, q)
        with torch.no_grad():
            # The last coordinate depends on itself only, the one before on itself and the last, and so on.
            argument, rest = b.expand(target.shape), target
            columns: list[Tensor] = []
            for i in reversed(range(self.num_ortho)):
                z = solve_tanh(rest[..., i], r[..., i, i], s[..., i, i], argument[..., i])
                bent = torch.tanh(argument[..., i] + s[..., i, i] * z)
                argument = argument + s[..., :, i] * z.unsqueeze(-1)
                rest = rest - r[..., :, i] * bent.unsqueeze(-1)
                columns.insert(0, z)
            start = torch.stack(columns, -1)
        # One Newton step of the whole system, with gradients: those of the inverse function.
        bent = torch.tanh(_rows(start, s.mT) + b)
        residual = start + _rows(bent, r.mT) - target
        jacobian = _small_jacobian(bent.detach(), r.detach(), s.detach())
        z = start - torch.linalg.solve_triangular(jacobian, residual.unsqueeze(-1), upper=True).squeeze(-1)
        bent = torch.tanh(_rows(z, s.mT) + b)
        return y - _rows(_rows(bent, r.mT), q.mT), -_slopes(bent, r, s).log1p().sum(-1)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, r, s, b = self._matrices(context)
        bent = torch.tanh(_rows(_rows(x, q), s.mT) + b)
        slopes = _slopes(bent, r, s)
        with torch.no_grad():
            # d log(1 + h' r s) / d argument with h'' = -2 h h'.
            score = score + _rows(_rows(2.0 * bent * slopes / (1.0 + slopes), s), q.mT)
            # In the basis of Q the Jacobian is upper triangular; outside its span it is the identity.
            inside = _rows(score, q)
            jacobian = _small_jacobian(bent, r, s)
            solved = torch.linalg.solve_triangular(jacobian.mT, inside.unsqueeze(-1), upper=False).squeeze(-1)
            score = score + _rows(solved - inside, q.mT)
        return x + _rows(_rows(bent, r.mT), q.mT), slopes.log1p().sum(-1), score


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """``x^T matrix`` for every row: ``(..., n)`` and ``(..., n, m)`` to ``(..., m)``."""
    return x @ matrix if matrix.ndim == 2 else (x.unsqueeze(-2) @ matrix).squeeze(-2)


def _slopes(bent: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """``h'_i r_ii s_ii``, given ``bent = tanh(argument)``."""
    return (1.0 - bent.square()) * (r.diagonal(dim1=-2, dim2=-1) * s.diagonal(dim1=-2, dim2=-1))


def _small_jacobian(bent: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """``I + R diag(h') S``, upper triangular, ``(..., M, M)``."""
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return identity + (r * (1.0 - bent.square()).unsqueeze(-2)) @ s
