# SPDX-License-Identifier: Apache-2.0
"""Repeated operations are merged; random ones, and those on memory that is written to, are not. Unused ones are
dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pyro_flows.compiled.simplify import drop_unused, merge_repeated
from pyro_flows.compiled.tracer import trace_operations


def loop(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """A random walk as a loop: each term computes its scale's logarithm and square anew."""
    leaf = scale.detach().requires_grad_()
    with torch.enable_grad():
        loss = torch.zeros(())
        for before, after in pairwise(x):
            loss = loss + (after - before).square() / (2.0 * leaf.exp() ** 2) + leaf.exp().log()
        return loss.detach(), *torch.autograd.grad(loss, leaf)


def noisy(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return x + torch.randn(3) * scale, x + torch.randn(3) * scale


def written(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Sums before and after a write, directly and through a view; buffers that are equal until then."""
    one, other = torch.zeros(3), torch.zeros(3)
    held = x * scale
    row = held.view(1, 3)
    before = held.sum(), row.sum()
    held.add_(1.0)
    one.copy_(x)
    return *before, held.sum(), row.sum(), one, other


def operations(function: Callable[..., Sequence[Tensor]]) -> tuple[int, int]:
    """Numbers of operations before and after; checks that results are the same, on other inputs too."""
    inputs = torch.arange(3.0), torch.tensor(0.3)
    graph, captured, _ = trace_operations(function, inputs)
    count = sum(node.op == "call_function" for node in graph.graph.nodes)
    merge_repeated(graph)
    for given in (inputs, (torch.tensor([0.1, -2.0, 0.7]), torch.tensor(-1.2))):
        torch.manual_seed(0)
        expected = function(*(value.clone() for value in given))
        torch.manual_seed(0)
        found = graph(*(value.clone() for value in given), *captured)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    return count, sum(node.op == "call_function" for node in graph.graph.nodes)


def test_terms_of_a_loop_are_computed_once() -> None:
    before, after = operations(loop)
    assert after < 0.8 * before


def test_draws_are_not_merged() -> None:
    before, after = operations(noisy)
    assert before == after


def test_what_is_written_to_is_not_merged() -> None:
    operations(written)


def test_unused_operations_are_dropped_but_not_writes_into_what_is_used() -> None:
    def function(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        noise, density = torch.randn(3), x * scale
        density[x < 1.0] = 0.0  # of no use
        path = torch.zeros(3)
        row = path.view(3, 1)
        row[1] = x[1] * scale
        return (path + 1.0, noise)

    inputs = torch.arange(3.0), torch.tensor(0.3)
    graph, captured, _ = trace_operations(function, inputs)
    *_, output = graph.graph.nodes
    output.args = (output.args[0][:1],)
    drop_unused(graph)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("randn" in target or "aten.lt" in target or "index_put" in target for target in targets)
    assert torch.equal(graph(*inputs, *captured)[0], torch.tensor([1.0, 1.3, 1.0]))
