# SPDX-License-Identifier: Apache-2.0
"""Noise of one coordinate that is skewed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from pyro_flows.transforms.skewed import SkewedNoise

SKEWS = torch.tensor([0.0, 1e-8, 1e-3, -0.1, 0.5, -3.0, 10.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_map_is_increasing_and_onto(dtype: torch.dtype) -> None:
    noise, skew = torch.linspace(-30.0, 30.0, 1001, dtype=dtype).unsqueeze(-1), SKEWS.to(dtype)
    value = SkewedNoise.at(noise, skew).value
    assert (value.diff(dim=0) > 0.0).all()
    assert value.max() > 1.0 and value.min() < -1.0
    error = (SkewedNoise.inverse(value, skew) - noise).abs().max()
    assert error < 30.0 * 100.0 * torch.finfo(dtype).eps  # a slope of a tenth makes rounding errors ten times as large


def test_derivatives_are_those_of_the_value() -> None:
    noise = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64).requires_grad_()
    skewed = SkewedNoise.at(noise, torch.tensor(0.7, dtype=torch.float64))
    (slope,) = torch.autograd.grad(skewed.value.sum(), noise, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), noise)
    torch.testing.assert_close(slope, skewed.slope)
    torch.testing.assert_close(curvature, skewed.curvature)


def test_the_third_derivative_of_the_log_density() -> None:
    """To first order it is three times the skewness, by differences of the second one around the mode."""
    skew = torch.tensor(1e-3, dtype=torch.float64)

    def log_density(value: Tensor) -> Tensor:
        noise = SkewedNoise.inverse(value, skew)
        return -0.5 * noise.square() - SkewedNoise.at(noise, skew).slope.log()

    ends = [hessian(log_density, torch.tensor(end, dtype=torch.float64)) for end in (-0.5, 0.5)]
    third = ends[1] - ends[0]
    assert abs(third / (3.0 * skew) - 1.0) < 0.02
    torch.testing.assert_close(SkewedNoise.at(torch.tensor([-1.0, 1.0]), skew).value, torch.tensor([-1.0, 1.0]))
