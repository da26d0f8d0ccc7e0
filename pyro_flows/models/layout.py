# SPDX-License-Identifier: Apache-2.0
"""L2. The map between values of latent sites and packed unconstrained vectors: one vector in all, or one for each item
of some plates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_flows._checks import shown
from pyro_flows.models.sites import Site, full_size
from pyro_flows.transforms.base import is_readable

__all__ = ["Layout", "check_names", "partition"]

OWNER = "AutoFlowGuide"


class Layout:
    """Latent sites, in order, packed into one unconstrained vector for each item of some plates; without plates, into
    a single vector.

    Pyro counts batch dimensions from the right. Here ``lead`` is the shape of those from the outermost of the plates
    on: the number of items in use (a mini-batch's, say) in each plate's dimension, and size 1 in any other. The sites'
    other batch dimensions are packed into the vector, before their event dimensions.

    Args:
        sites: The sites, one or more; all are in the plates.
        plates: Frames of the plates, outermost (leftmost) first.
        has_leaves: Whether the coordinates of the last site are leaves: independent of each other given all others.

    Attributes:
        names: Names of the sites.
        plate_names: Names of the plates.
        rank: Number of dimensions of ``lead``.
        sizes: Number of coordinates of the packed vector for each site.
        latent_dim: Length D of the packed vector.
        num_leaves: Number of its last coordinates that are leaves; 0 for none.
    """

    def __init__(
        self, sites: Collection[Site], plates: tuple[CondIndepStackFrame, ...] = (), *, has_leaves: bool = False
    ) -> None:
        self.sites = tuple(sites)
        self.plates = plates
        self.names = tuple(site.name for site in self.sites)
        self.plate_names = tuple(frame.name for frame in plates)
        self.rank = max((-frame.dim for frame in plates), default=0)
        self._dims = frozenset(frame.dim for frame in plates)
        self.sizes = [
            math.prod((*self._packed_dims(site).values(), *site.unconstrained_event_shape)) for site in self.sites
        ]
        self.latent_dim = sum(self.sizes)
        self.num_leaves = self.sizes[-1] if has_leaves else 0

    @property
    def num_free(self) -> int:
        """Number of coordinates that are no leaves."""
        return self.latent_dim - self.num_leaves

    def with_leaves(self, name: str) -> Layout:
        """The layout in which this site, whose coordinates are leaves, comes last."""
        others = [site for site in self.sites if site.name != name]
        return Layout([*others, self[name]], self.plates, has_leaves=True)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    @property
    def slices(self) -> dict[str, slice]:
        """Site name -> slice of its coordinates in the packed vector."""
        ends = itertools.accumulate(self.sizes)
        return {name: slice(end - size, end) for name, size, end in zip(self.names, self.sizes, ends, strict=True)}

    @property
    def full_sizes(self) -> tuple[int, ...]:
        """Sizes of the plates without subsampling."""
        return tuple(full_size(frame) for frame in self.plates)

    @property
    def num_items(self) -> int:
        """Number of items in the full plates; 1 without plates."""
        return math.prod(self.full_sizes)

    def items(self) -> list[Tensor]:
        """Coordinates of the packed vector that belong to the same items, ``(num_items, m)`` with m >= 2 for each kind.

        Sites in the same plates share their items, and so do vectors of one length: a vector of weights and that of
        their scales, say, with or without a plate, as long as there is a single set of plates of this length.
        """
        kinds: dict[frozenset[str] | int, list[Tensor]] = {}
        orders: dict[frozenset[str], list[str]] = {}
        for site, where in zip(self.sites, self.slices.values(), strict=True):
            inner = self._packed_dims(site)
            plates = {frame.name: frame.dim for frame in site.frames if frame.dim in inner}
            index, names = torch.arange(where.start, where.stop), frozenset(plates)
            count = math.prod(inner[dim] for dim in plates.values()) if plates else len(index)
            if plates:
                # Another site may have these plates in other dimensions: items are in the order of the first one.
                order = orders.setdefault(names, sorted(plates, key=lambda name: plates[name]))
                axes = [list(inner).index(plates[name]) for name in order]
                index = index.view(*inner.values(), -1).movedim(axes, list(range(len(axes))))
            if count > 1:
                kinds.setdefault(names or count, []).append(index.reshape(count, -1))
        for count in [key for key in kinds if isinstance(key, int)]:
            same = [key for key, parts in kinds.items() if isinstance(key, frozenset) and len(parts[0]) == count]
            if len(same) == 1:
                kinds[same[0]] += kinds.pop(count)
        found = [torch.cat(parts, -1) for parts in kinds.values()]
        return [items for items in found if items.shape[-1] > 1]

    @property
    def init_loc(self) -> Tensor:
        """Packed values of the trace that the sites were read from, ``lead + (D,)``."""
        return self.pack_unconstrained({site.name: site.init_loc for site in self.sites})

    def _packed_dims(self, site: Site) -> dict[int, int]:
        """Batch dimensions (negative) of a site that are packed into the vector, with their sizes."""
        batch_shape = site.unconstrained_shape[: site.batch_rank]
        sizes = {axis - site.batch_rank: size for axis, size in enumerate(batch_shape)}
        return {dim: size for dim, size in sizes.items() if dim not in self._dims and size != 1}

    def split(self, packed: Tensor | Sequence[Tensor], batch_dim: int = 0) -> Iterator[tuple[Site, Tensor]]:
        """Split packed vectors into the unconstrained values of each site, in the site's own shape.

        Args:
            packed: ``batch_shape + lead + (D,)``, or its parts of lengths ``sizes``. Any dimensions between
                ``batch_shape`` and ``lead`` are Pyro's: they broadcast against a site's other batch dimensions
                (particles, outer plates).
            batch_dim: Length of ``batch_shape``, which stays in front of all batch dimensions of a site.
        """
        parts = packed.split(self.sizes, -1) if isinstance(packed, Tensor) else packed
        for site, part in zip(self.sites, parts, strict=True):
            batch_shape, lead = part.shape[:batch_dim], part.shape[batch_dim:-1]
            inner, event_shape = self._packed_dims(site), site.unconstrained_event_shape
            own = (1,) * (site.batch_rank - len(lead)) + lead
            outer = [size for axis, size in enumerate(own) if axis - len(own) not in inner]
            part = part.reshape((*batch_shape, *outer, *inner.values(), *event_shape))
            axes, last_axes = _axes(inner, len(event_shape))
            yield site, part.movedim(last_axes, axes).to(site.dtype)

    def pack_unconstrained(self, values: Mapping[str, Tensor], rank: int | None = None) -> Tensor:
        """Invert :meth:`split`.

        Args:
            values: Site name -> ``batch_shape + unconstrained shape``, over the full plates or any part of them.
            rank: Number of dimensions of ``lead`` in the result, with dimensions of size 1 added on its left; None adds
                none.

        Returns:
            ``batch_shape + lead + (D,)``.
        """
        parts = [
            self._by_item(site, values[site.name], len(site.unconstrained_event_shape), rank) for site in self.sites
        ]
        return torch.cat(parts, -1)

    def _by_item(self, site: Site, value: Tensor, event_dim: int, rank: int | None) -> Tensor:
        """Reshape ``batch_shape + batch dimensions of the site + event_shape`` to ``batch_shape + lead + (size,)``."""
        inner, end = self._packed_dims(site), value.dim() - event_dim
        lead = [value.shape[end + dim] if dim in self._dims else 1 for dim in range(-self.rank, 0)]
        fill = (1,) * ((self.rank if rank is None else rank) - self.rank)
        axes, last_axes = _axes(inner, event_dim)
        value = value.movedim(axes, last_axes)
        size = math.prod(value.shape[end - len(inner) :])
        return value.reshape((*value.shape[: end - site.batch_rank], *fill, *lead, size))

    def unpack(self, packed: Tensor | Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Map packed vectors to values on the sites' supports.

        Args:
            packed: ``batch_shape + lead + (D,)``, or its parts of lengths ``sizes``.

        Returns:
            Site name -> ``batch_shape + site shape``, with as many items in the plates as ``packed`` has; and
            ``log|det d values / d packed|``, ``batch_shape + lead``.
        """
        like = packed if isinstance(packed, Tensor) else packed[0]
        values, total = {}, like.new_zeros(like.shape[:-1])
        for site, part in self.split(packed, batch_dim=like.dim() - 1 - self.rank):
            values[site.name], log_det = site.constrain(part)
            if torch.is_tensor(log_det):
                total = total - self._by_item(site, log_det, 0, None).sum(-1)
        return values, total

    def pack(self, values: Mapping[str, Any], rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Invert :meth:`unpack`.

        Args:
            values: Site name -> tensor of shape ``batch_shape + site shape``, over the full plates or any part of them;
                every site, one common batch shape.
            rank: Number of dimensions of ``lead`` in the result; see :meth:`pack_unconstrained`.

        Returns:
            ``batch_shape + lead + (D,)``, and ``log|det d packed / d values|`` of shape ``batch_shape + lead``.

        Raises:
            TypeError: If a value is no number.
            ValueError: If sites are missing or unknown, a shape does not fit, or a value is NaN.
        """
        check_names(self.names, values)
        parts, total, batch_shape = {}, torch.zeros(()), None
        for site in self.sites:
            value = values[site.name]
            if not torch.is_tensor(value):
                value = _as_tensor(site, value)
            if is_readable(value) and value.isnan().any():
                raise ValueError(f"{OWNER}: expected the value of site '{site.name}' to be numbers, but got NaN.")
            found = self._batch_shape(site, value)
            batch_shape = found if batch_shape is None else batch_shape
            if found != batch_shape:
                raise ValueError(
                    f"{OWNER}: expected site '{site.name}' to have the batch shape {tuple(batch_shape)} of the sites "
                    f"before it, but got {tuple(found)}. Parallel `Predictive` leaves dimensions of size 1 in place of "
                    "plates; reshape to `(num_samples, *site shape)`."
                )
            parts[site.name], log_det = site.unconstrain(value)
            if torch.is_tensor(log_det):
                total = total + self._by_item(site, log_det, 0, rank).sum(-1)
        packed = self.pack_unconstrained(parts, rank)
        return packed, total.to(packed).expand(packed.shape[:-1])

    def _batch_shape(self, site: Site, value: Tensor) -> torch.Size:
        """Batch shape of a value, in front of the site's shape; the latter may differ along the plates only."""
        batch_dim = value.dim() - len(site.shape)
        own = value.shape[max(batch_dim, 0) :]
        differs = {axis - site.batch_rank for axis, sizes in enumerate(zip(own, site.shape)) if len(set(sizes)) > 1}
        if batch_dim < 0 or not differs <= self._dims:
            along = f", with any size along {' and '.join(self.plate_names)}" if self.plates else ""
            raise ValueError(
                f"{OWNER}: expected site '{site.name}' to have shape batch_shape + {tuple(site.shape)}{along}, but got "
                f"{tuple(value.shape)}. Reshape it."
            )
        return value.shape[:batch_dim]

    def place(self, features: Tensor, plate: str) -> Tensor:
        """Reshape ``(size of the plate, F)`` to ``lead + (F,)``, with the plate in its own dimension."""
        dim = self.plates[self.plate_names.index(plate)].dim
        return features.reshape((features.shape[0],) + (1,) * (-dim - 1) + features.shape[1:])

    def flat_index(self, indices: Mapping[str, Tensor], owned: Mapping[str, range] | None = None) -> Tensor:
        """Row index of each item in a table of all items, ``lead``, from indices into each plate.

        Args:
            indices: Plate -> indices of items.
            owned: Plate -> the only items of it that the table has rows for.

        Raises:
            IndexError: If there is an item without a row.
        """
        row = torch.zeros((), dtype=torch.long)
        for name, size in zip(self.plate_names, self.full_sizes, strict=True):
            index = indices[name]
            if owned and name in owned:
                items = owned[name]
                index, size = index - items.start, len(items)
                if len(index) and not 0 <= index.min() <= index.max() < size:
                    raise IndexError(
                        f"{OWNER}: expected items {items.start} to {items.stop - 1} of plate '{name}', whose "
                        "parameters this process holds while it trains along with others, but got other items. Use the "
                        "guide after fit, or in its callback."
                    )
            row = row * size + self.place(index.unsqueeze(-1), name).squeeze(-1)
        return row

    def quantiles(self, draws: Tensor, levels: Tensor) -> Tensor:
        """Unconstrained values whose images on the supports are quantiles, coordinate by coordinate.

        Args:
            draws: ``(num_samples, *lead, D)``.
            levels: Probabilities, ``(count,)``.

        Returns:
            ``(count, *lead, D)``.
        """
        levels = levels.to(draws).unsqueeze(-1)
        decreasing = [torch.full((size,), site.is_decreasing) for site, size in zip(self.sites, self.sizes)]
        wanted = torch.where(torch.cat(decreasing).to(draws.device), 1 - levels, levels)  # (count, D)
        # torch.quantile takes at most 16 million elements; interpolation between order statistics is the same.
        # Contiguous along the sorted dimension: else memory access takes most of the time.
        ordered = draws.movedim(0, -1).contiguous().sort(-1).values.movedim(-1, 0)
        shape = (len(levels),) + (1,) * (draws.dim() - 2) + draws.shape[-1:]
        position = (wanted * (len(draws) - 1)).reshape(shape).expand((len(levels), *draws.shape[1:]))
        below = position.floor().long()
        above = (below + 1).clamp(max=len(draws) - 1)
        return torch.lerp(ordered.gather(0, below), ordered.gather(0, above), position - below)


def partition(sites: Iterable[Site], local: Collection[str]) -> list[Layout]:
    """Split a model's latent sites by the local plates that they are in.

    Args:
        sites: All latent sites.
        local: Names of the local plates.

    Returns:
        One layout for each set of local plates that some site is in, that of the global sites without plates; fewest
        plates first, so that a block comes after all that it may condition on.
    """
    groups: dict[tuple[str, ...], list[Site]] = {}
    frames: dict[tuple[str, ...], tuple[CondIndepStackFrame, ...]] = {}
    for site in sites:
        plates = tuple(sorted((frame for frame in site.frames if frame.name in local), key=lambda frame: frame.dim))
        names = tuple(frame.name for frame in plates)
        groups.setdefault(names, []).append(site)
        frames[names] = plates
    return [Layout(groups[names], frames[names]) for names in sorted(groups, key=len)]


def check_names(names: Collection[str], values: Mapping[str, Any]) -> None:
    """Refuse values whose sites are not exactly these.

    Raises:
        ValueError: If sites are missing or unknown.
    """
    missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
    if missing or unknown:
        raise ValueError(
            f"{OWNER}: expected a value for each of the latent sites {sorted(names)}, but missing are {missing} and "
            f"unknown are {unknown}."
        )


def _as_tensor(site: Site, value: Any) -> Tensor:
    """A number, a list or an array as a tensor."""
    try:
        return torch.as_tensor(value, dtype=site.dtype, device=site.init_loc.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{OWNER}: expected the value of site '{site.name}' to be a tensor, but got {shown(value)}."
        ) from None


def _axes(inner: Collection[int], event_dim: int) -> tuple[list[int], list[int]]:
    """Axes of batch dimensions in their own place, and their axes just before the event dimensions."""
    return [dim - event_dim for dim in inner], list(range(-event_dim - len(inner), -event_dim))
