# SPDX-License-Identifier: Apache-2.0
"""L2. What a run of the guide and one of the model tell: latents and their layout, plates, and what has no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_flows.models.enumeration import check_enumeration
from pyro_flows.models.plates import full_size
from pyro_flows.models.traces import sample_nodes

__all__ = ["Latent", "Structure", "common_plate", "read_structure"]


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent site of the model.

    Attributes:
        name: Its name.
        shape: Shape of its value in one run, batch dimensions first.
        event_dim: Number of event dimensions of its value.
        item_axis: Which axis of ``shape`` runs along the items; None where there are none.
        to_support: The bijection from unconstrained values; None for a discrete site and its like.
        unconstrained_shape: Shape of its unconstrained value; empty without a bijection.
    """

    name: str
    shape: torch.Size
    event_dim: int
    item_axis: int | None
    to_support: Transform | None
    unconstrained_shape: torch.Size

    def unconstrain(self, values: Tensor) -> Tensor:
        """``(S, *shape)`` to ``(S, *unconstrained_shape)``; as it is where there is no bijection."""
        return values if self.to_support is None else self.to_support.inv(values)

    def by_item(self, values: Tensor) -> Tensor:
        """``(S, *shape)``, constrained or not, to ``(S, N, size of an item)``."""
        if self.item_axis is None:
            return values.reshape(len(values), 1, -1)
        return values.movedim(1 + self.item_axis, 1).flatten(2) if values.dim() > 2 else values.unsqueeze(-1)

    @property
    def item_size(self) -> int:
        """Number of unconstrained coordinates of an item."""
        items = 1 if self.item_axis is None else self.unconstrained_shape[self.item_axis]
        return math.prod(self.unconstrained_shape) // max(items, 1)

    def from_items(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """``(S, N, item_size)`` to values ``(S, *shape)`` and log-determinants ``(S, N)``."""
        assert self.to_support is not None
        shape = list(self.unconstrained_shape)
        if self.item_axis is None:
            unconstrained = packed.reshape(len(packed), *shape)
        else:
            items = shape.pop(self.item_axis)
            unconstrained = packed.reshape(len(packed), items, *shape).movedim(1, 1 + self.item_axis)
        value = self.to_support(unconstrained)
        ladj = self.to_support.log_abs_det_jacobian(unconstrained, value)
        ladj = sum_rightmost(ladj, ladj.dim() - value.dim() + self.event_dim)  # (S, *batch)
        return value, self.by_item(ladj).sum(-1)


@dataclass(frozen=True, eq=False)
class Structure:
    """What is known of a model and a guide before any weights are computed.

    Attributes:
        latents: The model's latent sites that the guide draws, in the model's order.
        guide_shapes: Shape of each sample site of the guide in one run.
        nesting: Number of batch dimensions in use.
        items: The plate that every site is in, over which the log weights fall apart; None if there is none.
        subsampled: Names of the plates that take mini-batches.
        enumerates: Whether the model has discrete sites to be summed out.
        indices: The mini-batch of each plate of the model in the run that was looked at.
        elements: Numbers that one draw takes, roughly.
    """

    latents: tuple[Latent, ...]
    guide_shapes: Mapping[str, torch.Size]
    nesting: int
    items: CondIndepStackFrame | None
    subsampled: tuple[str, ...]
    enumerates: bool
    indices: Mapping[str, Any]
    elements: int

    @property
    def num_items(self) -> int:
        """Number of items N; 1 where the log weights do not fall apart."""
        return 1 if self.items is None else int(self.items.size)

    @property
    def item_dim(self) -> int:
        """Unconstrained dimensions of an item (of all latents where there are no items)."""
        return sum(latent.item_size for latent in self.latents)

    @property
    def is_continuous(self) -> bool:
        """Whether all latents have an unconstrained space."""
        return all(latent.to_support is not None for latent in self.latents)

    def lead(self, latent: Latent, values: Tensor) -> Tensor:
        """``(S, *shape)`` as a site of that many draws in the outermost plate."""
        fill = self.nesting - len(latent.shape) + latent.event_dim
        return values.reshape(len(values), *(1,) * fill, *latent.shape)

    def per_draw(self, log_prob: Tensor, count: int) -> Tensor:
        """Log density of a site, draws in the outermost plate (if any), to float64 sums of shape ``(count, N)``."""
        rank = self.nesting + 1
        log_prob = log_prob.double().reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
        keep = [0] if self.items is None else [0, rank + self.items.dim]
        dims = [i for i in range(rank) if i not in keep]
        summed = log_prob.sum(dims) if dims else log_prob
        return summed.reshape(len(summed), -1).expand(count, self.num_items)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained vectors ``(S, N, item_dim)`` of values ``(S, *shape)``."""
        return torch.cat([site.by_item(site.unconstrain(values[site.name])) for site in self.latents], -1)

    def unpack(self, packed: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Invert :meth:`pack`; also ``log|det d values / d packed|``, ``(S, N)``."""
        values, total = {}, packed.new_zeros(packed.shape[:2])
        parts = packed.split([latent.item_size for latent in self.latents], -1)
        for latent, part in zip(self.latents, parts, strict=True):
            values[latent.name], ladj = latent.from_items(part)
            total = total + ladj
        return values, total


@torch.no_grad()
def read_structure(
    owner: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Structure:
    """Run the guide twice and the model once.

    Raises:
        NotImplementedError: If the guide holds a site at a point, enumerates, or leaves a latent out; if the model
            enumerates what is scaled, or one value after another.
        TypeError: If ``args`` is not a tuple.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"{owner}: expected args to be a tuple, but got a {type(args).__name__}. Write args=(x,).")
    with poutine.block(), pyro.validation_enabled(False):  # only the structure is looked at
        guide_trace, again = (poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(2))
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    drawn = {name: node for name, node in sample_nodes(guide_trace).items() if not node["is_observed"]}
    _check_guide(owner, drawn, again)
    nodes = sample_nodes(trace)
    frames = [[f for f in node["cond_indep_stack"] if f.vectorized] for node in (*drawn.values(), *nodes.values())]
    subsampled = {f.name for stack in frames for f in stack if full_size(f) > f.size}
    latents, enumerated = [], []
    for name, node in nodes.items():
        if node["is_observed"]:
            continue
        if name in drawn:
            latents.append(name)
        elif node["infer"].get("enumerate") == "parallel":
            enumerated.append(name)
        else:
            raise NotImplementedError(
                f"{owner}: expected the guide to draw latent site '{name}', but it does not. Add the site to the guide"
                " or, if it is discrete, mark it: `model = config_enumerate(model)`."
            )
    check_enumeration(owner, nodes)
    items = None if subsampled else common_plate(frames)
    return Structure(
        latents=tuple(_latent(nodes[name], items) for name in latents),
        guide_shapes={name: node["value"].shape for name, node in drawn.items()},
        nesting=max((-f.dim for stack in frames for f in stack), default=0),
        items=items,
        subsampled=tuple(sorted(subsampled)),
        enumerates=bool(enumerated),
        indices={name: node["value"] for name, node in trace.nodes.items() if site_is_subsample(node)},
        elements=sum(math.prod(node["fn"].shape()) for node in (*drawn.values(), *nodes.values())),
    )


def _check_guide(owner: str, drawn: Mapping[str, dict[str, Any]], again: Trace) -> None:
    if not drawn:
        raise NotImplementedError(f"{owner}: expected a guide that draws latent sites, but it draws none.")
    for name, node in drawn.items():
        if node["infer"].get("enumerate"):
            raise NotImplementedError(
                f"{owner}: expected a guide without enumerated sites, but '{name}' is one. Mark the site in the model "
                "instead, and leave it out of the guide."
            )
        is_point = isinstance(node["fn"], dist.Delta) and torch.equal(node["value"], again.nodes[name]["value"])
        if is_point and node["value"].numel():
            raise NotImplementedError(
                f"{owner}: expected the guide to have a density, but it holds site '{name}' at a point, as AutoDelta "
                "does, so that there is no ELBO to compare with the evidence. Use AutoNormal or AutoFlowGuide for the "
                f"site, or take it as known: `poutine.condition(model, data={{'{name}': value}})`."
            )


def common_plate(frames: list[list[CondIndepStackFrame]]) -> CondIndepStackFrame | None:
    """The largest plate that every site is in: given it, densities are sums over items that share nothing."""
    common = set.intersection(*({(f.name, f.dim, f.size) for f in stack} for stack in frames))
    largest = max(common, key=lambda plate: plate[2], default=None)
    if largest is None or largest[2] < 2:
        return None
    return next(f for f in frames[0] if f.name == largest[0])


def _latent(node: dict[str, Any], items: CondIndepStackFrame | None) -> Latent:
    value, event_dim = node["value"], node["fn"].event_dim
    support = node["fn"].support
    if type(support).__name__ == "MixtureSameFamilyConstraint":  # that of its components, unknown to biject_to
        support = support.base_constraint
    try:
        to_support = biject_to(support)
        unconstrained_shape = to_support.inv(value).shape
    except NotImplementedError:
        to_support, unconstrained_shape = None, torch.Size()
    return Latent(
        name=node["name"],
        shape=value.shape,
        event_dim=event_dim,
        item_axis=None if items is None else value.dim() - event_dim + items.dim,
        to_support=to_support,
        unconstrained_shape=unconstrained_shape,
    )
