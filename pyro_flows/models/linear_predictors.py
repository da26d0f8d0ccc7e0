# SPDX-License-Identifier: Apache-2.0
"""L2. Linear predictors: what the data see of a standard normal latent, as functions that are affine in it given the
other latents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from pyro_flows.compiled.affine import AffineParts
from pyro_flows.compiled.simplify import drop_unused
from pyro_flows.compiled.tracer import LEARNED
from pyro_flows.models.covariances import RECORDING, parents_of
from pyro_flows.models.layout import Layout
from pyro_flows.models.recorded_run import (
    RecordedLikelihood,
    RecordedRun,
    RunRecorder,
    flat,
    is_standard_normal,
    likelihood_of,
)
from pyro_flows.models.sites import Site
from pyro_flows.transforms import LinearPredictor

__all__ = [
    "LINEAR_PREDICTORS",
    "ReadLinearPredictor",
    "RecordedLinearPredictor",
    "read_linear_predictor",
]


@dataclass(frozen=True)
class LinearPredictorSettings:
    """Which predictors are read.

    Attributes:
        max_dim: Largest number n of coordinates of the site.
        max_predictors: Largest number K of predictors: a draw takes memory and time for K n slopes.
        max_others: Largest number of other coordinates: of more, a normal for all together is as good, and sooner.
    """

    max_dim: int = 256
    max_predictors: int = 256
    max_others: int = 32


LINEAR_PREDICTORS = LinearPredictorSettings()


class RecordedLinearPredictor:
    """Offset and slope of the predictors, by the model's own operations, without its Python.

    Data that the model reads are those of the recording, as are dtype and device of the operations. What is not finite
    is replaced by zero.

    Args:
        graph: From a direction, ``(n,)``, and the parts of packed latents to values of the predictors, where z is zero,
            and to their changes along the direction; a tuple of tensors of any shapes each.
        captured: The graph's further inputs.
        sizes: Lengths of the parts.
        dim: Number n of coordinates of the site.
        like: A tensor of the dtype and on the device of the recording.
    """

    def __init__(
        self, graph: GraphModule, captured: Sequence[Tensor], sizes: Sequence[int], dim: int, like: Tensor
    ) -> None:
        self._graph = graph
        self._captured = tuple(captured)
        self._sizes = [*sizes]
        self._dim = dim
        self._like = like.new_zeros(())

    def __call__(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., K)`` and ``(..., K, n)`` at packed latents, ``(..., D)``; differentiable."""
        units = torch.eye(self._dim, dtype=self._like.dtype, device=self._like.device)

        def one(packed: Tensor) -> tuple[Tensor, Tensor]:
            parts = packed.split(self._sizes)

            def along(unit: Tensor) -> tuple[Tensor, Tensor]:
                offsets, changes = self._graph(unit, *parts, *self._captured)
                return flat(offsets), flat(changes)

            offsets, slope = torch.vmap(along, out_dims=(0, 1))(units)
            offset = offsets[0]  # the same along all units, and computed once
            return offset.nan_to_num(0.0, 0.0, 0.0), slope.nan_to_num(0.0, 0.0, 0.0)

        given = packed.to(self._like)
        if packed.dim() == 1:
            offset, slope = one(given)
        else:
            offset, slope = torch.vmap(one)(given.reshape(-1, packed.shape[-1]))
            offset, slope = (part.unflatten(0, packed.shape[:-1]) for part in (offset, slope))
        return offset.to(packed), slope.to(packed)

    def slopes(self, packed: Tensor) -> tuple[Tensor]:
        """The slopes alone."""
        return (self(packed)[1],)

    def turns(self, points: Tensor) -> bool:
        """Whether slopes at points, ``(N, D)``, differ in more than a factor for each coordinate of the site."""
        directions = F.normalize(self(points)[1], dim=-2)
        return bool((directions - directions[:1]).abs().max() > RECORDING.tolerance)


class ReadLinearPredictor(NamedTuple):
    """The predictors of a site.

    Attributes:
        rows: The site's coordinates in the joint block's packed vector, n of them.
        parents: Mask of the coordinates of the other sites that offset or slope depend on, ``(D,)``.
        predictor: From packed latents, ``(..., D)``, to an offset g, ``(..., K)``, and a slope H, ``(..., K, n)``, that
            do not depend on the site's own coordinates z: the predictors are g + H z. They are in the order in which
            the model computes them, and differ from what it computes in signs and in constant terms.
        likelihood: The log density of the other sites, given the predictors.
        turns: Whether slopes change in more than a factor for each coordinate of the site, as those of effects do.
    """

    rows: slice
    parents: Tensor
    predictor: RecordedLinearPredictor
    likelihood: RecordedLikelihood
    turns: bool

    def for_head(self, like: Tensor) -> LinearPredictor:
        """What a head knows of them, which is not their likelihood.

        Args:
            like: A packed vector, ``(D,)``.
        """
        return LinearPredictor(self.rows, len(self.predictor(like)[0]), self.predictor)


