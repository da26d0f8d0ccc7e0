# SPDX-License-Identifier: Apache-2.0
"""L7. Ctrl-C: the first one is heard between two steps, so that no state is half changed; the second one at once. The
end of the time that a run may take is heard as the first one is."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """Within this context the first Ctrl-C waits for :meth:`raise_pending`; a second one raises ``KeyboardInterrupt``.

    Only where Python's own handler is in place, and in the main thread, which alone hears signals; elsewhere, Ctrl-C is
    what it was.

    Args:
        end: When the run has to stop, by ``time.perf_counter``; infinity for never.

    Attributes:
        count: Number of interruptions until now, signals or exceptions; the end of the time is none.
        ran_out: Whether the run was stopped since its time was up.
    """

    def __init__(self, end: float = math.inf) -> None:
        self.count = 0
        self.ran_out = False
        self._end = end
        self._pending = False
        self._by_time = False
        self._installed = False

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._pending or self.count:
            self.count += self._pending
            self._pending = False
            raise KeyboardInterrupt
        self._pending = True

    @property
    def is_pending(self) -> bool:
        """Whether Ctrl-C was pressed, which was not heeded yet."""
        return self._pending

    @property
    def is_late(self) -> bool:
        """Whether the time is up, which was not heeded yet."""
        return not self.ran_out and time.perf_counter() > self._end

    def raise_pending(self, wishes: Sequence[bool] | None = None) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed or the time is up.

        Args:
            wishes: What these are in any process; None for this one alone.
        """
        pressed, late = (self.is_pending, self.is_late) if wishes is None else wishes
        if pressed or late:
            self._by_time = late and not pressed
            self.ran_out, self._pending = self.ran_out or self._by_time, False
            raise KeyboardInterrupt

    def heed(self) -> None:
        """Count the interruption that was raised; raises ``KeyboardInterrupt`` again if it was not the first."""
        self.count += not self._by_time
        self._by_time = False
        if self.count > 1:
            raise KeyboardInterrupt
