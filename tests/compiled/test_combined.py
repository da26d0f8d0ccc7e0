# SPDX-License-Identifier: Apache-2.0
"""Which kernels a GPU runs as one; inductor plans them for a CPU here, which combines none."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch._inductor import scheduler as inductor_scheduler

from pyro_flows.compiled import inductor
from pyro_flows.compiled.combined import combined_late, late_levels
from pyro_flows.compiled.inductor import _inductor, _quiet, _with_sums
from pyro_flows.compiled.tracer import trace_operations

KERNELS = inductor_scheduler.ForeachKernelSchedulerNode
NUM_PARTICLES = 100


def network(x, *weights):
    """A loss, and weights after a step."""
    with torch.enable_grad():
        leaves = [weight.detach().requires_grad_() for weight in weights]
        value = x
        for leaf in leaves:
            value = torch.nn.functional.silu(value @ leaf)
        loss = value.square().sum()
        found = torch.autograd.grad(loss, leaves)
    return loss.detach(), *[weight - 0.1 * part for weight, part in zip(weights, found, strict=True)]


@pytest.fixture(scope="module")
def plan():
    """Levels of kernels of a network's step, early and late, and the kernels that each one needs."""
    found = {}

    def look(scheduler):
        early = scheduler._topological_sort_nodes()
        found["early"], found["late"] = early, late_levels(scheduler, early)
        found["needed"] = {node: scheduler._get_unmet_dep_nodes(node) for level in early for node in level}
        return []

    values = torch.randn(NUM_PARTICLES, 8), torch.randn(8, 16), torch.randn(16, 12), torch.randn(12, 4)
    graph = _with_sums(trace_operations(network, values).graph)
    with _quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNELS, "group_algorithm_for_combo_kernels", staticmethod(look))
        patch.setattr(inductor, "combined_late", nullcontext)
        run = _inductor(graph, list(values), {"combo_kernels": True, "fx_graph_cache": False})
    for one, other in zip(run(*values), network(*values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    return found


def level_of(levels):
    return {node: number for number, level in enumerate(levels) for node in level}


def test_gradients_of_weights_are_combined_with_each_other(plan):
    """And not each with a link of the chain from layer to layer, which waits for it then."""
    early, late = level_of(plan["early"]), level_of(plan["late"])
    weights = [node for node in early if node.is_reduction() and math.prod(node.group[1][-1]) == NUM_PARTICLES]
    assert len(weights) >= 3
    assert len({early[node] for node in weights}) == len(weights)
    assert len({late[node] for node in weights}) == 1


def test_kernels_of_a_level_do_not_need_each_other(plan):
    late = level_of(plan["late"])
    assert set(late) == set(level_of(plan["early"]))
    assert all(late[needed] < late[node] for node, before in plan["needed"].items() for needed in before)


def test_other_code_combines_kernels_as_torch_does():
    before = KERNELS.group_algorithm_for_combo_kernels
    with combined_late():
        assert KERNELS.group_algorithm_for_combo_kernels is not before
    assert KERNELS.group_algorithm_for_combo_kernels is before


def test_a_version_of_torch_without_groups_is_left_alone(monkeypatch):
    monkeypatch.delattr(KERNELS, "group_algorithm_for_combo_kernels")
    with combined_late():
        assert not hasattr(KERNELS, "group_algorithm_for_combo_kernels")
