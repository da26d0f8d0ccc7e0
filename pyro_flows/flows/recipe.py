# SPDX-License-Identifier: Apache-2.0
"""L2. A :class:`FlowSpec` as data that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pyro_flows.flows import bases
from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.registry import family_name, get, names

__all__ = ["Recipe"]

BASES = {each.__name__: each for each in (bases.StudentT, bases.Mixture)}


@dataclass(frozen=True)
class Recipe:
    """A flow's family and its hyper-parameters.

    Attributes:
        family: Name of a registered family; empty for others, such as a user's function.
        hyper: Hyper-parameters, in numbers, strings and tuples; that of the base may be a dictionary.
        title: Text that tells flows apart.
    """

    family: str
    hyper: Mapping[str, Any]
    title: str

    @classmethod
    def of(cls, spec: FlowSpec) -> Recipe:
        """The recipe of a spec."""
        family = family_name(type(spec))
        hyper = {each.name: _as_data(getattr(spec, each.name)) for each in fields(spec)}
        is_data = all(_is_data(value) for value in hyper.values())
        texts = {name: value if _is_data(value) else _name_of(value) for name, value in hyper.items()}
        title = f"{family or type(spec).__name__}({', '.join(f'{name}={value}' for name, value in texts.items())})"
        return cls(family, hyper, title) if family and is_data else cls("", {}, title)

    def spec(self) -> FlowSpec:
        """The spec.

        Raises:
            ValueError: If the family is not registered, or has other hyper-parameters now; it says which.
        """
        if self.family not in names():
            raise ValueError(f"'{self.family or self.title}' is not a registered family")
        hyper = {name: _as_base(value) for name, value in self.hyper.items()}
        try:
            return get(self.family, **hyper)
        except TypeError as error:
            raise ValueError(f"'{self.family}' has other hyper-parameters here ({error})") from None


def _as_data(value: Any) -> Any:
    name = type(value).__name__
    if BASES.get(name) is type(value):
        return {"base": name, **{each.name: getattr(value, each.name) for each in fields(value)}}
    return value


def _as_base(value: Any) -> Any:
    if isinstance(value, Mapping):
        rest = dict(value)
        return BASES[rest.pop("base")](**rest)
    return value


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    if isinstance(value, tuple):
        return all(map(_is_data, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _name_of(value: Any) -> str:
    """The name of a function or a class, which unlike its ``repr`` is the same in every process."""
    return getattr(value, "__qualname__", type(value).__qualname__)
