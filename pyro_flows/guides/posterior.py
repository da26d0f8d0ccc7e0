# SPDX-License-Identifier: Apache-2.0
"""L3. The guide's distribution as a module: a joint block, one local block per set of local plates, and encoders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_flows.flows import DiagonalNormal, FlowSpec, Mixture
from pyro_flows.flows.bases import resolve_base
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.guides.amortize import Encoder, probe
from pyro_flows.guides.joint import JointBlock
from pyro_flows.guides.local import LocalBlock
from pyro_flows.guides.step_limit import StepLimit
from pyro_flows.models.plates import LocalTable, partition
from pyro_flows.models.priors import read_joint_prior, read_prior
from pyro_flows.models.sites import Site, SiteTable, decreasing, quantiles

__all__ = ["Posterior"]

# Items of a mini-batch, beyond which each has a Gaussian in place of a flow: a network of every item would cost a
# hundred times what AutoNormal does.
MAX_FLOWS = 20_000
# Draws times items that are in flight at once in summaries.
MAX_ROWS = 2**18

Latents = dict[tuple[str, ...], Tensor]


class Posterior(nn.Module):
    """q(globals) times, for each set of local plates, q(an item's latents | globals, its parents).

    Args:
        model: The model.
        trace: Its latent sites, from one run.
        spec: Recipe of every block's flow.
        init_scale: Standard deviation at the start, > 0.
        local: Names of the local plates.
        amortize: Plate -> encoder, for the amortized ones among them.
        args: The model's arguments, which tell what the encoders return.
        kwargs: Likewise.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        trace: Trace,
        spec: FlowSpec,
        init_scale: float,
        *,
        local: Collection[str],
        amortize: Mapping[str, Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        sites = SiteTable.from_trace(trace)
        outside, tables = partition(sites, local)
        if tables and isinstance(resolve_base("AutoFlowGuide", spec.base), Mixture):
            plates = " and ".join(f"'{name}'" for name in tables[0].names)
            raise NotImplementedError(
                f"AutoFlowGuide: expected a normal or Student-t base, since site '{tables[0].sites[0].name}' in plate "
                f"{plates} has a flow of its own for each item, but got {spec.base!r}. Leave base out, or run the "
                'model on its full plates and write AutoFlowGuide(model, flow=..., structure="joint").'
            )
        self.order = tuple(site.name for site in sites)
        self.joint: JointBlock | None = None
        if outside:
            table = _subtable(trace, outside)
            # A single global under a family of two dimensions or more: as in `FlowSpec.build_local`.
            small = bool(tables) and table.latent_dim < spec.min_dim
            joint_spec = DiagonalNormal(base=spec.base) if small else spec
            prior = read_joint_prior(model, args, kwargs, table) if joint_spec.knows_priors else None
            self.joint = JointBlock(table, joint_spec, init_scale, prior=prior)
        self.encoders = nn.ModuleDict({_key((plate,)): Encoder(plate, f) for plate, f in amortize.items()})
        widths = {encoder.plate: probe(encoder, args, kwargs) for encoder in self._encoders()}
        self.local = nn.ModuleDict()
        starts = {table.names: _batch_start(table, trace) for table in tables}
        for own in tables:
            encoder_dims = [widths[name] for name in own.names if name in widths]
            parents = [block for block in self.blocks() if set(block.table.names) < set(own.names)]
            prior = read_prior(
                model,
                args,
                kwargs,
                own,
                starts[own.names],
                None if self.joint is None else self.joint.table,
                [parent.table for parent in parents],
                [starts[parent.table.names] for parent in parents],
            )
            self.local[_key(own.names)] = LocalBlock(
                own,
                spec,
                _full_start(own, starts[own.names], amortized=frozenset(widths)),
                init_scale,
                joint=self.joint,
                parents=parents,
                encoder_dim=sum(encoder_dims) if encoder_dims else None,
                prior=prior,
                is_long=not encoder_dims and starts[own.names].shape[:-1].numel() > MAX_FLOWS,
            )
        # The filters of all blocks' gradients.
        self.filters = tuple(part for part in self.modules() if isinstance(part, GradientFilter))
        self.step_limit = StepLimit(self, self.filters)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, after the last step was limited."""
        self.step_limit.apply()
        return super().state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "step_limit"):
            self.step_limit.forget()  # parameters have another dtype or device afterwards
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.step_limit.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def refused_values(self) -> dict[str, Tensor] | None:
        """Values of the first draw whose gradient was not finite, in a guide without local latents; None elsewhere."""
        if self.joint is None or len(self.local) or self.joint.gradient_filter.refused_draw is None:
            return None
        split = self.joint.table.split(self.joint.gradient_filter.refused_draw)
        return {site.name: site.to_support(part) for site, part in split}

    def _encoders(self) -> Iterator[Encoder]:
        for encoder in self.encoders.values():
            assert isinstance(encoder, Encoder)
            yield encoder

    def encoder(self, plate: str) -> Encoder | None:
        """The plate's encoder, if it is amortized."""
        return next((encoder for encoder in self._encoders() if encoder.plate == plate), None)

    def blocks(self) -> Iterator[LocalBlock]:
        """The local blocks; parents come before those who condition on them."""
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
                f"AutoFlowGuide: expected one flow over all latents, but those of plate {_title(block)} are local, "
                "with a conditional flow for each item. For NeuTraReparam and other uses of the flow's map, run the "
                'model on its full plates and write `AutoFlowGuide(model, structure="joint")`.'
            )
        assert self.joint is not None
        return self.joint

    def parents(self, block: LocalBlock) -> list[LocalBlock]:
        """The blocks whose latents a block's items are given."""
        return [other for other in self.blocks() if other.table.names in block.parent_names]

    @property
    def latent_dim(self) -> int:
        """Length of the joint block's vector."""
        return self.joint.table.latent_dim if self.joint is not None else 0

    @property
    def _rank(self) -> int:
        return max((block.table.rank for block in self.blocks()), default=0)

    def _full_items(self, block: LocalBlock, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Context of all items that the arguments speak of."""
        encoded, indices = {}, {}
        for name, size in zip(block.table.names, block.table.full_sizes, strict=True):
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
        return block.item_context(indices, encoded)

    @torch.no_grad()
    def draw(
        self, num_samples: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, repeatable: bool = False
    ) -> Latents:
        """Packed unconstrained draws over the full plates, without gradients.

        Args:
            num_samples: Number of draws S.
            args: The model's arguments, for encoders.
            kwargs: Likewise.
            repeatable: Use noise that is the same at each call and (but for a mixture) symmetric about zero, so that
                summaries repeat, leave the global random state alone, and have an exact median where a flow is affine.

        Returns:
            ``(S, latent_dim)`` under ``()``, and ``(S, *lead, item_dim)`` under each local block's plates.
        """
        items = {block.table.names: self._full_items(block, args, kwargs) for block in self.blocks()}
        rows = max((item.shape[:-1].numel() for item in items.values()), default=1)
        step = max(2, MAX_ROWS // rows // 2 * 2)
        generator = torch.Generator(next(self.parameters()).device).manual_seed(0) if repeatable else None
        chunks: list[Latents] = []
        for start in range(0, num_samples, step):
            count = min(step, num_samples - start)
            latents: Latents = {}
            if self.joint is not None:
                flow = self.joint.flow
                like = flow.head.raw.value.new_zeros(()).expand(count, self.latent_dim)
                joint = flow.transform.condition(None)(flow.base.sample(like, generator))
                latents[()] = joint.reshape((count,) + (1,) * self._rank + joint.shape[-1:])
            for block in self.blocks():
                own = items[block.table.names]
                axis = max(range(-own.dim(), -1), key=lambda dim: own.shape[dim])  # of the longest plate
                length = max(1, MAX_ROWS * own.shape[axis] // (count * own.shape[:-1].numel()))
                pieces = []
                for first in range(0, own.shape[axis], length):
                    given = {names: _narrow(value, axis, first, length) for names, value in latents.items()}
                    pieces.append(self._draw_items(block, _narrow(own, axis, first, length), given, count, generator))
                latents[block.table.names] = torch.cat(pieces, axis)
            chunks.append(latents)
        draws = {names: torch.cat([chunk[names] for chunk in chunks]) for names in chunks[0]}
        if () in draws:
            draws[()] = draws[()].reshape(num_samples, -1)
        return draws

    def _draw_items(
        self, block: LocalBlock, items: Tensor, latents: Latents, count: int, generator: torch.Generator | None
    ) -> Tensor:
        """So many packed draws of items with these contexts, ``(count, *lead, item_dim)``."""
        distribution = block.distribution(items, latents, self.joint, self.parents(block), path_gradient=False)
        lead = distribution.batch_shape
        if len(lead) <= items.dim() - 1:  # nothing that was drawn is given: all draws share the context
            lead = torch.Size((count,) + (1,) * (self._rank - len(lead)) + tuple(lead))
        like = items.new_zeros(()).expand((*lead, block.table.item_dim))
        value: Tensor = distribution.transforms[0](block.flow.base.sample(like, generator))
        return value

    def _values(self, draws: Latents) -> dict[str, Tensor]:
        """Site name -> values on the supports, ``(S, *site shape)``, in the model's order."""
        values = self.joint.table.unpack(draws[()]) if self.joint is not None else {}
        for block in self.blocks():
            packed = draws[block.table.names]
            packed = packed.reshape(packed.shape[:1] + packed.shape[1 + self._rank - block.table.rank :])
            for site, unconstrained in block.table.split(packed):
                extra_rank = unconstrained.dim() - 1 - len(site.unconstrained_shape)
                shape = unconstrained.shape[:1] + unconstrained.shape[1 + extra_rank :]
                values[site.name] = site.to_support(unconstrained.reshape(shape))
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
        tables: list[tuple[tuple[str, ...], tuple[Site, ...]]] = [(b.table.names, b.table.sites) for b in self.blocks()]
        if self.joint is not None:
            tables.append(((), self.joint.table.sites))
        for names, sites in tables:
            draws[names] = quantiles(draws[names], levels.to(draws[names]), decreasing(sites).to(draws[names].device))
        return self._values(draws)

    def log_prob(self, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Log density, ``batch_shape``, of values on the supports, ``batch_shape + site shape`` for every site."""
        if set(values) != set(self.order):
            missing, unknown = sorted(set(self.order) - set(values)), sorted(set(values) - set(self.order))
            raise ValueError(
                f"AutoFlowGuide: expected a value for each of the latent sites {sorted(self.order)}, but "
                f"missing are {missing} and unknown are {unknown}."
            )
        total = torch.zeros(())
        latents: Latents = {}
        rank = self._rank
        if self.joint is not None:
            packed, ladj = self.joint.table.pack({site.name: values[site.name] for site in self.joint.table})
            distribution = self.joint.distribution(path_gradient=False)
            total = distribution.log_prob(packed.to(self.joint.flow.head.raw.value)) + ladj
            latents[()] = packed.reshape(packed.shape[:-1] + (1,) * rank + packed.shape[-1:])
        for block in self.blocks():
            own = self._full_items(block, args, kwargs)
            packed, ladj = block.table.pack(values, rank)
            packed = packed.to(own)
            lead = packed.shape[packed.dim() - 1 - rank : -1]
            if lead[rank - own.dim() + 1 :] != own.shape[:-1]:
                raise ValueError(
                    f"AutoFlowGuide: expected values for all {tuple(own.shape[:-1])} items of "
                    f"{' and '.join(block.table.names)}, but got {tuple(lead)}. Give every item's, in order."
                )
            latents[block.table.names] = packed
            distribution = block.distribution(own, latents, self.joint, self.parents(block), path_gradient=False)
            density = distribution.log_prob(packed) + ladj
            total = total + density.sum(tuple(range(-rank, 0)))
        return total


def _key(names: tuple[str, ...]) -> str:
    """A module's name for a set of plates; the prefix keeps a plate named "items" apart from a dictionary's method."""
    return "_".join(("plate", *names)).replace(".", "_")


def _title(block: LocalBlock) -> str:
    """A block's plates as messages name them."""
    return " and ".join(f"'{name}'" for name in block.table.names)


def _subtable(trace: Trace, sites: list[Site]) -> SiteTable:
    part = trace.copy()
    for name in list(part.nodes):
        if name not in {site.name for site in sites}:
            part.remove_node(name)
    return SiteTable.from_trace(part)


def _batch_start(table: LocalTable, trace: Trace) -> Tensor:
    """Where the items of the mini-batch start, ``lead + (item_dim,)``."""
    values = {site.name: trace.nodes[site.name]["value"].detach() for site in table.sites}
    return table.pack(values, table.rank)[0]


def _full_start(table: LocalTable, start: Tensor, amortized: Collection[str]) -> Tensor:
    """Where the items of the full plates start: the mini-batch's values, repeated."""
    for name, dim, size in zip(table.names, table.dims, table.full_sizes, strict=True):
        axis = start.dim() - 1 + dim
        if name not in amortized:
            start = start.index_select(axis, torch.arange(size, device=start.device) % start.shape[axis])
    return start


def _narrow(value: Tensor, axis: int, first: int, length: int) -> Tensor:
    """A part along an axis, counted from the right; all of it where the axis is of size 1 or missing."""
    if value.dim() < -axis or value.shape[axis] == 1:
        return value
    return value.narrow(axis, first, min(length, value.shape[axis] - first))
