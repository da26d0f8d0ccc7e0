# SPDX-License-Identifier: Apache-2.0
"""L1. The Python values that a recorded step read and that its graph has fixed, so that a change is noticed."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

__all__ = ["Guard", "Reads", "watch_reads"]


@dataclass(frozen=True)
class GuardSettings:
    """Bounds of a guard.

    Attributes:
        max_items: Largest number of items of a list or dictionary that are compared one by one; of a larger one, only
            its length and the items that the code names.
        max_objects: Number of objects that are searched for values.
    """

    max_items: int = 64
    max_objects: int = 10_000


SETTINGS = GuardSettings()
# Packages whose functions read nothing that a user changes while training.
LIBRARIES = {"builtins", "numpy", "pyro", "pyro_flows", "torch", "tqdm"}
SCALARS = (bool, int, float, complex, str, bytes)
# Modules of torch that do the same whatever their flags.
WITHOUT_FLAGS = (torch.nn.Linear, torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.Sequential)
DEFINITIONS = (types.FunctionType, types.BuiltinFunctionType, type)
# What is raised where an item, an attribute or a variable of an enclosing function is gone.
GONE = (LookupError, AttributeError, ValueError)


class Reads(NamedTuple):
    """The functions of a user that a run called.

    Attributes:
        codes: Their code objects, by identity, each with the globals that it reads.
    """

    codes: dict[int, tuple[types.CodeType, dict[str, Any]]]

    def globals(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The global names that they read, with their dictionaries."""
        for code, names in self.codes.values():
            for step in dis.get_instructions(code):
                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in names:
                    yield names, step.argval

    def names(self) -> set[str]:
        """Names of attributes that they read, and their constant strings, which may be keys."""
        found = set()
        for code, _ in self.codes.values():
            for step in dis.get_instructions(code):
                is_attribute = step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER"))
                if is_attribute or (step.opname == "LOAD_CONST" and isinstance(step.argval, str)):
                    found.add(step.argval)
        return found


