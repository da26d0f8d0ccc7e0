# SPDX-License-Identifier: Apache-2.0
"""L1. Tracing a function of tensors into the graph of its operations, gradients included."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_flows._recording import recording

__all__ = ["OperationTracer", "trace_operations"]

aten = torch.ops.aten
# Marks of nodes: constants, which depend only on numbers in the code, and tensors that the code holds.
CONSTANT, HELD = "constant", "held"


class OperationTracer(TorchDispatchMode):
    """Appends each torch operation within this context to a graph.

    As ``torch.fx.experimental.proxy_tensor.make_fx`` does, but in a sixth of the time, since that keeps a fake of each
    tensor. Views that do not change a tensor's shape, strides, offset or dtype are left out.

    Args:
        graph: The graph to append to.

    Attributes:
        captured: Tensors that the code reads from elsewhere than its inputs; each is a placeholder, after the inputs'.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.captured: list[Tensor] = []
        self._nodes = WeakTensorKeyDictionary()  # a step's tensors may not all fit into memory
        self._last_placeholder: Node | None = None

    def placeholder(self, name: str) -> Node:
        """Add an input to the graph."""
        if self._last_placeholder is None:
            self._last_placeholder = self.graph.placeholder(name)
        else:
            with self.graph.inserting_after(self._last_placeholder):
                self._last_placeholder = self.graph.placeholder(name)
        return self._last_placeholder

    def identify(self, tensor: Tensor, node: Node) -> None:
        """Register a tensor as the value of a node."""
        self._nodes[tensor] = node

    def node_of(self, value: Any) -> Any:
        """Replace a tensor, or the tensors in lists and tuples, by their nodes; other values are unchanged."""
        if isinstance(value, Tensor):
            node = self._nodes.get(value)
            if node is None:
                node = self.placeholder(f"captured_{len(self.captured)}")
                node.meta[HELD] = True
                self.captured.append(value.detach())
                self._nodes[value] = node
            return node
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.node_of, value))
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            self._check_readable((*args, *kwargs.values()))
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        if func is aten._linalg_check_errors.default:
            self._refuse_by_nan(args[0])
            return found
        if func is aten.lift_fresh.default:
            node = self.graph.call_function(aten.lift_fresh_copy.default, (self.node_of(args[0]),))
            node.meta[CONSTANT] = True
        elif func.is_view and isinstance(found, Tensor) and _is_same_view(found, args[0]):
            node = self.node_of(args[0])
        else:
            options = {name: self.node_of(value) for name, value in kwargs.items()}
            node = self.graph.call_function(func, self.node_of(tuple(args)), options)
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            is_constant = all(other.meta.get(CONSTANT) for other in node.all_input_nodes)
            node.meta[CONSTANT] = is_constant and not is_random
        self._identify_all(found, node)
        return found

    def _identify_all(self, found: Any, node: Node) -> None:
        """Register all tensors of an operation's result as values of a node and its items."""
        if isinstance(found, Tensor):
            node.meta["numel"] = found.numel()
            self._nodes[found] = node
        elif isinstance(found, (list, tuple)):
            for index, part in enumerate(found):
                if part is not None:
                    item = self.graph.call_function(operator.getitem, (node, index))
                    item.meta[CONSTANT] = node.meta[CONSTANT]
                    self._identify_all(part, item)

    def _refuse_by_nan(self, info: Tensor) -> None:
        """Set results to NaN for matrices at which an algorithm fails, where eager code raises for the whole batch.

        Args:
            info: The algorithm's status for each matrix, ``batch_shape``; not zero where it failed.
        """
        known = self.node_of(info)
        has_failed = self.graph.call_function(aten.ne.Scalar, (known, 0))
        for tensor, node in list(self._nodes.items()):
            if node.target is operator.getitem and node.args[0] is known.args[0] and tensor.is_floating_point():
                shape = (*info.shape, *(1,) * (tensor.dim() - info.dim()))
                refused = self.graph.call_function(aten.view.default, (has_failed, list(shape)))
                self._nodes[tensor] = self.graph.call_function(aten.where.ScalarSelf, (refused, math.nan, node))

    def _check_readable(self, values: Iterable[Any]) -> None:
        """Refuse to let Python read computed values; :mod:`pyro_flows._blame` turns the error into a message.

        Raises:
            RuntimeError: If one of the values is a tensor that a call of the graph would compute.
        """
        for value in values:
            node = self._nodes.get(value) if isinstance(value, Tensor) else None
            if node is not None and not (node.meta.get(CONSTANT) or node.meta.get(HELD)):
                raise RuntimeError(".item() on a Tensor that is being recorded")


def _is_same_view(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.dtype == other.dtype
    )


def trace_operations(
    function: Callable[..., Iterable[Tensor]], inputs: Sequence[Tensor], parts: Sequence[Tensor] = ()
) -> tuple[GraphModule, list[Tensor]]:
    """Run a function once, and return its operations as a graph.

    Args:
        function: Takes tensors and returns tensors.
        inputs: Inputs to run it with, which become the graph's placeholders.
        parts: Tensors that the function reads from elsewhere and that the graph takes from its first input, a vector,
            of which they are consecutive parts.

    Returns:
        The graph, and the tensors that are its further inputs: those that the function reads from elsewhere.

    Raises:
        RuntimeError: If Python reads a value that the function computed.
        Exception: Any exception that the function raises.
    """
    graph = Graph()
    tracer = OperationTracer(graph)
    for index, value in enumerate(inputs):
        tracer.identify(value, tracer.placeholder(f"input_{index}"))
    if parts:
        first = next(iter(graph.nodes))
        split = graph.call_function(aten.split_with_sizes.default, (first, [part.numel() for part in parts]))
        for index, part in enumerate(parts):
            piece = graph.call_function(operator.getitem, (split, index))
            tracer.identify(part, graph.call_function(aten.view.default, (piece, list(part.shape))))
    with recording(), tracer:
        found = tuple(function(*inputs))
    graph.output(tracer.node_of(found))
    graph.eliminate_dead_code()
    graph.lint()
    return GraphModule(torch.nn.Module(), graph), tracer.captured
