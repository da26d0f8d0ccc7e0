# SPDX-License-Identifier: Apache-2.0
"""L7. How the processes of a group begin a run together: the same options, parameters and parts of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pyro_flows.distributed.processes import Processes
from pyro_flows.models.fingerprint import describe_data
from pyro_flows.training.batches import Batches
from pyro_flows.training.checkpoint import StoredRun
from pyro_flows.training.options import RunOptions
from pyro_flows.training.parts import Parts

__all__ = ["check_options", "divided", "have_same_data"]


def check_options(processes: Processes, asked: RunOptions, checkpoint: Any) -> None:
    """Raise ValueError in all processes unless they call with the same options."""
    for rank, (other, path) in enumerate(processes.gather((asked, checkpoint is not None))):
        difference = asked.difference(other) or other.difference(asked)
        if asked.num_steps != other.num_steps:
            difference = f"num_steps to be {asked.num_steps}, but got {other.num_steps}"
        if path != (checkpoint is not None):
            difference = "a checkpoint, or none"
        if difference:
            raise ValueError(
                f"fit: expected the same options in all processes, {difference}, in processes {processes.rank} and "
                f"{rank}. Write distributed=False where each process trains by itself."
            )


def divided(processes: Processes, asked: RunOptions, stored: StoredRun) -> tuple[RunOptions, Parts]:
    """The parts of a step, and the options with their number and, where there are several, with a seed.

    Raises:
        ValueError: If their number is not a multiple of that of the processes.
    """
    count = asked.num_parts or processes.size
    if stored.before_data is not None or stored.state is not None:
        count = (None if stored.options is None else stored.options.num_parts) or 1
    if count % processes.size:
        raise ValueError(
            f"fit: expected a step to have a part for each of {processes.size} processes, or a multiple, but got "
            f"{count}. Write settings=FitSettings(num_parts={processes.size}), and another path for a new run if this "
            "is one from a checkpoint; or train with as many processes as before."
        )
    if count > 1 and asked.seed is None and (stored.options is None or stored.options.seed is None):
        asked = replace(asked, seed=processes.broadcast(int(torch.randint(2**31, ()))))
    return replace(asked, num_parts=count if count > 1 else None), Parts(processes, count)


def have_same_data(processes: Processes, batches: Batches) -> bool:
    """Whether all processes have the same first mini-batch, and so all others.

    Raises:
        ValueError: If they have not, and there are no others.
    """
    found = processes.gather(describe_data([batches.first]) if processes.size > 1 else None)
    same = all(each == found[0] for each in found)
    if not same and not batches.many:
        raise ValueError(
            "fit: expected the same data in all processes, which share the particles of a step, but got others. Pass a "
            "list of mini-batches, in which the data of processes may differ; or write distributed=False."
        )
    return same
