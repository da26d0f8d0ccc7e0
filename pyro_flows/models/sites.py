# SPDX-License-Identifier: Apache-2.0
"""L2. One trace of a model becomes an immutable table of its latent sites: shapes, order, and the way between the
packed unconstrained vector and the sites' own values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from pyro_flows.transforms.representable import Representable, unconstrained_limits

__all__ = ["Site", "SiteTable", "decreasing", "quantiles"]


@dataclass(frozen=True, eq=False)
class Site:
    """One latent site.

    Attributes:
        name: Its name in the model.
        shape: Shape of its value.
        event_dim: Number of event dimensions of its value.
        unconstrained_shape: Shape of its unconstrained value; differs from ``shape`` for a simplex, say.
        unconstrained_event_dim: Number of event dimensions of the unconstrained value.
        start: Where it begins in the packed vector.
        size: How many coordinates it has there.
        to_support: The bijection from unconstrained values to the support; see :class:`Representable`.
        is_real: Whether that bijection is the identity.
        is_decreasing: Whether that bijection reverses the order of each coordinate, as for ``less_than``.
        dtype: Of its value; the packed vector has the widest of all.
        frames: The plates it is in.
    """

    name: str
    shape: torch.Size
    event_dim: int
    unconstrained_shape: torch.Size
    unconstrained_event_dim: int
    start: int
    size: int
    to_support: Transform
    is_real: bool
    is_decreasing: bool
    dtype: torch.dtype
    frames: tuple[CondIndepStackFrame, ...]

    def constrain(self, unconstrained: Tensor) -> tuple[Tensor, Tensor | float]:
        """Value on the support, and ``log|det d unconstrained / d value|`` with the batch shape of the value."""
        if self.is_real:
            return unconstrained, 0.0
        value = self.to_support(unconstrained)
        ladj = -self.to_support.log_abs_det_jacobian(unconstrained, value)
        return value, sum_rightmost(ladj, ladj.dim() - value.dim() + self.event_dim)


class SiteTable:
    """The latent sites of a model, in trace order, packed into one unconstrained vector.

    Args:
        sites: The sites with ``start`` and ``size`` that tile ``[0, latent_dim)``.
        init_loc: Packed unconstrained value at which the trace was taken, ``(latent_dim,)``.
    """

    def __init__(self, sites: Sequence[Site], init_loc: Tensor) -> None:
        self.sites = tuple(sites)
        self.init_loc = init_loc
        self._sizes = [site.size for site in self.sites]
        self.latent_dim = sum(self._sizes)

    @classmethod
    def from_trace(cls, trace: Trace) -> SiteTable:
        """Read the table off a trace that holds latent sites only.

        Raises:
            NotImplementedError: If a support has no bijection; ask for the site's name before.
        """
        sites, parts, start = [], [], 0
        for name, node in trace.iter_stochastic_nodes():
            fn, value = node["fn"], node["value"].detach()
            to_support = biject_to(fn.support)
            is_real = _is_identity(to_support)
            if not is_real:
                to_support = Representable(to_support, unconstrained_limits(value.dtype))
            unconstrained = to_support.inv(value)
            site = Site(
                name=name,
                shape=value.shape,
                event_dim=fn.event_dim,
                unconstrained_shape=unconstrained.shape,
                unconstrained_event_dim=fn.event_dim + unconstrained.dim() - value.dim(),
                start=start,
                size=math.prod(unconstrained.shape),
                to_support=to_support,
                is_real=is_real,
                is_decreasing=_is_decreasing(to_support),
                dtype=value.dtype,
                frames=tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized),
            )
            start += site.size
            sites.append(site)
            parts.append(unconstrained.reshape(-1))
        init_loc = torch.cat(parts) if parts else torch.zeros(0)
        return cls(sites, init_loc)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @property
    def names(self) -> list[str]:
        """The sites' names, in order."""
        return [site.name for site in self.sites]

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def split(self, packed: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Give each site its slice of ``batch_shape + (latent_dim,)`` in the site's unconstrained shape.

        Batch dimensions are Pyro's: they broadcast against the plates of a site (particles, outer plates).
        """
        batch_shape = packed.shape[:-1]
        for site, part in zip(self.sites, packed.split(self._sizes, -1), strict=True):
            shape = site.unconstrained_shape
            if batch_shape:
                shape = torch.broadcast_shapes(shape, batch_shape + (1,) * site.unconstrained_event_dim)
            yield site, part.reshape(shape).to(site.dtype)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Values on the supports for ``(num_samples, latent_dim)``, each ``(num_samples, *site shape)``."""
        values = {}
        for site, part in zip(self.sites, packed.split(self._sizes, -1), strict=True):
            unconstrained = part.reshape(packed.shape[:-1] + site.unconstrained_shape).to(site.dtype)
            values[site.name] = site.to_support(unconstrained)
        return values

    def pack(self, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Invert :meth:`unpack`.

        Args:
            values: Site name -> tensor of shape ``batch_shape + site shape``; every site, one common batch shape.

        Returns:
            ``batch_shape + (latent_dim,)``, and ``log|det d packed / d values|`` of shape ``batch_shape``.

        Raises:
            ValueError: If sites are missing or unknown, or a shape does not fit.
        """
        names = {site.name for site in self.sites}
        if names != set(values):
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise ValueError(
                f"SiteTable: expected a value for each of the latent sites {sorted(names)}, but "
                f"missing are {missing} and unknown are {unknown}."
            )
        parts, total, batch_shape = [], torch.zeros(()), None
        for site in self.sites:
            value = torch.as_tensor(values[site.name])
            batch_dim = value.dim() - len(site.shape)
            if batch_dim < 0 or value.shape[batch_dim:] != site.shape:
                raise ValueError(
                    f"SiteTable: expected site '{site.name}' to have shape batch_shape + {tuple(site.shape)}, "
                    f"but got {tuple(value.shape)}. Reshape it."
                )
            if batch_shape is None:
                batch_shape = value.shape[:batch_dim]
            if value.shape[:batch_dim] != batch_shape:
                raise ValueError(
                    f"SiteTable: expected site '{site.name}' to have the batch shape {tuple(batch_shape)} of the sites "
                    f"before it, but got {tuple(value.shape[:batch_dim])}. Parallel `Predictive` leaves dimensions of "
                    "size 1 in place of plates; reshape to `(num_samples, *site shape)`."
                )
            unconstrained = site.to_support.inv(value)
            parts.append(unconstrained.reshape((*batch_shape, site.size)))
            if not site.is_real:
                ladj = -site.to_support.log_abs_det_jacobian(unconstrained, value)
                total = total + sum_rightmost(ladj, ladj.dim() - batch_dim)
        packed = torch.cat(parts, -1)
        return packed, total.to(packed).expand(packed.shape[:-1])


def decreasing(sites: Sequence[Site]) -> Tensor:
    """Which coordinates of the packed vector have their order reversed on their support, ``(D,)``."""
    return torch.cat([torch.full((site.size,), site.is_decreasing) for site in sites])


def quantiles(draws: Tensor, levels: Tensor, reversed_order: Tensor) -> Tensor:
    """Quantiles of each coordinate over the first dimension.

    Args:
        draws: ``(num_samples, ..., D)``.
        levels: Probabilities, ``(count,)``.
        reversed_order: From :func:`decreasing`; these coordinates get ``1 - levels``.

    Returns:
        ``(count, ..., D)``.
    """
    wanted = torch.where(reversed_order, 1 - levels.unsqueeze(-1), levels.unsqueeze(-1))  # (count, D)
    # torch.quantile takes at most 16 million elements; interpolation between order statistics is the same. Contiguous
    # along what is sorted: else most of the time is spent on fetching.
    ordered = draws.movedim(0, -1).contiguous().sort(-1).values.movedim(-1, 0)
    shape = (len(levels),) + (1,) * (draws.dim() - 2) + draws.shape[-1:]
    position = (wanted * (len(draws) - 1)).reshape(shape).expand((len(levels), *draws.shape[1:]))
    below = position.floor().long()
    above = (below + 1).clamp(max=len(draws) - 1)
    return torch.lerp(ordered.gather(0, below), ordered.gather(0, above), position - below)


def _base_transform(transform: Transform) -> Transform:
    while isinstance(transform, (IndependentTransform, Representable)):
        transform = transform.base if isinstance(transform, Representable) else transform.base_transform
    return transform


def _is_identity(transform: Transform) -> bool:
    transform = _base_transform(transform)
    return isinstance(transform, ComposeTransform) and not transform.parts


def _is_decreasing(transform: Transform) -> bool:
    try:
        return bool(torch.as_tensor(_base_transform(transform).sign < 0).all())
    except NotImplementedError:  # The simplex and its kin have no order of coordinates to keep.
        return False
