# SPDX-License-Identifier: Apache-2.0
"""What of a graph is affine in an input, and what its outputs follow it by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_flows.compiled.affine import AffineParts
from pyro_flows.compiled.tracer import trace_operations

DATA = torch.tensor([1.0, 0.0, 2.0])
Function = Callable[[Tensor, Tensor], Tensor]


def parts_of(function: Function, max_elements: int = 100) -> tuple[list[Tensor], list[Tensor]]:
    """Values of the outermost affine parts at ``z = 0``, and their changes along (1, 2, 3), where theta is 0.5."""
    theta, z = torch.tensor(0.5), torch.tensor([0.3, -1.0, 0.7])
    graph, captured, _ = trace_operations(lambda *inputs: [function(*inputs)], [theta, z])
    inputs = list(graph.graph.nodes)[:2]
    inputs[1].meta["shape"] = z.shape
    affine = AffineParts(graph, inputs[1:2], inputs)
    split: GraphModule = affine.split(affine.outermost(max_elements))
    offsets, changes = split(torch.tensor([1.0, 2.0, 3.0]), theta, z, *captured)
    return list(offsets), list(changes)


def check(function: Function, expected: list[tuple[list[float], list[float]]], max_elements: int = 100) -> None:
    offsets, changes = parts_of(function, max_elements)
    assert len(offsets) == len(changes) == len(expected)
    for offset, change, (at_zero, along) in zip(offsets, changes, expected, strict=True):
        torch.testing.assert_close(offset, torch.tensor(at_zero))
        torch.testing.assert_close(change, torch.tensor(along))


def test_terms_that_are_linear_all_the_way_are_no_parts() -> None:
    """A Poisson log density: that of the data times the predictor says nothing on its own."""

    def function(theta: Tensor, z: Tensor) -> Tensor:
        predictor = theta + theta * z
        return (DATA * predictor - predictor.exp()).sum()

    check(function, [([0.5, 0.5, 0.5], [0.5, 1.0, 1.5])])


def test_signs_and_constant_terms_are_left_out() -> None:
    check(lambda theta, z: (DATA - (theta * z + 3.0)).square().sum(), [([0.0, 0.0, 0.0], [0.5, 1.0, 1.5])])


def test_repetitions_are_left_out() -> None:
    index = torch.tensor([0, 1, 2, 2, 2])
    check(lambda theta, z: (theta * z)[index].exp().sum(), [([0.0, 0.0, 0.0], [0.5, 1.0, 1.5])])


def test_a_small_part_is_no_larger_whole() -> None:
    check(lambda theta, z: (theta * z)[1:2].exp().sum(), [([0.0], [1.0])])


def test_other_terms_are_left_out_where_there_are_too_many() -> None:
    def function(theta: Tensor, z: Tensor) -> Tensor:
        return (theta * torch.ones(5, 1) + theta * z).exp().sum()

    check(function, [([0.0, 0.0, 0.0], [0.5, 1.0, 1.5])], max_elements=14)
    check(function, [([[0.5, 0.5, 0.5]] * 5, [[0.5, 1.0, 1.5]] * 5)], max_elements=15)
    check(function, [], max_elements=2)


def test_terms_beside_others_that_are_not_affine() -> None:
    """A step of a path whose last one is bent: what is added to it counts, since the sum is bent again."""

    def function(theta: Tensor, z: Tensor) -> Tensor:
        first = theta * z[:1] + theta
        return (first.tanh() + theta * z[1:2]).exp().sum()

    check(function, [([0.5], [0.5]), ([0.0], [1.0])])


@pytest.mark.parametrize("bend", [torch.floor, lambda x: torch.div(x, 0.5, rounding_mode="floor"), lambda x: x.int()])
def test_steps_are_not_affine(bend: Callable[[Tensor], Tensor]) -> None:
    check(lambda theta, z: bend(theta * z).sum(), [([0.0, 0.0, 0.0], [0.5, 1.0, 1.5])])


def test_products_of_affine_parts_and_shapes() -> None:
    def function(theta: Tensor, z: Tensor) -> Tensor:
        start = torch.zeros_like(z.exp()) + theta
        return ((start + z) * (theta * z)).sum()

    check(function, [([0.5, 0.5, 0.5], [1.0, 2.0, 3.0]), ([0.0, 0.0, 0.0], [0.5, 1.0, 1.5])])


def written(theta: Tensor, z: Tensor) -> Tensor:
    path = torch.zeros(3)
    path[1:] = theta * z[1:]
    return path.exp().sum()


def written_over(theta: Tensor, z: Tensor) -> Tensor:
    path = theta * z
    path[0] = theta
    return path.exp().sum()


@pytest.mark.parametrize("function", [written, written_over])
def test_writes_are_refused(function: Function) -> None:
    with pytest.raises(NotImplementedError, match="written"):
        parts_of(function)


def test_writes_of_other_values_are_no_obstacle() -> None:
    def function(theta: Tensor, z: Tensor) -> Tensor:
        scales = torch.ones(3)
        scales[0] = theta
        density = (scales * z).exp()
        density[DATA > 1.0] = 0.0
        return density.sum()

    check(function, [([0.0, 0.0, 0.0], [0.5, 2.0, 3.0])])
