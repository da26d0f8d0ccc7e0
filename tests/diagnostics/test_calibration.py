# SPDX-License-Identifier: Apache-2.0
"""Simulation-based calibration: exact posteriors pass, and what is wrong with others is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide, check_calibration, fit, plots

NUM_DATA = 5


def model(x: Tensor, y: Tensor) -> None:
    """Its posterior is normal with variance 1/6 in the scale of the prior, which is 2."""
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


X = torch.linspace(-1.0, 1.0, NUM_DATA)
PRECISION = 0.25 + X.square().sum()


def posterior(shift: float = 0.0, width: float = 1.0) -> Callable[..., None]:
    def guide(x: Tensor, y: Tensor) -> None:
        loc = (x * y).sum() / PRECISION
        scale = PRECISION.rsqrt()
        pyro.sample("slope", dist.Normal(loc + shift * scale, width * scale))

    return guide


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_posterior_is_calibrated(seed: int) -> None:
    report = check_calibration(
        model, posterior(), (X, torch.zeros(NUM_DATA)), num_datasets=300, progress=False, seed=seed
    )
    assert report.calibrated
    assert report.ranks["slope"].shape == (300, 1)
    site = report.sites["slope"]
    assert abs(site.bias) < 4 * site.bias_se
    assert abs(site.width - 1) < 4 * site.width_se
    assert "calibrated, as far as" in str(report)


@pytest.mark.parametrize(
    "shift, width, reason",
    [(0.0, 0.6, "too narrow"), (0.0, 1.7, "too wide"), (-0.6, 1.0, "too low"), (0.6, 1.0, "too high")],
)
def test_what_is_wrong_is_named(shift: float, width: float, reason: str) -> None:
    report = check_calibration(
        model, posterior(shift, width), (X, torch.zeros(NUM_DATA)), num_datasets=300, progress=False, seed=0
    )
    assert not report.calibrated
    assert reason in report.sites["slope"].reason
    assert f"'slope' is {reason}" in str(report)


@pytest.mark.slow
def test_p_values_of_a_calibrated_guide_are_uniform() -> None:
    """Of 50 p-values, 5 % and 50 % are below these levels, within 4 standard errors."""
    p_values = torch.tensor(
        [
            check_calibration(
                model,
                posterior(),
                (X, torch.zeros(NUM_DATA)),
                num_datasets=60,
                num_samples=20,
                progress=False,
                seed=seed,
            )
            .sites["slope"]
            .p_value
            for seed in range(50)
        ]
    )
    for level in (0.05, 0.5):
        assert abs((p_values < level).double().mean() - level) < 4 * math.sqrt(level * (1 - level) / 50)


def test_other_guides_are_fitted_to_each_data_set() -> None:
    """Data that the model standardizes are not among its arguments: the model that is fitted is conditioned on them."""

    def standardized(raw: Tensor) -> None:
        y = (raw - 3.0) / 2.0
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc.sum(-1), 1.0), obs=y)

    seen = []

    def refit(model: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> AutoNormal:
        if len(seen) == 3:
            seen.append(None)
            raise ValueError("this one fails")
        guide = AutoNormal(model, init_scale=0.1)
        guide(*args, **kwargs)
        y = pyro.poutine.trace(model).get_trace(*args, **kwargs).nodes["y"]["value"]
        seen.append(y)
        return guide

    report = check_calibration(
        standardized, args=(torch.zeros(4),), refit=refit, num_datasets=30, num_samples=20, progress=False, seed=0
    )
    assert report.failed == 1
    assert report.ranks["loc"].shape == (29, 2)
    assert not report.calibrated
    assert "too narrow" in report.sites["loc"].reason
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.slow
def test_a_fit_of_each_data_set_is_calibrated() -> None:
    def refit(model: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> AutoFlowGuide:
        guide = AutoFlowGuide(model)
        fit(model, guide, args, kwargs, progress=False, num_steps=1)  # the warm start is the posterior
        return guide

    report = check_calibration(
        model, args=(X,), kwargs={"y": torch.zeros(NUM_DATA)}, refit=refit, num_datasets=20, progress=False, seed=1
    )
    assert report.calibrated


def test_items_of_a_plate_count_each() -> None:
    class Encoder(nn.Module):
        """Exact, but for the width."""

        def forward(self, x: Tensor) -> Tensor:
            return x

    def items(x: Tensor) -> None:
        with pyro.plate("items", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("items", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)).to_event(1))

    report = check_calibration(items, guide, (torch.zeros(50, 2),), progress=False, seed=0)
    assert report.ranks["z"].shape == (2000, 2)
    assert report.calibrated

    amortized = AutoFlowGuide(items, amortize={"items": Encoder()}).setup(torch.zeros(50, 2))
    report = check_calibration(items, amortized, (torch.zeros(50, 2),), num_datasets=4, progress=False, seed=0)
    assert report.ranks["z"].shape == (200, 2)
    assert not report.calibrated  # it is not trained


def test_what_it_cannot_do_it_refuses() -> None:
    y = torch.zeros(NUM_DATA)
    with pytest.raises(ValueError, match="but got neither"):
        check_calibration(model, args=(X, y))
    with pytest.raises(ValueError, match="but got both"):
        check_calibration(model, posterior(), (X, y), refit=lambda *_: posterior())

    def factored(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(loc**2))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    with pytest.raises(ValueError, match="'penalty' is a pyro"):
        check_calibration(factored, posterior(), (torch.tensor(0.0),))

    def improper(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    with pytest.raises(ValueError, match="expected a model that can draw its own data"):
        check_calibration(improper, posterior(), (torch.tensor(0.0),))

    def hidden() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="data are among the arguments"):
        check_calibration(hidden, posterior())

    def subsampled(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[rows])

    with pytest.raises(NotImplementedError, match="'rows' is subsampled"):
        check_calibration(subsampled, args=(y,), refit=lambda *_: posterior())

    def fails(*_: Any) -> AutoNormal:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="all 3 failed"):
        check_calibration(model, args=(X, y), refit=fails, num_datasets=3, progress=False)


def test_arguments_by_hand() -> None:
    def standardized(raw: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=(raw - 3.0) / 2.0)

    def guide(raw: Tensor) -> None:
        pyro.sample("loc", dist.Normal((raw - 3.0) / 4.0, math.sqrt(0.5)))

    report = check_calibration(
        standardized,
        guide,
        (torch.tensor(0.0),),
        to_args=lambda data: ((3.0 + 2.0 * data["y"],), {}),
        num_datasets=300,
        progress=False,
        seed=0,
    )
    assert report.calibrated


def test_its_picture() -> None:
    report = check_calibration(
        model, posterior(width=0.6), (X, torch.zeros(NUM_DATA)), num_datasets=300, progress=False, seed=0
    )
    ax = plots.calibration(report)
    line = ax.get_lines()[-1].get_ydata()
    assert line.max() > 1.358 / math.sqrt(300)  # a wave: up, then down
    assert line.argmax() < line.argmin()
    with pytest.raises(ValueError, match="expected 1 to 5 of slope, but got"):
        plots.calibration(report, sites=["x"])
