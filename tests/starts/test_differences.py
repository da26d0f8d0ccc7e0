# SPDX-License-Identifier: Apache-2.0
"""Mean derivatives by differences at mirrored draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.starts.differences import mean_derivatives
from pyro_flows.starts.fixed_draws import antithetic

CUBIC = torch.tensor([0.3, -0.2, 0.5])


def cubic(z: Tensor) -> Tensor:
    return -z.square().sum(-1) + z[..., 0] * z[..., 1] + (CUBIC * z**3).sum(-1)


def test_third_derivatives_cancel() -> None:
    """Of a cubic, each draw's differences are off by its third derivatives times the step; their mean is exact."""
    draws = antithetic(8, torch.zeros(3, dtype=torch.float64))
    found = mean_derivatives(cubic, draws, torch.tensor([2, 0]), step=0.5)
    assert found is not None
    exact = -2.0 * torch.eye(3, dtype=torch.float64)
    exact[0, 1] = exact[1, 0] = 1.0
    torch.testing.assert_close(found[1], exact[[2, 0]], rtol=0.0, atol=1e-6)
    gradient = 3.0 * CUBIC.double() * draws.square().mean(0)
    torch.testing.assert_close(found[0], gradient, rtol=0.0, atol=1e-6)


def test_draws_without_derivatives_are_left_out() -> None:
    draws = antithetic(8, torch.zeros(3, dtype=torch.float64))

    def broken(z: Tensor) -> Tensor:
        return torch.where(z[..., 0] > draws[:, 0].sort().values[-2], math.nan, cubic(z))

    found = mean_derivatives(broken, draws, torch.arange(3), step=1e-3)
    assert found is not None
    assert found[1].isfinite().all()
    assert mean_derivatives(lambda z: math.nan * cubic(z), draws, torch.arange(3), step=1e-3) is None
