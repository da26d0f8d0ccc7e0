# SPDX-License-Identifier: Apache-2.0
"""What a graph is before torch's compiler gets it; what that makes of it is tested in test_svi.py."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.compiled.inductor import COMPILER, _unfuse
from pyro_flows.compiled.tracer import trace_operations


def test_sums_are_taken_out_of_small_products_alone() -> None:
    def function(small: Tensor, large: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.addmm(small, small, factor),
            torch.addmm(large, large, factor),
            torch.addmm(small, small, factor, beta=2),
        )

    values = torch.randn(16, 8), torch.randn(COMPILER.max_unfused, 8), torch.randn(8, 8)
    graph = trace_operations(function, values)[0]
    expected = function(*values)
    _unfuse(graph)
    assert all(torch.allclose(*pair) for pair in zip(graph(*values), expected, strict=True))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.mm.default) == 1
    assert targets.count(torch.ops.aten.addmm.default) == 2
