# SPDX-License-Identifier: Apache-2.0
"""L0. Whether operations are being recorded, so that code which looks at values takes another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["is_recording", "recording"]

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def is_recording() -> bool:
    """Whether operations are being recorded into a graph, where Python must not look at values."""
    return _RECORDING.get()


@contextmanager
def recording() -> Iterator[None]:
    """Has :func:`is_recording` say so, in this thread; gradients are computed in it, not in a thread of the GPU's, to
    which the answer would be no."""
    token = _RECORDING.set(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _RECORDING.reset(token)
