# SPDX-License-Identifier: Apache-2.0
"""L1. Noise of one coordinate that is skewed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.transforms.heads.conditional import Pull

__all__ = ["SkewedNoise"]


@dataclass(frozen=True)
class SkewSettings:
    """Settings of skewed noise.

    Attributes:
        max_slope: Bound on the slope of what skewness adds to noise, below 1, so that the map is onto.
    """

    max_slope: float = 0.9


SKEW = SkewSettings()


class SkewedNoise(NamedTuple):
    r"""Standard normal noise, mapped by :math:`h(x) = x + \kappa (x^2 - 1) / 2` near zero: to first order its density
    is :math:`e^{\kappa (x^3 - 3 x) / 2}` times the normal one, and its log density has the third derivative
    :math:`3 \kappa`. See :mod:`pyro_flows.transforms.heads.conditional`, where noise of many coordinates is skewed so.

    Away from zero the slope of :math:`h(x) - x` approaches a bound below 1, so that h is increasing and onto; and
    :math:`h(\pm 1) = \pm 1`.

    Attributes:
        value: ``h``.
        slope: Its first derivative.
        curvature: Its second derivative.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor

    @classmethod
    def at(cls, noise: Tensor, skew: Tensor) -> SkewedNoise:
        """For noise, and the skewness of each coordinate, ``kappa``."""
        bound = SKEW.max_slope
        more = Pull.at(noise, skew / bound)
        return cls(noise + bound * more.value - _at_one(skew), 1.0 + bound * more.slope, bound * more.curvature)

    @staticmethod
    def inverse(value: Tensor, skew: Tensor) -> Tensor:
        """Noise, the root of a quadratic equation that has the sign of the map."""
        bound = SKEW.max_slope
        total, rate = value + _at_one(skew), skew / bound**2
        away = 1.0 + rate * total
        length = (1.0 - bound**2 + (bound * away).square()).sqrt()
        is_near = away > 0.0  # elsewhere skewness is not zero, and the other form of the root is the accurate one
        near = total * (2.0 + rate * total) / (torch.where(is_near, away, 0.0) + length)
        return torch.where(is_near, near, (away - length) / (torch.where(is_near, 1.0, rate) * (1.0 - bound**2)))


def _at_one(skew: Tensor) -> Tensor:
    """What skewness adds at a standard deviation on either side, which is subtracted everywhere."""
    return SKEW.max_slope * Pull.at(torch.ones_like(skew), skew / SKEW.max_slope).value
