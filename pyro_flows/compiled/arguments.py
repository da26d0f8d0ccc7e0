# SPDX-License-Identifier: Apache-2.0
"""L1. Arguments of a step: their tensors, and the structure that steps of one graph share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["structure", "tensors"]


def _flat_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Any]:
    """All leaves of the arguments, and their tree structure; a tuple of tensors, the common case, is its own leaves."""
    if not kwargs and all(torch.is_tensor(value) for value in args):
        return args, len(args)
    inputs, spec = pytree.tree_flatten((args, kwargs))
    return inputs, spec


def tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among arguments, in the order of their tree."""
    return [value for value in _flat_arguments(args, kwargs)[0] if torch.is_tensor(value)]


def structure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Structure of arguments: calls with equal structures share a graph."""
    inputs, spec = _flat_arguments(args, kwargs)
    kinds: list[Any] = []
    for value in inputs:
        if torch.is_tensor(value):
            kinds.append((value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
        elif isinstance(value, (int, float, str, bool, type(None))):
            kinds.append((type(value), value))
        else:
            kinds.append((type(value), id(value)))
    return (spec, *kinds)
