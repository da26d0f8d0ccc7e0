# SPDX-License-Identifier: Apache-2.0
"""L2. Multivariate normal priors whose location and covariance follow other latents, as functions of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.fx import GraphModule

from pyro_flows._random import seeded
from pyro_flows.compiled.simplify import drop_unused
from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.models.layout import Layout
from pyro_flows.models.sites import Site
from pyro_flows.models.watch import is_plain, unwrapped, watch
from pyro_flows.transforms import Covariance

__all__ = ["RECORDING", "ReadCovariance", "parents_of", "read_covariances"]


@dataclass(frozen=True)
class RecordingSettings:
    """How priors are recorded, and compared with the model's.

    Attributes:
        max_dim: Largest number of coordinates with known priors where some have a covariance that follows other
            latents, whose factor takes O(D^3) for each draw.
        num_points: Number of points at which they are compared.
        spread: Standard deviation of these about the initial location, in unconstrained space.
        tolerance: Largest difference, relative to the largest entry; allows for rounding of another order in float32.
    """

    max_dim: int = 300
    num_points: int = 3
    spread: float = 0.3
    tolerance: float = 1e-3


RECORDING = RecordingSettings()


class RecordedPrior:
    """Location and Cholesky factor of the covariance of a prior, by the model's own operations, without its Python.

    Data that the model reads are those of the recording, as are dtype and device of the operations. Where the
    covariance is not positive definite, the factor is the identity.

    Args:
        graph: From the packed latents of the joint block, ``(D,)``, to a location, ``(L,)``, and a factor, ``(n, n)``.
        captured: The graph's further inputs, which are copied.
        like: A tensor of the dtype and on the device of the recording.
    """

    def __init__(self, graph: GraphModule, captured: Sequence[Tensor], like: Tensor) -> None:
        self._graph = graph
        self._captured = tuple(value.clone() for value in captured)
        self._like = like.new_zeros(())

    def __call__(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., L)`` and ``(..., n, n)`` at packed latents, ``(..., D)``."""

        def one(packed: Tensor) -> tuple[Tensor, Tensor]:
            loc, factor = self._graph(packed, *self._captured)
            is_factor = factor.isfinite().all() & (factor.diagonal() > 0.0).all()
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            return loc.nan_to_num(0.0, 0.0, 0.0), torch.where(is_factor, factor.tril(), identity)

        given = packed.to(self._like)
        if packed.dim() == 1:
            loc, factor = one(given)
        else:
            loc, factor = torch.vmap(one)(given.reshape(-1, packed.shape[-1]))
            loc, factor = (part.unflatten(0, packed.shape[:-1]) for part in (loc, factor))
        return loc.to(packed), factor.to(packed)


class ReadCovariance(NamedTuple):
    """A site's prior, for a head.

    Attributes:
        covariance: Where the site is in the joint block's vector, and its prior.
        parents: Mask of the coordinates of the sites that the prior depends on, ``(D,)``.
    """

    covariance: Covariance
    parents: Tensor


