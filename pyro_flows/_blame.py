# SPDX-License-Identifier: Apache-2.0
"""L0. Which line of a user's program an exception or a warning comes from."""

from __future__ import annotations

import inspect
import os
import traceback

import pyro
import torch

__all__ = ["blame", "user_level"]

# Folders whose lines are not the user's.
LIBRARIES = tuple(os.path.dirname(module.__file__) + os.sep for module in (torch, pyro) if module.__file__)
SITE_PACKAGES = os.path.dirname(LIBRARIES[1][:-1]) + os.sep
OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
# What torch says where a number, an index or a truth value is asked of a tensor that has none yet.
STEERS = ("tracing tensor", ".item() on a Tensor", "data-dependent control flow", "data-dependent guard")


def blame(error: BaseException, *never: str) -> str:
    """The last line that is the user's, and what torch says of it, as ``model.py, line 12, `float(mu)`: ...``.

    Args:
        error: An exception with its traceback.
        never: Files of ours that are no answer, even where there is no line of the user's; none means all of them.
    """
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    if any(text in message for text in STEERS) or isinstance(error, torch.fx.proxy.TraceError):
        message = "a value of a tensor steers Python (`.item()`, `float()`, `if`)"
    frames = traceback.extract_tb(error.__traceback__)
    # The user's lines if there are any, and else Pyro's or ours.
    for others in ((*LIBRARIES, OURS, "<"), (LIBRARIES[0], *(never or [OURS]), "<")):
        found = [frame for frame in frames if not frame.filename.startswith(others)]
        if found:
            name = found[-1].filename.removeprefix(SITE_PACKAGES)
            name = os.path.basename(name) if os.path.isabs(name) else name
            return f"{name}, line {found[-1].lineno}, `{found[-1].line}`: {message}"
    return message


def user_level() -> int:
    """The ``stacklevel`` at which a warning of the caller names the user's line: the first outside of this package,
    Pyro and torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith((OURS, *LIBRARIES)):
        frame, level = frame.f_back, level + 1
    return level
