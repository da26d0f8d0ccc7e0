# SPDX-License-Identifier: Apache-2.0
"""L3. The mini-batches of a warm start: from a user's calls, or from plates that draw their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_flows._checks import shown
from pyro_flows.models.layout import Layout
from pyro_flows.models.traces import Call, DrawnPlates

__all__ = ["Arguments", "MakePlates", "MiniBatch", "Watch", "check_calls", "mini_batches", "unwatched"]

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
MakePlates = Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, pyro.plate]]


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """The model's arguments, and the items that they hold.

    Attributes:
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        indices: Plate -> indices of its mini-batch.
        drawn: The same, for the plates whose indices the model would draw at random.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    indices: dict[str, Tensor]
    drawn: dict[str, Tensor]

    @property
    def call(self) -> Call:
        """Arguments and indices to run the model with."""
        return Call(self.args, self.kwargs, self.drawn)

    def scale(self, layout: Layout) -> float:
        """Factor by which subsampled plates scale the log densities of these items, >= 1."""
        return layout.num_items / math.prod(len(self.indices[name]) for name in layout.plate_names)


def check_calls(calls: Any) -> None:
    """Raise ValueError unless these are the arguments of mini-batches, at least one."""
    is_list = isinstance(calls, (list, tuple)) and len(calls) > 0
    if not is_list or not all(len(call) == 2 and isinstance(call[1], Mapping) for call in calls):
        raise ValueError(f"warm_start_on: expected calls, [(args, kwargs), ...], but got {shown(calls)}.")


# Wraps a pass over mini-batches in a progress bar, with a title.
Watch = Callable[[Iterator[MiniBatch], str], Iterable[MiniBatch]]


def unwatched(batches: Iterator[MiniBatch], title: str) -> Iterable[MiniBatch]:
    """A pass over mini-batches without a progress bar."""
    return batches


def mini_batches(
    call: Arguments, make_plates: MakePlates, owned: Callable[[str, int], range] | None = None
) -> Iterator[MiniBatch]:
    """The mini-batches of a call: a single one, or, where plates draw their own, one for each part of these plates.

    Args:
        call: The model's arguments.
        make_plates: Function from the arguments to the guide's plates.
        owned: Function from the name and the size of a plate that draws its own to the items that are wanted; None
            wants all.
    """
    args, kwargs = call
    with poutine.block(), DrawnPlates() as drawn:
        plates = make_plates(args, kwargs)
    indices = {name: torch.as_tensor(plate.indices) for name, plate in plates.items()}
    parts: list[list[tuple[str, Tensor]]] = []
    for name in sorted(drawn.sizes.keys() & plates.keys()):
        size, count, items = plates[name].size, plates[name].subsample_size, indices[name]
        wanted = range(size) if owned is None else owned(name, size)
        starts = [min(start, wanted.stop - count) for start in wanted[::count]]
        parts.append([(name, torch.arange(start, start + count, device=items.device)) for start in starts])
    for chosen in itertools.product(*parts):
        yield MiniBatch(args, kwargs, {**indices, **dict(chosen)}, dict(chosen))
