# SPDX-License-Identifier: Apache-2.0
"""L1. Replaying operations on a GPU as one CUDA graph: a single launch, in place of one for each kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["CudaGraph"]


class CudaGraph:
    """A function of tensors whose kernels are captured once, and launched together at each call.

    Inputs that stay in place in memory are read there. Those that move, and those on the CPU, have buffers on the GPU,
    to which each call copies them, unless they are unchanged since the last one. Noise is drawn from the GPU's
    generator, as without capture.

    Args:
        run: Takes tensors and returns tensors; gets all inputs on the GPU. It is called three times.
        inputs: Inputs, at least the first of which is on the GPU.
        moving: Positions of inputs for which later calls may have other tensors, of the same shape.

    Raises:
        RuntimeError: If the function waits for the GPU, as ``nonzero`` does, or for another reason can't be captured.
    """

    def __init__(
        self, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], moving: Sequence[int] = ()
    ) -> None:
        device = inputs[0].device
        places = {*moving, *(place for place, value in enumerate(inputs) if value.device != device)}
        self._buffers = {place: inputs[place].detach().to(device, copy=True) for place in sorted(places)}
        self._copied: dict[int, tuple[Tensor, int]] = {}
        # Kept, since the captured kernels read their memory.
        self._values = [self._buffers.get(place, value) for place, value in enumerate(inputs)]
        before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        try:
            stream.wait_stream(before)
            torch.cuda.set_stream(stream)
            run(*self._values)  # loads kernels and libraries
            with _waiting_refused():
                run(*self._values)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._found = run(*self._values)
        finally:
            torch.cuda.set_stream(before)
        before.wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Results of the function, in memory that the next call overwrites."""
        for place, buffer in self._buffers.items():
            value = inputs[place]
            if self._is_new(place, value):
                buffer.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._found

    def _is_new(self, place: int, value: Tensor) -> bool:
        """Whether an input has to be copied; the version counter of a tensor on the CPU misses changes by NumPy."""
        if not value.is_cuda or value.is_inference():
            return True
        last, version = self._copied.get(place, (None, 0))
        self._copied[place] = value, value._version
        return last is not value or version != value._version


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Raise where the CPU waits for the GPU: a capture that fails leaves torch's generator unusable."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
