# SPDX-License-Identifier: Apache-2.0
"""L1. The context of a plate item's flow, as named parts and as the single vector that networks take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ContextLayout", "ItemContext", "join"]


class ItemContext(NamedTuple):
    """Context of an item's flow; leading dimensions broadcast.

    Attributes:
        parents: Standardized values of the latents that its density depends on, ``(..., parent_dim)``.
        features: Features of the item: an encoder's output, or the item's row of an embedding table,
            ``(..., feature_dim)``.
        site: Location and log-scale of the item's site approximation, as parametrized by its head,
            ``(..., 2 * input_dim)``.
        prior: Location and log-scale of the prior, ``(..., 2 * input_dim)``; or ``(..., 0)`` where none is known.
    """

    parents: Tensor
    features: Tensor
    site: Tensor
    prior: Tensor

    def join(self) -> Tensor:
        """Concatenate the parts to one vector, ``(..., size)``; :meth:`ContextLayout.split` is the inverse."""
        return join(self)


@dataclass(frozen=True)
class ContextLayout:
    """Lengths of the parts of an :class:`ItemContext`.

    Attributes:
        parent_dim: Length of the parents' values; may be 0.
        feature_dim: Length of the features; may be 0.
        input_dim: Length of the item's own vector.
        has_prior: Whether priors are known.
    """

    parent_dim: int
    feature_dim: int
    input_dim: int
    has_prior: bool

    @property
    def network_dim(self) -> int:
        """Length of the networks' input."""
        return self.parent_dim + self.feature_dim

    @property
    def size(self) -> int:
        """Length of the whole vector."""
        return self.network_dim + (4 if self.has_prior else 2) * self.input_dim

    def split(self, context: Tensor) -> ItemContext:
        """Split a vector, ``(..., size)``, into its parts."""
        gaussian = 2 * self.input_dim
        sizes = [self.parent_dim, self.feature_dim, gaussian, gaussian if self.has_prior else 0]
        return ItemContext(*context.split(sizes, -1))

    def network_input(self, context: Tensor) -> Tensor:
        """The part of a vector that layers and networks receive, ``(..., network_dim)``: parents and features."""
        return context[..., : self.network_dim]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last dimension; the others broadcast."""
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(lead + part.shape[-1:]) for part in parts], -1)
