# SPDX-License-Identifier: Apache-2.0
"""L1. Merging the operations of a recorded graph that compute the same value, and dropping those without use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = ["connected", "drop_unused", "is_random", "merge_repeated", "written_groups"]


def merge_repeated(graph: GraphModule) -> None:
    """Merge operations with equal arguments, in place; results are the same, bit for bit.

    A loop over sites computes the terms of a shared scale again for each of them, and its derivative even more often.
    Random operations are not merged, nor any that read or share memory that the graph writes to.

    Args:
        graph: A graph of operations of ``torch.ops``, as :func:`~pyro_flows.compiled.tracer.trace_operations` makes it.
    """
    written = set[Node]().union(*written_groups(graph))
    first: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node in written or is_random(node):
            continue
        if any(source in written for source in node.all_input_nodes):
            continue
        # The representation of an argument is exact: a node's name, a number with all its digits.
        same = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.recompile()


def drop_unused(graph: GraphModule) -> None:
    """Drop operations that no output follows, in place: random ones too, which a graph keeps otherwise, and those that
    write into memory that nothing else reads.

    Args:
        graph: As for :func:`merge_repeated`.
    """
    groups = written_groups(graph)
    needed, waiting = set[Node](), [node for node in graph.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
            for group in groups:
                waiting += group if node in group else ()
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_function" and node not in needed:
            graph.graph.erase_node(node)
    graph.recompile()


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def written_groups(graph: GraphModule) -> list[set[Node]]:
    """Nodes that share memory which an operation of the graph writes to, a set for each such memory."""
    near: dict[Node, set[Node]] = {}
    written: list[Node] = []
    for node in graph.graph.nodes:
        for source, writes in _aliases(node):
            near.setdefault(node, set()).add(source)
            near.setdefault(source, set()).add(node)
            if writes:
                written.append(source)
    return connected(written, near)


def connected(starts: Iterable[Node], near: Mapping[Node, Iterable[Node]]) -> list[set[Node]]:
    """Sets of nodes, of which each has all those near any of it; one for each start that is in none before."""
    found: list[set[Node]] = []
    for first in starts:
        if any(first in some for some in found):
            continue
        some, pending = set[Node](), [first]
        while pending:
            node = pending.pop()
            if node not in some:
                some.add(node)
                pending += near.get(node, ())
        found.append(some)
    return found


def _aliases(node: Node) -> Iterator[tuple[Node, bool]]:
    """Arguments whose memory an operation's result shares, or that it writes to, and whether it does the latter."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # an item of a sequence of results, which may be views
        yield from ((source, False) for source in node.all_input_nodes)
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        for source in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(source, Node):
                yield source, argument.alias_info.is_write
