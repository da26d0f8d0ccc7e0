# SPDX-License-Identifier: Apache-2.0
"""L1. Groups of coordinates whose known priors are correlated, or of which the data see functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Correlated", "Covariance", "LinearPredictor", "StateChain"]


class Correlated(NamedTuple):
    """Coordinates whose priors share a matrix of correlations, itself a latent.

    Attributes:
        offset: The first of ``num * size`` adjacent coordinates, which form ``num`` vectors.
        num: Number of vectors.
        size: Length of each vector, K.
        factor_offset: The first of the ``K (K - 1) / 2`` coordinates of the matrix's Cholesky factor, in the order of
            :class:`~torch.distributions.transforms.CorrCholeskyTransform`.
    """

    offset: int
    num: int
    size: int
    factor_offset: int

    @property
    def rows(self) -> slice:
        """The coordinates."""
        return slice(self.offset, self.offset + self.num * self.size)


class Covariance(NamedTuple):
    """Coordinates whose priors are multivariate normals with a location and a covariance that follow other latents.

    Attributes:
        offset: The first of ``num * size`` adjacent coordinates, which form ``num`` vectors with the same covariance.
        num: Number of vectors.
        size: Length of each vector, n.
        prior: Locations, ``(..., num * n)``, and the Cholesky factor of the covariance, ``(..., n, n)``, as functions
            of all coordinates, ``(..., D)``, of which it uses free ones only.
    """

    offset: int
    num: int
    size: int
    prior: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def rows(self) -> slice:
        """The coordinates."""
        return slice(self.offset, self.offset + self.num * self.size)


class LinearPredictor(NamedTuple):
    """Standard normal coordinates of which the data see affine functions only.

    Attributes:
        rows: The coordinates z, n of them.
        num: Number K of functions.
        read: Offsets, ``(..., K)``, and slopes in z, ``(..., K, n)``, as functions of all coordinates, ``(..., D)``, of
            which it uses free ones only.
    """

    rows: slice
    num: int
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


class StateChain(NamedTuple):
    """A chain of states, ``h_t = c_t + a_t h_(t-1) + b_t z_t``, with standard normal z: coordinates that are the states
    themselves, or z, of which the data see the states only.

    Attributes:
        rows: The coordinates, n of them, adjacent.
        read: Offsets c, coefficients a, of which the first is ignored, and scales b, not zero, ``(..., n)`` each, as
            functions of all coordinates, ``(..., D)``, of which it uses free ones only.
        is_centered: Whether the coordinates are the states.
    """

    rows: slice
    read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    is_centered: bool = False
