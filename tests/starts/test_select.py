# SPDX-License-Identifier: Apache-2.0
"""Which start is taken, of those that were found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.starts import mixture, select
from pyro_flows.starts.gaussian import Gaussian, refined
from pyro_flows.starts.likelihood import fit_likelihood
from tests.common import schools
from tests.starts.test_gaussian import correlated

STARTERS = ("_from_gaussian", "_from_priors", "_from_modes")


def funnel() -> None:
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    with pyro.plate("members", 3):
        pyro.sample("x", dist.Normal(0.0, (log_scale / 2).exp()))


@pytest.mark.parametrize(("model", "expected"), [(correlated, "_from_gaussian"), (funnel, "_from_priors")])
def test_the_best_is_taken(model: Callable[..., Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}

    def noted(name: str) -> Callable[..., Any]:
        starter = getattr(select, name)

        def run(*args: Any) -> Any:
            start = found[name] = starter(*args)
            return start

        return run

    for name in STARTERS:
        monkeypatch.setattr(select, name, noted(name))
    guide = AutoFlowGuide(model).warm_start()
    assert found.keys() == set(STARTERS)
    found = {name: start for name, start in found.items() if start is not None}
    assert max(found, key=lambda name: found[name].elbo) == expected
    torch.testing.assert_close(guide.posterior.joint.flow.state_dict(), found[expected].state, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("affordable", "most"), [(32, 4), (16, 2)])
def test_expensive_likelihood_factors_are_fitted_less_often(
    affordable: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50,000 observations, each fit and the Newton steps after it took half a minute."""
    rounds = []

    def counted(*args: Any, **options: Any) -> bool:
        rounds.append(options)
        return fit_likelihood(*args, **options)

    def better(*args: Any) -> Gaussian:
        """As if each round gained a nat."""
        return replace(refined(*args), elbo=-100.0 + len(rounds))

    monkeypatch.setattr(select, "affordable_draws", lambda *_: affordable)
    monkeypatch.setattr(select, "fit_likelihood", counted)
    monkeypatch.setattr(select, "refined", better)
    AutoFlowGuide(schools).warm_start(torch.tensor([28.0, 8.0, -3.0, 7.0]))
    assert len(rounds) == most


@pytest.mark.parametrize("seed", range(3))
def test_necks_of_a_hierarchy_are_no_modes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Climbs into them went on and on; Gaussians in four of them, 30 nats below the best one, were refined, and their
    average covariance had no factor."""
    refined_modes = []
    monkeypatch.setattr(mixture, "_refined", lambda _, mode: refined_modes.append(mode) or mode)
    pyro.set_rng_seed(seed)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.double)
    AutoFlowGuide(neck).warm_start(y)
    assert not refined_modes


def neck(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * torch.ones((), dtype=y.dtype)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 12.0), obs=y)
