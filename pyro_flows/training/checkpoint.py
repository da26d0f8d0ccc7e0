# SPDX-License-Identifier: Apache-2.0
"""L7. What a run of :func:`~pyro_flows.fit` writes down so that it can go on after the process is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Checkpoint"]

# Seconds between two records within a cycle.
EVERY = 60.0


class Checkpoint:
    """A file with the state of a run: numbers, strings, and tensors in lists.

    Args:
        path: The file; None keeps no record.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._saved = time.monotonic()

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.path is not None and self.path.exists()

    @property
    def is_due(self) -> bool:
        """Whether the last record is old enough to be replaced."""
        return self.path is not None and time.monotonic() - self._saved >= EVERY

    def save(self, state: dict[str, Any]) -> None:
        """Replace the record; the old one stays until the new one is whole."""
        if self.path is None:
            return
        part = self.path.with_name(self.path.name + ".part")
        torch.save(state, part)
        os.replace(part, self.path)
        self._saved = time.monotonic()

    def load(self, leaves: list[Tensor]) -> dict[str, Any]:
        """The record.

        Args:
            leaves: The parameters that it has to be of.

        Raises:
            ValueError: If it is of other parameters.
        """
        assert self.path is not None
        state: dict[str, Any] = torch.load(self.path, map_location=leaves[0].device, weights_only=True)
        found = [tuple(value.shape) for value in state["point"]]
        expected = [tuple(leaf.shape) for leaf in leaves]
        if found != expected:
            raise ValueError(
                f"fit: expected '{self.path.name}' to hold the state of this model and guide, whose parameters have "
                f"shapes {expected}, but got {found}. Delete the file, or pass another checkpoint."
            )
        return state
