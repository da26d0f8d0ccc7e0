# SPDX-License-Identifier: Apache-2.0
"""L3. The joint block: one flow over all the global latent sites."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_flows.flows import Flow, FlowDistribution, FlowSpec
from pyro_flows.sites import SiteTable

__all__ = ["JointBlock", "build_reproducibly"]


def build_reproducibly(build: Callable[[], Flow]) -> Flow:
    """Build a flow whose buffers (random permutations, say) are the same each time.

    Pyro's parameter store keeps no buffers, so parameters that are taken from a store must mean what they meant.
    """
    flow = build()
    if any(True for _ in flow.buffers()):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.default_generator.manual_seed(0)
            for buffer, fixed in zip(flow.buffers(), build().buffers(), strict=True):
                buffer.copy_(fixed)
    return flow


class JointBlock(nn.Module):
    """A flow over the packed unconstrained values of several sites.

    Starts at ``N(init_loc, init_scale^2)`` in unconstrained space (families with an identity start), in the dtype and
    on the device of the model's own trace.

    Args:
        table: The sites.
        spec: Recipe of the flow; told the sites' sizes, in order.
        init_scale: Standard deviation at the start, > 0.
    """

    def __init__(self, table: SiteTable, spec: FlowSpec, init_scale: float) -> None:
        super().__init__()
        self.table = table
        spec = spec.with_blocks([site.size for site in table if site.size])
        flow = build_reproducibly(lambda: spec.build(table.latent_dim))
        self.flow = flow.to(dtype=table.init_loc.dtype, device=table.init_loc.device)
        self.flow.head.initialize(table.init_loc, torch.full_like(table.init_loc, init_scale))

    def distribution(self, *, path_gradient: bool) -> FlowDistribution:
        """The distribution of the packed vector."""
        distribution: FlowDistribution = self.flow(path_gradient=path_gradient)
        return distribution

    def standardize(self, packed: Tensor) -> Tensor:
        """Packed values as input for those who condition on them."""
        return self.flow.head.standardize(packed)
