# SPDX-License-Identifier: Apache-2.0
"""L1. Tracing a function of tensors into the graph of its operations, gradients included."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_flows._recording import recording
from pyro_flows.compiled.known import ADDRESS, WRITES, KnownValues, Read

__all__ = ["LEARNED", "OperationTracer", "Recording", "trace_operations"]

aten = torch.ops.aten
# Marks of nodes that Python may read: constants, which depend only on numbers in the code; and what follows from data,
# from tensors that the code holds, and from constants.
CONSTANT, KNOWN = "constant", "known"
# Mark of captured tensors that require gradients, such as parameters: training changes them.
LEARNED = "learned"


class Recording(NamedTuple):
    """A function as a graph of its operations.

    Attributes:
        graph: The graph.
        captured: Tensors that are its last inputs: those that the function reads from elsewhere.
        known: Values of data and of captured tensors that Python read, which are fixed in the graph.
    """

    graph: GraphModule
    captured: list[Tensor]
    known: KnownValues


class OperationTracer(TorchDispatchMode):
    """Appends each torch operation within this context to a graph.

    As ``torch.fx.experimental.proxy_tensor.make_fx`` does, but in a sixth of the time, since that keeps a fake of each
    tensor. Views that change no shape, stride, offset, dtype or sign are left out.

    Python may read values that follow from data, from tensors that the code holds, and from numbers in it, such as
    ``int(group.max())``.

    Args:
        graph: The graph to append to.

    Attributes:
        captured: Tensors that the code reads from elsewhere than its inputs; each is a placeholder, after the inputs'.
        reads: What Python read of known values.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.captured: list[Tensor] = []
        self.reads: list[Read] = []
        self._sharing: dict[int, list[Node]] = {}  # nodes that Python may read, by the address of their memory
        self._outside: set[int] = set()  # addresses of the memory of inputs and of captured tensors
        self._lost: set[int] = set()  # addresses of memory of which not all is known any more
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

    def identify(self, tensor: Tensor, node: Node, *, is_known: bool = False) -> None:
        """Register a tensor from outside as the value of a node, whose values Python may read if they are known."""
        node.meta[KNOWN] = is_known
        self._outside.add(_address(tensor))
        self._register(tensor, node)

    def _register(self, tensor: Tensor, node: Node) -> None:
        self._nodes[tensor] = node
        if node.meta.get(KNOWN):
            node.meta.setdefault(ADDRESS, set()).add(_address(tensor))
            self._sharing.setdefault(_address(tensor), []).append(node)

    def _capture(self, value: Tensor) -> Node:
        """Add an input that the code reads from elsewhere."""
        node = self.placeholder(f"captured_{len(self.captured)}")
        node.meta[LEARNED] = value.requires_grad
        self.captured.append(value)
        return node

    def node_of(self, value: Any) -> Any:
        """Replace a tensor, or the tensors in lists and tuples, by their nodes; other values are unchanged."""
        if isinstance(value, Tensor):
            node = self._nodes.get(value)
            if node is None:
                node = self._capture(value)
                # Another name of memory that was written meanwhile has not the value that it has at the next call.
                self.identify(value, node, is_known=_address(value) not in self._lost)
            return node
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.node_of, value))
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            value = func(*args, **kwargs)
            # Distributions that were made while Pyro validated check their values even now. They go on if these are
            # right; where they are not, the density says so.
            if not (value is True and self._checks(args[0])):
                self.read(func, args, value)
            return value
        found = func(*args, **kwargs)
        if func is aten._linalg_check_errors.default:
            self._refuse_by_nan(args[0])
            return found
        if func is aten.lift_fresh.default:
            literal = self._capture(args[0].clone())  # the code may write into its own
            node = self.graph.call_function(aten.lift_fresh_copy.default, (literal,))
            node.meta[CONSTANT] = node.meta[KNOWN] = _address(args[0]) not in self._lost
        elif func.is_view and isinstance(found, Tensor) and _is_same_view(found, args[0]):
            node = self.node_of(args[0])
        else:
            options = {name: self.node_of(value) for name, value in kwargs.items()}
            node = self.graph.call_function(func, self.node_of(tuple(args)), options)
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            if is_random and any(isinstance(value, torch.Generator) for value in kwargs.values()):
                raise RuntimeError("it draws from a generator of its own; pass what it draws as an argument")
            for mark in (CONSTANT, KNOWN):
                node.meta[mark] = not is_random and all(other.meta.get(mark) for other in node.all_input_nodes)
            if written := list(_written(func, args, kwargs)):
                self._write(written, node)
            elif not func.is_view:
                self._forget_memory(found, args)
        self._identify_all(found, node)
        if func in (aten.index.Tensor, aten.masked_select.default):
            indices = args[1] if func is aten.index.Tensor else args[1:]
            for mask in (index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)):
                self.read(_count, (mask,), _count(mask))
        elif torch.Tag.dynamic_output_shape in func.tags:
            for tensor in [found] if isinstance(found, Tensor) else found:
                self.read(_shape, (tensor,), tensor.shape)
        elif func is aten._pack_padded_sequence.default:  # reads the lengths behind torch's back
            self.read(_contents, (args[1],), _contents(args[1]))
        return found

    def read(self, function: Callable[..., Any], args: Sequence[Any], value: Any) -> None:
        """Note that Python has read a value.

        Raises:
            RuntimeError: If each call of the graph computes it anew; :mod:`pyro_flows._blame` makes a message of it.
        """
        nodes = self.node_of(tuple(args))
        tensors = [node for node in nodes if isinstance(node, Node)]
        if all(node.meta.get(CONSTANT) for node in tensors):
            return
        if not all(node.meta.get(KNOWN) for node in tensors):
            raise RuntimeError(".item() on a Tensor that is being recorded")
        self.reads.append(Read(function, nodes, value, next(reversed(self.graph.nodes))))

    def _checks(self, value: Any) -> bool:
        """Whether a value is the outcome of a distribution's validation, which alone asks in this way."""
        node = self._nodes.get(value) if isinstance(value, Tensor) else None
        return node is not None and node.target is aten._is_all_true.default

    def _write(self, written: Sequence[Tensor], node: Node) -> None:
        """Tensors whose memory an operation writes into are known only if what it writes is, and if the memory is not
        from outside, where the next call of the graph finds what is written now; and constant only if that is."""
        addresses = set(map(_address, written))
        node.meta[KNOWN] = node.meta[WRITES] = node.meta[KNOWN] and addresses.isdisjoint(self._outside | self._lost)
        node.meta[ADDRESS] = addresses
        if not node.meta[KNOWN]:
            self._lost |= addresses
        for address in addresses:
            for other in self._sharing.get(address, ()):
                for mark in (CONSTANT, KNOWN):
                    other.meta[mark] = other.meta.get(mark, False) and node.meta[mark]

    def _forget_memory(self, found: Any, args: Sequence[Any]) -> None:
        """Memory of a result that is not an argument's is new, whatever was at its address before."""
        tensors = [found] if isinstance(found, Tensor) else found if isinstance(found, (list, tuple)) else []
        for address in {_address(tensor) for tensor in tensors if isinstance(tensor, Tensor)}:
            if all(address != _address(value) for value in args if isinstance(value, Tensor)):
                self._lost.discard(address)
                self._sharing.pop(address, None)

    def _identify_all(self, found: Any, node: Node) -> None:
        """Register all tensors of an operation's result as values of a node and its items."""
        if isinstance(found, Tensor):
            node.meta["shape"] = found.shape
            self._register(found, node)
        elif isinstance(found, (list, tuple)):
            for index, part in enumerate(found):
                if part is not None:
                    item = self.graph.call_function(operator.getitem, (node, index))
                    item.meta.update({mark: node.meta.get(mark, False) for mark in (CONSTANT, KNOWN)})
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


