# SPDX-License-Identifier: Apache-2.0
"""L1. Parts of a recorded graph that are affine in one of its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from pyro_flows.compiled.simplify import written_groups

__all__ = ["AffineParts", "copy_operation", "operation_of", "terms_of"]

aten = torch.ops.aten


class _Kind(Enum):
    FREE = "does not depend on the variable"
    AFFINE = "affine"
    OTHER = "depends on it in another way"


# Operations that leave the entries of their first argument as they are, or repeat, reorder or leave out some, or change
# all signs or the dtype.
_MOVES = {
    *(aten.alias, aten.clone, aten.expand, aten.flip, aten.gather, aten.index, aten.index_select, aten.neg),
    *(aten.permute, aten.repeat, aten.reshape, aten.roll, aten.select, aten.slice, aten.squeeze, aten.t),
    *(aten.transpose, aten.unsqueeze, aten.view, aten._reshape_alias, aten._to_copy, aten._unsafe_view),
}
_SUMS = {aten.add, aten.sub, aten.rsub}
# Operations of which only the shape of the first argument matters.
_LIKE = {aten.empty_like, aten.full_like, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones_like}
_LIKE |= {aten.zeros_like}


class _Rule(NamedTuple):
    """Where operations are linear.

    Attributes:
        operations: The operations.
        choices: Places of arguments in which they are linear jointly, given all others; there may be several choices.
    """

    operations: Collection[Any]
    choices: tuple[tuple[int, ...], ...]


_RULES = (
    _Rule(_MOVES, ((0,),)),
    _Rule(_SUMS, ((0, 1),)),
    _Rule((aten.mul, aten.mm, aten.bmm, aten.mv, aten.dot), ((0,), (1,))),
    _Rule((aten.addmm, aten.addmv, aten.baddbmm, aten.addbmm, aten.addcmul, aten.addr), ((0, 1), (0, 2))),
    _Rule((aten.linear, aten.convolution), ((0, 2), (1, 2))),
    _Rule((aten.sum, aten.cumsum, aten.mean, aten.div, aten.cholesky_solve), ((0,),)),
    _Rule((aten.stack, aten.cat, aten.unbind, aten.split, aten.split_with_sizes, operator.getitem), ((0,),)),
    _Rule((aten.diagonal, aten.diag_embed, aten.tril, aten.triu, aten.unfold), ((0,),)),
    _Rule((aten.masked_fill, aten.constant_pad_nd), ((0, 2),)),
    _Rule((aten.index_add, aten.scatter_add), ((0, 3),)),
    _Rule((aten.linalg_solve_triangular,), ((1,),)),
    _Rule((aten.where,), ((1, 2),)),
)
_LINEAR = {operation: rule.choices for rule in _RULES for operation in rule.operations}


class AffineParts:
    """Which values of a graph are affine in one of its inputs, the variable, given the others; or in several jointly.

    Args:
        graph: A graph as :func:`~pyro_flows.compiled.tracer.trace_operations` makes it, without unused operations.
        variables: The input, or several.
        inputs: All inputs that vary, the variables among them; others are constant.

    Raises:
        NotImplementedError: If what depends on the variable is written into other memory, or written over.
    """

    def __init__(self, graph: GraphModule, variables: Sequence[Node], inputs: Collection[Node]) -> None:
        self._graph = graph.graph
        self.variables = dict.fromkeys(variables)  # in order
        self._kinds: dict[Node, _Kind] = {}
        self._varying: set[Node] = set(inputs)
        for node in self._graph.nodes:
            self._kinds[node] = _Kind.AFFINE if node in self.variables else self._kind(node)
            if not self._varying.isdisjoint(node.all_input_nodes):
                self._varying.add(node)
        for group in written_groups(graph):
            kinds = {self._kinds[node] for node in group}
            if len(kinds) > 1 or _Kind.AFFINE in kinds:
                raise NotImplementedError("a variable is written into memory")

    def outermost(self, max_elements: int) -> list[Node]:
        """Affine values that the outputs follow in another than an affine way, in place of the variables; without
        repetitions, signs and constant terms, and where they have more elements than allowed, without terms that do not
        depend on the variable; none if they have more even then."""
        used = {node for node in self._graph.nodes if node.op == "output"}  # by an output, not by their shapes alone
        bent: set[Node] = set()  # followed by an output in another than a linear way
        found: list[Node] = []
        for node in reversed(self._graph.nodes):
            users = [user for user in node.users if user in used]
            if self._kinds[node] is not _Kind.FREE and users:
                used.add(node)
            bends = [user for user in users if user.op != "output" and (self._is_bend(user) or user in bent)]
            if bends:
                bent.add(node)
            if self._kinds[node] is _Kind.AFFINE and any(self._kinds[user] is _Kind.OTHER for user in bends):
                found.append(node)
        found.reverse()
        free = {node for node, kind in self._kinds.items() if kind is _Kind.FREE}
        for removable in (free - self._varying, free):
            sources = dict.fromkeys(self._without(node, removable) for node in found)
            if sum(_numel(node) for node in sources) <= max_elements:
                return list(sources)
        return []

    def split(self, nodes: Collection[Node]) -> GraphModule:
        """A graph of the values of affine nodes where the variable is zero, and of their derivatives.

        Its inputs are a direction, of the variable's shape, and those of the original one; its outputs two tuples, of
        the values at zero, which do not depend on the variable, and of their changes along the direction. Exact, since
        terms that do not depend on the variable are no part of these.
        """
        (variable,) = self.variables
        own = Graph()
        direction = own.placeholder("direction")
        copies: dict[Node, Node] = {}  # of what is free, and of inputs
        changes: dict[Node, Node] = {variable: direction}
        offsets: dict[Node, Node] = {}  # without those that are zero

        def zeros(node: Node) -> Node:
            return own.call_function(aten.new_zeros.default, (copies[variable], list(node.meta["shape"])))

        def offset(node: Node) -> Node:
            return copies[node] if self._kinds[node] is _Kind.FREE else offsets.get(node) or zeros(node)

        def change(node: Node) -> Node:
            if self._kinds[node] is _Kind.FREE:
                return own.call_function(aten.zeros_like.default, (copies[node],))
            return changes[node]

        for node in self._graph.nodes:
            kind = self._kinds[node]
            if node.op == "placeholder":
                copies[node] = own.node_copy(node)
            elif kind is _Kind.FREE:
                copies[node] = copy_operation(own, node, lambda old: copies[old] if old in copies else zeros(old))
            elif kind is _Kind.AFFINE:
                places = self.places(node)
                terms = [*terms_of(node, places)]
                if any(t in offsets or self._kinds[t] is _Kind.FREE if isinstance(t, Node) else t for t in terms):
                    offsets[node] = copy_operation(own, node, offset)
                changes[node] = copy_operation(own, node, copies.__getitem__, places, change)
        own.output((tuple(map(offset, nodes)), tuple(changes[node] for node in nodes)))
        return GraphModule(torch.nn.Module(), own)

    def is_free(self, node: Node) -> bool:
        """Whether a value does not depend on the variable."""
        return self._kinds[node] is _Kind.FREE

    def whole(self, node: Node, count: int) -> Node:
        """The value with so many elements of which a node repeats, reorders or leaves out some; the node itself if that
        is the variable, or none."""
        inner = node
        while operation_of(inner) in _MOVES and len(dependent := self.dependent(inner)) == 1:
            (inner,) = dependent
            if _numel(inner) == count and inner not in self.variables:
                return inner
        return node

    def dependent(self, node: Node) -> list[Node]:
        """The arguments of an operation that depend on the variable."""
        return [source for source in node.all_input_nodes if self._kinds[source] is not _Kind.FREE]

    def places(self, node: Node) -> tuple[int, ...]:
        """Places of the arguments that depend on the variable, where the operation is linear in these; else none."""
        dependent = set(self.dependent(node))
        for places in _LINEAR[operation_of(node)] if _is_linear(node) else ():
            if dependent.isdisjoint(_nodes(_others(node, places))):
                return places
        return ()

    def _kind(self, node: Node) -> _Kind:
        dependent = self.dependent(node)
        if not dependent or (operation_of(node) in _LIKE and dependent == [node.args[0]]):
            return _Kind.FREE
        is_affine = all(self._kinds[source] is _Kind.AFFINE for source in dependent) and self.places(node)
        return _Kind.AFFINE if is_affine else _Kind.OTHER

    def _is_bend(self, node: Node) -> bool:
        """Whether an operation is not linear in those of its arguments that depend on the variable."""
        return self._kinds[node] is not _Kind.FREE and not self.places(node)

    def _without(self, node: Node, removable: Collection[Node]) -> Node:
        """The value of which a node is a repetition, the negative or a sum with removable terms, if it is no larger."""
        while node not in self.variables:
            dependent, operation = self.dependent(node), operation_of(node)
            others = [source for source in node.all_input_nodes if source not in dependent]
            is_sum = operation in _SUMS and all(source in removable for source in others)
            if len(dependent) > 1 or not (is_sum or operation in _MOVES) or _numel(dependent[0]) > _numel(node):
                break
            node = dependent[0]
        return node


def operation_of(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_linear(node: Node) -> bool:
    """Whether there are arguments in which an operation is linear."""
    dtype = node.kwargs.get("dtype")
    is_rounded = node.kwargs.get("rounding_mode") or (isinstance(dtype, torch.dtype) and not dtype.is_floating_point)
    return operation_of(node) in _LINEAR and not is_rounded


def terms_of(node: Node, places: tuple[int, ...]) -> Iterator[Any]:
    """The arguments at some places, with the items of lists."""
    for place in places:
        if place < len(node.args):
            argument = node.args[place]
            yield from argument if isinstance(argument, (list, tuple)) else (argument,)


def _others(node: Node, places: tuple[int, ...]) -> list[Any]:
    return [*node.kwargs.values(), *(value for place, value in enumerate(node.args) if place not in places)]


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg([*arguments], found.append)
    return found


def _numel(node: Node) -> int:
    shape: torch.Size = node.meta["shape"]
    return shape.numel()


def copy_operation(
    graph: Graph,
    node: Node,
    to_copy: Callable[[Node], Node],
    places: tuple[int, ...] = (),
    to_term: Callable[[Node], Node] | None = None,
) -> Node:
    """Copy an operation, with the arguments at some places mapped in another way, and numbers there replaced by 0.

    Views are copies where they must be, since rows of a batch may be anywhere in memory.
    """
    arguments = [
        (0 if isinstance(value, (int, float)) else map_arg(value, to_term))
        if to_term and place in places
        else map_arg(value, to_copy)
        for place, value in enumerate(node.args)
    ]
    is_view = node.target in (aten.view.default, aten._unsafe_view.default)
    target: Any = aten.reshape.default if is_view else node.target
    copied = graph.call_function(target, tuple(arguments), map_arg(dict(node.kwargs), to_copy))
    copied.meta = dict(node.meta)
    return copied
