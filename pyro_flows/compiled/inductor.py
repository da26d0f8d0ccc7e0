# SPDX-License-Identifier: Apache-2.0
"""L1. Compilation of a graph of tensor operations by torch's inductor."""

from __future__ import annotations

import contextvars
import copy
import gc
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pyro_flows.compiled.combined import combined_late

__all__ = ["to_machine_code", "without_collector"]

aten = torch.ops.aten

# Inductor's options. Noise comes from torch's own generator. On a GPU, kernels that do not need each other's results
# are combined into one, which halves the time of a small step; they are launched by CudaGraph. On
# a CPU, kernels are called from C++, since calls from Python would take as long as the kernels; they share one memory
# pool; and no patterns fuse sums and products again, see below. The rest saves compile time: the instruction set that
# the processor reports is not tested; calls are compiled apart from the kernels, with less optimization; headers are
# not precompiled; and the remainder of a loop has no masked code, which is no faster either.
GPU_OPTIONS: dict[str, Any] = {"fallback_random": True, "combo_kernels": True}
CPU_OPTIONS: dict[str, Any] = {
    "fallback_random": True,
    "cpp_wrapper": True,
    "memory_planning": True,
    "memory_pool": "combined",
    "pattern_matcher": False,
    "cpp_wrapper_build_separate": True,
    "cpp.vec_isa_ok": True,
    "cpp_cache_precompile_headers": False,
    "cpp.enable_loop_tail_vec": False,
    "aot_inductor.enable_line_tables": False,
}


@dataclass(frozen=True)
class CompilerSettings:
    """Changes to a graph before it is compiled.

    Attributes:
        max_unfused: Number of elements of a matrix product up to which a sum with it is an operation of its own; for
            larger products, that costs a pass through memory.
        max_summed: Number of multiplications of a matrix product up to which a GPU takes it as a sum of products, which
            the compiler fuses with its neighbours: a small step takes as long as it has kernels.
    """

    max_unfused: int = 4096
    max_summed: int = 2**20


COMPILER = CompilerSettings()
# Inductor's options and the garbage collector belong to all threads, so that these compile one at a time.
ONE_AT_A_TIME = threading.RLock()


def to_machine_code(graph: GraphModule, inputs: list[Any]) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph for inputs of these shapes and dtypes; uses inductor's cache."""
    is_cuda = inputs[0].is_cuda
    _flatten_batches(graph)
    if is_cuda:  # numbers that the model keeps on the CPU, and learning rates; see CudaGraph
        inputs = [value.to(inputs[0].device) for value in inputs]
        graph = _with_sums(graph)
    else:
        _unfuse(graph)
    options = GPU_OPTIONS if is_cuda else CPU_OPTIONS
    # Where that fails: torch 2.11 can't combine kernels that sort, as stratified noise does; and perhaps the
    # compiler is older than the processor.
    careful = {"combo_kernels": False} if is_cuda else {"cpp.vec_isa_ok": None}
    with ONE_AT_A_TIME, _quiet(), without_collector():
        try:
            return _inductor(graph, inputs, options)
        except Exception:
            return _inductor(graph, inputs, {**options, **careful})


def _inductor(graph: GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Sequence[Tensor]]:
    known = torch._inductor.list_options()  # another version of torch may have others
    options = {name: value for name, value in options.items() if name in known}
    fake = FakeTensorMode(shape_env=ShapeEnv())
    # A context of tracing, without which inductor does not look into its cache.
    with combined_late(), tracing(TracingContext(fake)), torch._inductor.config.patch(options):
        if not inputs[0].is_cuda:
            # Inductor tests the processor's instruction sets in other processes; the graph is traced meanwhile.
            trial = contextvars.copy_context()
            threading.Thread(target=trial.run, args=(_instructions,), daemon=True).start()
        shapes: list[Any] = [fake.from_tensor(value, static_shapes=True) for value in inputs]
        run: Callable[..., Sequence[Tensor]] = torch._inductor.compile(graph, shapes)
    return run


def _instructions() -> None:
    """Have inductor look up the processor's vector instructions, and cache them."""
    with suppress(Exception):  # inductor will raise it again when it needs them
        importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()


def _unfuse(graph: GraphModule) -> None:
    """Split ``addmm`` and ``baddbmm`` into a product and a sum: torch's kernels copy the summand, while the compiler
    fuses the sum with the operations that follow."""
    products = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
    for node in list(graph.graph.nodes):
        product = products.get(node.target)
        if product is not None and not node.kwargs and node.meta["shape"].numel() <= COMPILER.max_unfused:
            with graph.graph.inserting_before(node):
                given, *factors = node.args
                total = graph.graph.call_function(
                    aten.add.Tensor, (given, graph.graph.call_function(product, tuple(factors)))
                )
            node.replace_all_uses_with(total)
            graph.graph.erase_node(node)
    graph.recompile()


def _flatten_batches(graph: GraphModule) -> None:
    """Give the solvers by a factorization and its pivots one dimension of batches.

    Torch's kernels step from matrix to matrix by the stride of the last such dimension. In memory that the compiler
    lays out, that stride is any number if the dimension has size 1, and the kernels read memory of others.
    """
    call = graph.graph.call_function
    for node in list(graph.graph.nodes):
        if node.target not in WITH_PIVOTS or len(batch := node.meta["shape"][:-2]) < 2:
            continue
        event = node.meta["shape"][-2:]
        n = event[-2 if node.kwargs.get("left", True) else -1]
        with graph.graph.inserting_before(node):
            args = [
                call(aten.reshape.default, (call(aten.expand.default, (arg, [*batch, *end])), [batch.numel(), *end]))
                for arg, end in zip(node.args[:3], ((n, n), (n,), event), strict=True)
            ]
            flat = call(node.target, tuple(args), node.kwargs)
            solution = call(aten.reshape.default, (flat, [*batch, *event]))
        solution.meta.update(node.meta)
        node.replace_all_uses_with(solution)
        graph.graph.erase_node(node)
    graph.recompile()


def _with_sums(graph: GraphModule) -> GraphModule:
    """A copy of a graph whose small matrix products are sums of products."""
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in list(graph.graph.nodes):
        if node.target not in PRODUCTS or node.kwargs:
            continue
        one, other = node.args[-2:]
        shapes = [part.meta.get("shape") for part in (one, other)]
        if None in shapes or shapes[0].numel() * shapes[1][-1] > COMPILER.max_summed:
            continue
        with graph.graph.inserting_before(node):
            total = _sum_of_products(graph.graph.call_function, one, other, len(shapes[0]) - 1)
            if len(node.args) == 3:
                total = graph.graph.call_function(aten.add.Tensor, (node.args[0], total))
        node.replace_all_uses_with(total)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _sum_of_products(call: Any, one: Node, other: Node, last: int) -> Node:
    """``(..., m, k)`` times ``(..., k, n)``; ``last`` is the dimension of ``k``."""
    left, right = call(aten.unsqueeze.default, (one, -1)), call(aten.unsqueeze.default, (other, -3))
    found: Node = call(aten.sum.dim_IntList, (call(aten.mul.Tensor, (left, right)), [last]))
    return found


WITH_PIVOTS = {aten.linalg_lu_solve.default, aten.linalg_ldl_solve.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings and log entries, which are about torch's internals."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable Python's garbage collector, which the compiler's many objects keep busy for a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
