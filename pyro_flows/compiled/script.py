# SPDX-License-Identifier: Apache-2.0
"""L1. A graph run by TorchScript's interpreter: no compiler, and half the time that Python takes for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["to_script"]


@torch.no_grad()
def to_script(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The same operations, without Python between them; runs the graph once.

    Args:
        graph: Takes tensors and returns tensors.
        inputs: Like those that it will be given.

    Raises:
        Exception: If torch can't take the graph down.
    """
    with warnings.catch_warnings():
        # torch advises its compiler, which takes a minute for what this does in a second.
        warnings.simplefilter("ignore")
        script: Any = torch.jit.trace(graph, tuple(inputs), check_trace=False)  # type: ignore[no-untyped-call]

    def run(*values: Tensor) -> Sequence[Tensor]:
        with torch.jit.optimized_execution(False):  # type: ignore  # its passes cost more than they save
            found: Sequence[Tensor] = script(*values)
        return found

    return run
