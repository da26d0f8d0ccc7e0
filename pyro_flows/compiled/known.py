# SPDX-License-Identifier: Apache-2.0
"""L1. Values of data that Python read while a graph was recorded, and that are fixed in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

__all__ = ["KNOWN", "KnownValues", "Read", "writes"]

# Mark of a node that follows from data, from tensors that the code holds, and from numbers in the code.
KNOWN = "known"


class Read(NamedTuple):
    """A value that Python read.

    Attributes:
        function: What reads it, such as the operation behind ``.item()``.
        args: Its arguments, with nodes for tensors.
        value: What it was: a number, a truth value or a shape.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    value: Any


class KnownValues:
    """What a model reads of its data in Python, such as the number of groups, ``int(group.max()) + 1``.

    A recorded step has it fixed, so that the step is only for data of which it is the same.

    Args:
        graph: The graph as recorded, without an output; it stays as it is.
        reads: What was read; what does not depend on the graph's inputs is dropped.
    """

    def __init__(self, graph: Graph, reads: Sequence[Read]) -> None:
        own = Graph()
        copies: dict[Node, Node] = {}
        needed = _needed(graph, reads)
        for node in graph.nodes:
            if node.op == "placeholder" or node in needed:
                copies[node] = own.node_copy(node, copies.__getitem__)
        given = [node for node in graph.nodes if node.op == "placeholder"]
        self._used = [index for index, node in enumerate(given) if node in needed]
        kept = reads if self._used else ()
        own.output(tuple(own.call_function(r.function, map_arg(r.args, copies.__getitem__)) for r in kept))
        self._values = [read.value for read in kept]
        self._read = GraphModule(torch.nn.Module(), own)
        self._seen: list[tuple[Tensor, int]] = []

    @torch.no_grad()
    def hold(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the inputs of the graph have these values; they are read again only where a tensor is another one, or
        was changed in place."""
        if not self._used:
            return True
        tensors = [inputs[index] for index in self._used]
        if any(tensor.is_inference() for tensor in tensors):  # which do not count changes
            return self._are(inputs)
        if len(self._seen) == len(tensors) and all(
            tensor is seen and tensor._version == version
            for tensor, (seen, version) in zip(tensors, self._seen, strict=True)
        ):
            return True
        holds = self._are(inputs)
        self._seen = [(tensor, tensor._version) for tensor in tensors] if holds else []
        return holds

    def _are(self, inputs: Sequence[Tensor]) -> bool:
        try:
            found = self._read(*inputs)
        except (RuntimeError, IndexError):  # an index out of range, say
            return False
        return all(
            one == other or (one != one and other != other) for one, other in zip(found, self._values, strict=True)
        )


def _needed(graph: Graph, reads: Sequence[Read]) -> set[Node]:
    """Nodes from which reads follow: those of their arguments, what writes into known tensors, and all before them."""
    waiting: list[Node] = []
    for read in reads:
        map_arg(read.args, waiting.append)
    if waiting:
        waiting += [node for node in graph.nodes if node.meta.get(KNOWN) and writes(node)]
    needed: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def writes(node: Node) -> bool:
    """Whether an operation changes one of its arguments in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