@contextmanager
def watch_reads() -> Iterator[Reads]:
    """Note the functions that are called within this context; none under a profiler, which can't share its hook."""
    reads = Reads({})
    if sys.getprofile() is not None:
        yield reads
        return
    seen: dict[int, tuple[types.CodeType, dict[str, Any]]] = {}

    def note(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen[id(frame.f_code)] = frame.f_code, frame.f_globals

    sys.setprofile(note)
    try:
        yield reads
    finally:
        sys.setprofile(None)
        reads.codes.update((key, found) for key, found in seen.items() if not _is_library(found[1].get("__name__")))


class Guard:
    """The values that decide what a model and a guide do, as they are now, to be compared at each call.

    These are, of all functions of the user that a run called: the global variables and the variables of enclosing
    functions that they read; and, in the objects found there, in the objects that the programs are methods of and in
    the arguments, the attributes and items with a name that occurs in the functions. Numbers and strings are compared
    by value, everything else by identity; lists and dictionaries item by item; modules of torch by their flags, such as
    ``training``, and others by the attributes that their class lists as ``python_state``. A tensor that changes in
    place is an input of the graph, and no change.

    Not seen are values inside objects of other libraries, such as NumPy's arrays, files, and the state of generators.

    Args:
        roots: The model, the guide and their arguments.
        reads: The functions that a run of them called.
    """

    def __init__(self, roots: Iterable[Any], reads: Reads) -> None:
        self._names = reads.names()
        self._codes = reads.codes
        self._entries: list[tuple[Any, Any, Any]] = []
        self._labels: list[str] = []
        self._seen: dict[int, Any] = {}
        self._waiting: list[tuple[Any, str]] = []
        for names, name in {(id(names), name): (names, name) for names, name in reads.globals()}.values():
            self._add(names, name, name)
        for root in roots:
            self._visit_later(root, getattr(root, "__name__", "argument"))
        while self._waiting and len(self._seen) < SETTINGS.max_objects:
            self._visit(*self._waiting.pop())
        self._seen, self._waiting, self._codes = {}, [], {}

    def __len__(self) -> int:
        return len(self._entries)

    def keep_constant(self) -> None:
        """Drop values that have changed since: those that the programs themselves change at each run."""
        kept = [index for index, entry in enumerate(self._entries) if _holds(*entry)]
        self._entries = [self._entries[index] for index in kept]
        self._labels = [self._labels[index] for index in kept]

    @property
    def holds(self) -> bool:
        """Whether nothing has changed."""
        for container, key, value in self._entries:
            try:
                now = container[key]
            except GONE:
                return False
            if now is not value and not _is_equal(now, value):
                return False
        return True

    def change(self) -> str:
        """The first change, as ```cfg.beta` was 1.0 and is 0.5``; empty if there is none."""
        for label, (container, key, value) in zip(self._labels, self._entries, strict=True):
            if not _holds(container, key, value):
                try:
                    now = _shown(container[key])
                except GONE:
                    now = "gone"
                before = _shown(value)
                return f"`{label}` was {before} and is {now}" if now != before else f"`{label}` is another object"
        return ""

    # Search

    def _add(self, container: Any, key: Any, label: str) -> None:
        """Compare an item of a container at each call, and search it."""
        value = container[key]
        if isinstance(value, types.ModuleType) and _is_library(value.__name__):
            return
        if isinstance(value, DEFINITIONS) and _is_library(value.__module__):
            return
        self._entries.append((container, key, value))
        self._labels.append(label)
        self._visit_later(value, label)

    def _visit_later(self, value: Any, label: str) -> None:
        if not isinstance(value, (*SCALARS, torch.Tensor, type(None))) and id(value) not in self._seen:
            self._seen[id(value)] = value  # kept, so that no other object gets its id
            self._waiting.append((value, label))

    def _visit(self, value: Any, label: str) -> None:
        if isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, types.MethodType):
            self._visit_later(value.__func__, value.__name__)
            self._visit_later(value.__self__, "self")
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit_later(part, getattr(part, "__name__", label))
        elif isinstance(value, types.ModuleType):
            self._add_named(vars(value), label)
        elif isinstance(value, (tuple, frozenset)):
            for index, part in enumerate(value):
                self._visit_later(part, f"{label}[{index}]")
        elif isinstance(value, (list, dict)):
            self._visit_items(value, label)
        elif isinstance(value, type):
            if not _is_library(value.__module__):
                self._add_named(vars(value), label)
        else:
            self._visit_object(value, label)

    def _visit_function(self, function: types.FunctionType) -> None:
        is_relevant = id(function.__code__) in self._codes or _is_library(function.__module__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty one
                if is_relevant and name != "__class__":
                    self._add(_Value(partial(getattr, cell, "cell_contents")), None, name)
        if is_relevant:
            for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                self._visit_later(part, function.__name__)

    def _visit_items(self, value: list[Any] | dict[Any, Any], label: str) -> None:
        self._entries.append((_Value(value.__len__), None, len(value)))
        self._labels.append(f"len({label})")
        if len(value) <= SETTINGS.max_items:
            for key in range(len(value)) if isinstance(value, list) else list(value):
                self._add(value, key, f"{label}[{key!r}]")
        elif isinstance(value, dict):
            self._add_named(value, label)

    def _visit_object(self, value: Any, label: str) -> None:
        kind = type(value)
        if isinstance(value, torch.nn.Module):
            for name, child in value._modules.items():
                self._visit_later(child, f"{label}.{name}")
            for name in getattr(kind, "python_state", ()):
                self._add(vars(value), name, f"{label}.{name}")
            if kind.__module__.partition(".")[0] == "torch" and not isinstance(value, WITHOUT_FLAGS):
                flags = [name for name, flag in vars(value).items() if isinstance(flag, SCALARS) and name[0] != "_"]
                for name in flags:
                    self._add(vars(value), name, f"{label}.{name}")
        if _is_library(kind.__module__, standard=False):
            for part in _parts_of(value):
                self._visit_later(part, label)
            return
        own = getattr(value, "__dict__", {})
        self._add_named(own, label)
        if isinstance(value, torch.nn.Module):
            self._add_named(value._buffers, label)
        for parent in kind.__mro__:
            if _is_library(parent.__module__):
                continue
            for name, part in list(vars(parent).items()):
                if isinstance(part, types.FunctionType):
                    self._visit_later(part, name)
                elif name in self._names and name not in own and _is_own_state(part) and hasattr(value, name):
                    self._add(_Value(partial(getattr, value, name)), None, f"{label}.{name}")

    def _add_named(self, container: Mapping[Any, Any], label: str) -> None:
        for name in [name for name in container if name in self._names]:
            if not isinstance(container, types.MappingProxyType) or _is_own_state(container[name]):  # a class's
                self._add(container, name, f"{label}.{name}")


class _Value:
    """A value that is no item of a container, read as if it were one."""

    __slots__ = ("_read",)

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __getitem__(self, key: Any) -> Any:
        return self._read()


def _holds(container: Any, key: Any, value: Any) -> bool:
    try:
        now = container[key]
    except GONE:
        return False
    return now is value or _is_equal(now, value)


def _is_equal(now: Any, value: Any) -> bool:
    """Whether two scalars are of one type and equal; two NaNs are."""
    return type(now) is type(value) and isinstance(now, SCALARS) and (now == value or (now != now and value != value))


def _is_library(module: str | None, *, standard: bool = True) -> bool:
    """Whether a module is of a library whose functions read nothing of the user's; with or without Python's own."""
    root = (module or "").partition(".")[0]
    if root.startswith("namedtuple_"):  # generated code
        return True
    return root in LIBRARIES or (standard and root in sys.stdlib_module_names)


def _is_own_state(value: Any) -> bool:
    """Whether a member of a class is a value that its instances share, or a slot; not a method or a property."""
    return isinstance(value, types.MemberDescriptorType) or not hasattr(value, "__get__")


def _parts_of(value: Any) -> Iterator[Any]:
    """What an object of a library calls: the program that a handler or another wrapper holds."""
    if not isinstance(value, (torch.Tensor, torch.nn.Module)):
        for part in list(getattr(value, "__dict__", {}).values()):
            if callable(part):
                yield part


def _shown(value: Any) -> str:
    if isinstance(value, SCALARS) or value is None:
        return repr(value)
    return f"a {type(value).__name__}"
