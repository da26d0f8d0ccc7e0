# SPDX-License-Identifier: Apache-2.0
"""L2. Memory under ``torch.vmap`` that a model writes values to which differ between draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["BatchedMemory"]

# Functions that allocate new tensors.
FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like, torch.ones_like),
    *(torch.full_like, Tensor.new, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),  # type: ignore[attr-defined]
}


class BatchedMemory(TorchFunctionMode):
    """Gives each draw its own copy of newly created tensors, so that the model can write each draw's values to them.

    Numbers are written where a mask says, ``logits[probs == 0] = 0.0`` as in the density of torch's ``Multinomial``, by
    an operation that does not count the mask's entries, whose number differs between draws.
    """

    def __init__(self, batched: Tensor) -> None:
        super().__init__()
        self._zero = 0.0 * batched.detach().sum()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and _is_mask(args[1]) and _is_number(args[2]):
            values, mask, number = args
            mask = mask.reshape(*mask.shape, *(1,) * (values.dim() - mask.dim()))
            if isinstance(number, Tensor):
                return values.copy_(torch.where(mask, number.to(values.dtype), values))
            return values.masked_fill_(mask, number)
        found = func(*args, **(kwargs or {}))
        if func in FACTORIES:
            return found + self._zero.to(found.dtype)
        return found


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
