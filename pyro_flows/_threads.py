# SPDX-License-Identifier: Apache-2.0
"""L0. One thread at a time runs programs of Pyro, whose handlers belong to the whole process."""

from __future__ import annotations

import os
import threading
import warnings

from pyro_flows._blame import user_level

__all__ = ["one_at_a_time"]


class one_at_a_time:
    """Context in which no other thread is in such a context, after waiting; one thread may nest them.

    Args:
        owner: Name of the public function, for the warning that it waits, after a second.
    """

    lock = threading.RLock()
    holder = ""

    __slots__ = ("_before", "_owner")

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        if not (self.lock.acquire(blocking=False) or self.lock.acquire(timeout=1)):
            warnings.warn(
                f"{self._owner}: waits for {one_at_a_time.holder} in another thread, since Pyro's handlers and torch's "
                "random numbers belong to the whole process. To run several side by side, start processes.",
                stacklevel=user_level(),
            )
            self.lock.acquire()
        self._before, one_at_a_time.holder = one_at_a_time.holder, self._owner

    def __exit__(self, *error: object) -> None:
        one_at_a_time.holder = self._before
        self.lock.release()


def _start_anew() -> None:
    one_at_a_time.lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread that holds the lock does not exist in the child
    os.register_at_fork(after_in_child=_start_anew)
