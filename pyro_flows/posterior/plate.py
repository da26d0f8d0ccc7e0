# SPDX-License-Identifier: Apache-2.0
"""L3. A local block: one conditional flow for the latents of every item of a plate, with shared weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.flows import FlowDistribution, FlowSpec
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.models.layout import Layout
from pyro_flows.models.priors import LinearPrior
from pyro_flows.posterior.joint import JointBlock, build_reproducibly
from pyro_flows.transforms import PlateHead
from pyro_flows.transforms.context import ItemContext, join
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["Item", "LocalBlock"]


@dataclass(frozen=True)
class ItemSettings:
    """Dimensions of a local block.

    Attributes:
        embedding_dim: Length of an item's learned embedding, by which the shared flow can differ from item to item.
        max_parent_dim: Dimension of the globals above which they are projected to it, so that the cost of an item does
            not grow with them.
    """

    embedding_dim: int = 4
    max_parent_dim: int = 32


ITEMS = ItemSettings()


class Item(NamedTuple):
    """Features and site approximation of each item; see :class:`~pyro_flows.transforms.context.ItemContext`.

    Attributes:
        features: Features, ``lead + (feature_dim,)``.
        site: Parameters of the site approximation, ``lead + (2 * latent_dim,)``.
    """

    features: Tensor
    site: Tensor

    @property
    def lead(self) -> torch.Size:
        """Shape of the plates."""
        return self.site.shape[:-1]


class LocalBlock(nn.Module):
    """The conditional flow q(local latents of an item | globals, parent groups), for all items of a plate.

    Items differ in their site approximation and a few features: from a table with a row for each item, or from an
    encoder's output. Items of a table are initialized to ``N(init_loc, init_scale^2)`` in unconstrained space (for
    families that are initialized to the identity); those of an encoder to a Gaussian of the prior's scale, where that
    is known, around a location that varies with the encoder's output.

    Args:
        layout: Layout of the sites, with the plates.
        spec: Recipe of the flow; gets the sites' sizes, in order.
        init_loc: Initial location of the items of the full plate, ``lead + (latent_dim,)``.
        init_scale: Initial standard deviation in unconstrained space, > 0.
        joint: The block of the globals, if there are any.
        parents: Blocks whose latents each item depends on: those in a subset of its plates.
        encoder_dim: Length of the encoders' output, or None for a table.
        prior: The items' priors, where they were found in the model.
        is_long: Whether a mini-batch is so large that each item gets a Gaussian, without networks.
    """

    def __init__(
        self,
        layout: Layout,
        spec: FlowSpec,
        init_loc: Tensor,
        init_scale: float,
        *,
        joint: JointBlock | None,
        parents: Sequence[LocalBlock],
        encoder_dim: int | None,
        prior: LinearPrior | None,
        is_long: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.sparse = False
        self.owned: Mapping[str, range] = {}  # plate -> its items whose rows the table has; empty for all
        self.parent_names = tuple(parent.layout.plate_names for parent in parents)
        self.prior = prior
        joint_dim = joint.layout.latent_dim if joint is not None else 0
        parent_dim = min(joint_dim, ITEMS.max_parent_dim) + sum(parent.layout.latent_dim for parent in parents)
        self.embedding_dim = 0 if is_long else ITEMS.embedding_dim
        feature_dim = self.embedding_dim if encoder_dim is None else encoder_dim
        spec = spec.with_blocks(layout.sizes)
        known = None if prior is None else prior.known
        with init_loc.device:
            self.flow = build_reproducibly(
                lambda: spec.build_local(layout.latent_dim, parent_dim, feature_dim, known, plain=is_long)
            )
        self.gradient_filter = GradientFilter(layout.latent_dim)
        self.to(dtype=init_loc.dtype, device=init_loc.device)
        locs = init_loc.reshape(-1, layout.latent_dim)
        if encoder_dim is not None:
            locs = locs.mean(0)
        values = [] if joint is None else [joint.layout.init_loc]
        values += [parent.head.gaussian()[0] for parent in parents]
        scale = torch.full_like(locs.reshape(-1, layout.latent_dim)[0], init_scale)
        gaussian = None if prior is None else prior(torch.cat([*values, locs.new_zeros(0)]))
        if encoder_dim is not None and prior is not None and gaussian is not None:
            scale = torch.where(prior.known, gaussian.chunk(2)[1].exp(), scale)
        own = self.head.initialize_items(locs, scale, gaussian, in_scales=encoder_dim is not None)
        self.project = None
        if joint_dim > ITEMS.max_parent_dim:
            self.project = nn.Parameter(own.new_empty(ITEMS.max_parent_dim, joint_dim).normal_(std=joint_dim**-0.5))
        self.items: nn.Parameter | None = None
        self.encoded: ContextParameters | None = None
        if encoder_dim is None:
            # The shared layers learn to distinguish items by these; initialized to zero, neither would have a gradient.
            embedding = torch.randn_like(own[:, :1].expand(-1, self.embedding_dim))
            self.items = nn.Parameter(torch.cat([embedding, own], -1))  # (items, embedding + site approximation)
        else:
            self.encoded = ContextParameters(own, encoder_dim, refines=False).to(own)
            # An encoder distinguishes items from the first step on. From a narrow initialization that is the same for
            # all, a decoder that is trained along first learns to ignore the latents.
            head = self.encoded.head
            assert head is not None
            nn.init.normal_(head.weight, std=head.in_features**-0.5)

    @property
    def head(self) -> PlateHead:
        """The outermost transform."""
        return cast(PlateHead, self.flow.head)

    @torch.no_grad()
    def initialize_items(
        self, loc: Tensor, scale: Tensor, prior: Tensor | None, mean: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Initialize every item of a table to a Gaussian of its own.

        Args:
            loc: Locations, ``(items, latent_dim)``, in the order of the table.
            scale: Standard deviations, ``(items, latent_dim)``, > 0.
            prior: Locations and log-scales of the items' priors, ``(items, 2 * latent_dim)``, where they are known;
                these enter with full weight.
            mean: Mean over all items, which may be more than the table has; see the head.
        """
        assert self.items is not None
        self.items[:, self.embedding_dim :] = self.head.initialize_items(
            loc, scale, prior, max_share=math.inf, in_scales=True, mean=mean
        )

    def known_prior(
        self, latents: Mapping[tuple[str, ...], Tensor], joint: JointBlock | None, parents: Sequence[LocalBlock]
    ) -> Tensor:
        """Locations and log-scales of the items' priors, ``(..., 2 * latent_dim)``; see :meth:`distribution`."""
        assert self.prior is not None
        values = _parent_values(latents, joint, parents)
        return self.prior(join(values)) if values else self.prior.bias

    def item_context(self, indices: Mapping[str, Tensor], encoded: Mapping[str, Tensor]) -> Item:
        """Features and site approximations of a mini-batch's items.

        Args:
            indices: Plate -> indices of the mini-batch, for plates without an encoder.
            encoded: Plate -> encoder's output for the mini-batch, for plates with one.
        """
        if self.items is not None:
            index = self.layout.flat_index(indices, self.owned).to(self.items.device)
            if self.sparse:
                rows = F.embedding(index, self.items, sparse=True)
            else:  # an embedding's gradient takes seven times as long
                rows = self.items.index_select(0, index.flatten()).reshape(*index.shape, -1)
            return Item(*rows.tensor_split([self.embedding_dim], -1))
        assert self.encoded is not None
        dtype = self.encoded.value.dtype
        outputs = [
            self.layout.place(encoded[name].to(dtype), name) for name in self.layout.plate_names if name in encoded
        ]
        features = join(outputs)
        # Items of this block's plates without an encoder share their parameters.
        return Item(features, self.encoded(features))

    def context(
        self,
        items: Item,
        latents: Mapping[tuple[str, ...], Tensor],
        joint: JointBlock | None,
        parents: Sequence[LocalBlock],
    ) -> ItemContext:
        """Context of the conditional flow; see :meth:`distribution`."""
        standard = [parent.head.standardize(latents[parent.layout.plate_names]) for parent in parents]
        if joint is not None:
            first = joint.standardize(latents[()])
            standard.insert(0, first if self.project is None else F.linear(first, self.project))
        nothing = items.site.new_zeros(0)
        prior = nothing if self.prior is None else self.known_prior(latents, joint, parents)
        return ItemContext(join(standard) if standard else nothing, *items, prior)

    def distribution(
        self,
        items: Item,
        latents: Mapping[tuple[str, ...], Tensor],
        joint: JointBlock | None,
        parents: Sequence[LocalBlock],
        *,
        path_gradient: bool,
        filtered: bool = False,
    ) -> FlowDistribution:
        """The distribution of the items' packed vectors, batch shape ``lead``, event shape ``(latent_dim,)``.

        Args:
            items: Result of :meth:`item_context`.
            latents: Packed unconstrained latents of the globals, under ``()``, and of the parents, under their plates.
            joint: The block of the globals, as in the constructor.
            parents: The parent blocks, as in the constructor.
            path_gradient: Whether gradients leave out the score term; see
                :class:`~pyro_flows.flows.FlowDistribution`.
            filtered: Whether the gradients of draws pass the block's filter.
        """
        values = _parent_values(latents, joint, parents) if torch.is_grad_enabled() else []
        distribution: FlowDistribution = self.flow(
            self.context(items, latents, joint, parents).join(),
            path_gradient=path_gradient,
            parents=tuple(values),
            gradient_filter=self.gradient_filter if filtered else None,
        )
        return distribution


def _parent_values(
    latents: Mapping[tuple[str, ...], Tensor], joint: JointBlock | None, parents: Sequence[LocalBlock]
) -> list[Tensor]:
    """Packed latents that a block conditions on, in order."""
    values = [] if joint is None else [latents[()]]
    return [*values, *(latents[parent.layout.plate_names] for parent in parents)]
