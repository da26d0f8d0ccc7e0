# SPDX-License-Identifier: Apache-2.0
"""L0. Draws that arrive chunk by chunk, kept in memory or in one file a site."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Storage"]


class Storage:
    """Room for draws of several sites.

    A file is written under another name and renamed in the end, so that a file of that name is always complete.

    Args:
        owner: Name of the caller, for error messages.
        like: Site -> a tensor of the shape and dtype of a draw.
        num_samples: Number of draws.
        path: A folder for files in NumPy's format, which is made if it is missing; None keeps the draws in memory.
        max_bytes: Largest size in memory, in bytes.

    Raises:
        MemoryError: If the draws take more than ``max_bytes`` in memory.
        ValueError: If the folder can't be made.
    """

    def __init__(
        self,
        owner: str,
        like: Mapping[str, Tensor],
        num_samples: int,
        path: str | os.PathLike[str] | None,
        max_bytes: int,
    ) -> None:
        sizes = {name: num_samples * value.numel() * value.element_size() for name, value in like.items()}
        if path is None and sum(sizes.values()) > max_bytes:
            largest = max(sizes, key=lambda name: sizes[name])
            raise MemoryError(
                f"{owner}: expected draws that fit in memory, at most {max_bytes / 2**30:.3g} GiB, but {num_samples} "
                f"draws take {sum(sizes.values()) / 2**30:.3g} GiB, those of site '{largest}', each of shape "
                f"{tuple(like[largest].shape)}, {sizes[largest] / 2**30:.3g}. Write them to files, path='predictions', "
                "or take fewer sites, sites=[...], or draws."
            )
        self._owner = owner
        self._folder = None if path is None else Path(path)
        if self._folder is not None:
            _make(owner, self._folder)
        shapes = {name: (num_samples, *value.shape) for name, value in like.items()}
        self._rooms: dict[str, Tensor] = {}
        for name, value in like.items():
            if self._folder is None:
                self._rooms[name] = torch.empty(shapes[name], dtype=value.dtype, device="cpu")
                continue
            dtype = torch.empty((), dtype=value.dtype, device="cpu").numpy().dtype
            opened = np.lib.format.open_memmap(self._part(name), mode="w+", dtype=dtype, shape=shapes[name])
            self._rooms[name] = torch.from_numpy(opened)

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{urllib.parse.quote(name, safe=' ')}.npy"

    def _part(self, name: str) -> Path:
        return self._file(name).with_suffix(".npy.part")

    def write(self, start: int, draws: Mapping[str, Tensor]) -> None:
        """Store ``(S, *shape)`` draws, the first of which is number ``start``."""
        for name, room in self._rooms.items():
            value = draws[name]
            if value.is_floating_point() and not room.is_floating_point() and value.isnan().any():
                raise ValueError(
                    f"{self._owner}: expected a value of site '{name}' in each run of the model, but it raises at "
                    f"{int(value.isnan().reshape(len(value), -1).any(-1).sum())} of {len(value)} draws, so that the "
                    "site has none. Run the model there by itself to see why."
                )
            room[start : start + len(value)] = value

    def finish(self) -> dict[str, Tensor]:
        """Site -> all draws; those in files are read where they are looked at, and are not changed by changes."""
        if self._folder is None:
            return self._rooms
        names, self._rooms = list(self._rooms), {}  # closes the files
        for name in names:
            os.replace(self._part(name), self._file(name))
        return {name: torch.from_numpy(np.load(self._file(name), mmap_mode="c")) for name in names}


def _make(owner: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{owner}: expected path to be a folder, or one that can be made, but '{folder}' is not: "
            f"{error.strerror or error}. Pass another path."
        ) from None
