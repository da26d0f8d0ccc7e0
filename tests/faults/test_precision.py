# SPDX-License-Identifier: Apache-2.0
"""Where float32 is the reason for a failure, results and errors say so; where it is not, they do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyro_flows import AutoFlowGuide, diagnose, fit

USE = (
    r"Use float64: `torch.set_default_dtype\(torch.float64\)` before the guide is made, and the data as `x.double\(\)`"
)
X = torch.linspace(0.0, 1.0, 40)
Y = torch.sin(3.0 * X)


def gaussian_process(y: Tensor) -> None:
    """A smooth kernel on a fine grid: its condition number is 1e9."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.2))
    x = X.to(length)
    distance = x.unsqueeze(-1) - x
    kernel = torch.exp(-0.5 * (distance / length[..., None, None]).square())
    kernel = kernel + 1e-9 * torch.eye(len(X))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(X)), kernel), obs=y)


def many_data(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1e-2), obs=y)


def overflowing(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    pyro.factor("energy", -((1e20 * (1.0 + rate.abs())) ** 2) * 1e-40)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)


def without_density_anywhere(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.validation_enabled(False):
        pyro.factor("none", torch.tensor(-torch.inf))


def plain(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_an_exception_of_the_model_has_a_note() -> None:
    for run in (fit, diagnose):
        with pytest.raises((ValueError, torch.linalg.LinAlgError), match=r"covariance_matrix|cholesky") as caught:
            run(gaussian_process, prior, (Y,), progress=False)
        (note,) = caught.value.__notes__
        assert note.startswith(f"{run.__name__}: In float64 the log density is finite there. Use float64")


def prior(y: Tensor) -> None:
    pyro.sample("length", dist.LogNormal(0.0, 0.2))


def test_draws_that_float32_refuses() -> None:
    """Where only some of the draws fail, so that a run can begin."""

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        pyro.factor("energy", -((rate.exp() * 1.8e19) ** 2) * 1e-40)  # infinite in float32 above 0

    def guide(y: Tensor) -> None:
        pyro.sample("rate", dist.Normal(0.0, 1.0))

    report = diagnose(model, guide, (Y,), search=False, progress=False, seed=0)
    assert not report.trustworthy
    assert report.dtype == torch.float32
    assert "draws without a finite log density in float32 have one in float64" in str(report)
    torch.set_default_dtype(torch.float64)
    try:
        report = diagnose(model, guide, (Y,), search=False, progress=False, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (report.dtype, report.rounding) == (torch.float64, "")


def test_an_error_of_fit_says_it() -> None:
    guide = AutoFlowGuide(overflowing, init_loc_fn=init_to_value(values={"rate": torch.tensor(0.3)}))
    with pytest.raises(RuntimeError, match=USE):
        fit(overflowing, guide, (Y,), num_steps=50, progress=False)


def test_a_model_without_density_has_none_in_float64_either() -> None:
    guide = AutoFlowGuide(without_density_anywhere)
    with pytest.raises(RuntimeError) as caught:
        fit(without_density_anywhere, guide, (Y,), num_steps=50, progress=False)
    assert "float64" not in str(caught.value)


@pytest.fixture(scope="module")
def million() -> Tensor:
    return torch.randn(300_000, generator=torch.Generator().manual_seed(0)) + 0.5


def test_log_densities_of_many_data(million: Tensor) -> None:
    """Their sum is -1e9, of which float32 has 64 nats at best."""
    mean = million.mean().item()

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(torch.tensor(mean), 2e-5))

    report = diagnose(many_data, guide, (million,), num_samples=100, search=False, progress=False, seed=0)
    assert not report.trustworthy
    assert "by rounding in float32. Use float64" in report.rounding


@pytest.mark.parametrize("model", [plain])
def test_good_fits_say_nothing(model: Callable[..., Any]) -> None:
    guide = AutoFlowGuide(model)
    result = fit(model, guide, (Y,), num_steps=30, progress=False, seed=0)
    assert (result.dtype, result.rounding) == (torch.float32, "")
    assert "float" not in str(result)
    report = diagnose(model, guide, (Y,), progress=False, seed=0)
    assert (report.dtype, report.rounding) == (torch.float32, "")
