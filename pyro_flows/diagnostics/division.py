# SPDX-License-Identifier: Apache-2.0
"""L7. How processes share a diagnosis: all draw, with noise of their own, and the first one judges."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pyro_flows._random import seed_of, seeded
from pyro_flows.compiled.parameters import state_of
from pyro_flows.diagnostics.search import SearchResult
from pyro_flows.diagnostics.sites import SiteTally
from pyro_flows.distributed.buffers import first_buffers
from pyro_flows.distributed.parameters import parameters_of
from pyro_flows.distributed.processes import Processes
from pyro_flows.importance.weights import Draws, ImportanceSampler
from pyro_flows.models.checks import warn_without_data
from pyro_flows.models.fingerprint import data_difference, describe_data

__all__ = ["Division", "DivisionSettings"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class DivisionSettings:
    """When draws can be divided.

    Attributes:
        min_draws: Smallest number of draws of a process: from the first draws of the first one, all take the scale of
            a site's bulk, which is a central 68 % interval.
    """

    min_draws: int = 50


SETTINGS = DivisionSettings()


class Division:
    """The processes that share a diagnosis; or this one alone, whose draws are as without a division.

    Args:
        owner: Name of the public function, for errors.
        distributed: Whether the processes of the default group take part; all of them call the same methods then.
        num_samples: Number of draws on all processes together.
        seed: Seed of the diagnosis; None draws it in the first process.
        others: Further options, the same in all processes.

    Attributes:
        processes: The processes.
        seed: The seed, where several processes have agreed on it.

    Raises:
        ValueError: If processes call with other options, or there are too few draws for each.
    """

    def __init__(self, owner: str, *, distributed: bool, num_samples: int, seed: int | None, **others: Any) -> None:
        self.processes = Processes.of_group(owner) if distributed else Processes(owner)
        self.num_samples, self.seed, self._called = num_samples, seed, 0
        if self.processes.size == 1:
            return
        options = {"num_samples": num_samples, "seed": seed, **others}
        for rank, found in enumerate(self.processes.gather(options)):
            if found != options:
                raise ValueError(
                    f"{owner}: expected the same options in all processes, but got {options} in process "
                    f"{self.processes.rank} and {found} in process {rank}. Pass the same; without distributed=True a "
                    "process works by itself."
                )
        least = SETTINGS.min_draws * self.processes.size
        if num_samples < least:
            raise ValueError(
                f"{owner}: expected {SETTINGS.min_draws} draws in each of {self.processes.size} processes at least, "
                f"but got num_samples={num_samples}. Write num_samples={least}, or more."
            )
        if seed is None:
            self.seed = self.processes.broadcast(int(torch.randint(2**31, ())))

    def check(
        self,
        model: Callable[..., Any],
        guides: Mapping[str, Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Raise ValueError in all processes unless data and parameters of the model and the guides are the same.

        Of buffers, only the shapes have to be; see :meth:`first_buffers`.

        Args:
            model: The model.
            guides: How error messages call a guide -> guide.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        if self.processes.size == 1:
            return

        def described() -> dict[str, str]:
            found = describe_data([(args, kwargs)])
            for name, guide in guides.items():
                parameters = parameters_of(model, guide, args, kwargs)
                named = {f"parameter {i} of the model and {name}": p.detach() for i, p in enumerate(parameters)}
                found |= describe_data([((), named)])
                for i, buffer in enumerate(state_of(model, guide)):
                    found[f"buffer {i} of the model and {name}"] = f"{buffer.dtype} of shape {tuple(buffer.shape)}"
            return found

        own = self.processes.each(described)
        for rank, found in enumerate(self.processes.gather(own)):
            difference = data_difference(found, own)
            if difference:
                raise ValueError(
                    f"{self.processes.owner}: expected the same data and parameters in all processes, which share the "
                    f"draws, but {difference}, in processes {rank} and {self.processes.rank}. Load the same guide "
                    "in all; without distributed=True a process works by itself."
                )

    def first_buffers(self, model: Callable[..., Any], guide: Callable[..., Any]) -> AbstractContextManager[None]:
        """Give the modules of all processes the first one's buffers, such as running statistics, within a context."""
        return nullcontext() if self.processes.size == 1 else first_buffers(self.processes, state_of(model, guide))

    def sampler(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> ImportanceSampler:
        """A sampler of the model and a guide; if there is none in one process, an error in all."""
        return self.processes.each(lambda: ImportanceSampler(self.processes.owner, model, guide, args, kwargs))

    def warn_without_data(self, sampler: ImportanceSampler) -> None:
        """Warn in the first process if the model observes nothing; where warnings are errors, all raise."""
        processes, model = self.processes, sampler.score.model
        processes.each(
            lambda: warn_without_data(processes.owner, model.nodes, model.call) if processes.is_first else None
        )

    def search(self, work: Callable[[], SearchResult], sampler: ImportanceSampler) -> SearchResult:
        """The regions that the first process finds, on the device of a sampler's draws."""
        if self.processes.size == 1:
            return work()
        found = self.first(lambda: work().to("cpu"))
        return self.processes.each(lambda: found.to(next(iter(sampler.draw(1).values.values())).device))

    def sample(
        self, sampler: ImportanceSampler, tally: SiteTally, draw: Callable[[Iterator[Draws]], Value], *, progress: bool
    ) -> tuple[list[Value], Draws]:
        """Results of a function for the draws of each process, in the first one; and the first draws of this process.

        Args:
            sampler: Sampler of the model and a guide.
            tally: To which the function adds its draws; in the end that of the first process has all of them.
            draw: Function from draws in chunks to a result without tensors of another device than the CPU.
            progress: Whether to show a progress bar.
        """
        processes = self.processes
        count, rank, size = self.num_samples, processes.rank, processes.size
        first: Draws | None = None

        def noted(chunks: Iterator[Draws]) -> Iterator[Draws]:
            nonlocal first
            for draws in chunks:
                first = first or draws
                yield draws

        if size == 1:
            results = [draw(noted(sampler.chunks(count, progress=progress)))]
        else:
            with seeded(self._next_seed()):
                share = count * (rank + 1) // size - count * rank // size
                chunks = noted(sampler.chunks(share, progress=progress and processes.is_first))
                begin = processes.each(lambda: next(chunks))
                origin = processes.each(lambda: tally.origin(begin) if processes.is_first else [])
                tally.begin(processes.broadcast(origin), begin)
                own = processes.each(lambda: draw(itertools.chain([begin], chunks)))
            found = processes.to_first((own, tally.state))
            results = [result for result, _ in found]
            for _, state in found[1:]:
                tally.merge(state)
        assert first is not None
        return results, first

    def _next_seed(self) -> int:
        """A seed of this process and of what it does next, where there are several processes."""
        assert self.seed is not None
        self._called += 1
        return seed_of(self.seed, self._called, self.processes.rank)

    def first(self, work: Callable[[], Value]) -> Value:
        """What a function returns in the first process, which alone calls it."""
        if self.processes.size == 1:
            return work()
        seed = self._next_seed()

        def alone() -> Value | None:
            with seeded(seed):  # also lest a guide that is set up later begins elsewhere in the first process
                return work() if self.processes.is_first else None

        return self.processes.broadcast(self.processes.each(alone))  # type: ignore[return-value]
