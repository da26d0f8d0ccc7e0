# SPDX-License-Identifier: Apache-2.0
"""L2. A model's run as a graph of operations, and what follows some of its values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_flows._random import seeded
from pyro_flows.compiled.simplify import drop_unused, merge_repeated
from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.models.covariances import RECORDING
from pyro_flows.models.layout import Layout
from pyro_flows.models.log_joint import constrain, scored_sites
from pyro_flows.models.traces import Call
from pyro_flows.models.watch import is_plain, unwrapped

__all__ = [
    "RecordedLikelihood",
    "RecordedRun",
    "RunRecorder",
    "flat",
    "is_standard_normal",
    "likelihood_of",
]


class RecordedRun(NamedTuple):
    """A recorded run of the model.

    Attributes:
        graph: From the parts of packed latents to the log density of each site, in the order of ``sites``.
        captured: The graph's further inputs.
        sites: What Pyro knows of the sites.
        normals: Names of the nodes of location and scale, for latents of one coordinate with a normal prior.
        is_live: Whether what is made of the run follows data that are changed in place.
    """

    graph: GraphModule
    captured: list[Tensor]
    sites: dict[str, dict[str, Any]]
    normals: dict[str, tuple[str, str]]
    is_live: bool

    def inputs_of(self, graph: GraphModule) -> list[Tensor]:
        """The captured tensors that a part of the graph uses, copied unless they are to be followed; the inputs of the
        others, which may be large data, are dropped."""
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        inputs = placeholders[len(placeholders) - len(self.captured) :]
        kept = [value for node, value in zip(inputs, self.captured, strict=True) if node.users]
        for node in inputs:
            if not node.users:
                graph.graph.erase_node(node)
        graph.recompile()
        return kept if self.is_live else [value.clone() for value in kept]

    def without(self, names: Collection[str], more: Sequence[str] = ()) -> tuple[GraphModule, list[Node]]:
        """A copy of the graph without the log densities of some sites, and with further nodes of these names."""
        graph = copy.deepcopy(self.graph)
        nodes = {node.name: node for node in graph.graph.nodes}
        *_, output = graph.graph.nodes
        log_densities = zip(self.sites, output.args[0], strict=True)
        kept = [log_density for other, log_density in log_densities if other not in names]
        output.args = ((*kept, *(nodes[name] for name in more)),)
        drop_unused(graph)
        return graph, [nodes[name] for name in more]


class RecordedLikelihood:
    """What follows the predictors: the log density of all other sites, given these.

    Args:
        graph: From the values of the predictors, and the parts of packed latents, to log densities of sites.
        captured: The graph's further inputs.
        sizes: Lengths of the parts.
        shapes: Shapes of the predictors, as the model has them.
        like: A tensor of the dtype and on the device of the recording.
    """

    def __init__(
        self,
        graph: GraphModule,
        captured: Sequence[Tensor],
        sizes: Sequence[int],
        shapes: Sequence[torch.Size],
        like: Tensor,
    ) -> None:
        self._graph = graph
        self._captured = tuple(captured)
        self._sizes = [*sizes]
        self._shapes = [*shapes]
        self._like = like.new_zeros(())

    def __call__(self, packed: Tensor, predictors: Tensor) -> Tensor:
        """``(S,)`` at packed latents, ``(S, D)``, and predictors, ``(S, K)``; differentiable."""

        def one(packed: Tensor, predictors: Tensor) -> Tensor:
            values = predictors.split([shape.numel() for shape in self._shapes])
            shaped = [value.reshape(shape) for value, shape in zip(values, self._shapes, strict=True)]
            return torch.stack(self._graph(*shaped, *packed.split(self._sizes), *self._captured)).sum()

        return torch.vmap(one)(packed.to(self._like), predictors.to(self._like)).to(packed)


class RunRecorder:
    """Records runs of a model at points about the initial location, of which the first is kept.

    Attributes:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the sites.
        points: The points, packed, ``(N, D)``.
        live: Whether what is made of a run follows data that are changed in place. Otherwise it has copies.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        *,
        live: bool = False,
    ) -> None:
        self.live = live
        self.model, self.args, self.kwargs, self.layout = model, args, kwargs, layout
        with seeded(0):
            noise = torch.randn(RECORDING.num_points, layout.latent_dim).to(layout.init_loc)
        self.points = layout.init_loc + RECORDING.spread * noise
        self._first: RecordedRun | None = None
        self._is_recorded = False

    def first(self) -> RecordedRun | None:
        """The run at the first point; None if it cannot be recorded."""
        if not self._is_recorded:
            self._is_recorded = True
            # A model may raise anything at unlikely values, and reads of values are refused.
            with suppress(Exception):
                self._first = self.at(self.points[0])
        return self._first

    def at(self, point: Tensor) -> RecordedRun:
        """A run at a point, ``(D,)``.

        Raises:
            Exception: What the model raises, or if it cannot be recorded.
        """
        sites: dict[str, dict[str, Any]] = {}
        normals: list[str] = []

        def log_densities(*parts: Tensor) -> list[Tensor]:
            sites.update(self.scored(parts))
            normals.extend(name for name in self.layout.names if _is_normal(sites[name]))
            fns = [unwrapped(sites[name]["fn"]) for name in normals]
            log_densities = [node["log_prob"].sum() for node in sites.values()]
            return [*log_densities, *(fn.loc for fn in fns), *(fn.scale for fn in fns)]

        parts = [part.clone() for part in point.split(self.layout.sizes)]
        with seeded(0), pyro.validation_enabled(False):
            graph, captured, _ = trace_operations(log_densities, parts)
        for node, part in zip(graph.graph.nodes, parts):  # those of captured tensors are longer
            node.meta["shape"] = part.shape
        merge_repeated(graph)
        *_, output = graph.graph.nodes
        found = output.args[0]
        output.args = (found[: len(sites)],)
        locs, scales = found[len(sites) :][: len(normals)], found[len(sites) :][len(normals) :]
        pairs = zip(normals, zip(locs, scales, strict=True), strict=True)
        names = {name: (loc.name, scale.name) for name, (loc, scale) in pairs}
        return RecordedRun(graph, captured, sites, names, self.live)

    def scored(self, parts: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
        """The sites of a run of the model itself, by name, with their ``log_prob``, at parts of packed latents."""
        values, _ = constrain(self.layout.split(parts))
        return {node["name"]: node for node in scored_sites(self.model, values, Call(self.args, self.kwargs))}


def _is_normal(node: Mapping[str, Any]) -> bool:
    fn = unwrapped(node["fn"])
    return is_plain(node) and type(fn) is dist.Normal and fn.loc.numel() == fn.scale.numel() == 1


def is_standard_normal(node: Mapping[str, Any]) -> bool:
    """Whether a site of a run has independent standard normal coordinates, and no scale or mask."""
    fn = unwrapped(node["fn"])
    return is_plain(node) and type(fn) is dist.Normal and not fn.loc.any() and bool((fn.scale == 1.0).all())


def likelihood_of(
    run: RecordedRun, graph: GraphModule, predictors: Sequence[Node], layout: Layout, like: Tensor
) -> RecordedLikelihood:
    """The log densities of a run's graph given some of its values.

    Args:
        run: The run.
        graph: Its graph, or a part of it.
        predictors: Nodes of the values, by the names that they have there.
        layout: The sites.
        like: A tensor of the dtype and on the device of the recording.
    """
    graph = copy.deepcopy(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    first = next(iter(graph.graph.nodes))
    shapes = []
    for predictor in predictors:
        node = nodes[predictor.name]
        with graph.graph.inserting_before(first):
            given = graph.graph.placeholder(f"given_{node.name}")
        node.replace_all_uses_with(given)
        shapes.append(predictor.meta["shape"])
    drop_unused(graph)
    return RecordedLikelihood(graph, run.inputs_of(graph), layout.sizes, shapes, like)


def flat(values: Sequence[Tensor]) -> Tensor:
    """Tensors of any shapes as one vector, ``(K,)``."""
    return torch.cat([value.reshape(-1) for value in values])
