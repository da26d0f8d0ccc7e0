# SPDX-License-Identifier: Apache-2.0
"""L3. The joint block: one flow over all the global latent sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_flows.flows import Flow, FlowDistribution, FlowSpec
from pyro_flows.guides.warm_start import Gaussian, LogJoint, best_gaussian
from pyro_flows.sites import SiteTable
from pyro_flows.transforms import FullRankAffine, SiteOrderedAffine

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

    @property
    def _linear(self) -> SiteOrderedAffine | None:
        """The layer that can hold a correlated Gaussian below a diagonal head."""
        below = self.flow.transform.parts[-2:-1]
        return next((part for part in below if isinstance(part, SiteOrderedAffine) and part.can_be_linear), None)

    @property
    def holds_correlations(self) -> bool:
        """Whether :meth:`start` can write any Gaussian, or only one of independent coordinates."""
        return self._linear is not None or isinstance(self.flow.head, FullRankAffine)

    @torch.no_grad()
    def start(self, loc: Tensor, factor: Tensor) -> None:
        """Make the affine layers :math:`N(m, L L^\top)`; all others are taken to be the identity.

        Args:
            loc: ``m``, ``(latent_dim,)``.
            factor: ``L``, lower triangular with a positive diagonal; diagonal unless ``holds_correlations``.
        """
        head = self.flow.head
        scale = factor.diagonal()
        if self._linear is not None:
            scale = factor.norm(dim=-1)
            self._linear.set_linear((factor / scale.unsqueeze(-1)).to(loc))
        elif isinstance(head, FullRankAffine):
            head.below_diagonal.copy_((factor / scale.unsqueeze(-1)).tril(-1))
        head.initialize(loc, scale.to(loc))

    def warm_start(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], init_scale: float
    ) -> Gaussian:
        """Find a good Gaussian for the model and start there; see :func:`best_gaussian`."""
        nesting = max((-frame.dim for site in self.table for frame in site.frames), default=0)
        trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                nesting = max(nesting, *(-f.dim for f in site["cond_indep_stack"] if f.vectorized), 0)
                if site["infer"].get("enumerate"):
                    raise NotImplementedError(
                        f"AutoFlowGuide.warm_start: expected a model without enumerated sites, but '{name}' is one. "
                        "Train the guide as it is."
                    )
        log_joint = LogJoint(model, self.table, args, kwargs, nesting)
        found = best_gaussian(log_joint, self.table.init_loc, init_scale, correlated=self.holds_correlations)
        self.start(found.loc, found.factor)
        return found

    def distribution(self, *, path_gradient: bool) -> FlowDistribution:
        """The distribution of the packed vector."""
        distribution: FlowDistribution = self.flow(path_gradient=path_gradient)
        return distribution

    def standardize(self, packed: Tensor) -> Tensor:
        """Packed values as input for those who condition on them."""
        return self.flow.head.standardize(packed)