class _DirectReads(TorchFunctionMode):
    """Notes reads of a tensor's memory that are no operations."""

    def __init__(self, tracer: OperationTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            self._tracer.read(_contents, (args[0].detach(),), _contents(args[0]))
        return func(*args, **(kwargs or {}))


def _is_same_view(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.dtype == other.dtype
        and one.is_conj() == other.is_conj()
        and one.is_neg() == other.is_neg()
    )


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory, which is that of a NumPy array that shares it; 0 where it has none."""
    with suppress(NotImplementedError, RuntimeError):  # a sparse one
        return tensor.untyped_storage().data_ptr()
    return 0


def _contents(tensor: Tensor) -> bytes:
    with torch.utils._python_dispatch._disable_current_modes():
        return tensor.detach().resolve_conj().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _shape(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _count(mask: Tensor) -> int:
    with torch.utils._python_dispatch._disable_current_modes():
        return int(mask.count_nonzero())


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Tensors among an operation's arguments into which it writes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (part for part in (value if isinstance(value, (list, tuple)) else [value]) if part is not None)


def trace_operations(
    function: Callable[..., Iterable[Tensor]],
    inputs: Sequence[Tensor],
    parts: Sequence[Tensor] = (),
    data: Sequence[Tensor] = (),
) -> Recording:
    """Run a function once, and return its operations as a graph.

    Args:
        function: Takes tensors and returns tensors.
        inputs: Inputs to run it with, which become the graph's placeholders.
        parts: Tensors that the function reads from elsewhere and that the graph takes from its first input, a vector,
            of which they are consecutive parts.
        data: Further inputs, the values of which Python may read.

    Raises:
        RuntimeError: If Python reads a value that the function computed from ``inputs`` or at random.
        Exception: Any exception that the function raises.
    """
    graph = Graph()
    tracer = OperationTracer(graph)
    for index, value in enumerate([*inputs, *data]):
        tracer.identify(value, tracer.placeholder(f"input_{index}"), is_known=index >= len(inputs))
    if parts:
        first = next(iter(graph.nodes))
        split = graph.call_function(aten.split_with_sizes.default, (first, [part.numel() for part in parts]))
        for index, part in enumerate(parts):
            piece = graph.call_function(operator.getitem, (split, index))
            tracer.identify(part, graph.call_function(aten.view.default, (piece, list(part.shape))))
    with recording(), tracer, _DirectReads(tracer):
        found = tuple(function(*inputs, *data))
    known = KnownValues(graph, tracer.reads)
    graph.output(tracer.node_of(found))
    graph.eliminate_dead_code()
    graph.lint()
    captured = [value.detach() for value in tracer.captured]  # not within, where it would not share counts of changes
    return Recording(GraphModule(torch.nn.Module(), graph), captured, known)
