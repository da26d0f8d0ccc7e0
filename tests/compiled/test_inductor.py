# SPDX-License-Identifier: Apache-2.0
"""What a graph is before torch's compiler gets it; what that makes of it is tested in test_svi.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_flows.compiled import inductor
from pyro_flows.compiled.inductor import COMPILER, _unfuse, _with_sums, to_machine_code
from pyro_flows.compiled.tracer import trace_operations
from tests.devices.pretended import pretended_gpu


def test_sums_are_taken_out_of_small_products_alone() -> None:
    def function(small: Tensor, large: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.addmm(small, small, factor),
            torch.addmm(large, large, factor),
            torch.addmm(small, small, factor, beta=2),
        )

    values = torch.randn(16, 8), torch.randn(COMPILER.max_unfused, 8), torch.randn(8, 8)
    graph = trace_operations(function, values).graph
    expected = function(*values)
    _unfuse(graph)
    assert all(torch.allclose(*pair) for pair in zip(graph(*values), expected, strict=True))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.mm.default) == 1
    assert targets.count(torch.ops.aten.addmm.default) == 2


def test_small_products_are_sums_on_a_gpu() -> None:
    def function(one: Tensor, other: Tensor, batch: Tensor, large: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = one + 1, other + 1, batch + 1, large + 1  # not the inputs, whose sizes a graph does not know
        return a @ b, torch.addmm(b[:1], a, b), c @ c.mT, torch.baddbmm(c[:, :, :1], c, c.mT), d.T @ d

    values = torch.randn(4, 5), torch.randn(5, 3), torch.randn(2, 3, 4), torch.randn(COMPILER.max_summed // 4, 8)
    graph = trace_operations(function, values).graph
    made = _with_sums(graph)
    for one, other in zip(made(*values), function(*values), strict=True):
        torch.testing.assert_close(one, other)
    products = [node for node in made.graph.nodes if "mm" in str(node.target)]
    assert len(products) == 1 and sum("mm" in str(node.target) for node in graph.graph.nodes) == 5


def test_solvers_read_their_own_matrices_alone() -> None:
    """Where a dimension of batches has size 1, compiled code ended in a segmentation fault."""

    def function(root: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, ...]:
        root = root.detach().requires_grad_()
        matrix = root @ root.mT + torch.eye(64)
        total = torch.linalg.solve(matrix, right).sum() + torch.linalg.solve(matrix, left, left=False).sum()
        return total.detach(), *torch.autograd.grad(total, root)

    values = torch.randn(116, 1, 64, 64), torch.randn(116, 1, 64, 1), torch.randn(116, 1, 2, 64)
    graph, captured, _ = trace_operations(function, values)
    made = to_machine_code(graph, [*values, *captured])
    for one, other in zip(made(*values, *captured), function(*values), strict=True):
        torch.testing.assert_close(one, other)


def test_kernels_that_cannot_be_combined_are_compiled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that sort in torch 2.11, on a GPU, which is only pretended."""

    def compile_apart(graph: Any, inputs: list[Any], options: dict[str, Any]) -> Any:
        if options["combo_kernels"]:
            raise AssertionError("ops.sort is only supported in persistent reductions")
        return graph

    monkeypatch.setattr(inductor, "_inductor", compile_apart)
    values = torch.rand(8, 3)
    graph = trace_operations(lambda x: (x.argsort(0),), [values]).graph
    with pretended_gpu(monkeypatch):
        run = to_machine_code(graph, [values.to("cuda")])
    assert torch.equal(run(values)[0], values.argsort(0))
