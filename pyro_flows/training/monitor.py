# SPDX-License-Identifier: Apache-2.0
"""L7. What a user sees of a run while it lasts: one progress bar from the first second on, and a callback."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm.auto import tqdm

from pyro_flows._checks import Settings, check_call, check_callable

__all__ = ["Callback", "FitProgress", "Monitor", "check_callback"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class FitProgress:
    """State of a run of :func:`~pyro_flows.fit` after a learning-rate cycle.

    Attributes:
        cycle: Number of finished cycles, >= 1.
        step: Number of optimizer steps so far.
        elbo: ELBO of the guide as it is now, from fresh draws, in nats; or the value of another objective.
        elbo_se: Its standard error.
        best_elbo: Highest one so far, in nats.
        learning_rate: Peak learning rate of the cycle.
        seconds: Wall time since the call.
        objective: What is optimized in this cycle: ``"elbo"``, which comes first, or what was asked for.
    """

    cycle: int
    step: int
    elbo: float
    elbo_se: float
    best_elbo: float
    learning_rate: float
    seconds: float
    objective: str = "elbo"


# Called after each cycle; a true return value stops the run.
Callback = Callable[[FitProgress], Any]


def check_callback(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a function of one argument."""
    check_callable(owner, name, value)
    check_call(owner, name, value, (None,), {}, "Let it take a FitProgress.")


@dataclass(frozen=True)
class MonitorSettings(Settings):
    """What the bar shows.

    Attributes:
        interval: Number of steps between two updates of the ELBO.
        window: Number of recent steps whose mean ELBO is shown, and the change from their first half to their second.
        seconds: Least time between two updates of the bar, in seconds.
    """

    interval: int = 50
    window: int = 200
    seconds: float = 0.5


class Monitor:
    """The progress bar of a run and the user's callback; a context that closes the bar.

    Args:
        progress: Whether to show the bar.
        callback: Called after each cycle; a true return value stops the run.
        settings: What the bar shows.
    """

    def __init__(
        self, progress: bool = False, callback: Callback | None = None, settings: MonitorSettings = MonitorSettings()
    ) -> None:
        self.begin = time.perf_counter()
        self._callback, self._settings = callback, settings
        self._bar = tqdm(desc="warm start", disable=not progress, mininterval=settings.seconds)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def watch(self, passed: Iterable[Item], title: str, total: int | None) -> Iterator[Item]:
        """Show how far a pass of the warm start is; ``total`` is its number of mini-batches, None if unknown."""
        for index, item in enumerate(passed, 1):
            self._bar.set_postfix_str(f"{title} {index}" + ("" if total is None else f" of {total}"), refresh=False)
            self._bar.update(0)
            yield item

    def begin_cycle(self, number: int | None, step: int, total: int) -> None:
        """Show the beginning of a cycle: its number (None where there are none), steps so far, and those at its end."""
        self._bar.n, self._bar.total = step, total
        self._bar.set_description("steps" if number is None else f"fit, cycle {number}")

    def step(self, losses: Sequence[float], num_steps: int, title: str = "ELBO") -> None:
        """Show a step, and now and then the ELBO, or what else ``title`` says that the losses are the negative of."""
        self._bar.update()
        if num_steps % self._settings.interval == 0:
            recent = losses[-self._settings.window :]
            half = len(recent) // 2
            trend = statistics.fmean(recent[:half] or [0.0]) - statistics.fmean(recent[half:] or [0.0])
            self._bar.set_postfix_str(f"{title} {-statistics.fmean(recent[half:] or [0.0]):.3f}, trend {trend:+.3f}")

    @property
    def has_callback(self) -> bool:
        """Whether the user wants to be called, and so may look at the guide."""
        return self._callback is not None

    def end_cycle(self, progress: FitProgress) -> bool:
        """Call the user's function; returns whether it wants the run to stop."""
        return self._callback is not None and bool(self._callback(progress))
