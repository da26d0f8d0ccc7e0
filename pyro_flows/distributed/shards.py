# SPDX-License-Identifier: Apache-2.0
"""L3. The tables of local latents, of which each process holds the rows of its own items while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_flows.distributed.plates import PlateShare
from pyro_flows.distributed.processes import ALONE, Processes
from pyro_flows.posterior.plate import LocalBlock

__all__ = ["Shards"]


class Shards:
    """The rows of tables that belong to this process: those of its share of the items of a plate.

    A step moves rows of its mini-batch only, which come from the share of one process; so no other process needs these
    rows, or what goes along with them, until training ends. Where a plate lies inside of others, or others inside of
    it, all rows of its items are meant.

    Args:
        processes: The processes, which call the methods together.
        blocks: Blocks of local latents. Those that are in the plate and have a table are divided.
        plate: Name of the plate whose items are shared; empty for none.
        count: Number of parts of a step, a multiple of that of the processes; each has a share of the items.
        own: Numbers of the parts of this process, which follow one another.

    Attributes:
        blocks: The blocks whose tables are divided; none in a single process.
        shares: The shares of this process; none if no items are shared.
    """

    def __init__(
        self,
        processes: Processes = ALONE,
        blocks: Iterable[LocalBlock] = (),
        plate: str = "",
        count: int = 1,
        own: range = range(1),
    ) -> None:
        self.processes, self.plate, self.count = processes, plate, count
        found = [block for block in blocks if block.items is not None and plate in block.layout.plate_names]
        self.blocks = found if processes.size > 1 else []
        self.shares = [PlateShare(plate, part, count) for part in own] if found else []

    def covers(self, blocks: Iterable[LocalBlock], min_items: int) -> bool:
        """Whether items of several shares, of so many each at least, are all that blocks have latents of."""
        lengths = [dict(zip(b.layout.plate_names, b.layout.full_sizes)).get(self.plate, 0) for b in blocks]
        return len(self.shares) > 0 and self.count > 1 and min(lengths) // self.count >= min_items

    def __contains__(self, leaf: Tensor) -> bool:
        """Whether a parameter is a table of which each process holds some rows now."""
        return self._block_of(leaf) is not None

    def _block_of(self, leaf: Tensor) -> LocalBlock | None:
        return next((block for block in self.blocks if block.items is leaf and _is_divided(block)), None)

    def _range(self, size: int, rank: int) -> range:
        """Items of a process, of so many."""
        return PlateShare(self.plate, rank, self.processes.size).items(size)

    @contextmanager
    def divided(self) -> Iterator[None]:
        """Hold the rows of this process only within this context; afterwards all of them.

        If an error ends it, other processes may not have met with it, so that nothing is sent: rows of theirs are NaN.
        """
        self._divide()
        try:
            yield
            self.join()
        except BaseException:
            for block in filter(_is_divided, self.blocks):
                own = _table(block).data
                whole = own.new_full((block.layout.num_items, *own.shape[1:]), math.nan)
                self._rows(block, whole, self.processes.rank).copy_(self._shaped(block, own, self.processes.rank))
                self._replace(block, whole, {})
            raise

    @contextmanager
    def joined(self, wanted: bool) -> Iterator[None]:
        """Hold all rows within this context, inside of :meth:`divided`, if any process wants to."""
        if not any(map(_is_divided, self.blocks)) or not any(self.processes.gather(wanted)):
            yield
            return
        self.join()
        yield
        self._divide()

    def _divide(self) -> None:
        for block in self.blocks:
            table, size = _table(block), self._size(block)
            own = self._own(block, table.data)
            self._replace(block, own, {self.plate: self._range(size, self.processes.rank)})

    def join(self) -> None:
        """End the division of the tables, of which all processes get all rows."""
        for block in filter(_is_divided, self.blocks):
            self._replace(block, self._gathered(block, _table(block).data, to_all=True), {})

    def whole(self, leaf: Tensor, value: Tensor) -> Tensor:
        """All rows of a tensor of a parameter's shape, in the first process; others get their own back, and so do all
        for parameters that are not divided."""
        block = self._block_of(leaf)
        if block is None or value.shape != leaf.shape:
            return value
        return self._gathered(block, value, to_all=False)

    def own(self, leaf: Tensor, value: Tensor) -> Tensor:
        """The rows of this process, of a tensor of a parameter's shape before it was divided."""
        block = self._block_of(leaf)
        if block is None or len(value) != block.layout.num_items:
            return value
        return self._own(block, value)

    def _own(self, block: LocalBlock, whole: Tensor) -> Tensor:
        """A copy of the rows of this process."""
        rows = self._rows(block, whole, self.processes.rank).clone(memory_format=torch.contiguous_format)
        return rows.reshape(-1, *whole.shape[1:])

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the rows of all processes, of ``(rows, n)`` here, to ``(n,)``; NaN if there are none."""
        if not any(map(_is_divided, self.blocks)):
            return values.mean(0)
        count = values.new_tensor([len(values)], dtype=torch.float64)
        *total, rows = self.processes.sum(torch.cat([values.double().sum(0), count]))
        return (torch.stack(total) / rows).to(values.dtype)

    @torch.no_grad()
    def _gathered(self, block: LocalBlock, value: Tensor, *, to_all: bool) -> Tensor:
        processes, size = self.processes, self._size(block)
        keeps = to_all or processes.is_first
        whole = value.new_empty((block.layout.num_items if keeps else 0, *value.shape[1:]))
        for rank in range(processes.size):
            rows = block.layout.num_items // size * len(self._range(size, rank))
            place = self._rows(block, whole, rank) if keeps else None
            if rank == processes.rank:
                piece = value
            elif place is not None and place.is_contiguous():
                piece = place.view(rows, *value.shape[1:])  # received where they belong
            else:
                piece = value.new_empty((rows, *value.shape[1:]))
            processes.share([piece], rank)
            if place is not None and piece.data_ptr() != place.data_ptr():
                place.copy_(self._shaped(block, piece, rank))
        return whole if keeps else value

    def _replace(self, block: LocalBlock, values: Tensor, owned: dict[str, range]) -> None:
        """Give a table other rows; the parameter itself stays, which others refer to."""
        table = _table(block)
        table.grad = None
        # By way of another type: else gradients would need the former shape where an older graph is still alive.
        table.data = torch.empty(0, dtype=torch.complex64, device=values.device)
        table.data = values
        block.owned = owned

    def _size(self, block: LocalBlock) -> int:
        return block.layout.full_sizes[block.layout.plate_names.index(self.plate)]

    def _shaped(self, block: LocalBlock, value: Tensor, rank: int) -> Tensor:
        """Rows of a process by the plates, ``(*sizes, ...)``."""
        sizes = list(block.layout.full_sizes)
        sizes[block.layout.plate_names.index(self.plate)] = len(self._range(self._size(block), rank))
        return value.reshape(*sizes, *value.shape[1:])

    def _rows(self, block: LocalBlock, whole: Tensor, rank: int) -> Tensor:
        """Those of all rows that belong to a process, by the plates, ``(*sizes, ...)``; shares memory."""
        items = self._range(self._size(block), rank)
        by_plates = whole.view(*block.layout.full_sizes, *whole.shape[1:])
        return by_plates.narrow(block.layout.plate_names.index(self.plate), items.start, len(items))


def _is_divided(block: LocalBlock) -> bool:
    return bool(block.owned)


def _table(block: LocalBlock) -> torch.nn.Parameter:
    assert block.items is not None
    return block.items
