# SPDX-License-Identifier: Apache-2.0
"""L7. Ctrl-C: the first one is heard between two steps, so that no state is half changed; the second one at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """Within this context the first Ctrl-C waits for :meth:`raise_pending`; a second one raises ``KeyboardInterrupt``.

    Only where Python's own handler is in place, and in the main thread, which alone hears signals; elsewhere, Ctrl-C is
    what it was.

    Attributes:
        count: Number of interruptions until now, signals or exceptions.
    """

    def __init__(self) -> None:
        self.count = 0
        self._pending = False
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

    def raise_pending(self, anyone: bool | None = None) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed, here or, where ``anyone`` is given, if that says so."""
        if self._pending if anyone is None else anyone:
            self._pending = False
            raise KeyboardInterrupt
