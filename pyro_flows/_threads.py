# SPDX-License-Identifier: Apache-2.0
"""L0. One thread at a time runs programs of Pyro, whose handlers and parameters belong to the whole process."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_at_a_time"]


class _Turn:
    """A lock, and who has it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holder = ""


_TURN = _Turn()
if hasattr(os, "register_at_fork"):  # a thread that held the lock is not in the child
    os.register_at_fork(after_in_child=lambda: _TURN.__init__())  # type: ignore[misc]


@contextmanager
def one_at_a_time(owner: str, *, quietly: bool = False) -> Iterator[None]:
    """Wait until no other thread is in such a context; one thread may nest them.

    Args:
        owner: Name of the public function, for the warning.
        quietly: Whether to wait without a warning, for what takes milliseconds.
    """
    turn = _TURN
    if not turn.lock.acquire(blocking=False):
        if not quietly:
            warnings.warn(
                f"{owner}: waits for {turn.holder or 'another run'} in another thread, since Pyro's handlers and "
                "parameters belong to the whole process. To run several side by side, start processes.",
                stacklevel=4,
            )
        turn.lock.acquire()
    before, turn.holder = turn.holder, owner
    try:
        yield
    finally:
        turn.holder = before
        turn.lock.release()
