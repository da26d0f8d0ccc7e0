# SPDX-License-Identifier: Apache-2.0
"""L1. From a graph of tensor operations to machine code, by torch's inductor."""

from __future__ import annotations

import contextvars
import gc
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = ["to_machine_code", "without_collector"]

# What inductor is told. Noise comes from torch's own generator. On a CPU, the kernels are called from C++: in Python,
# that would take as long as they do; they share one piece of memory; and no patterns put sums and products together
# again, see below. The rest saves time of compiling: the instruction set that the processor says it has is not tried
# out; calls are compiled apart from the kernels, and less hard; headers are not compiled for another time; and what is
# left over at the end of a loop has no code with masks, which is no faster either.
GPU_OPTIONS: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": True}
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
    """What is changed about a graph before it is compiled.

    Attributes:
        max_unfused: Numbers in the result of a product up to which what is added to it is a sum of its own; of larger
            ones, that costs a pass through memory.
    """

    max_unfused: int = 4096


COMPILER = CompilerSettings()
# What is replaced in inductor meanwhile is so for all threads.
ONE_AT_A_TIME = threading.RLock()


def to_machine_code(graph: GraphModule, inputs: list[Any]) -> Callable[..., Sequence[Tensor]]:
    """The graph as a function of inputs like these, from inductor's cache if that has it."""
    is_cuda = inputs[0].is_cuda
    if not is_cuda:
        _unfuse(graph)
    options = GPU_OPTIONS if is_cuda else CPU_OPTIONS
    with ONE_AT_A_TIME, _quiet(), without_collector(), ExitStack() as patched:
        for patch in PATCHES:
            patched.enter_context(patch.applied())
        try:
            return _inductor(graph, inputs, options)
        except Exception:  # perhaps of a compiler that is older than the processor
            if is_cuda:
                raise
            return _inductor(graph, inputs, {**options, "cpp.vec_isa_ok": None})


def _inductor(graph: GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Sequence[Tensor]]:
    known = torch._inductor.list_options()  # another version of torch may have others
    options = {name: value for name, value in options.items() if name in known}
    fake = FakeTensorMode(shape_env=ShapeEnv())
    # A context of tracing, without which inductor does not look into its cache.
    with tracing(TracingContext(fake)), torch._inductor.config.patch(options):
        if not inputs[0].is_cuda:
            # Inductor tries out what the processor knows, in other processes: meanwhile, there is a graph to trace.
            trial = contextvars.copy_context()
            threading.Thread(target=trial.run, args=(_instructions,), daemon=True).start()
        shapes: list[Any] = [fake.from_tensor(value, static_shapes=True) for value in inputs]
        run: Callable[..., Sequence[Tensor]] = torch._inductor.compile(graph, shapes)
    return run


def _instructions() -> None:
    """Have inductor look for instructions on vectors, and remember them."""
    with suppress(Exception):  # of which inductor will hear when it needs them
        importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()


def _unfuse(graph: GraphModule) -> None:
    """Take sums out of products: torch copies what is added, where a compiler adds as it goes on with the result."""
    aten = torch.ops.aten
    products = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
    for node in list(graph.graph.nodes):
        product = products.get(node.target)
        if product is not None and not node.kwargs and node.meta["numel"] <= COMPILER.max_unfused:
            with graph.graph.inserting_before(node):
                given, *factors = node.args
                total = graph.graph.call_function(
                    aten.add.Tensor, (given, graph.graph.call_function(product, tuple(factors)))
                )
            node.replace_all_uses_with(total)
            graph.graph.erase_node(node)
    graph.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings and log entries, which are about torch."""
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
    """Without Python's garbage collector, which a compiler's millions of objects keep busy for a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _side_by_side(build_all: Callable[..., None]) -> Callable[..., None]:
    """Builds the parts of a C++ library at the same time, and then links them; torch builds one after the other."""

    def build(lock_path: str, builders: Any, *others: Any) -> None:
        if others or not isinstance(builders, Sequence):  # as another version of torch calls it
            return build_all(lock_path, builders, *others)
        *parts, library = builders
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            jobs = [pool.submit(build_all, f"{lock_path}.{index}", [part]) for index, part in enumerate(parts)]
        for job in jobs:
            job.result()
        return build_all(lock_path, [library])

    return build


def _where_needed(simplify: Callable[..., Any]) -> Callable[..., Any]:
    """Simplifies an index for an analysis only where there is something to simplify: divisions."""
    functions = importlib.import_module("torch.utils._sympy.functions")

    def simplified(index: Any, *others: Any) -> Any:
        return simplify(index, *others) if index.has(functions.FloorDiv, functions.ModularIndexing) else index

    return simplified


@dataclass(frozen=True)
class Patch:
    """A function of inductor's that is replaced while a graph is compiled, if this version of torch has it.

    docs/speed.rst has what each one saves. They are for inductor of torch 2.13 to 2.15.

    Attributes:
        module: Where the function lives, below ``torch._inductor``.
        name: The function.
        replacement: Makes the replacement of the original.
    """

    module: str
    name: str
    replacement: Callable[[Any], Any]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """With the function replaced."""
        place = importlib.import_module(f"torch._inductor.{self.module}")
        original = getattr(place, self.name, None)
        if original is None:
            yield
            return
        setattr(place, self.name, self.replacement(original))
        try:
            yield
        finally:
            setattr(place, self.name, original)


PATCHES = (
    Patch("codecache", "_worker_compile_cpp", _side_by_side),
    Patch("sizevars", "simplify_index_in_vec_range", _where_needed),
)
