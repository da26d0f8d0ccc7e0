# SPDX-License-Identifier: Apache-2.0
"""L2. The model-ordered flow, and the default stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer, positive, widths
from pyro_flows.flows.registry import register
from pyro_flows.transforms import (
    AffineCouplings,
    Chain,
    DirectedCouplings,
    FlowTransform,
    ItemCouplings,
    Leading,
    SiteOrderedAffine,
    Spline,
)

__all__ = ["Auto", "SiteOrdered"]


@dataclass(frozen=True)
class SizeSettings:
    """Composition of the default flow, by its dimension.

    The cost of a step is per operation up to some hundreds of dimensions, and per parameter beyond.

    Attributes:
        max_blocks: Largest number of blocks; more are merged with their neighbors, since sampling takes one step per
            block.
        max_full_rank_dim: Largest dimension at which linear parts have full rank; above it parameters grow linearly,
            and couplings are narrower.
        rank: Rank of linear parts above ``max_full_rank_dim``.
        max_couplings_dim: Largest dimension with couplings; above it one conditioner per block is the best use of time.
        max_splines_dim: Largest dimension with splines; above it conditioners are also narrow.
        narrow_dims: Widths of the hidden layers of narrow conditioners.
        low_rank: Rank of the linear parts of narrow conditioners.
        max_wide_dim: Largest dimension with wider layers (:meth:`~pyro_flows.flows.FlowSpec.wider_layers`).
        wide_transforms: Number of their couplings.
        wide_dims: Widths of these couplings' hidden layers.
        directed_transforms: Number of further couplings, whose networks begin with units along the directions of the
            observations.
        directed_parts: Number of parts that these transform in turn.
        directed_dims: Widths of their hidden layers.
        max_item_dim: Largest number of latents of an item with couplings of its own.
        max_shared_dim: Largest number of shared latents that these couplings read.
        leaf_dims: Widths of the hidden layers of a leaf's first affine map.
        leaf_rank: Rank of its linear part.
        max_flow_dim: Largest dimension of a flow; above it the guide is a mean-field Gaussian, since some dozens of
            parameters for each latent would cost many times AutoNormal's step.
    """

    max_blocks: int = 16
    max_full_rank_dim: int = 300
    rank: int = 16
    max_couplings_dim: int = 1000
    max_splines_dim: int = 2000
    narrow_dims: tuple[int, ...] = (8,)
    low_rank: int = 4
    max_wide_dim: int = 600
    wide_transforms: int = 3
    wide_dims: tuple[int, ...] = (128, 128)
    directed_transforms: int = 12
    directed_parts: int = 6
    directed_dims: tuple[int, ...] = (256,)
    max_item_dim: int = 8
    max_shared_dim: int = 8
    leaf_dims: tuple[int, ...] = (32,)
    leaf_rank: int = 4
    max_flow_dim: int = 20_000


SIZES = SizeSettings()


@register("site_ordered")
@dataclass(frozen=True, kw_only=True)
class SiteOrdered(FlowSpec):
    """Model-ordered flow: each site is affine in its noise given the sites before it, after an elementwise spline.

    The family for hierarchies: contains every Gaussian, every non-centering and funnels. In a guide, sites whose prior
    is Gaussian given others have a head that knows it; see :class:`~pyro_flows.transforms.MultilevelHead`,
    :class:`~pyro_flows.transforms.DiagonalPrecisionHead` and :class:`~pyro_flows.transforms.FullPrecisionHead`.

    Args:
        block_sizes: Sizes of the blocks in order; the guide fills in the model's sites. None makes every coordinate a
            block. More than 16 are merged with their neighbors.
        hidden_dims: Widths of each block's network.
        count_bins: Bins per spline, in [2, 128].
        log_scale_bound: Largest absolute log-scale of a block as a function of those before it, > 0, in addition to
            known priors.

    References:
        Ko, Domke. Model-Informed Flows for Bayesian Inference. NeurIPS 2025. arXiv:2505.24243.
    """

    knows_priors: ClassVar[bool] = True
    best_for: ClassVar[str] = "hierarchies, funnels"
    draw_cost: ClassVar[str] = "one pass; a short step a site, 16 at most"
    tails: ClassVar[str] = "as ``auto``"
    parameters: ClassVar[str] = "O(D²) to 300, then O(D)"

    block_sizes: tuple[int, ...] | None = widths(None)
    hidden_dims: tuple[int, ...] = widths((32, 32))
    count_bins: int = integer(8, low=2, high=128)
    log_scale_bound: float = positive(2.0)

    def with_blocks(self, block_sizes: Sequence[int]) -> FlowSpec:
        return self if self.block_sizes is not None else replace(self, block_sizes=tuple(block_sizes))

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        rank = SIZES.rank if input_dim > SIZES.max_full_rank_dim else None
        return [
            Spline(input_dim, context_dim, count_bins=self.count_bins),
            self._site_ordered(input_dim, context_dim, self.hidden_dims, rank),
        ]

    def _site_ordered(
        self, input_dim: int, context_dim: int, hidden_dims: Sequence[int], rank: int | None
    ) -> SiteOrderedAffine:
        sizes = self.block_sizes or (1,) * input_dim
        if sum(sizes) != input_dim:
            raise ValueError(
                f"{type(self).__name__}: expected block_sizes to add up to input_dim, but got {sizes} and {input_dim}. "
                "Leave block_sizes out to let the guide fill in the model's sites."
            )
        blocks = _merge(sizes, SIZES.max_blocks)
        return SiteOrderedAffine(
            input_dim,
            context_dim,
            block_sizes=blocks,
            hidden_dims=hidden_dims,
            rank=rank,
            log_scale_bound=self.log_scale_bound,
        )


@register("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(SiteOrdered):
    """The default: couplings, then the model-ordered flow.

    Site order represents the hierarchy; couplings represent the remaining dependence inside and between sites. A single
    latent needs only its spline, with more bins. Where a warm start finds several modes with mass, the base becomes a
    mixture with a component on each. Above 1000 dimensions couplings are omitted, above 2000 also splines,
    and above 20,000 the flow is a mean-field Gaussian: a step then takes at most three times as long as
    ``AutoNormal``'s.

    In a guide of 201 to 3000 dimensions, elements of the largest site that are independent of each other given the
    other latents, 300 at most, are mapped one by one given these, and couplings are those of the others; a step then
    takes four to seven times as long as ``AutoNormal``'s.

    Args:
        num_transforms: Number of affine couplings, >= 0, each of which transforms a part of the coordinates given all
            others; used for 2 to 1000 dimensions.
        coupling_dims: Widths of each coupling's hidden layers. None means two of 64, and of 32 above 300 dimensions.

    References:
        Ko, Domke. Model-Informed Flows for Bayesian Inference. NeurIPS 2025. arXiv:2505.24243.

        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017. arXiv:1605.08803.
    """

    chooses_base: ClassVar[bool] = True
    knows_leaves: ClassVar[bool] = True
    best_for: ClassVar[str] = "any model"
    tails: ClassVar[str] = (
        "Gaussian given the sites before; the scale follows a Gaussian prior's without a bound, so funnels fit, and "
        r"moves by :math:`e^{\pm 2}` at most besides"
    )

    num_transforms: int = integer(3, low=0)
    coupling_dims: tuple[int, ...] | None = widths(None)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        if input_dim == 1:
            return [Spline(input_dim, context_dim, count_bins=2 * self.count_bins)]
        if input_dim > SIZES.max_flow_dim:
            return []
        if input_dim > SIZES.max_splines_dim:
            return [self._site_ordered(input_dim, context_dim, SIZES.narrow_dims, SIZES.low_rank)]
        layers = super().layers(input_dim, context_dim)
        if self.num_transforms and input_dim <= SIZES.max_couplings_dim:
            layers.insert(0, self._couplings(input_dim, context_dim))
        return layers

    def _couplings(self, input_dim: int, context_dim: int) -> AffineCouplings:
        return AffineCouplings(
            input_dim,
            context_dim,
            num_transforms=self.num_transforms,
            hidden_dims=self.coupling_dims or ((32, 32) if input_dim > SIZES.max_full_rank_dim else (64, 64)),
            num_parts=max(2, self.num_transforms),
        )

    def layers_with_leaves(self, input_dim: int, num_leaves: int) -> list[FlowTransform]:
        """As :meth:`layers`, with couplings of the other coordinates only. Each leaf is an affine map given these, on
        both sides of its spline, so that its shape follows them too."""
        free = input_dim - num_leaves
        inner = replace(self, block_sizes=(free, num_leaves))
        layers: list[FlowTransform] = [
            inner._site_ordered(input_dim, 0, SIZES.leaf_dims, SIZES.leaf_rank),
            Spline(input_dim, 0, count_bins=self.count_bins),
            self._site_ordered(input_dim, 0, self.hidden_dims, SIZES.rank),
        ]
        if self.num_transforms and free > 1:
            layers.insert(0, Leading(input_dim, self._couplings(free, 0)))
        return layers

    def can_widen_to(self, input_dim: int) -> bool:
        return self.num_transforms > 0 and 2 <= input_dim <= SIZES.max_wide_dim

    def wider_layers(self, input_dim: int, items: Sequence[Tensor] = ()) -> dict[int, FlowTransform]:
        """Wide and directed couplings, and couplings within items between the default ones and the spline."""
        wide = AffineCouplings(
            input_dim, num_transforms=SIZES.wide_transforms, hidden_dims=SIZES.wide_dims, num_parts=3
        )
        directed = DirectedCouplings(
            input_dim,
            num_transforms=SIZES.directed_transforms,
            hidden_dims=SIZES.directed_dims,
            num_parts=SIZES.directed_parts,
        )
        innermost = Chain([wide, directed])
        kinds = [kind for kind in items if kind.shape[-1] <= SIZES.max_item_dim]
        if not kinds:
            return {0: innermost}
        is_shared = torch.ones(input_dim, dtype=torch.bool, device=kinds[0].device)
        for kind in kinds:
            is_shared[kind.flatten()] = False
        shared = is_shared.nonzero().squeeze(-1)[: SIZES.max_shared_dim]
        return {0: innermost, 1: Chain([ItemCouplings(input_dim, kind, shared) for kind in kinds])}


def _merge(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """At most ``count`` blocks of neighbors, by repeatedly joining the smallest adjacent pair."""
    merged = list(sizes)
    while len(merged) > count:
        index = min(range(len(merged) - 1), key=lambda i: merged[i] + merged[i + 1])
        merged[index : index + 2] = [merged[index] + merged[index + 1]]
    return tuple(merged)
