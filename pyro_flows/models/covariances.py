# SPDX-License-Identifier: Apache-2.0
"""L2. Multivariate normal priors whose location and covariance follow other latents, as functions of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_flows._random import seeded
from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.models.layout import Layout
from pyro_flows.models.sites import Site
from pyro_flows.models.watch import unwrapped, watch
from pyro_flows.transforms import Covariance

__all__ = ["ReadCovariance", "read_covariances"]


@dataclass(frozen=True)
class RecordingSettings:
    """How priors are recorded, and compared with the model's.

    Attributes:
        num_points: Number of points at which they are compared.
        spread: Standard deviation of these about the initial location, in unconstrained space.
        tolerance: Largest difference, relative to the largest entry; allows for rounding of another order in float32.
    """

    num_points: int = 3
    spread: float = 0.3
    tolerance: float = 1e-3


RECORDING = RecordingSettings()


class RecordedPrior:
    """Location and Cholesky factor of the covariance of a prior, by the model's own operations, without its Python.

    Data that the model reads are those of the recording. Where the covariance is not positive definite, the factor is
    the identity.

    Args:
        graph: From the packed latents of the joint block, ``(D,)``, to a location, ``(L,)``, and a factor, ``(n, n)``.
        captured: The graph's further inputs.
    """

    def __init__(self, graph: GraphModule, captured: Sequence[Tensor]) -> None:
        self._graph = graph
        self._captured = tuple(captured)

    def __call__(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., L)`` and ``(..., n, n)`` at packed latents, ``(..., D)``."""

        def one(packed: Tensor) -> tuple[Tensor, Tensor]:
            loc, factor = self._graph(packed, *self._captured)
            is_factor = factor.isfinite().all() & (factor.diagonal() > 0.0).all()
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            return loc.nan_to_num(0.0, 0.0, 0.0), torch.where(is_factor, factor.tril(), identity)

        if packed.dim() == 1:
            return one(packed)
        loc, factor = torch.vmap(one)(packed.reshape(-1, packed.shape[-1]))
        return loc.unflatten(0, packed.shape[:-1]), factor.unflatten(0, packed.shape[:-1])


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
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> list[ReadCovariance]:
    """Find the sites with a multivariate normal prior that depends on other sites, such as a Gaussian process.

    A prior that the model cannot be recorded for is left out, as is one that depends on anything but the joint block.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the joint block's sites.
    """
    found: list[ReadCovariance] = []
    with seeded(0), pyro.validation_enabled(False):
        noise = torch.randn(RECORDING.num_points, layout.latent_dim).to(layout.init_loc)
        points = layout.init_loc + RECORDING.spread * noise
        seen = watch(model, args, kwargs, _values(layout, layout.init_loc), layout.names)
        if seen is None:
            return found
        for site in layout:
            if not (site.is_real and _is_multivariate_normal(seen[site.name])):
                continue

            def prior(packed: Tensor, site: Site = site) -> tuple[Tensor, Tensor]:
                """Locations, ``(L,)``, and one factor for each vector, ``(num, n, n)``."""
                again = watch(model, args, kwargs, _values(layout, packed), [site.name])
                if again is None:
                    raise RuntimeError("the model raises here")
                fn = unwrapped(again[site.name])
                factor = fn.scale_tril
                return fn.loc.expand(site.unconstrained_shape).reshape(-1), factor.reshape(-1, *factor.shape[-2:])

            read = _record(prior, points)
            if read is not None:
                place, size = layout.slices[site.name], site.unconstrained_shape[-1]
                parents = _parents(read, layout, site, points)
                covariance = Covariance(place.start, (place.stop - place.start) // size, size, read)
                if parents.any():
                    found.append(ReadCovariance(covariance, parents))
    return found


def _is_multivariate_normal(fn: Any) -> bool:
    return isinstance(unwrapped(fn), (dist.MultivariateNormal, dist.LowRankMultivariateNormal))


def _values(layout: Layout, packed: Tensor) -> dict[str, Tensor]:
    return {site.name: site.to_support(part) for site, part in layout.split(packed)}


def _record(prior: Callable[[Tensor], tuple[Tensor, Tensor]], points: Tensor) -> RecordedPrior | None:
    """The prior as a graph; None if it is not what the model gives at the points, ``(N, D)``."""

    def single(packed: Tensor) -> tuple[Tensor, Tensor]:
        loc, factors = prior(packed)
        return loc, factors[0]

    try:
        read = RecordedPrior(*trace_operations(single, [points[0]]))
        expected = [prior(point) for point in points]
        together = read(points)
    except Exception:  # a model may raise anything at unlikely values, or have operations that cannot be batched
        return None
    for index, parts in enumerate(expected):
        for one, other in zip(parts, (together[0][index], together[1][index]), strict=True):
            if not ((one - other).abs() <= RECORDING.tolerance * other.abs().max()).all():
                return None
    return read


def _parents(read: RecordedPrior, layout: Layout, own: Site, points: Tensor) -> Tensor:
    """Mask of the coordinates of the sites with which a prior changes, ``(D,)``."""
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
