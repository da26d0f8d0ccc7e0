# SPDX-License-Identifier: Apache-2.0
"""L3. Buffers of modules, such as running statistics, which processes may hold in versions of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_flows.distributed.processes import Processes

__all__ = ["first_buffers", "set_buffers"]


@torch.no_grad()
def set_buffers(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set buffers, in place, to as many values of their shapes."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


@contextmanager
def first_buffers(
    processes: Processes, buffers: Sequence[Tensor], values: Sequence[Tensor] | None = None
) -> Iterator[None]:
    """Give the modules of all processes the first one's buffers within this context, and their own ones after it.

    Args:
        processes: The processes; all of them call this, with buffers of the same shapes.
        buffers: The buffers.
        values: What to take in their place; None takes them as they are.
    """
    before = [buffer.detach().clone() for buffer in buffers]
    try:
        if values is not None:
            set_buffers(buffers, values)
        processes.share(buffers)
        yield
    finally:
        set_buffers(buffers, before)
