# SPDX-License-Identifier: Apache-2.0
r"""L1. Symmetric tridiagonal matrices: products, and a Cholesky factorization by odd-even (cyclic) reduction.

Eliminating the rows with an even index, which are not coupled to each other, leaves a tridiagonal matrix of the rows
with an odd index, half as many:

.. math::
    \begin{pmatrix} D & B^\top \\ B & E \end{pmatrix}
    = \begin{pmatrix} D^{1/2} & 0 \\ B D^{-1/2} & I \end{pmatrix}
    \begin{pmatrix} I & 0 \\ 0 & E - B D^{-1} B^\top \end{pmatrix}
    \begin{pmatrix} D^{1/2} & D^{-1/2} B^\top \\ 0 & I \end{pmatrix}.

A level takes a few operations on whole vectors, so that all of it is O(n) work in O(log n) operations, where the usual
order takes n. As a Cholesky factorization in some order of the rows it is as stable as any.

References:
    Buzbee, Golub, Nielson. On direct methods for solving Poisson's equations. SIAM Journal on Numerical Analysis 1970,
    section 3. Hockney. A fast direct solution of Poisson's equation using Fourier analysis. Journal of the ACM 1965.
    Golub, Van Loan. Matrix Computations. 4th edition 2013, section 4.5.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TridiagonalCholesky", "inverse_diagonal", "tridiagonal_product"]


class _Level(NamedTuple):
    """Rows that are eliminated together, every other one of ``size``: the inverse root of their diagonal, and ``B
    D^-1/2``, which couples each to the row after it, and, from the second on, to the row before it; each ``(...,
    ceil(size / 2))``."""

    size: int
    scale: Tensor
    after: Tensor
    before: Tensor


class TridiagonalCholesky:
    r"""The Cholesky factorization :math:`A = C C^\top` of symmetric positive definite tridiagonal matrices, with C
    lower triangular if rows and columns are in the order of an odd-even reduction: those with an even index first.

    It is made of differentiable operations, none of which depends on values, and has the dtype of the matrix. Rows and
    columns of C are in the order of the matrix: if that is diagonal, so is C. A matrix that is not positive definite
    gives NaNs.

    Shape:
        - vectors: ``(..., n)``, broadcastable against the batch shape of the matrices.

    Args:
        diagonal: ``(..., n)``, with n at least 1.
        off: The elements beside the diagonal, ``(..., n - 1)``.

    Example:
        >>> import torch
        >>> from pyro_flows.transforms import TridiagonalCholesky
        >>> walk = TridiagonalCholesky(torch.full((100,), 2.0), torch.full((99,), -1.0))
        >>> walk.solve(torch.ones(100)).shape
        torch.Size([100])
    """

    def __init__(self, diagonal: Tensor, off: Tensor) -> None:
        self._levels: list[_Level] = []
        diagonal = diagonal.expand(*torch.broadcast_shapes(diagonal.shape[:-1], off.shape[:-1]), -1)
        right = F.pad(off, (0, 1))  # couples each row to the next one, the last to none
        while (size := diagonal.shape[-1]) > 1:
            (even, odd), (to_odd, to_even) = _halves(diagonal, 1.0), _halves(right)
            scale = even.rsqrt()
            after = to_odd * scale
            before = to_even * scale.roll(-1, -1)  # of the next of these rows; zero for the last one, which has none
            self._levels.append(_Level(size, scale, after, before))
            diagonal = _minus(odd, after, after, before, before)
            right = -before * after.roll(-1, -1)
        self._last = diagonal.rsqrt()

    def log_det(self) -> Tensor:
        """``log|A|``, which is ``2 log|C|``; of the batch shape."""
        return -2.0 * torch.cat([*(level.scale for level in self._levels), self._last], -1).log().sum(-1)

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``."""
        return self._solve_upper(self._solve_lower(b))

    def solve_lower(self, b: Tensor) -> Tensor:
        """``C^-1 b``."""
        return self._joined(self._solve_lower(b))

    def solve_upper(self, b: Tensor) -> Tensor:
        """``C^-T b``."""
        return self._solve_upper(self._split(b))

    def multiply(self, x: Tensor) -> Tensor:
        """``C x``."""
        *parts, last = self._split(x)
        product = last / self._last
        for level, part in zip(self._levels[::-1], parts[::-1], strict=True):
            odd = product + level.after * part + level.before * part.roll(-1, -1)
            product = _merged(part / level.scale, odd, level.size)
        return product

    def multiply_transposed(self, x: Tensor) -> Tensor:
        """``C^T x``."""
        products = []
        for level in self._levels:
            part, x = _halves(x)
            products.append(part / level.scale + level.after * x + (level.before * x).roll(1, -1))
        return self._joined([*products, x / self._last])

    def _solve_lower(self, b: Tensor) -> list[Tensor]:
        """``C^-1 b`` by levels."""
        parts = []
        for level in self._levels:
            even, odd = _halves(b)
            parts.append(even * level.scale)
            b = _minus(odd, level.after, parts[-1], level.before, parts[-1].roll(-1, -1))
        return [*parts, b * self._last]

    def _solve_upper(self, parts: list[Tensor]) -> Tensor:
        """``C^-T`` times a vector that is given by levels."""
        *parts, last = parts
        x = last * self._last
        for level, part in zip(self._levels[::-1], parts[::-1], strict=True):
            rest = torch.addcmul(part, level.after, x, value=-1.0) - (level.before * x).roll(1, -1)
            x = _merged(rest * level.scale, x, level.size)
        return x

    def _split(self, x: Tensor) -> list[Tensor]:
        """A vector by levels."""
        parts = []
        for _ in self._levels:
            part, x = _halves(x)
            parts.append(part)
        return [*parts, x]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """The inverse of :meth:`_split`."""
        *parts, x = parts
        for level, part in zip(self._levels[::-1], parts[::-1], strict=True):
            x = _merged(part, x, level.size)
        return x


def tridiagonal_product(diagonal: Tensor, off: Tensor, x: Tensor) -> Tensor:
    """A symmetric tridiagonal matrix, as that of :class:`TridiagonalCholesky`, times vectors ``(..., n)``."""
    return diagonal * x + F.pad(off * x[..., 1:], (0, 1)) + F.pad(off * x[..., :-1], (1, 0))


def inverse_diagonal(diagonal: Tensor, off: Tensor) -> Tensor:
    """The diagonal of the inverse of a matrix, as that of :class:`TridiagonalCholesky`, ``(..., n)``, detached: the
    gradient of the log-determinant."""
    with torch.enable_grad():
        leaf = diagonal.detach().requires_grad_()
        log_det = TridiagonalCholesky(leaf, off.detach()).log_det().sum()
    return torch.autograd.grad(log_det, leaf)[0]


def _halves(x: Tensor, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Elements with an even and with an odd index, ``(..., ceil(n / 2))`` each, the last one padded if n is odd."""
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1), value=padding)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return even, odd


def _merged(even: Tensor, odd: Tensor, size: int) -> Tensor:
    """The inverse of :func:`_halves`, for that number of elements."""
    x = torch.stack([even, odd], -1).flatten(-2)
    return x[..., :size] if size % 2 else x


def _minus(x: Tensor, one: Tensor, other: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    """A vector less two products."""
    return torch.addcmul(torch.addcmul(x, one, other, value=-1.0), third, fourth, value=-1.0)
