# SPDX-License-Identifier: Apache-2.0
"""L0. Torch's global random state: the CPU's generator, and those of the GPUs once a program uses them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor

__all__ = ["forked", "random_state", "seed_all", "seed_of", "seeded", "set_random_state"]


def _generators() -> list[torch.Generator]:
    """The generators in use. A GPU's exists once the GPU was used, or where it is the default device."""
    if not torch.cuda.is_initialized():
        if torch.get_default_device().type != "cuda":
            return [torch.default_generator]
        torch.cuda.init()
    return [torch.default_generator, *torch.cuda.default_generators]


def random_state() -> list[Tensor]:
    """States of the CPU's generator and of each GPU's; without the latter in a program that has not used a GPU yet."""
    return [generator.get_state() for generator in _generators()]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Invert :func:`random_state`; generators without a state then, or of GPUs that are missing, stay as they are."""
    for generator, state in zip(_generators(), states):
        generator.set_state(state)


def seed_all(seed: int) -> None:
    """Seed the generators in use; unlike ``torch.manual_seed``, not those of GPUs that are first used later."""
    for generator in _generators():
        generator.manual_seed(seed)


def seed_of(*key: int) -> int:
    """A seed that is made of several numbers, such as that of a run and that of a process."""
    return int(numpy.random.SeedSequence(key).generate_state(1, numpy.uint64)[0] >> 1)


@contextmanager
def forked() -> Iterator[None]:
    """Restore torch's random state on exit."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw by a seed within this context, and restore torch's random state on exit; None draws on as before."""
    if seed is None:
        yield
        return
    with forked():
        seed_all(int(seed))
        yield
