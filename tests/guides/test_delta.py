# SPDX-License-Identifier: Apache-2.0
"""The guide's point masses are Pyro's, but do not compare a draw with itself."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.guides.delta import DensityDelta


@pytest.mark.parametrize("validates", [False, True])
def test_densities_are_those_of_pyro(validates: bool) -> None:
    point, log_density = torch.randn(4, 3), torch.randn(4)
    kinds = (DensityDelta, dist.Delta)
    ours, theirs = (kind(point, log_density, event_dim=1, validate_args=validates) for kind in kinds)
    draw = ours.rsample()
    assert torch.equal(draw, theirs.rsample())
    assert torch.equal(ours.rsample((2,)), theirs.rsample((2,)))
    for value in (draw, draw.clone(), draw + 1.0, ours.rsample((2,))):
        assert torch.equal(ours.log_prob(value), theirs.log_prob(value))
    wider = ours.expand((2, 4))
    assert torch.equal(wider.log_prob(wider.rsample()), theirs.expand((2, 4)).log_prob(wider.rsample()))


def test_a_draws_own_density_takes_no_operation() -> None:
    def density(point: torch.Tensor, log_density: torch.Tensor) -> tuple[torch.Tensor, ...]:
        delta = DensityDelta(point, log_density, event_dim=1, validate_args=False)
        return (delta.log_prob(delta.rsample()),)

    graph = trace_operations(density, (torch.randn(4, 3), torch.randn(4))).graph
    assert not [node for node in graph.graph.nodes if node.op == "call_function"]