@torch.no_grad()
def read_covariances(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    names: Collection[str],
) -> list[ReadCovariance]:
    """Find the sites with a multivariate normal prior that depends on other sites, such as a Gaussian process.

    Left out are priors of more than some hundred coordinates; those that cannot be recorded, since Python reads a value
    or the model raises; those that depend on anything but the joint block, or on the model's own parameters; and those
    that are scaled or masked.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the joint block's sites.
        names: The sites to look at.
    """
    found: list[ReadCovariance] = []
    with seeded(0), pyro.validation_enabled(False):
        sites = [site for site in layout if site.name in names and _is_candidate(site)]
        normals = _plain_normals(model, args, kwargs, layout) if sites else set()
        sites = [site for site in sites if site.name in normals]
        if not sites:
            return found
        noise = torch.randn(RECORDING.num_points, layout.latent_dim).to(layout.init_loc)
        points = layout.init_loc + RECORDING.spread * noise

        def priors(packed: Tensor, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
            """By site: locations, ``(L,)``, and one factor for each vector, ``(num, n, n)``."""
            seen = watch(model, args, kwargs, _values(layout, packed), names)
            if seen is None:
                raise RuntimeError("the model raises here")
            parts = {}
            for name, fn in ((name, unwrapped(fn)) for name, fn in seen.items()):
                factor = fn.scale_tril
                loc = fn.loc.expand(layout[name].unconstrained_shape).reshape(-1)
                parts[name] = loc, factor.reshape(-1, *factor.shape[-2:])
            return parts

        def prior(name: str, packed: Tensor) -> tuple[Tensor, Tensor]:
            return priors(packed, [name])[name]

        try:
            with torch.enable_grad():
                expected = [priors(point, [site.name for site in sites]) for point in points]
        except Exception:  # a model may raise anything at unlikely values
            return found
        for site in sites:
            at_points = [each[site.name] for each in expected]
            read = _record(partial(prior, site.name), points, at_points)
            if read is not None:
                place, size = layout.slices[site.name], site.unconstrained_shape[-1]
                covariance = Covariance(place.start, (place.stop - place.start) // size, size, read)
                parents = parents_of(read, layout, site, points)
                if parents.any():
                    found.append(ReadCovariance(covariance, parents))
    return found


def _is_candidate(site: Site) -> bool:
    shape = site.unconstrained_shape
    return site.is_real and len(shape) > 0 and math.prod(shape) <= RECORDING.max_dim


def _plain_normals(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> set[str]:
    """Names of the sites with a multivariate normal prior that is neither scaled nor masked."""
    try:
        with poutine.block(), poutine.trace() as tape:
            poutine.condition(model, data=_values(layout, layout.init_loc))(*args, **kwargs)
    except Exception:  # as in `watch`
        return set()
    names = set()
    for site in layout:
        node = tape.trace.nodes.get(site.name)
        if node is None or not is_plain(node):
            continue
        if isinstance(unwrapped(node["fn"]), (dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
            names.add(site.name)
    return names


def _values(layout: Layout, packed: Tensor) -> dict[str, Tensor]:
    return {site.name: site.to_support(part) for site, part in layout.split(packed)}


def _record(
    prior: Callable[[Tensor], tuple[Tensor, Tensor]], points: Tensor, expected: Sequence[tuple[Tensor, Tensor]]
) -> RecordedPrior | None:
    """The prior as a graph; None if it is not what the model gives at the points, ``(N, D)``."""
    if any(part.requires_grad for parts in expected for part in parts):
        return None  # of the model's own parameters, which training changes

    def single(packed: Tensor) -> tuple[Tensor, Tensor]:
        loc, factors = prior(packed)
        return loc, factors[0]

    try:
        graph, captured, _ = trace_operations(single, [points[0]])
        drop_unused(graph)
        if not next(iter(graph.graph.nodes)).users:
            return None
        read = RecordedPrior(graph, captured, points)
        together = read(points)
    except Exception:  # operations that cannot be recorded or batched are refused in many ways
        return None
    for index, parts in enumerate(expected):
        for one, other in zip(parts, (together[0][index], together[1][index]), strict=True):
            if not ((one - other).abs() <= RECORDING.tolerance * other.abs().max()).all():
                return None
    return read


def parents_of(read: Callable[[Tensor], tuple[Tensor, ...]], layout: Layout, own: Site, points: Tensor) -> Tensor:
    """Mask of the coordinates of the sites other than ``own`` with which what is read changes, ``(D,)``, at points,
    ``(N, D)``."""
    mask = torch.zeros_like(points[0], dtype=torch.bool)
    before = read(points)
    for site in layout:
        where = layout.slices[site.name]
        if site.name == own.name:
            continue
        moved = points.clone()
        moved[:, where] = points.roll(1, 0)[:, where]
        mask[where] = any(not torch.equal(one, other) for one, other in zip(before, read(moved), strict=True))
    return mask
