# SPDX-License-Identifier: Apache-2.0
"""L1. Compiling the large operations of a graph, a likelihood's of many rows, while TorchScript runs the rest: much of
what the compiler saves, in a fraction of its time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pyro_flows.compiled.cost import PRODUCTS
from pyro_flows.compiled.inductor import to_machine_code
from pyro_flows.compiled.script import to_script
from pyro_flows.compiled.simplify import connected, is_random, written_groups

__all__ = ["LargePart", "large_part", "to_fused"]


@dataclass(frozen=True)
class FusionSettings:
    """Which operations of a graph are large: those with a result, or an argument, of at least some number of elements.

    Attributes:
        min_elements: The smallest such number. Moving these through memory takes as long as calling the operation; an
            operation that is compiled has to save as much, over a few thousand steps, to be worth it.
        shares: Such numbers as fractions of the largest result, too: the lower, the fewer and larger the parts.
    """

    min_elements: int = 2**15
    shares: tuple[float, ...] = (0.0, 0.1)


FUSION = FusionSettings()


@dataclass(frozen=True)
class LargePart:
    """A part of a graph that can run as a whole, after all that it needs and before all that needs it.

    Attributes:
        nodes: Its nodes.
    """

    nodes: frozenset[Node]

    @property
    def num_operations(self) -> int:
        """Number of its operations."""
        return len(self.nodes)

    @property
    def elements(self) -> int:
        """Number of elements of their results, those of views and matrix products left out."""
        return sum(_size(node) for node in self.nodes if node.target not in PRODUCTS and not _is_view(node))

    @property
    def worth(self) -> int:
        """Elements beyond those that each operation has to have."""
        return self.elements - FUSION.min_elements * self.num_operations


def large_part(graph: GraphModule) -> LargePart | None:
    """The part of a graph that is most worth compiling alone: connected large operations, with all between them.

    Args:
        graph: A graph of operations of ``torch.ops``, as :func:`~pyro_flows.compiled.tracer.trace_operations` makes it.

    Returns:
        None if no such part is worth it, or could run as a whole.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    fusible = [node for node in nodes if node.target not in PRODUCTS and not is_random(node)]
    largest = max(map(_size, fusible), default=0)
    found: set[frozenset[Node]] = set()
    for share in FUSION.shares:
        least = max(FUSION.min_elements, share * largest)
        large = {node for node in fusible if max(map(_size, (node, *node.all_input_nodes))) >= least}
        near = {node: large.intersection((*node.all_input_nodes, *node.users)) for node in nodes if node in large}
        found.update(_with_between(nodes, some) for some in connected(near, near))
    parts = [part for part in map(LargePart, found) if part.worth > 0]
    usable = (part for part in parts if _keeps_order(graph, part.nodes))
    return max(usable, key=lambda part: part.worth, default=None)


def to_fused(graph: GraphModule, part: LargePart, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compile a part of a graph, and have TorchScript run the rest; runs the graph once.

    Args:
        graph: Takes tensors and returns tensors.
        part: The part, as :func:`large_part` finds it.
        inputs: Example inputs, of the shapes and dtypes of all later ones.

    Raises:
        Exception: If torch can't compile the part, or convert the rest.
    """
    nodes = list(graph.graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    (wanted,) = (node.args[0] for node in nodes if node.op == "output")
    calls = [node for node in nodes if node.op == "call_function"]
    places = _places(calls, part.nodes)
    values = dict(zip(given, inputs, strict=True))
    stages: list[tuple[Callable[..., Sequence[Tensor]], list[Node], list[Node]]] = []
    for place, make in enumerate((to_script, to_machine_code, to_script)):
        module, needed, made = _stage([node for node in calls if places[node] == place])
        examples = [values[node] for node in needed]
        values.update(zip(made, module(*examples), strict=True))
        if made:
            stages.append((make(module, examples), needed, made))

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        known = dict(zip(given, inputs, strict=True))
        for compute, needed, made in stages:
            known.update(zip(made, compute(*(known[node] for node in needed)), strict=True))
        return [known[node] for node in wanted]

    return run


def _size(node: Node) -> int:
    """Number of elements of a result; 0 for several tensors."""
    shape = node.meta.get("shape")
    return 0 if shape is None else int(shape.numel())


def _is_view(node: Node) -> bool:
    return bool(getattr(node.target, "is_view", node.target is operator.getitem))


def _with_between(nodes: Sequence[Node], some: Collection[Node]) -> frozenset[Node]:
    """Some nodes and all that are between them. Results of several tensors stay with their items."""
    found, size = set(some), 0
    while len(found) > size:
        size = len(found)
        for node in tuple(found):
            (whole,) = node.all_input_nodes if node.target is operator.getitem else (node,)
            found |= {whole, *(item for item in whole.users if item.target is operator.getitem)}
        after, before = set(found), set(found)
        for node in nodes:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
        for node in reversed(nodes):
            if not before.isdisjoint(node.users):
                before.add(node)
        found = after & before
    return frozenset(found)


def _places(nodes: Sequence[Node], part: Collection[Node]) -> dict[Node, int]:
    """0 for operations that run before the part, 1 for those of the part, 2 for those after it."""
    places: dict[Node, int] = {}
    for node in nodes:
        follows = any(places.get(other) for other in node.all_input_nodes)
        places[node] = 1 if node in part else 2 if follows else 0
    return places


def _keeps_order(graph: GraphModule, part: Collection[Node]) -> bool:
    """Whether operations that draw random numbers, or that use memory which is written to, run in their order."""
    if any(map(is_random, part)):
        return False
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    ordered = [[node for node in nodes if is_random(node)]]
    for shared in written_groups(graph):
        ordered.append([node for node in nodes if node in shared or not shared.isdisjoint(node.all_input_nodes)])
    places = _places(nodes, part)
    return all(places[one] <= places[other] for group in ordered for one, other in pairwise(group))


def _stage(nodes: Sequence[Node]) -> tuple[GraphModule, list[Node], list[Node]]:
    """Some operations as a graph of their own, the nodes that it needs and those that others need of it."""
    inside = set(nodes)
    needed = list(dict.fromkeys(other for node in nodes for other in node.all_input_nodes if other not in inside))
    made = [node for node in nodes if not inside.issuperset(node.users)]
    graph, copies = Graph(), dict[Node, Node]()
    for node in needed:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in made))
    return GraphModule(nn.Module(), graph), needed, made
