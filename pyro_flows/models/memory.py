# SPDX-License-Identifier: Apache-2.0
"""L2. Memory under ``torch.vmap`` that a model writes values to which differ between draws."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from traceback import walk_stack
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

__all__ = ["BatchedMemory", "Place", "WrittenTo"]

# Calls in code that lead to each other, the innermost first.
Place = tuple[tuple[CodeType, int], ...]
# Operators that change a tensor, beside the functions whose names end in an underscore.
OPERATORS = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"
WRITERS = {"__setitem__", *(f"__i{name}__" for name in OPERATORS)}


@dataclass(frozen=True)
class MemorySettings:
    """How places are told apart.

    Attributes:
        depth: Number of calls that make a place: those of a function of the model's own or torch's, and its callers.
    """

    depth: int = 4


SETTINGS = MemorySettings()


class WrittenTo(Exception):
    """A model has written values that differ between draws to a tensor that does not, made in a place that is known
    now: the next run gives each draw its own."""


class BatchedMemory(TorchFunctionMode):
    """Gives each draw its own copy of those new tensors that the model writes each draw's values to.

    Of these, only the place where they were made is known from one run to the next: other tensors stay the same for all
    draws, as data have to whose values, or number, Python reads.

    Where a mask says, numbers are written, ``logits[probs == 0] = 0.0`` as in the density of torch's ``Multinomial``,
    or values, ``x[x.isnan()] = imputed``, by operations that do not count the mask's entries, whose number may differ
    between draws.

    Args:
        batched: A tensor that differs between draws.
        written: Places where tensors were made that are written to, which a run may add to.
    """

    def __init__(self, batched: Tensor, written: set[Place]) -> None:
        super().__init__()
        self._zero = 0.0 * batched.detach().sum()
        self._written = written
        self._made: dict[int, tuple[Place, StorageWeakRef]] = {}  # by address, which is used again once that expires

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch.

        Raises:
            WrittenTo: If it writes to a tensor that draws shared, and need not.
        """
        kwargs = kwargs or {}
        if not _writes(func):
            return self._noted(func(*args, **kwargs))
        try:
            return _write_where(*args) if func is Tensor.__setitem__ and _is_mask(args[1]) else func(*args, **kwargs)
        except RuntimeError as error:
            place = self._place_of(_address(args[0]))
            if place is None or place in self._written:
                raise
            self._written.add(place)
            raise WrittenTo from error

    def _noted(self, found: Any) -> Any:
        """A result, of its own for each draw if it is written to."""
        address = _address(found)
        if not address or self._place_of(address) is not None:
            return found
        frames = islice(walk_stack(sys._getframe(2)), SETTINGS.depth)
        place = tuple((frame.f_code, frame.f_lasti) for frame, _ in frames)
        if place in self._written:
            return found + self._zero.to(found.dtype)
        self._made[address] = place, StorageWeakRef(found.untyped_storage())
        return found

    def _place_of(self, address: int) -> Place | None:
        """Where the tensor with an address was made; None if that is not known."""
        place, memory = self._made.get(address, (None, None))
        return None if memory is None or memory.expired() else place


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in WRITERS or (name.endswith("_") and not name.endswith("__"))


def _address(value: Any) -> int:
    """Address of the memory of a tensor that draws share; 0 for none."""
    if not isinstance(value, Tensor) or is_functorch_wrapped_tensor(value):
        return 0
    return value.untyped_storage().data_ptr()


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 0


def _write_where(values: Tensor, mask: Tensor, new: Any) -> None:
    """``values[mask] = new``, of which no number of elements depends on the mask."""
    below = values.dim() - mask.dim()
    wide = mask.reshape(*mask.shape, *(1,) * below)
    if not isinstance(new, Tensor):
        values.masked_fill_(wide, new)
        return
    if new.dim() == 1 + below:
        order = mask.flatten().cumsum(0).sub(1).clamp(0, len(new) - 1)
        new = new[order].reshape(values.shape)
    values.copy_(torch.where(wide, new.to(values.dtype), values))
