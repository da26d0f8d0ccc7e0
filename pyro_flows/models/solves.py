# SPDX-License-Identifier: Apache-2.0
"""L2. Triangular systems under ``torch.vmap`` with one matrix for all draws, as of a normal with a fixed covariance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["SharedSolves", "has_solves"]


class SharedSolves(TorchFunctionMode):
    """Context in which ``torch.linalg.solve_triangular`` does not copy its matrix for each draw.

    ``torch.vmap`` does, where the matrix is the same for all draws: 64 draws of 1600 dimensions take 240 times as long
    as one system with 64 right-hand sides.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.linalg.solve_triangular and len(args) == 2 and set(kwargs) == {"upper"}:
            return _Solve.apply(*args, kwargs["upper"])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def has_solves(sites: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the density of any site of a trace takes a triangular system."""
    return any(_is_normal(site["fn"]) for site in sites)


def _is_normal(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.MultivariateNormal)


class _Solve(torch.autograd.Function):
    """``A^-1 B`` for triangular ``A``, ``(..., N, N)``, and ``B``, ``(..., N, K)``."""

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, upper: bool) -> Tensor:
        return torch.linalg.solve_triangular(matrix, right, upper=upper)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        matrix, _, ctx.upper = inputs
        ctx.save_for_backward(matrix, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        matrix, solution = ctx.saved_tensors
        to_right = _Solve.apply(matrix.mT, gradient, not ctx.upper)  # type: ignore[no-untyped-call]
        if not ctx.needs_input_grad[0] or not _is_on_the_way(ctx.next_functions[0][0]):
            return None, to_right, None
        to_matrix = -(to_right @ solution.mT)
        to_matrix = to_matrix.triu() if ctx.upper else to_matrix.tril()
        return to_matrix.sum_to_size(matrix.shape), to_right, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, right: Tensor, upper: bool) -> tuple[Tensor, int]:
        of_matrix, of_right, _ = in_dims
        if of_matrix is None:  # draws are further right-hand sides
            columns = right.movedim(of_right, -1)
            found = _Solve.apply(matrix, columns.flatten(-2), upper)  # type: ignore[no-untyped-call]
            return found.unflatten(-1, columns.shape[-2:]), found.dim()
        dim = max(matrix.dim() - 1, right.dim() - (of_right is not None))
        matrix = matrix.movedim(of_matrix, 0)
        right = right.unsqueeze(0) if of_right is None else right.movedim(of_right, 0)
        matrix, right = (
            value.reshape(value.shape[0], *(1,) * (dim + 1 - value.dim()), *value.shape[1:])
            for value in (matrix, right)
        )
        return _Solve.apply(matrix, right, upper), 0  # type: ignore[no-untyped-call]


def _is_on_the_way(node: Any) -> bool:
    """Whether the backward pass that is running goes on to a node, as torch's own operations ask."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it cannot tell of a leaf
        return True
