# SPDX-License-Identifier: Apache-2.0
"""L3. The joint block: one flow over all the latent sites that share a vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_flows.flows import FlowDistribution, FlowSpec
from pyro_flows.sites import SiteTable

__all__ = ["JointBlock"]


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
        flow = spec.build(table.latent_dim)
        if any(True for _ in flow.buffers()):
            # Pyro's parameter store keeps no buffers (random permutations, say), so every guide has the same ones, and
            # parameters that are taken from a store mean what they meant.
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                torch.default_generator.manual_seed(0)
                for buffer, fixed in zip(flow.buffers(), spec.build(table.latent_dim).buffers(), strict=True):
                    buffer.copy_(fixed)
        self.flow = flow.to(dtype=table.init_loc.dtype, device=table.init_loc.device)
        self.flow.head.initialize(table.init_loc, torch.full_like(table.init_loc, init_scale))

    def distribution(self, *, path_gradient: bool) -> FlowDistribution:
        """The distribution of the packed vector."""
        distribution: FlowDistribution = self.flow(path_gradient=path_gradient)
        return distribution

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Packed unconstrained draws, ``(num_samples, latent_dim)``, without gradients."""
        draws: Tensor = self.distribution(path_gradient=False).sample(torch.Size((num_samples,)))
        return draws

    @torch.no_grad()
    def summary_draws(self, num_samples: int) -> Tensor:
        """Like :meth:`sample`, but from noise that is the same at each call and symmetric about zero.

        So summaries repeat, leave the global random state alone, and where the flow is affine their median is exact.
        """
        zeros = self.flow.base_dist.mean
        generator = torch.Generator(zeros.device).manual_seed(0)
        half = torch.randn((num_samples // 2, len(zeros)), generator=generator, dtype=zeros.dtype, device=zeros.device)
        eps = torch.cat([half, -half, zeros.expand(num_samples % 2, -1)])
        draws: Tensor = self.flow.transform.condition(None)(eps)
        return draws

    def log_prob(self, packed: Tensor) -> Tensor:
        """Log density of packed unconstrained values."""
        log_prob: Tensor = self.distribution(path_gradient=False).log_prob(packed.to(self.flow.base_dist.mean))
        return log_prob
