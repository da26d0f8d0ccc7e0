# SPDX-License-Identifier: Apache-2.0
"""Which start is taken, of those that were found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlowGuide
from pyro_flows.starts import select
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
