# SPDX-License-Identifier: Apache-2.0
"""L0. Argument checks; every message says who expected what, what arrived, and what to do.

A public function is decorated with :func:`checked`, which looks at its arguments before anything is built or run. A
check is a function of ``(owner, name, value)`` that raises an exception unless the value will do.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn

__all__ = [
    "Check",
    "NamedOptions",
    "Settings",
    "check_bool",
    "check_call",
    "check_callable",
    "check_choice",
    "check_int",
    "check_mapping",
    "check_number",
    "check_path",
    "check_positive",
    "check_program",
    "check_sizes",
    "check_text",
    "check_type",
    "check_widths",
    "checked",
    "close_match",
    "constant",
    "integer",
    "optional",
    "shown",
]

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, str, Any], None]


def shown(value: Any) -> str:
    """A value as a message shows it: what it is, and its contents if these are short."""
    if torch.is_tensor(value) and value.numel() > 1:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of shape {value.shape}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}, {text[:60]}..."


def close_match(value: Any, known: Iterable[Any]) -> str:
    """The question whether another of the known names was meant, with a space before it; empty if none is close."""
    if not isinstance(value, str):
        return ""
    found = difflib.get_close_matches(value, [name for name in known if isinstance(name, str)], 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def check_positive(owner: str, name: str, value: Any, low: float = 0) -> None:
    """Raise ValueError unless ``value`` is a finite number > 0, or > ``low``."""
    if not _is_number(value) or not low < value < math.inf:
        found = f"{value}, which is not finite" if _is_number(value) and value == math.inf else shown(value)
        raise ValueError(f"{owner}: expected {name} to be a number > {low:g}, but got {found}.")


def check_number(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number, or a tensor of one."""
    if torch.is_tensor(value) and value.numel() == 1:
        value = value.item()
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"{owner}: expected {name} to be a finite number, but got {shown(value)}.")


