# SPDX-License-Identifier: Apache-2.0
"""L7. The parts of a step, which processes share: particles or mini-batches, each with noise of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
from torch import Tensor

from pyro_flows._memory import is_out_of_memory
from pyro_flows._random import seed_of, seeded
from pyro_flows.compiled.parameters import state_of, trial
from pyro_flows.distributed.buffers import first_buffers, set_buffers
from pyro_flows.distributed.plates import PlateShare
from pyro_flows.distributed.processes import ALONE, Processes
from pyro_flows.distributed.shards import Shards
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.particles import at_a_draw
from pyro_flows.models.traces import Call, DrawnPlates, run_quietly
from pyro_flows.training.batches import Arguments, Batches
from pyro_flows.training.random_state import capture_random_state, restore_random_state

__all__ = ["Parts"]


class Parts:
    """The parts of a step, whose gradients are averaged; each process has as many, which follow one another.

    Each part has the seed of its noise, its mini-batch, and its own buffers of modules, so that a run depends on the
    number of parts, but not on the number of processes.

    Args:
        processes: The processes of the run.
        count: Number of parts, a multiple of the number of processes.

    Attributes:
        own: Numbers of the parts of this process.
        plate: Name of the plate that draws its own mini-batches, if there is one: each part has a share of its items.
        shards: The tables of which this process holds only the rows of its own items, see :meth:`find_shards`.
    """

    def __init__(self, processes: Processes = ALONE, count: int = 1) -> None:
        self.processes, self.count = processes, count
        self.own = range(processes.rank * count // processes.size, (processes.rank + 1) * count // processes.size)
        self.plate = ""
        self.shards = Shards()
        self._buffers: dict[int, list[Tensor]] = {}  # of own parts that are not at work

    @property
    def is_whole(self) -> bool:
        """Whether a step is a single part, with noise from the global generator."""
        return self.count == 1

    def look_for_plate(self, model: Callable[..., Any], guide: Callable[..., Any], call: Call) -> None:
        """Find the largest plate that draws its own mini-batches; others draw theirs from all of their items.

        Raises:
            ValueError: If it has too few items for disjoint mini-batches.
        """
        if self.is_whole or self.plate:
            return
        drawn = DrawnPlates()
        with trial(state_of(model, guide)), pyro.validation_enabled(False):
            run_quietly(at_a_draw(drawn(model), drawn(guide)), call)
            self.plate = max(sorted(drawn.sizes), key=lambda name: drawn.sizes[name], default="")
            if self.plate:
                run_quietly(at_a_draw(*self.programs(self.own[0], model, guide)), call)

    @property
    def per_run(self) -> int:
        """Number of parts that share the items, of which the value of a run is the mean."""
        return self.count if self.plate else 1

    def num_runs(self, count: int, least: int) -> int:
        """Number of runs that evaluate ``count`` mini-batches; not fewer than ``least``, unless ``count`` is."""
        return max(-(-count // self.per_run), min(count, least))

    def find_shards(self, guide: Callable[..., Any]) -> Shards:
        """The rows of the guide's tables that belong to each process, once the plate is known."""
        if self.plate and isinstance(guide, AutoFlowGuide):
            self.shards = Shards(self.processes, guide.posterior.blocks(), self.plate, self.count, self.own)
        return self.shards

    def share(self, part: int) -> PlateShare | None:
        """The handler under which a plate draws its mini-batches from the items of a part; None if there is none."""
        return PlateShare(self.plate, part, self.count) if self.plate else None

    def programs(
        self, part: int, model: Callable[..., Any], guide: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """A model and a guide that draw their mini-batches from the items of a part."""
        share = self.share(part)
        return (model, guide) if share is None else (share(model), share(guide))

    @contextmanager
    def noise(self, *key: int) -> Iterator[None]:
        """Draw from a generator with a seed of its own within this context."""
        with seeded(seed_of(*key)):
            yield

    def first_failure(self, failure: Exception | None) -> str:
        """Message of the first process's failure of those that have one; empty if none has."""
        return next(filter(None, self.processes.gather("" if failure is None else str(failure))), "")

    def calls(self, batches: Batches) -> Iterator[tuple[int, Arguments]]:
        """The mini-batch of the next step for each own part."""
        for part in range(self.count) if batches.in_turns else self.own:
            call = batches.next()
            if part in self.own:
                yield part, call

    def runs(
        self,
        value: Callable[[Arguments, int], float],
        calls: Sequence[Arguments],
        count: int,
        seed: int | None,
        data: Batches,
    ) -> list[float]:
        """Values of ``count`` runs, on one mini-batch after another, which processes share.

        Where parts have items of their own, or processes data of their own, each part does all runs, and the values are
        means over the parts.

        Args:
            value: Function from a mini-batch and the number of a part to a value.
            calls: The mini-batches.
            count: Number of runs.
            seed: Seed of their noise, for several parts.
            data: The data that the mini-batches are of.

        Raises:
            MemoryError: If memory runs out in another process; in this one, its own error passes.
        """
        if self.is_whole:
            return [value(call, 0) for call in itertools.islice(itertools.cycle(calls), count)]
        assert seed is not None
        processes = self.processes
        found: dict[int, list[float]] = {}
        by_part = self.averages(data)
        failure: Exception | None = None
        try:
            for run in range(count) if by_part else range(processes.rank, count, processes.size):
                for part in self.own if by_part else [0]:
                    with self.noise(seed, run, *([part] if by_part else [])):
                        found.setdefault(run, []).append(value(calls[run % len(calls)], part))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        each = processes.gather((found, failure is not None))
        if any(failed for _, failed in each):
            raise failure or MemoryError("out of memory in another process")
        joined = [[one for values, _ in each for one in values.get(run, ())] for run in range(count)]
        return [math.fsum(values) / len(values) for values in joined]

    def averages(self, data: Batches) -> bool:
        """Whether the value of a run is the mean over all parts, which have items or data of their own."""
        return not self.is_whole and bool(self.plate or not data.in_turns)

    @contextmanager
    def at_work(self, part: int, buffers: Sequence[Tensor]) -> Iterator[None]:
        """Give the modules the buffers of a part within this context."""
        if len(self.own) == 1:
            yield
            return
        if not self._buffers:
            self._buffers = {own: [buffer.detach().clone() for buffer in buffers] for own in self.own}
        set_buffers(buffers, self._buffers[part])
        yield
        self._buffers[part] = [buffer.detach().clone() for buffer in buffers]

    def forget_buffers(self) -> None:
        """Take the modules' buffers as they are for all parts, since there are others now."""
        self._buffers = {}

    def freeze(self, batches: Batches, buffers: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Buffers, random state and position in the data of each part, in order; all processes call this."""
        if self.is_whole:
            return [_frozen(batches, buffers)]
        own = {}
        for part in self.own:
            with self.at_work(part, buffers):
                own[part] = _frozen(batches, buffers)
        found = {part: each for process in self.processes.gather(own) for part, each in process.items()}
        return [found[part] for part in range(self.count)]

    def restore(self, parts: Sequence[dict[str, Any]], batches: Batches, buffers: Sequence[Tensor]) -> None:
        """Invert :meth:`freeze`."""
        first = parts[self.own[0]]
        if first["position"] is not None:
            batches.seek(first["position"])
        self._buffers = {part: parts[part]["buffers"] for part in self.own} if len(self.own) > 1 else {}
        set_buffers(buffers, first["buffers"])
        restore_random_state(first["random"], batches.generators)

    @contextmanager
    def first_buffers(self, buffers: Sequence[Tensor]) -> Iterator[None]:
        """Give the modules of all processes the buffers of the first part within this context."""
        if self.is_whole:
            yield
            return
        with first_buffers(self.processes, buffers, self._buffers.get(0)):
            yield


def _frozen(batches: Batches, buffers: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "buffers": [buffer.detach().clone() for buffer in buffers],
        "random": capture_random_state(batches.generators),
        "position": batches.position,
    }
