# SPDX-License-Identifier: Apache-2.0
"""L1. Values of data that Python read while a graph was recorded, and that are fixed in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

__all__ = ["ADDRESS", "WRITES", "KnownValues", "Read", "writes"]

# Of a node whose value is known: where in memory it is; and whether it writes there, known values into a known tensor.
ADDRESS, WRITES = "address", "writes"


@dataclass(frozen=True)
class KnownSettings:
    """When values are read again.

    Attributes:
        max_elements: Number of elements on a CPU up to which they are read again at each call, which takes some ten
            microseconds; of more, or on a GPU, only where a tensor is another one, or torch has counted a change.
    """

    max_elements: int = 2**15


SETTINGS = KnownSettings()


class Read(NamedTuple):
    """A value that Python read.

    Attributes:
        function: What reads it, such as the operation behind ``.item()``.
        args: Its arguments, with nodes for tensors.
        value: What it was: a number, a truth value, a tensor's bytes or a shape.
        after: The last node before it: later ones may write into its arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    value: Any
    after: Node


class KnownValues:
    """What a model reads of its data in Python, such as the number of groups, ``int(group.max()) + 1``.

    A recorded step has it fixed, so that the step is only for data of which it is the same.

    Args:
        graph: The graph as recorded, without an output; it stays as it is.
        reads: What was read, in order.
    """

    def __init__(self, graph: Graph, reads: Sequence[Read]) -> None:
        own = Graph()
        copies: dict[Node, Node] = {}
        needed = _needed(graph, reads)
        rest, found = list(reversed(reads)), []
        for node in graph.nodes:
            if node.op == "placeholder" or node in needed:
                copies[node] = own.node_copy(node, copies.__getitem__)
            while rest and rest[-1].after is node:
                read = rest.pop()
                found.append(own.call_function(read.function, map_arg(read.args, copies.__getitem__)))
        own.output(tuple(found))
        given = [node for node in graph.nodes if node.op == "placeholder"]
        self._used = [index for index, node in enumerate(given) if node in needed]
        self._values = [read.value for read in reads]
        self._read = GraphModule(torch.nn.Module(), own)
        self._seen: list[tuple[Tensor, int, int]] = []

    @torch.no_grad()
    def hold(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the inputs of the graph have these values."""
        if not self._values:
            return True
        used = [inputs[index] for index in self._used]
        is_small = sum(t.numel() for t in used) <= SETTINGS.max_elements and not any(t.is_cuda for t in used)
        if is_small or any(tensor.is_inference() for tensor in used):  # which do not count changes
            return self._are(inputs)
        now = [(tensor, tensor._version, tensor.data_ptr()) for tensor in used]
        if len(self._seen) == len(now) and all(
            one[0] is other[0] and one[1:] == other[1:] for one, other in zip(now, self._seen, strict=True)
        ):
            return True
        holds = self._are(inputs)
        self._seen = now if holds else []
        return holds

    def _are(self, inputs: Sequence[Tensor]) -> bool:
        try:
            found = self._read(*inputs)
        except (RuntimeError, IndexError):  # an index out of range, say
            return False
        pairs = zip(found, self._values, strict=True)
        return all(one == other or (one != one and other != other) for one, other in pairs)  # two NaNs are equal


def _needed(graph: Graph, reads: Sequence[Read]) -> set[Node]:
    """Nodes from which reads follow, and those that write into their memory."""
    writers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for address in node.meta[ADDRESS] if node.meta.get(WRITES) else ():
            writers.setdefault(address, []).append(node)
    waiting: list[Node] = []
    for read in reads:
        map_arg(read.args, waiting.append)
    needed: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
            for address in node.meta.get(ADDRESS, ()):
                waiting += writers.get(address, ())
    return needed


def writes(node: Node) -> bool:
    """Whether an operation changes one of its arguments in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
