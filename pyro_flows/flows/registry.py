# SPDX-License-Identifier: Apache-2.0
"""L2. Families by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

from pyro_flows._checks import check_choice, check_text
from pyro_flows.flows.base import FlowSpec

__all__ = ["family_name", "get", "names", "register"]

_FAMILIES: dict[str, type[FlowSpec]] = {}

SpecClass = TypeVar("SpecClass", bound=type[FlowSpec])


@overload
def register(name: str) -> Callable[[SpecClass], SpecClass]: ...
@overload
def register(name: str, spec_class: SpecClass) -> SpecClass: ...
def register(name: str, spec_class: Any = None) -> Any:
    """Add a family, so that ``AutoFlowGuide(model, flow=name)`` finds it.

    A decorator of the family's class, ``@register("name")``, or a call, ``register("name", spec_class)``.

    Args:
        name: New name; a Python identifier.
        spec_class: Frozen dataclass that extends :class:`FlowSpec`, constructible without arguments. Left out where
            this decorates the class.

    Returns:
        The class, unchanged.

    Raises:
        TypeError: If ``spec_class`` is not a subclass of :class:`FlowSpec`.
        ValueError: If the name is taken by another class or is no identifier.
    """
    check_text("register", "name", name)
    if not name.isidentifier():
        raise ValueError(f"register: expected name to be an identifier, but got {name!r}.")
    if spec_class is None:
        return partial(register, name)
    if not (isinstance(spec_class, type) and issubclass(spec_class, FlowSpec)):
        raise TypeError(f"register: expected spec_class to be a subclass of FlowSpec, but got {spec_class!r}.")
    if _FAMILIES.get(name, spec_class) is not spec_class:
        raise ValueError(f"register: expected a new name, but {name!r} is {_FAMILIES[name].__name__}. Choose another.")
    _FAMILIES[name] = spec_class
    return spec_class


def names() -> tuple[str, ...]:
    """Names of all registered families, sorted."""
    return tuple(sorted(_FAMILIES))


def family_name(spec_class: type[FlowSpec]) -> str:
    """Name of a class's family; empty if it is not registered."""
    return next((name for name, each in _FAMILIES.items() if each is spec_class), "")


def get(name: str, **hyper: Any) -> FlowSpec:
    """A family's recipe.

    Args:
        name: One of :func:`names`.
        hyper: Hyper-parameters of that family; all others have the family's defaults.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.

    Example:
        >>> from pyro_flows import flows
        >>> flows.get("realnvp", num_transforms=6).num_transforms
        6
    """
    check_choice("flows.get", "name", name, names())
    return _FAMILIES[name](**hyper)
