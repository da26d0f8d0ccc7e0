# SPDX-License-Identifier: Apache-2.0
"""L7. The file from which an interrupted run of :func:`~pyro_flows.fit` is resumed."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_flows import _files
from pyro_flows._blame import user_level
from pyro_flows.compiled.parameters import trial
from pyro_flows.distributed.processes import ALONE, Processes
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.fingerprint import data_difference, describe_data, describe_model, model_difference
from pyro_flows.models.traces import Call
from pyro_flows.training.objective import Objective
from pyro_flows.training.options import RunOptions
from pyro_flows.training.random_state import capture_random_state, restore_random_state
from pyro_flows.training.state import TrainingState
from pyro_flows.training.version_0_1_0 import is_run_of_0_1_0, state_from_0_1_0

__all__ = ["Checkpoint", "StoredRun", "flow_guides"]

# Version of the file's format; files of 0.1.0 have none.
FORMAT = 3
KIND = "a run of fit"


@dataclass
class StoredRun:
    """What a checkpoint holds.

    Attributes:
        options: Options of the run, as they were chosen; None in files of 0.1.0.
        before_data: Random state before the data were looked at; None in files of 0.1.0.
        before_analysis: Random state after the warm start; None before its end.
        program: Description of guide, model and data; None before the end of the warm start.
        state: State of the run, as a dictionary; None before the end of the warm start.
        wider: State of its second part, the training of a wider flow; None before its begin.
        weighted: State of its last part, by another objective than the ELBO; None before its begin.
    """

    options: RunOptions | None = None
    before_data: dict[str, Any] | None = None
    before_analysis: dict[str, Any] | None = None
    program: dict[str, Any] | None = None
    state: dict[str, Any] | None = field(default=None, repr=False)
    wider: dict[str, Any] | None = field(default=None, repr=False)
    weighted: dict[str, Any] | None = field(default=None, repr=False)


class Checkpoint:
    """A file with the state of a run, in types that ``torch.load(weights_only=True)`` reads.

    Args:
        path: Path of the file; None writes no checkpoint.
        interval: Seconds between two checkpoints within a cycle, >= 0.
        processes: The processes of the run, of which the first one reads and writes the file.

    Attributes:
        run: What the file holds, or will hold.
    """

    def __init__(self, path: str | os.PathLike[str] | None, interval: float, processes: Processes = ALONE) -> None:
        self.path = None if path is None else Path(path)
        self.processes = processes
        self.interval = interval
        self.run = StoredRun()
        self._saved = time.monotonic()
        self._has_warned = False
        self._part = "state"

    def begin_part(self, name: str, former: TrainingState) -> None:
        """Keep the final state of the part of the run at hand; states that are saved from now on are those of the next
        part, ``"wider"`` or ``"weighted"``."""
        self._store(None if self.path is None else former.to_dict())
        self._part = name

    @property
    def is_due(self) -> bool:
        """Whether the file is old enough to be replaced, by the first process's clock."""
        return self.processes.is_first and self.path is not None and time.monotonic() - self._saved >= self.interval

    def error(self, expected: str, remedy: str) -> ValueError:
        """An error about the file."""
        return ValueError(f"fit: expected the checkpoint '{self.path}' {expected}. {remedy}")

    def read(self, asked: RunOptions) -> None:
        """Read the file, if there is one.

        Args:
            asked: Options that the call asks for.

        Raises:
            ValueError: If the file is not a run's, was damaged, or its run has other options.
        """
        if self.path is None:
            return
        values = self.processes.first(self._read)
        if values is None:
            return
        self.run = self._parsed(values)
        difference = "" if self.run.options is None else self.run.options.difference(asked)
        if difference:
            raise self.error(
                f"to be resumed with the options of its run, {difference}",
                "Leave the option as it was (all but objective, target_gap, anneal, compile and settings may be left "
                "out), or pass another path for a new run.",
            )

    def _read(self) -> dict[str, Any] | None:
        """What the file holds; None if there is no file."""
        assert self.path is not None
        if not os.path.lexists(self.path):
            return None
        try:
            return _files.read(self.path, unsigned=True)
        except (_files.FileError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise self.error(
                f"to be a file that fit has written, but {reason}", "Pass another path, or move the file away."
            ) from None

    def begin(self, asked: RunOptions, generators: Sequence[torch.Generator]) -> None:
        """Put the random state back to that of the run's begin; a new run writes its first file.

        Args:
            asked: Options that the call asks for.
            generators: Generators of the data, other than torch's global one.

        Raises:
            ValueError: If the file can't be written.
        """
        if self.run.before_data is not None:
            restore_random_state(self.run.before_data, generators)
        elif self.run.state is None and self.path is not None:
            self.run = StoredRun(asked, capture_random_state(generators))
            self.processes.first(self._write_first)

    def _write_first(self) -> None:
        assert self.path is not None
        try:
            _files.write(self.path, self._values())
        except OSError as error:
            raise self.error(
                f"to be a file that can be written, but {error.strerror or error}",
                "Make its folder, free space on the disk, or pass another path.",
            ) from None

    def _parsed(self, values: Mapping[str, Any]) -> StoredRun:
        if is_run_of_0_1_0(values):
            return StoredRun(state=dict(values))
        found, kind = values.get("format"), values.get("kind")
        if kind != KIND or found != FORMAT:
            what = f"it is {kind or 'something else'}" if kind != KIND else f"its format is {found}, not {FORMAT}"
            raise self.error(f"to hold {KIND}, but {what}", "Pass another path, or move the file away.")
        return StoredRun(
            RunOptions(**{"target_gap": None, **values["options"]}),
            values["before_data"],
            values["before_analysis"],
            values["program"],
            values["state"],
            values.get("wider"),  # files of the first releases with this format have neither
            values.get("weighted"),
        )

    def describe(self, objective: Objective) -> None:
        """Note what the run is one of, at the parameters of its begin."""
        if self.path is not None and self.run.program is None:
            self.run.program = _describe(objective)

    def check(self, objective: Objective, *, complete: bool) -> None:
        """Refuse a run of another model, guide, or other data.

        Args:
            objective: Model, guide and data of the call.
            complete: Whether data and log densities are compared, too; then parameters and random state must be those
                of the run's begin.
        """
        stored = self.run.program
        if stored is None:
            return
        found = _describe(objective)
        difference = (
            (data_difference(stored["data"], found["data"]) if complete else "")
            or model_difference(stored["model"], found["model"], densities=complete)
            or _difference("the guide", stored["guide"], found["guide"])
            or _difference("the shapes of the parameters", stored["parameters"], found["parameters"])
        )
        difference = self.processes.broadcast(difference)
        if difference:
            raise self.error(
                f"to hold a run of this model, guide and data, but {difference}",
                "Pass what the run was begun with, or another path for a new run. Mini-batches have to be the same "
                "where the random state is: shuffle by torch's generators.",
            )

    def adopt(self, guide: Callable[..., Any]) -> None:
        """Let a guide's flows take the kinds that they had at the run's begin: bases that a warm start has chosen, and
        whether they were wide."""
        bases = (self.run.program or {}).get("bases", ())  # files of the first releases with this format have none
        for part, shapes in zip(flow_guides(guide), bases, strict=False):  # another guide is refused later
            if part.prototype_trace is not None:  # with annealing there was no warm start
                part.posterior.adopt(shapes)

    def load(self, objective: Objective) -> TrainingState:
        """The state in the file.

        Raises:
            ValueError: If it is not that of the objective's parameters, or not a state.
        """
        leaves, stored = objective.leaves, getattr(self.run, self._part)
        assert stored is not None
        try:
            if self.run.options is None:
                state = state_from_0_1_0(stored, leaves, objective.guide)
            else:
                state = TrainingState.from_dict(stored)
        except (TypeError, ValueError) as error:
            raise self.error(f"to hold the state of a run, but {error}", "Pass another path.") from None
        found = [tuple(value.shape) for value in state.point]
        expected = [tuple(leaf.shape) for leaf in leaves]
        if found != expected:
            raise self.error(
                f"to hold the state of this model and guide, whose parameters have shapes {expected}, but got {found}",
                "Pass the model and the guide of its run, or another path for a new run.",
            )
        self._store(None)
        state.change_points(leaves, lambda leaf, value: value.to(leaf.device))
        return state

    def save(self, state: TrainingState) -> None:
        """Replace the file; the old one stays until the new one is whole. If it can't be written, warn once."""
        self._saved = time.monotonic()
        if self.path is None or not self.processes.is_first:
            return
        self._store(state.to_dict())
        try:
            _files.write(self.path, self._values())
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"fit: can't write the checkpoint '{self.path}' ({error}), and goes on; the last one that was "
                    "written stays. Free space on the disk; the next one is tried in "
                    f"{self.interval:g} seconds. This is said once.",
                    stacklevel=user_level(),
                )
        finally:
            self._store(None)

    def _store(self, state: dict[str, Any] | None) -> None:
        setattr(self.run, self._part, state)

    def _values(self) -> dict[str, Any]:
        run = self.run
        assert run.options is not None
        return {
            "format": FORMAT,
            "kind": KIND,
            "options": run.options.to_dict(),
            "before_data": run.before_data,
            "before_analysis": run.before_analysis,
            "program": run.program,
            "state": run.state,
            "wider": run.wider,
            "weighted": run.weighted,
        }


def _describe(objective: Objective) -> dict[str, Any]:
    """Guide, model and data of an objective at its current parameters."""
    args, kwargs = objective.batches.first
    with trial(objective.buffers):
        return {
            "guide": _name_of(objective.guide),
            "parameters": [tuple(leaf.shape) for leaf in objective.leaves],
            "bases": [
                {
                    name: tuple(p.shape)
                    for name, p in part.posterior.listed_parameters()
                    if ".base." in name or ".inserted." in name
                }
                for part in flow_guides(objective.guide)
            ],
            "model": describe_model(objective.model, Call(args, kwargs)),
            "data": describe_data(objective.calls),
        }


def _difference(title: str, stored: Any, found: Any) -> str:
    return "" if stored == found else f"{title} is {stored} there and {found} here"


def flow_guides(guide: Callable[..., Any]) -> list[AutoFlowGuide]:
    """A flow guide itself, or those in an ``AutoGuideList``."""
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    return [part for part in parts if isinstance(part, AutoFlowGuide)]


def _name_of(guide: Callable[..., Any]) -> str:
    """A guide's class, and the flows of its parts."""
    return ", ".join([type(guide).__name__, *(part.flow_title for part in flow_guides(guide))])
