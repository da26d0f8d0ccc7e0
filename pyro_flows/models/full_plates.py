# SPDX-License-Identifier: Apache-2.0
"""L2. Programs that draw random mini-batches, run on all items."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.subsample_messenger import SubsampleMessenger

__all__ = ["on_full_plates"]


def on_full_plates(program: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model or a guide so that plates that would draw a mini-batch have all items, in order. Plates whose items
    the arguments choose are left alone.

    Pyro decides a plate's size where the plate is made, before any handler sees it; so its function is replaced while
    the program runs.
    """

    @functools.wraps(program, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with _full_plates():
            return program(*args, **kwargs)

    return run


@contextmanager
def _full_plates() -> Iterator[None]:
    own = SubsampleMessenger.__dict__["_subsample"]

    def all_items(name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any) -> Any:
        return own.__func__(name, size, None if subsample is None else subsample_size, subsample, *rest)

    SubsampleMessenger._subsample = staticmethod(all_items)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = own
