# SPDX-License-Identifier: Apache-2.0
"""L0. Argument checks; every message says who expected what, what arrived, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["check_choice", "check_int", "check_positive", "check_sizes"]


def check_positive(owner: str, name: str, value: Any, low: float = 0) -> None:
    """Raise ValueError unless ``value`` is a number > 0, or > ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > low:
        raise ValueError(f"{owner}: expected {name} to be a number > {low:g}, but got {value!r}.")


def check_int(owner: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an integer in ``[low, high]``."""
    wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{owner}: expected {name} to be an integer {wanted}, but got {value!r}.")


def check_sizes(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a tuple of integers >= 1."""
    if not isinstance(value, tuple) or not all(isinstance(v, int) and v >= 1 for v in value):
        raise ValueError(
            f"{owner}: expected {name} to be a tuple of integers >= 1, such as (64, 64), but got {value!r}."
        )


def check_choice(owner: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``, which are listed."""
    if value not in choices:
        raise ValueError(f"{owner}: expected {name} to be one of {', '.join(map(repr, choices))}, but got {value!r}.")
