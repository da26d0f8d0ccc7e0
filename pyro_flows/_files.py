# SPDX-License-Identifier: Apache-2.0
"""L0. Files of tensors that are written whole or not at all, and that are checked when they are read."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["FileError", "read", "write"]

# torch.save writes a zip archive, which may end in a comment: here the checksum of all that is before it. Zeros stand
# for the comment's length, which are the last two bytes of an archive without one.
MARK = b"pyro_flows sha256 "
LENGTH = struct.Struct("<H")
FOREIGN = "it was cut off, or something else has written it"
SIZE = len(MARK) + 2 * hashlib.sha256().digest_size


class FileError(ValueError):
    """A file can't be read: what is wrong with it, without its name."""


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Replace a file; the former one stays until the new one is whole and on the disk.

    Args:
        path: The file; a link is followed.
        contents: Tensors, numbers, strings and None, in dictionaries, lists and tuples.

    Raises:
        OSError: If it can't be written; nothing is left behind then.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(_signed(contents))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system opens folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _signed(contents: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(contents), buffer)
    archive = buffer.getvalue()[: -LENGTH.size]
    return archive + LENGTH.pack(SIZE) + MARK + hashlib.sha256(archive).hexdigest().encode()


def read(path: Path, *, map_location: Any = "cpu", unsigned: bool = False) -> dict[str, Any]:
    """Read a file that :func:`write` has written.

    Args:
        path: The file.
        map_location: Device of the tensors.
        unsigned: Whether dictionaries with neither a checksum nor a "format" are read too, as 0.1.0 has written them.

    Raises:
        FileError: If it is not such a file, or was damaged.
        OSError: If the system can't read it.
    """
    if path.is_dir():
        raise FileError("it is a folder")
    data = path.read_bytes()
    if not data:
        raise FileError("it is empty")
    archive, end = data[: -SIZE - LENGTH.size], data[-SIZE - LENGTH.size :]
    signed = end.startswith(LENGTH.pack(SIZE) + MARK)
    if not (signed or unsigned):
        raise FileError(FOREIGN)
    if signed and end[-SIZE:] != MARK + hashlib.sha256(archive).hexdigest().encode():
        raise FileError("it was damaged since: its checksum is wrong")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other formats of pickle
            found = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except Exception:  # torch reports what it can't read in many ways
        raise FileError(FOREIGN) from None
    if not isinstance(found, dict):
        raise FileError(f"it holds a {type(found).__name__}")
    if not signed and "format" in found:
        raise FileError(FOREIGN)
    return found
