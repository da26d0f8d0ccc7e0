# SPDX-License-Identifier: Apache-2.0
"""States that follow each other in a recorded graph, against the loops that make them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_flows.compiled.affine import AffineParts
from pyro_flows.compiled.recursion import Recursion, read_recursion
from pyro_flows.compiled.tracer import trace_operations

T = 7
Model = Callable[[Tensor, Tensor], Tensor]


def by_loop(theta: Tensor, z: Tensor) -> Tensor:
    h, path = theta[2] * z[0], []
    path.append(h)
    for t in range(1, T):
        h = theta[0] + theta[1] * (h - theta[0]) + theta[2] * z[t]
        path.append(h)
    return torch.stack(path)


def of_a_stack(theta: Tensor, z: Tensor) -> Tensor:
    return ((theta[3] + by_loop(theta, z)) / 2).exp().sum()


def one_by_one(theta: Tensor, z: Tensor) -> Tensor:
    """Each state is seen by a function of its own."""
    h, total = theta[0], torch.zeros(())
    for t in range(T):
        h = theta[1] * h + z[t] * theta[2]
        total = total + (h / 2 + theta[3]).exp() * (t + 1)
    return total


def of_a_sum(theta: Tensor, z: Tensor) -> Tensor:
    return (theta[3] - (theta[2] * z + theta[0]).cumsum(-1)).exp().sum()


def of_scaled_entries(theta: Tensor, z: Tensor) -> Tensor:
    """Scales of their own, and entries by ``unbind``."""
    noise = theta[2] * torch.arange(1.0, T + 1.0) * z
    h, path = torch.zeros(1), []
    for entry in noise.unbind():
        h = theta[1] * h + entry
        path.append(h)
    return torch.cat(path).cos().sum()


def of_slices(theta: Tensor, z: Tensor) -> Tensor:
    h, path = torch.zeros(1), []
    for t in range(T):
        h = theta[1] * h + theta[2] * z[t : t + 1]
        path.append(h)
    return (theta[3] * torch.cat(path)).sin().sum()


def of_some(theta: Tensor, z: Tensor) -> Tensor:
    """Not all of them are seen."""
    path = by_loop(theta, z) + theta[3] * torch.arange(float(T))
    return path[torch.tensor([0, 2, 3])].exp().sum() + path[5:].cos().sum()


def of_each(theta: Tensor, z: Tensor) -> Tensor:
    path = theta[3] + (theta[2] * z).cumsum(-1)
    total = torch.zeros(())
    for t in range(T):
        total = total + path[t].exp()
    return total


def read(model: Model) -> tuple[Recursion | None, list[Tensor]]:
    theta, z = torch.tensor([0.3, 0.8, 0.5, 0.2]), torch.zeros(T)
    graph, captured, _ = trace_operations(lambda *inputs: [model(*inputs)], [theta, z])
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"][:2]
    for node, value in zip(inputs, (theta, z), strict=True):
        node.meta["shape"] = value.shape
    affine = AffineParts(graph, inputs[1:2], inputs)
    return read_recursion(graph, affine, affine.outermost(T)), captured


@pytest.mark.parametrize("model", [of_a_stack, one_by_one, of_a_sum, of_scaled_entries, of_slices, of_some, of_each])
def test_coefficients_give_the_states_that_the_loop_does(model: Model) -> None:
    """What is seen of them, as the model computes it; at other values than the recording's."""
    recursion, captured = read(model)
    assert recursion is not None
    theta, z = torch.tensor([-0.4, 0.6, 1.5, 0.7]), torch.randn(T, generator=torch.Generator().manual_seed(0))
    offset, lag, scale, shift, unit = recursion.graph(theta, z + 1.0, *captured)  # z itself does not matter
    h, seen = torch.zeros(()), []
    for t in range(T):
        h = offset[t] + (lag[t] * h if t else 0.0) + scale[t] * z[t]
        seen.append(shift[t] + unit[t] * h)
    graph, _, _ = trace_operations(lambda *inputs: [model(*inputs)], [theta, z])
    values = dict.fromkeys(node.name for node in recursion.nodes)
    found: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Tensor:
            value: Tensor = super().run_node(n)
            if n.name in values:
                found.append(value.reshape(-1))
            return value

    Watch(graph).run(theta, z, *captured)
    torch.testing.assert_close(torch.stack(seen), torch.cat(found))


def test_a_loop_leaves_few_operations() -> None:
    """One state follows another in the same way each time."""
    recursion, _ = read(of_a_stack)
    assert recursion is not None
    assert len([node for node in recursion.graph.graph.nodes if node.op == "call_function"]) < 40
    assert sum(node.target is torch.ops.aten.mul.Tensor for node in recursion.graph.graph.nodes) <= 3


def backwards(theta: Tensor, z: Tensor) -> Tensor:
    return of_a_stack(theta, z.flip(0))


def of_second_order(theta: Tensor, z: Tensor) -> Tensor:
    one, other, path = torch.zeros(()), torch.zeros(()), []
    for t in range(T):
        one, other = theta[0] * one + theta[1] * other + z[t], one
        path.append(one)
    return torch.stack(path).exp().sum()


def of_moving_averages(theta: Tensor, z: Tensor) -> Tensor:
    return torch.stack([z[t] + theta[1] * z[max(t - 1, 0)] for t in range(T)]).exp().sum()


def of_a_product(theta: Tensor, z: Tensor) -> Tensor:
    return (theta[0] * torch.ones(T, T) @ z).exp().sum()


def of_effects(theta: Tensor, z: Tensor) -> Tensor:
    """None of which follows another."""
    return torch.stack([theta[0] + theta[1] * entry for entry in z]).exp().sum()


def seen_twice(theta: Tensor, z: Tensor) -> Tensor:
    return of_a_stack(theta, z) + z.exp().sum()


@pytest.mark.parametrize(
    "model",
    [backwards, of_second_order, of_moving_averages, of_a_product, of_effects, seen_twice],
)
def test_others_are_no_states_that_follow_each_other(model: Model) -> None:
    assert read(model)[0] is None
