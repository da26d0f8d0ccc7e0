# SPDX-License-Identifier: Apache-2.0
"""L1. Parameters of a model and a guide as one vector, and the state that a step changes in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.nn.module import _is_module_local_param_enabled
from torch import Tensor

from pyro_flows._random import forked
from pyro_flows.compiled.adam import limited_step

__all__ = ["FlatParameter", "RecordingError", "StepLimit", "leaves_of", "limits_of", "modules_of", "state_of", "trial"]


class RecordingError(RuntimeError):
    """A step is not a fixed sequence of tensor operations; the message names the line that prevents it."""


@runtime_checkable
class StepLimit(Protocol):
    """Limit on the step of some parameters of a guide; any module of a guide may have one, as ``self.step_limit``.

    Code that updates the parameters within the limit then calls :meth:`forget`.

    Attributes:
        parameters: Parameters whose steps are limited.
        largest_step: Largest change of an entry in a step, in its units, > 0.
        units: The units of the entries of each parameter, of its shape; None for ones.
    """

    parameters: list[Tensor]
    largest_step: float

    @property
    def units(self) -> list[Tensor | None]: ...

    def forget(self) -> None:
        """Accept the parameters as they are: changes until now are not shortened."""


class FlatParameter:
    """Leaves of a model and a guide as views of one vector, so that an optimizer has a single tensor to update.

    The leaves remain parameters of modules and entries of Pyro's store, but share memory with :attr:`flat` until
    :meth:`release`; so does :attr:`vector`, which is a plain tensor.

    Args:
        leaves: Unconstrained parameters, of one dtype and on one device.
        limits: Step limits of the guide; code that updates the vector has to apply them.

    Attributes:
        per_limit: One over the largest step of each entry, ``(N,)``; 0 where there is no limit.

    Raises:
        RecordingError: If there are no leaves, or they have several dtypes or are on several devices.
    """

    def __init__(self, leaves: Sequence[Tensor], limits: Sequence[StepLimit] = ()) -> None:
        kinds = {(leaf.dtype, leaf.device) for leaf in leaves}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
            raise RecordingError(f"expected parameters of one dtype on one device, but got {found}")
        self.leaves = list(leaves)
        self.flat = torch.nn.Parameter(torch.cat([leaf.detach().reshape(-1) for leaf in leaves]))
        self.vector = self.flat.detach()
        self.sizes = [leaf.numel() for leaf in leaves]
        slow: dict[int, Tensor] = {}
        for limit in limits:
            for leaf, unit in zip(limit.parameters, limit.units, strict=True):
                ones = torch.ones_like(leaf) if unit is None else unit
                slow[id(leaf)] = (limit.largest_step * ones).reciprocal().detach().reshape(-1)
        rows = [slow[id(leaf)] if id(leaf) in slow else self.vector.new_zeros(leaf.numel()) for leaf in leaves]
        self.per_limit = torch.cat(rows)
        for leaf, part in zip(leaves, self.flat.detach().split(self.sizes), strict=True):
            leaf.data = part.view(leaf.shape)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Shorten the step that is taken within this context; see :func:`limited_step`."""
        before = self.vector.clone()
        yield
        with torch.no_grad():
            self.vector.copy_(before + limited_step(self.vector - before, self.per_limit))

    @property
    def is_whole(self) -> bool:
        """Whether all leaves still share memory with the vector."""
        step = self.flat.element_size()
        address = self.flat.data_ptr()
        for leaf, size in zip(self.leaves, self.sizes, strict=True):
            if leaf.data_ptr() != address:
                return False
            address += size * step
        return True

    def gather_gradients(self) -> None:
        """Move the gradients of the leaves into that of the vector."""
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        self.flat.grad = torch.cat([part.reshape(-1) for part in parts])
        for leaf in self.leaves:
            leaf.grad = None

    def release(self) -> None:
        """Give each leaf memory of its own again."""
        for leaf in self.leaves:
            leaf.data = leaf.detach().clone()


def leaves_of(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Unconstrained leaves of all param statements of a run."""
    with pyro.validation_enabled(False), poutine.block(), poutine.trace(param_only=True) as capture:
        run(*args, **kwargs)
    # From the store, where it is used, since fixed parameters of a guide have SVI take them for one of them.
    stored = {} if _is_module_local_param_enabled() else pyro.get_param_store()._params
    return [
        stored[name] if name in stored else node["value"].unconstrained() for name, node in capture.trace.nodes.items()
    ]


def state_of(*programs: Any) -> list[Tensor]:
    """Buffers of the modules of a model and a guide, which a run may change in place."""
    modules = [module for program in programs for module in modules_of(program)]
    return list({id(buffer): buffer for module in modules for buffer in module.buffers()}.values())


def modules_of(program: Any, depth: int = 4) -> Iterator[torch.nn.Module]:
    """A module itself, or the modules that a function holds, as ``poutine.block(guide)`` or ``lambda x: guide(x)``."""
    if isinstance(program, torch.nn.Module):
        yield program
    elif depth:
        held = [getattr(program, "__self__", None), *getattr(program, "args", ())]  # of a method, of a partial
        for cell in getattr(program, "__closure__", None) or ():
            with suppress(ValueError):  # an empty one
                held.append(cell.cell_contents)
        for part in held:
            if callable(part) and part is not program:
                yield from modules_of(part, depth - 1)


def limits_of(program: Any) -> list[StepLimit]:
    """Step limits of a guide's modules; see :class:`StepLimit`."""
    parts = [part for module in modules_of(program) for part in module.modules()]
    # Limits in a module's own dictionary only: a guide may also expose the limit of one of its parts.
    held = [vars(part).get("step_limit") for part in parts]
    return list({id(limit): limit for limit in held if isinstance(limit, StepLimit)}.values())


@contextmanager
def trial(state: Sequence[Tensor]) -> Iterator[None]:
    """Restore torch's random state and tensors on exit."""
    before = [value.clone() for value in state]
    try:
        with forked():
            yield
    finally:
        with torch.no_grad():
            for value, old in zip(state, before, strict=True):
                value.copy_(old)
