# SPDX-License-Identifier: Apache-2.0
"""L2. Fields: hundreds or thousands of latents of one site, and a few others that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["field_of"]


@dataclass(frozen=True)
class FieldSettings:
    """Which models have a field.

    Attributes:
        min_dim: Smallest number of coordinates of a field.
        max_others: Largest number of other coordinates.
        max_dim: Largest number of all coordinates: a covariance takes memory as its square, and a draw as much time.
    """

    min_dim: int = 200
    max_others: int = 50
    max_dim: int = 3000


FIELDS = FieldSettings()


def field_of(sizes: Sequence[int]) -> slice | None:
    """The coordinates of the largest site, if it is large and there are others, but few; None otherwise.

    Args:
        sizes: Number of coordinates of each site, in the order of the packed latents.
    """
    largest = max(range(len(sizes)), key=lambda site: sizes[site])
    begin, num_others = sum(sizes[:largest]), sum(sizes) - sizes[largest]
    is_field = sizes[largest] >= FIELDS.min_dim and 0 < num_others <= FIELDS.max_others and sum(sizes) <= FIELDS.max_dim
    return slice(begin, begin + sizes[largest]) if is_field else None
