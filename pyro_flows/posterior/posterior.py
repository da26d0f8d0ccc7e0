# SPDX-License-Identifier: Apache-2.0
"""L3. The guide's distribution as a module: a joint block, one local block per set of local plates, and encoders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_flows._memory import in_chunks
from pyro_flows.flows import DiagonalNormal, FlowSpec
from pyro_flows.flows.bases import resolve_base
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.models.layout import Layout, check_names, partition
from pyro_flows.models.priors import read_prior
from pyro_flows.models.sites import Site, full_size, read_sites
from pyro_flows.posterior.encoders import Encoder, probe
from pyro_flows.posterior.joint import JointBlock, make_joint_block
from pyro_flows.posterior.plate import Item, LocalBlock
from pyro_flows.posterior.step_limit import StepLimit

__all__ = ["Posterior"]


@dataclass(frozen=True)
class PlateSettings:
    """Limits on computations for all items of a plate.

    Attributes:
        max_flows: Number of items of a mini-batch above which each has a Gaussian in place of a flow: networks for
            every item would cost a hundred times as much as ``AutoNormal``.
        max_rows: Largest number of draws times items that summaries compute at once; bounds memory.
    """

    max_flows: int = 20_000
    max_rows: int = 2**18


PLATES = PlateSettings()

Latents = dict[tuple[str, ...], Tensor]


class Posterior(nn.Module):
    """The product of q(globals) and, for each set of local plates, q(an item's latents | globals, its parents).

    Args:
        model: The model.
        trace: Trace of its latent sites.
        spec: Recipe of every block's flow.
        init_scale: Initial standard deviation in unconstrained space, > 0.
        local: Names of the local plates.
        varying: Names of the plates that may have other items in other calls.
        amortize: Plate -> encoder, for the amortized ones among them.
        args: The model's arguments, on which encoders are called to find the length of their output.
        kwargs: The model's keyword arguments.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        trace: Trace,
        spec: FlowSpec,
        init_scale: float,
        *,
        local: Collection[str],
        varying: Collection[str],
        amortize: Mapping[str, Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        sites = read_sites(trace, varying)
        layouts = partition(sites, local)
        joint = None if layouts[0].plates else layouts.pop(0)
        if layouts and not resolve_base("AutoFlowGuide", spec.base).suits_items:
            raise NotImplementedError(
                f"AutoFlowGuide: expected a normal or Student-t base, since site '{layouts[0].names[0]}' in plate "
                f"{_title(layouts[0])} has a flow of its own for each item, but got {spec.base!r}. Leave base out, or "
                'run the model on its full plates and write AutoFlowGuide(model, flow=..., structure="joint").'
            )
        self.order = tuple(site.name for site in sites)
        self.joint: JointBlock | None = None
        if joint is not None:
            # A single global, while the family needs two dimensions or more: as in `FlowSpec.build_local`.
            small = bool(layouts) and joint.latent_dim < spec.min_dim
            joint_spec = DiagonalNormal(base=spec.base) if small else spec
            self.joint = make_joint_block(
                model, args, kwargs, joint, joint_spec, init_scale, may_have_leaves=not layouts
            )
            self.joint.flow.chooses_base &= not layouts
        self.encoders = nn.ModuleDict({_key((plate,)): Encoder(plate, f) for plate, f in amortize.items()})
        frames = {frame.name: frame for site in sites for frame in site.frames}
        sizes = {name: (full_size(frame), frame.size) for name, frame in frames.items()}
        widths = {encoder.plate: probe(encoder, args, kwargs, sizes[encoder.plate]) for encoder in self.all_encoders()}
        self.local = nn.ModuleDict()
        for own in layouts:
            encoder_dims = [widths[name] for name in own.plate_names if name in widths]
            parents = [block for block in self.blocks() if set(block.layout.plate_names) < set(own.plate_names)]
            parent_layouts = [*([] if joint is None else [joint]), *(parent.layout for parent in parents)]
            self.local[_key(own.plate_names)] = LocalBlock(
                own,
                spec,
                _full_init_loc(own, amortized=frozenset(widths)),
                init_scale,
                joint=self.joint,
                parents=parents,
                encoder_dim=sum(encoder_dims) if encoder_dims else None,
                prior=read_prior(model, args, kwargs, own, parent_layouts),
                is_long=not encoder_dims and own.init_loc.shape[:-1].numel() > PLATES.max_flows,
            )
        # The filters of all blocks' gradients.
        self.filters = tuple(part for part in self.modules() if isinstance(part, GradientFilter))
        self.step_limit = StepLimit(self, self.filters)
        self._listed: list[tuple[str, nn.Parameter]] | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """State of the module, after the step limit was applied to the last step."""
        self.step_limit.apply()
        return super().state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "step_limit"):
            self.step_limit.forget()  # parameters have another dtype or device afterwards
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = {n.removeprefix(prefix): v.shape for n, v in state_dict.items() if n.startswith(prefix)}
        if own:  # not where a state is of other parts only
            self.adopt(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the kinds of flows that a state of these names and shapes has; see :meth:`JointBlock.adopt`."""
        if self.joint is not None:
            own = "joint."
            self.joint.adopt({n.removeprefix(own): s for n, s in shapes.items() if n.startswith(own)})
        self.look_again()

    @property
    def can_widen(self) -> bool:
        """Whether :meth:`widen` has layers to insert; never beside local latents, whose flows are other ones."""
        return self.joint is not None and not len(self.local) and self.joint.can_widen

    def widen(self, directions: Tensor | None = None) -> None:
        """Insert further layers into the flow of the globals; see :meth:`JointBlock.widen`."""
        assert self.joint is not None
        self.joint.widen(directions)
        self.look_again()

    @property
    def num_modes(self) -> int:
        """Number of modes on each of which a warm start has put a component of a mixture by itself; 1 for a normal."""
        if self.joint is None or not self.joint.flow.chooses_base:
            return 1
        return self.joint.flow.base.num_components

    def look_again(self) -> None:
        """Find all parameters anew, after a flow has taken another base."""
        self._listed = None
        self.step_limit.look_again()

    def listed_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters by name; found once, since looking for them takes as long as an operation."""
        if self._listed is None:
            self._listed = list(self.named_parameters())
        return self._listed

    def refused_values(self) -> dict[str, Tensor] | None:
        """Values of the first draw whose gradient was not finite, in a guide without local latents; None elsewhere."""
        if self.joint is None or len(self.local) or self.joint.gradient_filter.refused_draw is None:
            return None
        split = self.joint.layout.split(self.joint.gradient_filter.refused_draw)
        return {site.name: site.to_support(part) for site, part in split}

    def all_encoders(self) -> Iterator[Encoder]:
        """The encoders of all amortized plates."""
        for encoder in self.encoders.values():
            assert isinstance(encoder, Encoder)
            yield encoder

    def encoder(self, plate: str) -> Encoder | None:
        """The plate's encoder, if it is amortized."""
        return next((encoder for encoder in self.all_encoders() if encoder.plate == plate), None)

    def blocks(self) -> Iterator[LocalBlock]:
        """The local blocks; a block comes after its parents."""
        for block in self.local.values():
            assert isinstance(block, LocalBlock)
            yield block

    @property
    def only_block(self) -> JointBlock:
        """The joint block of a guide without local latents.

        Raises:
            ValueError: If there are local latents. Not a NotImplementedError, which NeuTraReparam would hide.
        """
        for block in self.blocks():
            raise ValueError(
                f"AutoFlowGuide: expected one flow over all latents, but those of plate {_title(block.layout)} are "
                "local, with a conditional flow for each item. For NeuTraReparam and other uses of the flow's map, run "
                'the model on its full plates and write `AutoFlowGuide(model, structure="joint")`.'
            )
        assert self.joint is not None
        return self.joint

    def parents(self, block: LocalBlock) -> list[LocalBlock]:
        """The blocks whose latents a block's items depend on."""
        return [other for other in self.blocks() if other.layout.plate_names in block.parent_names]

    @property
    def latent_dim(self) -> int:
        """Length of the joint block's vector."""
        return self.joint.layout.latent_dim if self.joint is not None else 0

    def layouts(self) -> Iterator[Layout]:
        """Layouts of all blocks, parents first."""
        if self.joint is not None:
            yield self.joint.layout
        for block in self.blocks():
            yield block.layout

    def split(self, latents: Latents) -> Iterator[tuple[Site, Tensor]]:
        """Split packed latents into the unconstrained values of each site; see :meth:`Layout.split`."""
        for layout in self.layouts():
            yield from layout.split(latents[layout.plate_names])

    @property
    def _rank(self) -> int:
        return max(layout.rank for layout in self.layouts())

    def _full_items(self, block: LocalBlock, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Item:
        """Features and site approximations of all items of the full plates; for amortized ones, of the arguments'."""
        encoded, indices = {}, {}
        for name, size in zip(block.layout.plate_names, block.layout.full_sizes, strict=True):
            encoder = self.encoder(name)
            if encoder is None:
                indices[name] = torch.arange(size)
            elif not args and not kwargs:
                raise ValueError(
                    f"AutoFlowGuide: expected the model's arguments, since plate '{name}' is amortized, but got none. "
                    "Pass them to this method, after its own arguments."
                )
            else:
                encoded[name] = encoder(args, kwargs)
        items = block.item_context(indices, encoded)
        # Items of a plate without an encoder, inside one that has one, share a context.
        lead = [block.layout.place(index.unsqueeze(-1), name).shape[:-1] for name, index in indices.items()]
        full = torch.broadcast_shapes(items.lead, *lead)
        return Item(*(part.expand(*full, -1) for part in items))

    @torch.no_grad()
    def draw(
        self, num_samples: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, repeatable: bool = False
    ) -> Latents:
        """Packed unconstrained draws over the full plates, without gradients.

        Args:
            num_samples: Number of draws S.
            args: The model's arguments, for encoders.
            kwargs: The model's keyword arguments.
            repeatable: Whether to use noise that is the same at each call and (except for mixtures) symmetric about
                zero, so that summaries are reproducible, leave the global random state alone, and have an exact median
                where a flow is affine.

        Returns:
            Names of a block's plates, ``()`` for the joint block -> its draws, ``(S, *lead, D)``.
        """
        items = {block.layout.plate_names: self._full_items(block, args, kwargs) for block in self.blocks()}
        rows = max((item.lead.numel() for item in items.values()), default=1)
        step = max(2, PLATES.max_rows // rows // 2 * 2)
        generator = torch.Generator(next(self.parameters()).device).manual_seed(0) if repeatable else None

        def draw(count: int) -> Latents:
            latents: Latents = {}
            if self.joint is not None:
                flow = self.joint.flow
                like = flow.head.raw.value.new_zeros(()).expand(count, self.latent_dim)
                joint = flow.transform.condition(None)(flow.base.sample(like, generator))
                latents[()] = joint.reshape((count,) + (1,) * self._rank + joint.shape[-1:])
            for block in self.blocks():
                own = items[block.layout.plate_names]
                shape = own.site.shape
                axis = max(range(-len(shape), -1), key=lambda dim: shape[dim])  # of the longest plate
                length = max(1, PLATES.max_rows * shape[axis] // (count * own.lead.numel()))
                pieces = []
                for first in range(0, shape[axis], length):
                    near = {names: _narrow(value, axis, first, length) for names, value in latents.items()}
                    part = Item(*(_narrow(value, axis, first, length) for value in own))
                    pieces.append(self._draw_items(block, part, near, count, generator))
                latents[block.layout.plate_names] = torch.cat(pieces, axis)
            return latents

        chunks = [
            latents
            for _, latents in in_chunks("AutoFlowGuide", num_samples, step, draw, multiple=2 if repeatable else 1)
        ]
        draws: Latents = {}
        for layout in self.layouts():
            value = torch.cat([chunk[layout.plate_names] for chunk in chunks])
            draws[layout.plate_names] = value.reshape(num_samples, *value.shape[value.dim() - 1 - layout.rank :])
        return draws

    def _draw_items(
        self, block: LocalBlock, items: Item, latents: Latents, count: int, generator: torch.Generator | None
    ) -> Tensor:
        """Packed draws of some items, ``(count, *lead, D)``."""
        distribution = block.distribution(items, latents, self.joint, self.parents(block), path_gradient=False)
        lead = distribution.batch_shape
        if len(lead) <= len(items.lead):  # nothing that was drawn is given: all draws share the context
            lead = torch.Size((count,) + (1,) * (self._rank - len(lead)) + tuple(lead))
        like = items.site.new_zeros(()).expand((*lead, block.layout.latent_dim))
        value: Tensor = distribution.transforms[0](block.flow.base.sample(like, generator))
        return value

    def _values(self, draws: Latents) -> dict[str, Tensor]:
        """Site name -> values on the supports, ``(S, *site shape)``, in the model's order."""
        values: dict[str, Tensor] = {}
        for layout in self.layouts():
            values |= layout.unpack(draws[layout.plate_names])[0]
        return {name: values[name] for name in self.order}

    def sample(self, num_samples: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Site name -> draws, ``(num_samples, *site shape)`` over the full plates."""
        return self._values(self.draw(num_samples, args, kwargs))

    @torch.no_grad()
    def quantiles(
        self, levels: Tensor, num_samples: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Site name -> quantiles of each coordinate, ``(len(levels), *site shape)``, taken in unconstrained space."""
        draws = self.draw(num_samples, args, kwargs, repeatable=True)
        for layout in self.layouts():
            draws[layout.plate_names] = layout.quantiles(draws[layout.plate_names], levels)
        return self._values(draws)

    def log_prob(self, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Log density, ``batch_shape``, of values on the supports, ``batch_shape + site shape`` for every site."""
        check_names(self.order, values)
        total = torch.zeros(())
        latents, log_dets = {}, {}
        rank = self._rank
        for layout in self.layouts():
            own = {site.name: values[site.name] for site in layout}
            latents[layout.plate_names], log_dets[layout.plate_names] = layout.pack(own, rank)
        if self.joint is not None:
            distribution = self.joint.distribution(path_gradient=False)
            density = distribution.log_prob(latents[()].to(self.joint.flow.head.raw.value))
            total = sum_rightmost(density + log_dets[()], rank)
        for block in self.blocks():
            plates, items = block.layout.plate_names, self._full_items(block, args, kwargs)
            latents[plates] = latents[plates].to(items.site)
            lead = latents[plates].shape[-items.site.dim() : -1]
            if lead != items.lead:
                raise ValueError(
                    f"AutoFlowGuide: expected values for all {tuple(items.lead)} items of "
                    f"{' and '.join(plates)}, but got {tuple(lead)}. Give every item's, in order."
                )
            distribution = block.distribution(items, latents, self.joint, self.parents(block), path_gradient=False)
            total = total + sum_rightmost(distribution.log_prob(latents[plates]) + log_dets[plates], rank)
        return total


def _key(names: tuple[str, ...]) -> str:
    """A module's name for a set of plates; the prefix avoids names of a ``ModuleDict``'s methods, such as "items"."""
    return "_".join(("plate", *names)).replace(".", "_")


def _title(layout: Layout) -> str:
    """Names of a layout's plates, for messages."""
    return " and ".join(f"'{name}'" for name in layout.plate_names)


def _full_init_loc(layout: Layout, amortized: Collection[str]) -> Tensor:
    """Initial locations of the items of the full plates, ``lead + (D,)``: the mini-batch's values, repeated."""
    init_loc = layout.init_loc
    for frame in layout.plates:
        if frame.name not in amortized:
            axis = frame.dim - 1
            index = torch.arange(full_size(frame), device=init_loc.device) % init_loc.shape[axis]
            init_loc = init_loc.index_select(axis, index)
    return init_loc


def _narrow(value: Tensor, axis: int, first: int, length: int) -> Tensor:
    """Narrow a tensor along an axis, counted from the right; unchanged if the axis is of size 1 or missing."""
    if value.dim() < -axis or value.shape[axis] == 1:
        return value
    return value.narrow(axis, first, min(length, value.shape[axis] - first))
