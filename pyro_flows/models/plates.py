# SPDX-License-Identifier: Apache-2.0
"""L2. Which sites are local to which plates, and the way between an item's packed vector and the sites' own layout."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_flows.models.sites import Site, SiteTable

__all__ = ["LocalTable", "full_size", "partition"]


def full_size(frame: CondIndepStackFrame) -> int:
    """Size of a plate without subsampling."""
    return int(frame.full_size or frame.size)


class LocalTable:
    """The latent sites that are local to one set of plates, packed into one unconstrained vector per item.

    Pyro counts batch dimensions from the right. Here "lead" means them all, with the local plates' dimensions filled
    in and those of the sites' other plates of size 1, since the latter are packed into the item's vector.

    Args:
        sites: The sites; all share the local plates, in the same dimensions.
        plates: Frames of these plates, outermost (leftmost) first.
    """

    def __init__(self, sites: Collection[Site], plates: tuple[CondIndepStackFrame, ...]) -> None:
        self.names = tuple(frame.name for frame in plates)
        self.dims = tuple(frame.dim for frame in plates)
        self.full_sizes = tuple(full_size(frame) for frame in plates)
        packed, start = [], 0
        for site in sites:
            size = math.prod(self._extra(site).values()) * math.prod(self._event_shape(site))
            packed.append(replace(site, start=start, size=size))
            start += size
        self.sites = tuple(packed)
        self.item_dim = start
        self.rank = max(self._batch_rank(site) for site in self.sites)

    @property
    def num_items(self) -> int:
        """Number of items in the full plates."""
        return math.prod(self.full_sizes)

    def _event_shape(self, site: Site) -> torch.Size:
        return site.unconstrained_shape[self._batch_rank(site) :]

    def _batch_rank(self, site: Site) -> int:
        return len(site.unconstrained_shape) - site.unconstrained_event_dim

    def _extra(self, site: Site) -> dict[int, int]:
        """Batch dimensions (negative, from the left) of a site that are packed into the item's vector."""
        rank = self._batch_rank(site)
        return {dim: site.unconstrained_shape[rank + dim] for dim in range(-rank, 0) if dim not in self.dims}

    def split(self, packed: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Give each site its part of ``lead + (item_dim,)`` in the site's own layout, unconstrained."""
        for site in self.sites:
            part = packed[..., site.start : site.start + site.size]
            lead, extra, event = part.shape[:-1], self._extra(site), self._event_shape(site)
            lead = (1,) * (self._batch_rank(site) - len(lead)) + lead
            part = part.reshape((*lead, *extra.values(), *event))
            for index, dim in enumerate(extra):
                part = part.transpose(len(lead) + dim, len(lead) + index)
            yield site, part.reshape(part.shape[: len(lead)] + event).to(site.dtype)

    def pack(self, values: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """Invert :meth:`split` and the bijections to the supports.

        Args:
            values: Site name -> ``batch_shape + site shape``, over the full plates or any part of them.
            rank: Number of batch dimensions to give every site, beside ``batch_shape``.

        Returns:
            ``batch_shape + lead + (item_dim,)`` with ``len(lead) == rank``, and ``log|det d packed / d values|`` of
            shape ``batch_shape + lead``.

        Raises:
            ValueError: If a value has too few dimensions, or a size outside the local plates differs.
        """
        parts, total = {}, torch.zeros(())
        for site in self.sites:
            value = torch.as_tensor(values[site.name])
            batch_dim = value.dim() - len(site.shape)
            local = [len(site.shape) - site.event_dim + dim for dim in self.dims]
            wanted = [s for i, s in enumerate(site.shape) if i not in local]
            found = [s for i, s in enumerate(value.shape[max(batch_dim, 0) :]) if i not in local]
            if batch_dim < 0 or wanted != found:
                raise ValueError(
                    f"AutoFlowGuide: expected site '{site.name}' to have shape batch_shape + {tuple(site.shape)}, with "
                    f"any size along {' and '.join(self.names)}, but got {tuple(value.shape)}. Reshape it."
                )
            unconstrained = site.to_support.inv(value)
            parts[site.name] = unconstrained
            if not site.is_real:
                ladj = -site.to_support.log_abs_det_jacobian(unconstrained, value)
                ladj = sum_rightmost(ladj, ladj.dim() - value.dim() + site.event_dim)
                own = ladj.shape[batch_dim:]
                ladj = ladj.reshape(ladj.shape[:batch_dim] + (1,) * (rank - len(own)) + own)
                for dim in self._extra(site):
                    ladj = ladj.sum(dim, keepdim=True)
                total = total + ladj
        packed = self.pack_unconstrained(parts, rank)
        return packed, total.to(packed).expand(packed.shape[:-1])

    def pack_unconstrained(self, values: Mapping[str, Tensor], rank: int) -> Tensor:
        """Invert :meth:`split`: site name -> ``batch_shape + unconstrained shape``; see :meth:`pack`."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            extra, event = self._extra(site), self._event_shape(site)
            batch_dim = value.dim() - len(site.unconstrained_shape)
            own = value.shape[batch_dim : value.dim() - len(event)]
            lead_dim = batch_dim + rank
            pad = (1,) * (rank - len(own))
            part = value.reshape(value.shape[:batch_dim] + pad + own + (1,) * len(extra) + event)
            for index, dim in reversed(list(enumerate(extra))):
                part = part.transpose(lead_dim + dim, lead_dim + index)
            parts.append(part.reshape((*part.shape[:lead_dim], site.size)))
        return torch.cat(parts, -1)

    def place(self, features: Tensor, plate: str) -> Tensor:
        """Put ``(size of the plate, F)`` where the plate's dimension is: ``lead + (F,)``."""
        dim = self.dims[self.names.index(plate)]
        return features.reshape((features.shape[0],) + (1,) * (-dim - 1) + features.shape[1:])

    def flat_index(self, indices: Mapping[str, Tensor]) -> Tensor:
        """Row of each item in a table of all items, ``lead``, from indices into each plate."""
        row = torch.zeros((), dtype=torch.long)
        for name, size in zip(self.names, self.full_sizes, strict=True):
            row = row * size + self.place(indices[name].unsqueeze(-1), name).squeeze(-1)
        return row


def partition(table: SiteTable, local: Collection[str]) -> tuple[list[Site], list[LocalTable]]:
    """Split a model's latent sites by the local plates that they are in.

    Args:
        table: All latent sites.
        local: Names of the local plates.

    Returns:
        The global sites, and one table for each set of local plates that some site is in, fewest plates first: what
        a block may condition on comes before it.
    """
    groups: dict[tuple[str, ...], list[Site]] = {}
    frames: dict[tuple[str, ...], tuple[CondIndepStackFrame, ...]] = {}
    for site in table:
        plates = tuple(sorted((f for f in site.frames if f.name in local), key=lambda f: f.dim))
        names = tuple(frame.name for frame in plates)
        groups.setdefault(names, []).append(site)
        frames[names] = plates
    outside = groups.pop((), [])
    return outside, [LocalTable(groups[names], frames[names]) for names in sorted(groups, key=len)]
