# SPDX-License-Identifier: Apache-2.0
"""L1. States in a recorded graph that follow each other: a loop over time, or a cumulative sum."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from pyro_flows.compiled.affine import AffineParts, copy_operation, operation_of, terms_of
from pyro_flows.compiled.simplify import drop_unused, merge_repeated

__all__ = ["Recursion", "read_recursion"]

aten = torch.ops.aten

# Operations on vectors of which each entry of the result depends on the same entry of the argument.
_BY_ENTRY = {aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten._to_copy}
_SAME = {aten.alias, aten.clone, aten.expand, aten.reshape, aten.view, aten._unsafe_view}  # where shapes are
_ALL = -1  # in place of an index, in a vector of all


class Recursion(NamedTuple):
    """States :math:`h_t = c_t + a_t h_{t-1} + b_t z_t`, of which the first follows none, seen as :math:`m_t + s_t h_t`.

    Attributes:
        graph: From the inputs of the original graph to c, a, b, m and s, each ``(n,)``.
        nodes: What is seen in the original graph: one vector, or n scalars.
    """

    graph: GraphModule
    nodes: list[Node]


class _Value(NamedTuple):
    """An affine value as a function of one state and one entry of the variable, or a vector by entry.

    Attributes:
        before: Index of the state, or all; None if there is none.
        entry: Index of the entry, or all; None if there is none.
        parts: Nodes of the value where both are zero, and of its slopes in state and entry; None for zero.
    """

    before: int | None
    entry: int | None
    parts: tuple[Node | None, Node | None, Node | None]


def read_recursion(graph: GraphModule, affine: AffineParts, nodes: Sequence[Node]) -> Recursion | None:
    """Read affine values as states that follow each other, each driven by the entry of the variable at its place.

    Args:
        graph: The graph.
        affine: What of it is affine in the variable, a vector of n entries.
        nodes: The values: n scalars, or one vector that depends on a stack of n scalars, or on a cumulative sum, or
            some entries of it.

    Returns:
        The recursion; None if the values are no such states.
    """
    (variable,) = affine.variables
    length = variable.meta["shape"].numel()
    if not nodes or variable.meta["shape"] != (length,):
        return None
    nodes = [*dict.fromkeys(affine.whole(node, length) for node in nodes)]
    source = _source(affine, nodes[0]) if len(nodes) == 1 else None
    if source is None:
        states = [_shared(affine, node) for node in nodes]
    elif operation_of(source) in (aten.stack, aten.cat):
        states = [*source.args[0]]  # type: ignore[misc, list-item]
    else:
        states = []
    if len(states) != (length if states else 0) or len(set(states)) < len(states):
        return None
    return _Reader(graph, affine, states, source).read(nodes)


def _source(affine: AffineParts, node: Node) -> Node | None:
    """The stack or cumulative sum that a vector is a function of, by operations with one argument that depends on the
    variable; None if there is none."""
    while operation_of(node) not in (aten.stack, aten.cat, aten.cumsum):
        dependent = affine.dependent(node)
        if len(dependent) != 1 or dependent[0].meta["shape"].numel() != node.meta["shape"].numel():
            return None
        (node,) = dependent
    return node


def _shared(affine: AffineParts, node: Node) -> Node:
    """The state that a scalar is a function of, if the next state follows it too."""
    inner = node
    while len(dependent := affine.dependent(inner)) == 1 and dependent[0].meta["shape"].numel() == 1:
        (inner,) = dependent
        if len([user for user in inner.users if not affine.is_free(user)]) > 1:
            return inner
    return node


def read_transitions(
    graph: GraphModule, affine: AffineParts, locs: Sequence[Node], scales: Sequence[Node]
) -> GraphModule | None:
    r"""Read states that are the variables themselves, scalars in order, each with a scale, and a location that follows
    the one before it.

    Args:
        graph: The graph.
        affine: What of it is affine in all of the variables.
        locs: Locations, for each of them.
        scales: Scales.

    Returns:
        A graph from the inputs of the original one to c, a and b, ``(n,)`` each, for :math:`h_t \sim N(c_t + a_t
        h_{t-1}, b_t^2)`; None if locations are no such functions.
    """
    return _Reader(graph, affine, [*affine.variables], None).transitions(locs, scales)


class _Reader:
    """Writes a graph of the coefficients of a recursion.

    Args:
        graph: The original graph.
        affine: What of it is affine.
        states: The states in order, scalars; none for a sum.
        source: The stack of the states, or the cumulative sum; None if they are seen one by one.
    """

    def __init__(self, graph: GraphModule, affine: AffineParts, states: Sequence[Node], source: Node | None) -> None:
        self._graph = graph.graph
        self._affine = affine
        self._place = {node: place for place, node in enumerate(states)}
        self._source = source
        self._variable = next(iter(affine.variables))
        self._length = self._variable.meta["shape"].numel()
        self._own = Graph()
        self._copies: dict[Node, Node] = {}  # of what is free, and of inputs
        self._values: dict[Node, _Value] = {}
        self._found: list[_Value] = []  # of the states, or of the sum
        self._constants: dict[tuple[str, tuple[int, ...]], Node] = {}
        self._uniform: set[Node] = set()  # scalars in place of vectors with equal entries

    def read(self, nodes: Sequence[Node]) -> Recursion | None:
        """The recursion of which nodes are seen; None if the states do not follow each other."""
        if not self._follow(nodes):
            return None
        seen = [self._values.get(node) for node in nodes]
        if self._source is not None and None in seen:  # in another way than entry by entry
            nodes, seen = [self._source], [self._values[self._source]]
        places = [_ALL] if self._source is not None else range(len(nodes))
        is_own = all(
            value is not None and value.before == place and value.entry is None
            for value, place in zip(seen, places, strict=True)
        )
        if not is_own or (self._place and all(value.before is None for value in self._found)):
            return None
        self._found.sort(key=lambda value: value.entry or 0)
        rows = [[value.parts[k] for value in self._found] for k in range(3)]
        rows += [[value.parts[k] for value in seen if value is not None] for k in range(2)]
        return Recursion(self._made(rows), list(nodes))

    def transitions(self, locs: Sequence[Node], scales: Sequence[Node]) -> GraphModule | None:
        """The graph of :func:`read_transitions`."""
        self._follow([*locs, *scales])
        offsets: list[Node | None] = []
        lags: list[Node | None] = []
        for place, loc in enumerate(locs):
            value = self._values.get(loc)
            if self._affine.is_free(loc):
                value = _Value(None, None, (self._copies[loc], None, None))
            follows = None if place == 0 else place - 1
            if value is None or value.entry is not None or value.before != follows:
                return None
            offsets.append(value.parts[0])
            lags.append(value.parts[1])
        if not all(map(self._affine.is_free, scales)):
            return None
        return self._made([offsets, lags, [self._copies[scale] for scale in scales]])

    def _follow(self, nodes: Sequence[Node]) -> bool:
        """Write what nodes depend on, as functions of states and entries; whether the states follow each other."""
        needed, waiting = set[Node](), [*nodes]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._copies[node] = self._own.node_copy(node)
        for node in self._graph.nodes:
            if node in self._affine.variables:
                own = node in self._place
                parts = (None, self._constant("ones", node), None) if own else (None, None, self._constant("ones"))
                self._values[node] = _Value(self._place[node], None, parts) if own else _Value(None, _ALL, parts)
            elif node not in needed or node.op == "placeholder":
                continue
            elif self._affine.is_free(node):
                self._copies[node] = copy_operation(self._own, node, self._copy)
                if node.meta.get("shape") == ():
                    self._uniform.add(self._copies[node])
            elif node is self._source or node in self._place:
                value = self._state(node)
                if value is None:
                    return False
                self._values[node] = value
            elif (value := self._value(node)) is not None:
                self._values[node] = value
        return True

    def _state(self, node: Node) -> _Value | None:
        """A state, or all of them, as something that others depend on; None if it does not follow the one before it."""
        place = self._place.get(node, _ALL)
        if place != _ALL:
            value = self._value(node)
            if value is None or value.entry != place or value.before not in (None, place - 1):
                return None
            self._found.append(value)
        elif not self._place:
            (argument,) = self._affine.dependent(node)
            value = self._values.get(argument)
            if value is None or value.entry != _ALL or node.meta["shape"] != argument.meta["shape"]:
                return None
            self._found.append(value._replace(parts=(value.parts[0], self._constant("ones"), value.parts[2])))
        return _Value(place, None, (None, self._constant("ones", None if place == _ALL else node), None))

    def _made(self, rows: Sequence[Sequence[Node | None]]) -> GraphModule:
        """The graph with rows of nodes as vectors; many are the same, as they are in a loop."""
        self._own.output(tuple(tuple(row) for row in rows))
        graph = GraphModule(torch.nn.Module(), self._own)
        merge_repeated(graph)
        *_, output = self._own.nodes
        with self._own.inserting_before(output):
            output.args = (tuple(map(self._vector, output.args[0])),)
        drop_unused(graph)
        return graph

    def _vector(self, row: Sequence[Node | None]) -> Node:
        """Scalars as one vector; or a vector that is one already."""
        is_vector = len(row) == 1
        parts = []
        for node, some in groupby(row):
            if node is not None and is_vector and node not in self._uniform:
                return node
            flat = self._constant("zeros") if node is None else node
            count = self._length if is_vector else len([*some])
            parts.append(self._call(aten.expand.default, self._call(aten.reshape.default, flat, [1]), [count]))
        return self._call(aten.cat.default, parts) if len(parts) > 1 else parts[0]

    def _value(self, node: Node) -> _Value | None:
        """A value as a function of those before it; None if it depends on several states or entries."""
        found = [self._values.get(argument) for argument in self._affine.dependent(node)]
        values = [value for value in found if value is not None]
        befores = {value.before for value in values} - {None}
        entries = {value.entry for value in values} - {None}
        if len(values) < len(found) or len(befores) > 1 or len(entries) > 1:
            return None
        before, entry = next(iter(befores), None), next(iter(entries), None)
        if _ALL not in (before, entry):
            has_one = node.meta["shape"].numel() == 1
            return _Value(before, entry, self._parts(node, self._constant)) if has_one else None
        operation = operation_of(node)
        if operation is aten.unbind:
            return values[0]  # a sequence of entries
        if (place := self._picked(node)) is not None:
            first, back, slope = (self._pick(node, part, place) for part in values[0].parts)
            return _Value(None, place, (first, back, slope)) if before is None else None
        if node.meta["shape"] != (self._length,) or None not in (before, entry):
            return None
        if operation in _SAME:
            return values[0]
        if operation not in _BY_ENTRY:
            return None
        return _Value(before, entry, self._parts(node, lambda name, _: self._constant(name)))

    def _picked(self, node: Node) -> int | None:
        """The index of the entry that an operation takes of a vector; None if it does something else."""
        operation, index = operation_of(node), None
        if operation is operator.getitem:
            index = node.args[1]
        elif operation is aten.select or (operation is aten.slice and node.meta["shape"] == (1,)):
            index = node.args[2]
        return index % self._length if isinstance(index, int) else None

    def _pick(self, node: Node, part: Node | None, entry: int) -> Node | None:
        """The entry of a vector, in the shape of a node."""
        if part is None:
            return None
        found = part if part in self._uniform else self._call(aten.select.int, part, 0, entry)
        return self._call(aten.reshape.default, found, [*node.meta["shape"]]) if node.meta["shape"] else found

    def _parts(self, node: Node, constant: Callable[[str, Node], Node]) -> tuple[Node | None, Node | None, Node | None]:
        """What an operation makes of the parts of its arguments, with zeros by a function of their name and a node."""
        affine, own = self._affine, self._own
        places = affine.places(node)
        terms = [*terms_of(node, places)]
        sources = [term for term in terms if isinstance(term, Node) and not affine.is_free(term)]
        is_vector = node.meta["shape"] == (self._length,)

        def copied(old: Node) -> Node:
            """A copy; of a single number for all entries of a vector, as a scalar."""
            found, shape = self._copies[old], old.meta.get("shape")  # unknown for constant inputs
            if not is_vector or shape is None or shape.numel() > 1 or found in self._uniform:
                return found
            self._uniform.add(scalar := self._call(aten.reshape.default, found, []))
            return scalar

        has_more = any(affine.is_free(term) if isinstance(term, Node) else bool(term) for term in terms)

        def part(k: int) -> Node | None:
            def mapped(old: Node) -> Node:
                if affine.is_free(old):
                    return constant("zeros", old) if k else copied(old)
                return self._values[old].parts[k] or constant("zeros", old)

            if not (any(self._values[source].parts[k] is not None for source in sources) or (has_more and k == 0)):
                return None
            made = copy_operation(own, node, mapped) if k == 0 else copy_operation(own, node, copied, places, mapped)
            if all(each in self._uniform for each in made.all_input_nodes):
                self._uniform.add(made)
            return made

        return part(0), part(1), part(2)

    def _copy(self, node: Node) -> Node:
        """The copy of a value, or of something of the same shape where only that matters."""
        return self._copies[node] if node in self._copies else self._constant("zeros", node)

    def _constant(self, name: str, node: Node | None = None) -> Node:
        """Zeros or ones of a value's shape; by default a scalar, in place of a vector too."""
        key: tuple[str, tuple[int, ...]] = name, () if node is None else tuple(node.meta["shape"])
        if key not in self._constants:
            make = aten.new_zeros.default if name == "zeros" else aten.new_ones.default
            self._constants[key] = self._call(make, self._copies[self._variable], [*key[1]])
            if not key[1]:
                self._uniform.add(self._constants[key])
        return self._constants[key]

    def _call(self, target: object, *args: object) -> Node:
        return self._own.call_function(target, args)  # type: ignore[arg-type]
