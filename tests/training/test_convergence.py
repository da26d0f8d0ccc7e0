# SPDX-License-Identifier: Apache-2.0
"""When a user's own loop stops, and what it says of a NaN."""

from __future__ import annotations

import math
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyro_flows import AutoFlowGuide, Convergence, until_converged
from pyro_flows.training import ConvergenceSettings

Y = torch.tensor([1.0, 2.0, 3.0])


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize(("height", "time", "noise"), [(10, 500, 1), (10, 500, 3), (100, 300, 10), (5, 100, 3)])
def test_a_run_stops_when_the_loss_has_settled(height, time, noise):
    """Losses that decay exponentially, with noise of a given standard deviation."""
    for seed in range(10):
        numbers, rule = random.Random(seed), Convergence()
        left = next(
            height * math.exp(-step / time)
            for step in range(20_000)
            if rule.add(height * math.exp(-step / time) + numbers.gauss(0.0, noise))
        )
        assert left < 0.05  # nats


def test_losses_that_are_not_finite_do_not_count():
    rule = Convergence(ConvergenceSettings(min_window=10))
    assert not any(rule.add(math.nan) for _ in range(100))
    assert rule.losses == [] and rule.gain == math.inf
    assert any(rule.add(1.0) for _ in range(100)) and rule.gain == 0.0


def test_a_loop_of_ones_own():
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = list(until_converged(svi, (Y,), progress=False))
    assert 800 <= len(losses) < 5000
    assert guide.median(Y)["loc"].item() == pytest.approx(2.0, abs=0.2)
    assert len(list(until_converged(svi, kwargs={"y": Y}, max_steps=7, progress=False))) == 7
    seen = []
    svi.step = lambda y: seen.append(len(y)) or 0.0
    for _ in until_converged(svi, [(Y,), (Y[:2],)], max_steps=4, progress=False):
        pass
    assert seen == [3, 2, 3, 2]
    with pytest.raises(TypeError, match="iterator"):
        until_converged(svi, iter([(Y,)]))
    with pytest.raises(ValueError, match="max_steps"):
        until_converged(svi, (Y,), max_steps=0)


def test_one_bar_of_the_loop(capsys):
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    for _ in until_converged(svi, (Y,), max_steps=60):
        pass
    shown = capsys.readouterr().err
    assert "steps: 100%" in shown and "ELBO" in shown


def test_the_site_of_a_nan_is_named():
    def breaks(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.factor("root", (1.5 - loc).sqrt())

    pyro.enable_validation(False)
    svi = SVI(breaks, AutoNormal(breaks), Adam({"lr": 0.05}), Trace_ELBO())
    with (
        pytest.warns(UserWarning, match="Encountered NaN"),
        pytest.raises(
            RuntimeError, match=r"parameter '.*' is not finite after step \d+\. .* site 'root' has log density nan"
        ),
    ):
        list(until_converged(svi, (Y,), progress=False))
    assert all(value.isfinite().all() for value in pyro.get_param_store().values())

    svi.step = lambda y: math.inf
    with pytest.raises(RuntimeError, match="losses are not up to step 10"):
        list(until_converged(svi, (Y,), progress=False))
    pyro.enable_validation(True)


def test_it_takes_flow_guides_too():
    guide = AutoFlowGuide(model, "diagonal_normal")
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    assert len(list(until_converged(svi, (Y,), progress=False, settings=ConvergenceSettings(min_window=50)))) < 2000
