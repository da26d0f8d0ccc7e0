# SPDX-License-Identifier: Apache-2.0
"""L7. The state of all random generators that a run may draw from, as data that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from pyro_flows._random import random_state, set_random_state

__all__ = ["capture_random_state", "generators_of", "restore_random_state"]


def generators_of(loader: Any) -> list[torch.Generator]:
    """Generators of a ``DataLoader`` and its samplers, other than torch's global one."""
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    parts = [loader, *samplers, getattr(samplers[1], "sampler", None)]
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def capture_random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """State of torch's, NumPy's and Python's global generators, and of some others, in tensors, numbers and lists."""
    of_numpy: Any = numpy.random.get_state(legacy=True)
    name, key, *rest = of_numpy
    of_cpu, *of_gpus = random_state()
    return {
        "torch": of_cpu,
        "cuda": of_gpus,
        "numpy": [name, key.tolist(), *rest],
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Invert :func:`capture_random_state`."""
    set_random_state([state["torch"], *state["cuda"]])
    name, key, *rest = state["numpy"]
    numpy.random.set_state((name, key, *rest))
    version, numbers, last = state["python"]
    random.setstate((version, tuple(numbers), last))
    for generator, own in zip(generators, state["generators"]):
        generator.set_state(own)
