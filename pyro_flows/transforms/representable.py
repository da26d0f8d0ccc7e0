# SPDX-License-Identifier: Apache-2.0
"""L1. A bijection to a support whose values remain representable in floating point."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_flows.transforms.base import is_readable

__all__ = ["Representable", "unconstrained_limits"]


def unconstrained_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Limits between which unconstrained values are unchanged: -16 and 31 in single, -127 and 248 in double precision.

    Far above, the square of the exponential overflows. Far below, its fourth power underflows, by which the gradient of
    a normal with that scale is divided in intermediate results.
    """
    most = math.log(torch.finfo(dtype).max)
    return -0.18 * most, 0.35 * most


class Representable(Transform):
    r"""A bijection ``f`` to a support after a map that grows only logarithmically beyond limits :math:`a < 0 < b`:

    .. math::
        z \mapsto f(s(z)), \qquad s(z) = \max(a, \min(z, b)) + \log(1 + \max(z - b, 0)) - \log(1 + \max(a - z, 0)).

    A guide's draw of a log-scale may be any number. In float32 its exponential underflows to zero below -87 and the
    square of that below -43; below -24 the gradient of a normal with that scale is not finite, so training cannot
    recover. Since this is a bijection with a known log-determinant, densities remain exact.

    Args:
        base: ``f``.
        limits: ``a`` and ``b``.
    """

    bijective = True

    def __init__(self, base: Transform, limits: tuple[float, float]) -> None:
        super().__init__()
        self.base = base
        self.limits = limits

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return self.base.domain

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.base.codomain

    @property
    def sign(self) -> int:  # type: ignore[override]
        return self.base.sign

    def _is_far(self, x: Tensor) -> bool:
        """Whether any value is beyond the limits; true where values cannot be read."""
        return not is_readable(x) or not bool((x == x.clamp(*self.limits)).all())

    def _slowed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``s(x)`` and the distance of ``x`` beyond the limits."""
        inner = x.clamp(*self.limits)
        beyond = (x - inner).abs()
        return inner + (x - inner).sign() * beyond.log1p(), beyond

    def _call(self, x: Tensor) -> Tensor:
        value: Tensor = self.base(self._slowed(x)[0] if self._is_far(x) else x)
        return value

    def _inverse(self, y: Tensor) -> Tensor:
        slowed: Tensor = self.base.inv(y)
        if not self._is_far(slowed):
            return slowed
        inner = slowed.clamp(*self.limits)
        return inner + (slowed - inner).sign() * (slowed - inner).abs().expm1()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._is_far(x):
            plain: Tensor = self.base.log_abs_det_jacobian(x, y)
            return plain
        slowed, beyond = self._slowed(x)
        ladj: Tensor = self.base.log_abs_det_jacobian(slowed, y)
        return ladj - sum_rightmost(beyond.log1p(), self.base.domain.event_dim)

    def forward_shape(self, shape: Any) -> Any:
        return self.base.forward_shape(shape)

    def inverse_shape(self, shape: Any) -> Any:
        return self.base.inverse_shape(shape)
