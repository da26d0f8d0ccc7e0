# SPDX-License-Identifier: Apache-2.0
"""L3. The processes of ``torch.distributed``'s default group, and the few things that they say to each other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_flows._blame import user_level

__all__ = ["ALONE", "Processes"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class MessageSettings:
    """How tensors are sent.

    Attributes:
        max_elements: Largest number of elements of a tensor that are copied to be sent at once; bounds memory.
    """

    max_elements: int = 2**20


MESSAGES = MessageSettings()


class Processes:
    """Processes that share a run; each calls the same methods in the same order. A single one says nothing.

    Args:
        owner: Name of the public function, for error messages.
        rank: Number of this process, in ``[0, size)``.
        size: Number of processes, >= 1.

    Raises:
        RuntimeError: In every method, if another process has ended, or does not answer in the group's time limit.
    """

    def __init__(self, owner: str, rank: int = 0, size: int = 1) -> None:
        self.owner, self.rank, self.size = owner, rank, size

    @classmethod
    def of_group(cls, owner: str) -> Processes:
        """The processes of the default group, or this one alone where there is no group.

        Warns where ``torchrun`` has started several processes that are not in a group: each would work alone.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(owner, dist.get_rank(), dist.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            warnings.warn(
                f"{owner}: is one of {os.environ['WORLD_SIZE']} processes of torchrun, but works alone, since they "
                'are no group. Write torch.distributed.init_process_group("gloo") first, or "nccl" on GPUs.',
                stacklevel=user_level(),
            )
        return cls(owner)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that shows the bar and writes the files."""
        return self.rank == 0

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # torch's own errors of connections derive from the former
            reason = str(error).strip().splitlines()[0].partition(". ")[0]
            raise RuntimeError(
                f"{self.owner}: expected all {self.size} processes to go on together, but process {self.rank} has lost "
                f"another one ({reason}). Look for the first error among their outputs. With checkpoint= and torchrun "
                "--max-restarts, the run goes on from its file."
            ) from error

    def _device(self, tensor: Tensor) -> torch.device:
        """Where the group's backend takes tensors: NCCL does so on the process's own GPU only."""
        if dist.get_backend() != "nccl":
            return tensor.device
        return tensor.device if tensor.is_cuda else torch.device("cuda", torch.cuda.current_device())

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor of one shape over all processes; bitwise the same on each."""
        if self.size == 1:
            return tensor
        with self._together():
            total = tensor.detach().to(self._device(tensor), copy=True).contiguous()
            dist.all_reduce(total)
            return total.to(tensor.device)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their numbers; any objects that can be pickled."""
        if self.size == 1:
            return [value]
        with self._together():
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, value)
            return found

    def to_first(self, value: Value) -> list[Value]:
        """As :meth:`gather`, in the first process; none in the others, which receive nothing."""
        if self.size == 1:
            return [value]
        with self._together():
            found: list[Any] | None = [None] * self.size if self.is_first else None
            dist.gather_object(value, found, dst=0)
            return found or []

    def broadcast(self, value: Value) -> Value:
        """The first process's value; any object that can be pickled."""
        if self.size == 1:
            return value
        with self._together():
            found: list[Any] = [value]
            dist.broadcast_object_list(found, src=0)
            return found[0]  # type: ignore[no-any-return]

    def first(self, work: Callable[[], Value]) -> Value:
        """What a function returns that the first process alone calls.

        Raises:
            ValueError, RuntimeError, NotImplementedError: As the function does there; in all processes.
        """
        if self.size == 1:
            return work()
        result: Any = None
        failure: tuple[type[Exception], str] | None = None
        if self.is_first:
            try:
                result = work()
            except (ValueError, RuntimeError) as error:
                failure = _kind_of(error), str(error)
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure[0](failure[1])
        return result  # type: ignore[no-any-return]

    def each(self, work: Callable[[], Value]) -> Value:
        """What a function returns in this process, once it has returned in all; it says nothing to others.

        Raises:
            Exception: What it raises here.
            ValueError, RuntimeError, NotImplementedError: If it raises in another process only; RuntimeError in place
                of any other class.
        """
        if self.size == 1:
            return work()
        result: Any = None
        own: Exception | None = None
        try:
            result = work()
        except Exception as error:  # others would wait for this process
            own = error
        failures = self.gather(None if own is None else (_kind_of(own), f"{type(own).__name__}: {own}"))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise failure[0](
                    f"{self.owner}: expected all {self.size} processes to go on together, but process {rank} has "
                    f"failed ({failure[1]}). Look at its output."
                )
        return result  # type: ignore[no-any-return]

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor], rank: int = 0) -> None:
        """Set tensors, of the same shapes on all processes, to those of one of them."""
        if self.size == 1:
            return
        with self._together():
            for tensor in tensors:
                own = tensor.detach()
                for piece in own.view(-1).split(MESSAGES.max_elements) if own.is_contiguous() else [own]:
                    sent = piece.to(self._device(tensor), copy=True).contiguous()
                    dist.broadcast(sent, src=rank)
                    piece.copy_(sent)

    @torch.no_grad()
    def sum_sparse(self, tensor: Tensor) -> Tensor:
        """Sum of a sparse matrix with dense rows, of which each process holds a few; bitwise the same on each."""
        tensor = tensor.coalesce()
        if self.size == 1:
            return tensor
        with self._together():
            rows, values = tensor.indices(), tensor.values()
            device = self._device(values)
            counts = torch.zeros(self.size, dtype=torch.long, device=device)
            counts[self.rank] = rows.shape[1]
            dist.all_reduce(counts)
            most = int(counts.max())
            padded = torch.zeros(most, dtype=torch.long, device=device), values.new_zeros(most, *values.shape[1:])
            found = []
            for own, room in zip((rows[0], values), padded, strict=True):
                room = room.to(device)
                room[: len(own)] = own
                each = [torch.empty_like(room) for _ in range(self.size)]
                dist.all_gather(each, room)
                found.append(torch.cat([part[:count] for part, count in zip(each, counts.tolist(), strict=True)]))
            where, what = (part.to(values.device) for part in found)
            return torch.sparse_coo_tensor(where[None], what, tensor.shape, check_invariants=False).coalesce()


def _kind_of(error: Exception) -> type[Exception]:
    """The class of an error in other processes, which may not know a class of the user's."""
    kinds = (ValueError, NotImplementedError, RuntimeError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)


# Where no other process takes part.
ALONE = Processes("")
