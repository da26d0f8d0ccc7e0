# SPDX-License-Identifier: Apache-2.0
"""L2. Structure of a model and a guide, read off their runs: latents and their layout, plates, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform, identity_transform

from pyro_flows._checks import check_call
from pyro_flows.models.checks import check_guide, check_latents, first_run
from pyro_flows.models.enumeration import check_enumeration
from pyro_flows.models.layout import Layout
from pyro_flows.models.sites import Site, full_size
from pyro_flows.models.traces import Call, mini_batches, nesting_of, sample_nodes

__all__ = ["Structure", "common_plate", "read_structure"]


@dataclass(frozen=True, eq=False)
class Structure:
    """Structure of a model and a guide, known before any importance weights are computed.

    Attributes:
        layout: Layout of the model's latent sites that the guide draws, in the model's order, by :attr:`items`.
        nesting: Number of batch dimensions in use.
        subsampled: Names of the subsampled plates.
        is_continuous: Whether all latents have an unconstrained space.
        enumerates: Whether the model has discrete sites to be summed out.
        indices: Plate of the model -> indices of its mini-batch in the run that was read.
        elements: Approximate number of elements of the tensors of one draw.
    """

    layout: Layout
    nesting: int
    subsampled: tuple[str, ...]
    is_continuous: bool
    enumerates: bool
    indices: Mapping[str, Any]
    elements: int

    @property
    def latents(self) -> tuple[Site, ...]:
        """The sites of the layout."""
        return self.layout.sites

    @property
    def items(self) -> CondIndepStackFrame | None:
        """The plate that every site is in, over which the log weights factorize; None if there is none."""
        return next(iter(self.layout.plates), None)

    @property
    def num_items(self) -> int:
        """Number of items N; 1 where the log weights do not factorize."""
        return self.layout.num_items

    @property
    def item_dim(self) -> int:
        """Number of unconstrained dimensions of an item (of all latents where there are no items)."""
        return self.layout.latent_dim

    def item_axis(self, latent: Site) -> int | None:
        """Axis of the items in a latent's value, constrained or not; None where there are no items."""
        return None if self.items is None else latent.batch_rank + self.items.dim

    def per_draw(self, log_prob: Tensor, count: int) -> Tensor:
        """Sum the log density of a site, with draws in the outermost plate (if any), to ``(count, N)`` in float64."""
        rank = self.nesting + 1
        log_prob = log_prob.double().reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
        keep = [0] if self.items is None else [0, rank + self.items.dim]
        dims = [i for i in range(rank) if i not in keep]
        summed = log_prob.sum(dims) if dims else log_prob
        return summed.reshape(len(summed), -1).expand(count, self.num_items)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Map values ``(S, *shape)`` to unconstrained vectors ``(S, N, item_dim)``; discrete values are unchanged."""
        unconstrained = {site.name: site.to_support.inv(values[site.name]) for site in self.latents}
        packed = self.layout.pack_unconstrained(unconstrained)
        return packed.reshape(len(packed), self.num_items, self.item_dim)

    def unpack(self, packed: Tensor | Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Invert :meth:`pack`, from the vectors or their parts; also ``log|det d values / d packed|``, ``(S, N)``."""
        lead = (self.num_items,) + (1,) * (self.layout.rank - 1) if self.layout.plates else ()
        parts = packed.split(self.layout.sizes, -1) if isinstance(packed, Tensor) else packed
        values, log_det = self.layout.unpack([part.reshape(len(part), *lead, part.shape[-1]) for part in parts])
        return values, log_det.reshape(-1, self.num_items)


@torch.no_grad()
def read_structure(
    owner: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Structure:
    """Read the structure off two runs of the guide and one of the model.

    Raises:
        NotImplementedError: If the guide is a point mass at a site, enumerates, or leaves a latent out; if the model
            enumerates sequentially, or scales an enumerated site.
        TypeError: If the model or the guide does not take these arguments.
        ValueError: If the two were swapped, or the guide is for another model or for data of another size.
    """
    for name, program in (("model", model), ("guide", guide)):
        check_call(owner, name, program, args, kwargs)
    with poutine.block(), pyro.validation_enabled(False):  # only the structure is read
        guide_trace, again = (poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(2))
    check_guide(owner, sample_nodes(guide_trace))
    drawn = {name: node for name, node in sample_nodes(guide_trace).items() if not node["is_observed"]}
    _check_guide(owner, drawn, again)
    call = Call(args, kwargs, mini_batches(guide_trace))
    draws = [{name: found.nodes[name]["value"] for name in drawn} for found in (guide_trace, again)]
    with pyro.validation_enabled(False):
        trace = first_run(owner, model, call, draws)
    nodes = sample_nodes(trace)
    check_latents(owner, nodes, drawn)
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
                f"{owner}: expected the guide to draw latent site '{name}', but it does not. If it is data, pass "
                "them: args=(y,). Else add the site to the guide or, if it is discrete, mark it: `model = "
                "config_enumerate(model)`."
            )
    check_enumeration(owner, nodes)
    items = None if subsampled else common_plate(frames)
    bijections = {name: _bijection(nodes[name]["fn"].support) for name in latents}
    sites = [Site.read(nodes[name], identity_transform if f is None else f) for name, f in bijections.items()]
    return Structure(
        layout=Layout(sites, () if items is None else (items,)),
        nesting=nesting_of((*drawn.values(), *nodes.values())),
        subsampled=tuple(sorted(subsampled)),
        is_continuous=all(found is not None for found in bijections.values()),
        enumerates=bool(enumerated),
        indices=mini_batches(trace),
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
    """The largest plate that every site is in: log densities are then sums over independent items."""
    common = set.intersection(*({(f.name, f.dim, f.size) for f in stack} for stack in frames))
    largest = max(common, key=lambda plate: plate[2], default=None)
    if largest is None or largest[2] < 2:
        return None
    return next(f for f in frames[0] if f.name == largest[0])


def _bijection(support: Any) -> Transform | None:
    """Bijection from unconstrained space to a support; None if there is none, as for discrete sites."""
    if type(support).__name__ == "MixtureSameFamilyConstraint":  # unknown to biject_to, unlike its components'
        support = support.base_constraint
    try:
        return biject_to(support)
    except NotImplementedError:
        return None