class _Found(NamedTuple):
    """Predictors in a run.

    Attributes:
        graph: The run's graph, without the site's own log density.
        affine: What of it is affine in the site's coordinates.
        predictors: The predictors.
    """

    graph: GraphModule
    rest: GraphModule
    affine: AffineParts
    predictors: list[Node]


@torch.no_grad()
def read_linear_predictor(recorder: RunRecorder) -> ReadLinearPredictor | None:
    r"""Find a site z with a standard normal prior of which the data, and the priors of other latents, see some affine
    functions :math:`g(\theta) + H(\theta) z` only, with slopes that depend on other latents :math:`\theta`.

    A model may write so an autoregression, a random walk, a Gaussian process, or effects with correlations, covariates
    or shrinkage. Left out are sites of more than some hundred coordinates, or with more than some hundred predictors;
    those that are scaled or masked; and predictors that cannot be recorded, since Python reads a value, the model
    raises or writes z into memory; that are random; or that depend on the model's own parameters.

    Args:
        recorder: Of the model's runs, with the layout of the joint block's sites.

    Returns:
        The predictors of the largest such site; None if there is none.
    """
    layout = recorder.layout
    if layout.plates or len(layout.names) < 2:
        return None

    def is_candidate(site: Site) -> bool:
        size = _size(layout, site)
        is_of_size = 2 <= size <= LINEAR_PREDICTORS.max_dim and layout.latent_dim - size <= LINEAR_PREDICTORS.max_others
        return site.is_real and is_of_size

    sites = [site for site in layout if is_candidate(site)]
    points = recorder.points
    again = points[:1].clone()  # with other values of the sites alone
    for site in sites:
        again[:, layout.slices[site.name]] = points[1:2, layout.slices[site.name]]
    points = torch.cat([points, again])
    first = recorder.first() if sites else None
    if first is None:
        return None
    found = [(site, predictors) for site in sites if (predictors := _find(first, layout, site))]
    try:
        runs = [first, *(recorder.at(point) for point in points[1:])] if found else []
    except Exception:  # a model may raise anything at unlikely values
        return None
    for site, predictors in sorted(found, key=lambda pair: -_size(layout, pair[0])):
        read = _record(runs, predictors, layout, site, points)
        if read is not None and parents_of(read.slopes, layout, site, points).any():
            parents = parents_of(read, layout, site, points)
            likelihood = likelihood_of(runs[0], predictors.rest, predictors.predictors, layout, points)
            return ReadLinearPredictor(layout.slices[site.name], parents, read, likelihood, read.turns(points))
    return None


def _size(layout: Layout, site: Site) -> int:
    return layout.sizes[layout.names.index(site.name)]


def _find(run: RecordedRun, layout: Layout, site: Site) -> _Found | None:
    """Predictors of a site in a run; None if there are none, or too many."""
    if not is_standard_normal(run.sites[site.name]):
        return None
    graph, _ = run.without([site.name])
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"][: len(layout.names)]
    try:
        affine = AffineParts(graph, [inputs[layout.names.index(site.name)]], inputs)
    except NotImplementedError:
        return None
    predictors = affine.outermost(LINEAR_PREDICTORS.max_predictors)
    return _Found(graph, copy.deepcopy(graph), affine, predictors) if predictors else None


def _record(
    runs: Sequence[RecordedRun], found: _Found, layout: Layout, site: Site, points: Tensor
) -> RecordedLinearPredictor | None:
    """The predictors as a function; None if training changes it, or it is not what the runs at the points, ``(N, D)``,
    compute."""
    try:
        graph = found.affine.split(found.predictors)
        drop_unused(graph)
        if any(node.meta.get(LEARNED) and node.users for node in graph.graph.nodes):
            return None
        read = RecordedLinearPredictor(graph, runs[0].inputs_of(graph), layout.sizes, _size(layout, site), points)
        offset, slope = read(points)
        values = offset + (slope @ points[:, layout.slices[site.name]].unsqueeze(-1)).squeeze(-1)
        for index, (run, point, value) in enumerate(zip(runs, points, values, strict=True)):
            other = _find(run, layout, site) if index else found
            if other is None:
                return None
            expected = _values(other, run, point.split(layout.sizes))
            if not (value - expected).abs().le(RECORDING.tolerance * expected.abs().max()).all():
                return None
    except Exception:  # operations that cannot be batched, such as random ones, are refused in many ways
        return None
    return read


def _values(found: _Found, run: RecordedRun, parts: Sequence[Tensor]) -> Tensor:
    """The predictors, ``(K,)``, as a run computes them."""
    *_, output = found.graph.graph.nodes
    output.args = (tuple(found.predictors),)
    drop_unused(found.graph)
    return flat(found.graph(*parts, *run.captured))
