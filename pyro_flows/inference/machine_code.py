# SPDX-License-Identifier: Apache-2.0
"""L4. From a graph of tensor operations to machine code, by torch's inductor."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = ["to_machine_code"]

# What inductor is told. Noise comes from torch's own generator. On a CPU, the kernels are called from C++: in Python,
# that would take as long as they do. The rest saves time of compiling: the instruction set that the processor says it
# has is not tried out; calls are compiled apart from the kernels, and less hard; headers are not compiled for another
# time; and what is left over at the end of a loop has no code with masks, which is no faster either.
GPU_OPTIONS: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": True}
CPU_OPTIONS: dict[str, Any] = {
    "fallback_random": True,
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "cpp.vec_isa_ok": True,
    "cpp_cache_precompile_headers": False,
    "cpp.enable_loop_tail_vec": False,
    "aot_inductor.enable_line_tables": False,
}


def to_machine_code(graph: GraphModule, inputs: list[Any]) -> Callable[..., Sequence[Tensor]]:
    """The graph as a function of inputs like these, from inductor's cache if that has it."""
    for node in graph.graph.nodes:  # of the recording's own fake tensors, which are not those below
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    options = GPU_OPTIONS if inputs[0].is_cuda else CPU_OPTIONS
    with _quiet(), _without_collector():
        try:
            return _inductor(graph, inputs, options)
        except Exception:  # perhaps of a compiler that is older than the processor
            if inputs[0].is_cuda:
                raise
            return _inductor(graph, inputs, {**options, "cpp.vec_isa_ok": None})


def _inductor(graph: GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Sequence[Tensor]]:
    known = torch._inductor.list_options()  # another version of torch may have others
    options = {name: value for name, value in options.items() if name in known}
    fake = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(fake)):  # without which inductor does not look into its cache
        shapes: list[Any] = [fake.from_tensor(value, static_shapes=True) for value in inputs]
        run: Callable[..., Sequence[Tensor]] = torch._inductor.compile(graph, shapes, options=options)
    return run


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
def _without_collector() -> Iterator[None]:
    """Without Python's garbage collector, which a compiler's millions of objects keep busy for a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
