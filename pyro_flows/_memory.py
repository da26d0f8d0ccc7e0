# SPDX-License-Identifier: Apache-2.0
"""L0. Work in chunks that are halved where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["DoesNotFit", "does_not_fit", "first_line", "in_chunks", "is_out_of_memory"]

Result = TypeVar("Result")


class DoesNotFit(MemoryError):
    """Memory runs out even in the smallest chunk."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, or torch's on a GPU or a CPU."""
    if isinstance(error, DoesNotFit):
        return False
    if isinstance(error, (MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError))):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))


def in_chunks(
    owner: str, total: int, chunk: int, run: Callable[[int], Result], *, multiple: int = 1
) -> Iterator[tuple[int, Result]]:
    """Results of a function for chunks of a total, with their sizes; where memory runs out, chunks are halved.

    Args:
        owner: Name of the public function, for the error message.
        total: Sum of the sizes of the chunks.
        chunk: Largest size of a chunk, >= 1.
        run: Function of a chunk's size.
        multiple: Chunks remain multiples of it, but the last.

    Raises:
        DoesNotFit: If memory runs out for a chunk of ``multiple``.
    """
    done = 0
    while done < total:
        count = min(chunk, total - done)
        try:
            result = run(count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count <= multiple:
                raise does_not_fit(owner, count, error) from error
            chunk = max(multiple, count // 2 // multiple * multiple)
            continue
        done += count
        yield count, result


def does_not_fit(owner: str, count: int, error: BaseException) -> DoesNotFit:
    """The error that even a few draws need too much memory."""
    draws = "a single draw" if count == 1 else f"{count} draws"
    return DoesNotFit(
        f"{owner}: expected memory for {draws}, but it ran out ({first_line(error)}). Pass fewer data, or mini-batches "
        "by a subsampled plate."
    )


def first_line(error: BaseException) -> str:
    """The beginning of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
