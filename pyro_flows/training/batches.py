# SPDX-License-Identifier: Apache-2.0
"""L7. The data of a run: one tuple of arguments, or mini-batches that are passed over repeatedly."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch

from pyro_flows._checks import shown
from pyro_flows.training.random_state import capture_random_state, generators_of, restore_random_state

__all__ = ["Arguments", "Batches", "by_shape", "check_batches"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def check_batches(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tuple of arguments, or mini-batches that can be iterated over again."""
    if isinstance(value, tuple):
        return
    if torch.is_tensor(value) or isinstance(value, (str, Mapping, np.ndarray)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{owner}: expected {name} to be a tuple of the model's arguments, or mini-batches, but got "
            f"{shown(value)}. Write {name}=(x,)."
        )
    if isinstance(value, Iterator) or not (isinstance(value, Sized) or iter(value) is not iter(value)):
        raise TypeError(
            f"{owner}: expected {name} to be mini-batches that can be iterated over again, but got an iterator, "
            f"{shown(value)}. Pass the DataLoader itself, or a list of argument tuples."
        )


class Batches:
    """An endless sequence of the model's arguments.

    A position in it can be found again if each pass over the mini-batches is determined by the state of the random
    generators at its beginning: torch's, NumPy's and Python's global ones, and those of a ``DataLoader``.

    Args:
        args: A tuple of arguments; or mini-batches: an iterable that can be iterated over repeatedly, of tuples or
            lists of arguments (as a ``DataLoader`` gives), or of single arguments.
        kwargs: Keyword arguments, the same for each mini-batch.
        owner: Name of the caller, for error messages.

    Attributes:
        many: Whether there are mini-batches.
        first: Positional and keyword arguments of the first one.
        generators: Generators of a ``DataLoader``, other than torch's global one.
        in_turns: Whether all processes of a run have the same mini-batches, and take them in turns.

    Raises:
        TypeError: If a mini-batch is a dictionary; in a later pass, if there is no mini-batch any more.
        ValueError: If there is no mini-batch.
    """

    def __init__(
        self, args: tuple[Any, ...] | Iterable[Any], kwargs: Mapping[str, Any] | None, owner: str = "fit"
    ) -> None:
        self._owner = owner
        self.kwargs = dict(kwargs or {})
        self.many = not isinstance(args, tuple)
        self._source: Iterable[Any] = args if self.many else [args]
        self.generators = generators_of(args) if self.many else []
        self.in_turns = True
        self._begin: dict[str, Any] | None = None  # random state at the beginning of the pass
        self._taken = 0  # mini-batches of the pass
        self._passes = 0  # passes before this one
        self._stream = self._endless()
        try:
            self.first: Arguments = next(self._pass())
        except StopIteration:
            raise ValueError(f"{owner}: expected args to have at least one mini-batch, but got none.") from None

    def _pass(self) -> Iterator[Arguments]:
        for item in self._source:
            if isinstance(item, Mapping):
                raise TypeError(
                    f"{self._owner}: expected mini-batches to be tuples of the model's arguments, but got a dictionary "
                    f"of {', '.join(map(repr, item))}. Write a loader, or its collate_fn, that makes (x, y)."
                )
            yield (tuple(item) if isinstance(item, (tuple, list)) else (item,)), self.kwargs

    def _endless(self) -> Iterator[Arguments]:
        while True:
            if self.many:
                self._begin, self._taken = capture_random_state(self.generators), 0
                self._set_epoch()
            empty = True
            for call in self._pass():
                empty = False
                self._taken += 1
                yield call
            if empty:
                raise self._used_up()
            self._passes += 1

    def _set_epoch(self) -> None:
        """Have a ``DistributedSampler`` shuffle this pass in an order of its own."""
        set_epoch = getattr(getattr(self._source, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._passes)

    def next(self) -> Arguments:
        """The arguments of the next step."""
        return next(self._stream)

    @property
    def position(self) -> dict[str, Any] | None:
        """Where the sequence is, for :meth:`seek`; None if all its elements are the same."""
        return {"taken": self._taken, "random": self._begin, "passes": self._passes} if self.many else None

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a position, by going through its pass again; changes the random state."""
        self._stream = self._endless()
        self._begin, self._taken = None, 0
        self._passes = position.get("passes", 0)
        if position["random"] is not None:
            restore_random_state(position["random"], self.generators)
            for _ in range(position["taken"]):
                self.next()

    def one_pass(self, limit: int, max_elements: int) -> list[Arguments]:
        """The mini-batches of one pass.

        Args:
            limit: Largest number of mini-batches.
            max_elements: Number of elements of their tensors in all after which no more mini-batches are taken; memory
                that mini-batches share, such as that of all data, counts once.
        """
        calls: list[Arguments] = []
        held = 0
        counted: set[int] = set()
        for call in itertools.islice(self._pass(), limit):
            calls.append(call)
            for value in filter(torch.is_tensor, call[0]):
                memory = value.untyped_storage().data_ptr() if value.layout == torch.strided else id(value)
                held += value.numel() * (memory not in counted)
                counted.add(memory)
            if held > max_elements:
                break
        if not calls:
            raise self._used_up()
        return calls

    def _used_up(self) -> TypeError:
        return TypeError(
            f"{self._owner}: expected args to be mini-batches that can be iterated over again, but a second pass got "
            "none. Pass the DataLoader itself, or a list of argument tuples."
        )


def by_shape(calls: Iterable[Arguments]) -> list[Arguments]:
    """The first of the mini-batches of each combination of shapes, in order."""
    found: dict[Any, Arguments] = {}
    for args, kwargs in calls:
        shapes = tuple(value.shape if torch.is_tensor(value) else None for value in (*args, *kwargs.values()))
        found.setdefault(shapes, (args, kwargs))
    return list(found.values())
