# SPDX-License-Identifier: Apache-2.0
"""A GPU that is only pretended: tensors in the CPU's memory which say that they are on ``cuda``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _device as defaults
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_flows.compiled import replay

__all__ = ["MixedDevicesError", "pretended_gpu"]

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Operations that may read a tensor of another device than their first argument's.
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class MixedDevicesError(BaseException):
    """An operation has operands on both devices, where torch raises a RuntimeError on a GPU; no ``except Exception`` in
    between hides this one."""


class _Where:
    """Which tensors are on the GPU: those whose storage was made by one of its operations."""

    def __init__(self) -> None:
        # Weak references keep the addresses of storages that are gone from being used again.
        self._storages: dict[int, StorageWeakRef] = {}

    def is_on_gpu(self, tensor: Tensor) -> bool:
        return _storage(tensor)._cdata in self._storages

    def put(self, tensor: Tensor, *, on_gpu: bool) -> None:
        storage = _storage(tensor)
        if on_gpu:
            self._storages[storage._cdata] = StorageWeakRef(storage)
        else:
            self._storages.pop(storage._cdata, None)


def _storage(tensor: Tensor) -> Any:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return (tensor._values() if tensor.is_sparse else tensor).untyped_storage()


WHERE = _Where()  # one for all tests, since the library caches constants


class _Operations(TorchDispatchMode):
    """Results of an operation are where its operands are, which must be in one place, but for numbers."""

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            places = [self._where.is_on_gpu(value) for value in operands]
            if not operands and torch._C._current_graph_task_id() != -1:
                places = [True]  # made by autograd, where the tensor is whose gradient it is part of
            if any(places):
                self._check(func, operands, places)
                if func not in COPIES or places[0]:
                    for part in tree_leaves(found):
                        if isinstance(part, Tensor):
                            self._where.put(part, on_gpu=True)
        return found

    def _check(self, func: Any, operands: list[Tensor], places: list[bool]) -> None:
        if func in COPIES or (func in INDEXING and places[0]):
            return
        astray = [tuple(value.shape) for value, place in zip(operands, places) if not place and value.dim()]
        if astray:
            raise MixedDevicesError(f"{func}: expected operands on {GPU}, but got some of shapes {astray} on {CPU}")


class _Devices(TorchFunctionMode):
    """Has tensors on the GPU say so, and functions with ``device=`` make tensors there."""

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        place = self._asked_for(name, args, kwargs)
        if name in ("numpy", "__array__") and self._where.is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "_parse_to":  # reads the arguments of Module.to
            device, *rest = func(*args, **kwargs)
            like = next(filter(torch.is_tensor, args), None)
            return device if like is None else self._device(like), *rest
        if place is None:
            return func(*args, **kwargs)
        if name in ("cpu", "cuda"):
            found = args[0]
        else:
            places = (torch.device, str) if name == "to" else torch.device
            args, kwargs = tree_map(lambda value: CPU if isinstance(value, places) else value, (args, kwargs))
            found = func(*args, **{**kwargs, **({"device": CPU} if kwargs.get("device") is not None else {})})
        if not isinstance(found, Tensor):
            return found
        if any(isinstance(value, Tensor) and _storage(value)._cdata == _storage(found)._cdata for value in args):
            if self._where.is_on_gpu(found) == place:
                return found
            found = found.clone()
        self._where.put(found, on_gpu=place)
        return found

    def _attribute(self, func: Any, args: Any) -> Any:
        attribute = getattr(func.__self__, "__name__", "")
        if attribute == "device":
            return self._device(args[0])
        if attribute in ("is_cuda", "is_cpu"):
            return self._where.is_on_gpu(args[0]) == (attribute == "is_cuda")
        return func(*args)

    def _device(self, tensor: Tensor) -> torch.device:
        return GPU if self._where.is_on_gpu(tensor) else CPU

    def _asked_for(self, name: str, args: Any, kwargs: Any) -> bool | None:
        """Whether a result has to be on the GPU, or on the CPU; None is where its operands are."""
        if name in ("cpu", "cuda"):
            return name == "cuda"
        device = kwargs.get("device")
        if name == "to":
            others = [value for value in args[1:] if isinstance(value, (torch.device, str, Tensor))]
            device = others[0] if others else device
        elif device is None and name in ("tensor", "as_tensor") and defaults.CURRENT_DEVICE is not None:
            device = defaults.CURRENT_DEVICE  # to which torch moves tensors too
        elif device is None and name in ("new_tensor", "tensor", "as_tensor") and isinstance(args[0], Tensor):
            device = args[0]
        if isinstance(device, Tensor):
            return self._where.is_on_gpu(device)
        return None if device is None else torch.device(device).type == "cuda"


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this context ``device="cuda"`` works without a GPU: values, classes and gradients are a CPU's, ``device``
    says ``cuda:0``, and an operation on tensors of both devices raises :class:`MixedDevicesError`.

    Nothing is recorded, since the operations of a recorded graph name devices.

    Args:
        patch: Replaces what would need a GPU, until the end of the test.
    """
    make = torch.Generator

    class Generator(make):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls)

        def __init__(self, device: Any = None) -> None: ...

    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.cuda, "init", lambda: None)
    patch.setattr(replay, "SETTINGS", replay.ReplaySettings(recorded_call=sys.maxsize))
    with _Operations(WHERE), _Devices(WHERE):
        yield
