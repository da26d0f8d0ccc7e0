# SPDX-License-Identifier: Apache-2.0
"""L2. Whether two ways to run a model give the same: values, log densities, or their average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.models.traces import by_draw

__all__ = ["AGREEMENT", "agree", "agree_on_average", "are_same"]


@dataclass(frozen=True)
class AgreementSettings:
    """How closely a vectorized run has to agree with one run per draw.

    Attributes:
        relative: Largest difference relative to the log density; allows for rounding in float32.
        nats: Largest absolute difference, in nats, in addition to the relative one.
        num_averaged: Number of draws for models that draw random numbers of their own, which agree on average only.
        num_errors: Largest difference of such averages, in standard errors.
    """

    relative: float = 1e-4
    nats: float = 1e-3
    num_averaged: int = 100
    num_errors: float = 5.0


AGREEMENT = AgreementSettings()


def are_same(found: Tensor, expected: Tensor) -> bool:
    """Whether values are equal up to rounding."""
    if found.dtype != expected.dtype or not found.is_floating_point():
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=AGREEMENT.relative, atol=AGREEMENT.relative, equal_nan=True)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether log densities, ``(S, ...)``, have the same sums."""
    one, other = (by_draw(value) for value in (found, expected))
    return torch.allclose(one, other, rtol=AGREEMENT.relative, atol=AGREEMENT.nats, equal_nan=True)


def agree_on_average(found: Tensor, expected: Tensor) -> bool:
    """Whether log densities that are random, ``(S, ...)``, have the same mean."""
    one, other = (by_draw(value).double() for value in (found, expected))
    error = ((one.var() + other.var()) / len(one)).sqrt() * AGREEMENT.num_errors
    return bool((one.mean() - other.mean()).abs() <= error + AGREEMENT.relative * other.mean().abs() + AGREEMENT.nats)