def check_int(owner: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an integer in ``[low, high]``."""
    wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        raise ValueError(f"{owner}: expected {name} to be an integer {wanted}, but got {shown(value)}.")


def check_sizes(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a tuple of integers >= 1."""
    if not isinstance(value, tuple) or not all(type(v) is int and v >= 1 for v in value):
        raise ValueError(
            f"{owner}: expected {name} to be a tuple of integers >= 1, such as (64, 64), but got {shown(value)}."
        )


def check_choice(owner: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``, which are listed."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(
            f"{owner}: expected {name} to be one of {', '.join(map(repr, choices))}, but got {shown(value)}."
            f"{close_match(value, choices)}"
        )


def check_bool(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{owner}: expected {name} to be True or False, but got {shown(value)}.")


def check_callable(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{owner}: expected {name} to be a function, but got {shown(value)}.")


def check_mapping(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a mapping from names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{owner}: expected {name} to be a dictionary with names as keys, but got {shown(value)}.")


def check_text(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{owner}: expected {name} to be a string, and not empty, but got {shown(value)}.")


def check_path(owner: str, name: str, value: Any, of: str = "file") -> None:
    """Raise TypeError unless ``value`` is a path that is not empty, of a file or of a folder."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise TypeError(f"{owner}: expected {name} to be the path of a {of}, but got {shown(value)}.")


def check_type(owner: str, name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless ``value`` is an instance of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{owner}: expected {name} to be a {kind.__name__}, but got {shown(value)}.")


class _ConstructorSignature:
    """The signature of a dataclass' constructor, which would else be that of ``__new__``."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class NamedOptions:
    """Base of dataclasses whose fields are given by name; an unknown name is refused with the known ones."""

    __signature__ = _ConstructorSignature()

    def __new__(cls, *args: Any, **options: Any) -> Any:
        known = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [name for name in options if name not in known]
        if args or unknown:
            found = shown(args[0]) if args else f"{unknown[0]!r}.{close_match(unknown[0], known)}"
            raise TypeError(f"{cls.__name__}: expected options by name, {', '.join(known)}, but got {found}")
        return super().__new__(cls)


class Settings(NamedOptions):
    """Base of dataclasses of constants. Numbers are of the kind of the default, and positive; those that are named as a
    minimum or an interval may be zero. Fields that are made by :func:`constant` have a check of their own."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            default = each.default if each.default is not dataclasses.MISSING else each.default_factory()  # type: ignore
            may_be_zero = each.name.startswith("min_") or each.name.endswith("_interval")
            if "check" in each.metadata:
                each.metadata["check"](owner, each.name, value)
            elif isinstance(default, int):
                check_int(owner, each.name, value, 0 if may_be_zero else 1)
            elif isinstance(default, float):
                if not (may_be_zero and type(value) in (int, float) and value == 0):
                    check_positive(owner, each.name, value)
            else:
                check_type(owner, each.name, value, type(default))


def constant(default: Any, check: Check) -> Any:
    """A field of :class:`Settings` with a check of its own."""
    return dataclasses.field(default=default, metadata={"check": check})


def optional(check: Check) -> Check:
    """A check that also takes None."""

    def check_unless_none(owner: str, name: str, value: Any) -> None:
        if value is not None:
            check(owner, name, value)

    return check_unless_none


def integer(low: int, high: int | None = None) -> Check:
    """A check for an integer in ``[low, high]``."""
    return partial(check_int, low=low, high=high)


def checked(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function, so that its arguments are checked before it runs.

    Those of :data:`COMMON` need not be listed: they are the same everywhere.

    Args:
        checks: Argument -> its check.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        is_method = next(iter(signature.parameters), "") in ("self", "cls")
        used = {name: check for name, check in (COMMON | checks).items() if name in signature.parameters}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            owner = _owner(function, args[0]) if is_method and args else function.__qualname__
            for name, value in _bound(owner, signature, args, kwargs).items():
                if name in used:
                    used[name](owner, name, value)
            return function(*args, **kwargs)

        return call

    return decorate


def _owner(method: Callable[..., Any], bound: Any) -> str:
    """Name of a method, of the class that it is called on; of the class alone for its constructor."""
    kind = bound.__name__ if isinstance(bound, type) else type(bound).__name__
    return kind if method.__name__ == "__init__" else f"{kind}.{method.__name__}"


def check_call(
    owner: str,
    name: str,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    remedy: str = "Pass the model's own: to a function as args=(x, y), to a guide's method as they are.",
) -> None:
    """Raise TypeError if a user's function does not take these arguments, as far as its signature says."""
    try:
        signature = inspect.signature(program, follow_wrapped=False)
    except (TypeError, ValueError):  # none, as of some built-in callables
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{owner}: expected the arguments that {name} takes, {signature}, but got {len(args)} by position and "
            f"{', '.join(kwargs) or 'none'} by name: {error}. {remedy}"
        ) from None


def _bound(owner: str, signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name -> argument of those that are given.

    Raises:
        TypeError: If one is missing, or there are others.
    """
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any else [name for name in kwargs if name not in parameters]
    if unknown:
        names = [name for name in parameters if name not in ("self", "cls")]
        hint = close_match(unknown[0], names)
        if not hint and "kwargs" in parameters:
            hint = f" Arguments of the model go into args=(...,) or kwargs={{{unknown[0]!r}: ...}}."
        raise TypeError(f"{owner}: expected options among {', '.join(names)}, but got {unknown[0]!r}.{hint}")
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        needed = [name for name, p in parameters.items() if p.default is p.empty and name not in ("self", "cls")]
        raise TypeError(f"{owner}: expected {owner}({', '.join(needed)}, ...), but got {error}.") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_program(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` can be a model or a guide."""
    kind = "model" if name == "model" else "guide"
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise TypeError(
            f"{owner}: expected {name} to be a {kind}, but got {shown(value)}. Write {value.__name__}(...), which "
            "makes one."
        )
    if not callable(value):
        raise TypeError(f"{owner}: expected {name} to be a Pyro {kind}, a function, but got {shown(value)}.")


def _check_model(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` can be a model; ValueError if it is a guide."""
    check_program(owner, name, value)
    if isinstance(value, AutoGuide):
        raise ValueError(
            f"{owner}: expected {name} to be a model, but got a guide, an {type(value).__name__}. Write the model "
            "first, and the guide second."
        )


def _check_args(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tuple."""
    if not isinstance(value, tuple):
        raise TypeError(f"{owner}: expected {name} to be a tuple, but got {shown(value)}. Write {name}=(x,).")


def _check_kwargs(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a mapping from names, or None."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise TypeError(
            f"{owner}: expected {name} to be a dictionary of the model's arguments by name, but got {shown(value)}. "
            f"Write {name}={{'y': y}}."
        )


def check_widths(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a list or a tuple of integers >= 1."""
    check_sizes(owner, name, tuple(value) if isinstance(value, list) else value)


def _check_seed(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a seed that ``torch.manual_seed`` takes, or None."""
    if value is not None:
        check_int(owner, name, value, -(2**63), 2**64 - 1)


COMMON: dict[str, Check] = {
    "model": _check_model,
    "guide": check_program,
    "args": _check_args,
    "kwargs": _check_kwargs,
    "seed": _check_seed,
    "progress": check_bool,
    "search": check_bool,
    "input_dim": integer(1),
    "context_dim": integer(0),
    "hidden_dims": check_widths,
    "log_scale_bound": check_positive,
}
