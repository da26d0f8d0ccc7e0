# SPDX-License-Identifier: Apache-2.0
"""L2. The latent sites of a trace of a model as immutable records: their shapes, supports and plates."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from pyro_flows.transforms.representable import Representable, unconstrained_limits

__all__ = ["Site", "full_size", "read_sites"]


@dataclass(frozen=True)
class SupportSettings:
    """When a value is on a support.

    Attributes:
        rounding: Largest error of an entry of a vector or a matrix, such as a simplex whose sum is rounded.
    """

    rounding: float = 1e-4


SUPPORT = SupportSettings()


@dataclass(frozen=True, eq=False)
class Site:
    """One latent site of a trace.

    Attributes:
        name: Its name in the model.
        shape: Shape of its value, batch dimensions first.
        event_dim: Number of event dimensions of its value.
        init_loc: Its unconstrained value in the trace; may have another shape than ``shape``, as for a simplex.
        to_support: The bijection from unconstrained values to the support; see :class:`Representable`.
        is_real: Whether that bijection is the identity.
        frames: Frames of the plates that it is in.
        support: Its support, by which values are checked that are not the guide's own; None checks none.
    """

    name: str
    shape: torch.Size
    event_dim: int
    init_loc: Tensor
    to_support: Transform
    is_real: bool
    frames: tuple[CondIndepStackFrame, ...]
    support: Any = None

    @classmethod
    def read(cls, node: Mapping[str, Any], to_support: Transform, support: Any = None) -> Site:
        """Read a site off a node of a trace, given the bijection to its support, and the support itself."""
        value = node["value"].detach()
        return cls(
            name=node["name"],
            shape=value.shape,
            event_dim=node["fn"].event_dim,
            init_loc=to_support.inv(value),
            to_support=to_support,
            is_real=_is_identity(to_support),
            frames=tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized),
            support=support,
        )

    @property
    def batch_rank(self) -> int:
        """Number of batch dimensions, of its value and of its unconstrained value."""
        return len(self.shape) - self.event_dim

    @property
    def unconstrained_shape(self) -> torch.Size:
        """Shape of its unconstrained value."""
        return self.init_loc.shape

    @property
    def unconstrained_event_shape(self) -> torch.Size:
        """Shape of its unconstrained value without the batch dimensions."""
        return self.unconstrained_shape[self.batch_rank :]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its value; a packed vector has the widest of its sites' dtypes."""
        return self.init_loc.dtype

    @property
    def is_decreasing(self) -> bool:
        """Whether the bijection reverses the order of each coordinate, as for ``less_than``."""
        try:
            return bool(torch.as_tensor(_base_transform(self.to_support).sign < 0).all())
        except NotImplementedError:  # Coordinates of a simplex, say, have no order.
            return False

    def constrain(self, unconstrained: Tensor) -> tuple[Tensor, Tensor | float]:
        """Value on the support, and ``log|det d unconstrained / d value|`` with the batch shape of the value."""
        if self.is_real:
            return unconstrained, 0.0
        value = self.to_support(unconstrained)
        return value, self._log_det(unconstrained, value)

    def unconstrain(self, value: Tensor) -> tuple[Tensor, Tensor | float]:
        """Invert :meth:`constrain`; the log-determinant is the same, and minus infinity outside of the support."""
        if self.is_real:
            return value, 0.0
        invertible = value
        try:
            unconstrained = self.to_support.inv(value)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # some matrices have no Cholesky factor
            if self.support is None:
                raise
            valid = self._by_event(self.support.check(value), value.dim() - self.event_dim)
            anywhere = self.to_support(value.new_zeros(self.to_support.inverse_shape(value.shape)))
            invertible = torch.where(valid.reshape(valid.shape + (1,) * self.event_dim), value, anywhere)
            unconstrained = self.to_support.inv(invertible)
        log_det = self._log_det(unconstrained, invertible)
        if self.support is None:
            return unconstrained, log_det
        outside = self._is_outside(value, unconstrained)
        event = outside.reshape(outside.shape + (1,) * (unconstrained.dim() - outside.dim()))
        return unconstrained.masked_fill(event, 0.0), log_det.masked_fill(outside, -math.inf)

    def _is_outside(self, value: Tensor, unconstrained: Tensor) -> Tensor:
        """Whether a value, not NaN, is outside of the support or on its boundary; of the value's batch shape."""
        by_event = partial(self._by_event, batch_dim=value.dim() - self.event_dim)
        valid = by_event(self.support.check(value))
        if self.event_dim:  # a sum, as of a simplex, is rounded by more than torch allows
            valid = valid | by_event((self.to_support(unconstrained) - value).abs() < SUPPORT.rounding)
        return ~(valid & by_event(unconstrained.isfinite())) & by_event(~value.isnan())

    @staticmethod
    def _by_event(entries: Tensor, batch_dim: int) -> Tensor:
        """Whether a condition holds for all entries of an event."""
        return entries.flatten(batch_dim).all(-1) if entries.dim() > batch_dim else entries

    def _log_det(self, unconstrained: Tensor, value: Tensor) -> Tensor:
        ladj = -self.to_support.log_abs_det_jacobian(unconstrained, value)
        summed: Tensor = sum_rightmost(ladj, ladj.dim() - value.dim() + self.event_dim)
        return summed


def read_sites(trace: Trace, varying: Collection[str] = ()) -> list[Site]:
    """Read the sites of a trace that holds latent sites only, in its order.

    Args:
        trace: The trace.
        varying: Names of the plates that may have other items in other calls.

    Raises:
        NotImplementedError: If a support has no bijection from unconstrained space.
        ValueError: If a support differs between the items of a plate in ``varying``.
    """
    sites = []
    for _, node in trace.iter_stochastic_nodes():
        support = node["fn"].support
        for frame in node["cond_indep_stack"]:
            if frame.name in varying:
                support = _for_any_item(support, frame, node)
        to_support = biject_to(support)
        if not _is_identity(to_support):
            to_support = Representable(to_support, unconstrained_limits(node["value"].dtype))
        sites.append(Site.read(node, to_support, support))
    return sites


def full_size(frame: CondIndepStackFrame) -> int:
    """Size of a plate without subsampling."""
    return int(frame.full_size or frame.size)


def _for_any_item(support: Any, frame: CondIndepStackFrame, node: Mapping[str, Any]) -> Any:
    """The support that all items of a plate share.

    Raises:
        ValueError: If it differs between items.
    """
    shared, axis = copy.copy(support), frame.dim - node["fn"].event_dim
    for name, value in vars(support).items():
        if isinstance(value, constraints.Constraint):
            setattr(shared, name, _for_any_item(value, frame, node))
        elif torch.is_tensor(value) and value.dim() >= -axis:
            one = value.narrow(axis, 0, 1)
            if not torch.equal(value, one.expand_as(value)):
                raise ValueError(
                    f"AutoFlowGuide: expected latent site '{node['name']}' to have the same support for all items of "
                    f"the plate '{frame.name}', others of which may come in other calls, but got {support}. Draw what "
                    f"has, `u = pyro.sample('{node['name']}', dist.Uniform(0.0, 1.0))` for instance, and map it: "
                    "`low[idx] + (high - low)[idx] * u`."
                )
            setattr(shared, name, one)
    return shared


def _base_transform(transform: Transform) -> Transform:
    while isinstance(transform, (IndependentTransform, Representable)):
        transform = transform.base if isinstance(transform, Representable) else transform.base_transform
    return transform


def _is_identity(transform: Transform) -> bool:
    transform = _base_transform(transform)
    return isinstance(transform, ComposeTransform) and not transform.parts
