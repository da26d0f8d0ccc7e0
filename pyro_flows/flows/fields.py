# SPDX-License-Identifier: Apache-2.0
"""L2. Hyper-parameters with their ranges: fields of a recipe, which are checked when the recipe is made.

A range of another kind is ``dataclasses.field(default=..., metadata={"check": check})``, where ``check(owner, name,
value)`` raises a ValueError unless the value will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, fields
from functools import partial
from typing import Any

from pyro_flows._checks import check_choice, check_int, check_positive, check_sizes

__all__ = ["check_fields", "choice", "integer", "positive", "widths"]

Check = Callable[[str, str, Any], None]


def integer(default: int, *, low: int, high: int | None = None) -> Any:
    """An integer field in ``[low, high]``; without ``high``, any from ``low``."""
    return _field(default, partial(check_int, low=low, high=high))


def positive(default: float, *, low: float = 0.0) -> Any:
    """A field that is a number > ``low``."""
    return _field(default, partial(check_positive, low=low))


def choice(default: Any, choices: Sequence[Any]) -> Any:
    """A field that is one of ``choices``."""
    return _field(default, partial(check_choice, choices=choices))


def widths(default: tuple[int, ...] | None, *, min_length: int = 0) -> Any:
    """A field that is a tuple of integers >= 1, of ``min_length`` (0 or 1) entries at least.

    A default of None means that None is allowed, and leaves the choice to the recipe.
    """
    return _field(default, partial(_check_widths, min_length=min_length, optional=default is None))


def check_fields(recipe: Any) -> None:
    """Check every field of a dataclass. A subclass that gives a field another default keeps the field's check.

    Raises:
        ValueError: If a value is out of range; the message states the range.
    """
    owner = type(recipe)
    for known in fields(recipe):
        check = _find_check(owner, known.name)
        if check is not None:
            check(owner.__name__, known.name, getattr(recipe, known.name))


def _field(default: Any, check: Check) -> Any:
    return field(default=default, metadata={"check": check})


def _find_check(owner: type, name: str) -> Check | None:
    """The check of a field: that of the class nearest to ``owner`` which states one; None without any."""
    for parent in owner.__mro__:
        declared = vars(parent).get("__dataclass_fields__", {}).get(name)
        if declared is not None and "check" in declared.metadata:
            check: Check = declared.metadata["check"]
            return check
    return None


def _check_widths(owner: str, name: str, value: Any, *, min_length: int, optional: bool) -> None:
    if value is None and optional:
        return
    check_sizes(owner, name, value)
    if len(value) < min_length:
        raise ValueError(f"{owner}: expected {name} to have at least one entry, but got (). Use (64,).")
