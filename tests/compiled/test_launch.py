# SPDX-License-Identifier: Apache-2.0
"""Several compiled steps as one CUDA graph, which is only pretended here."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam

from pyro_flows import CompiledSVI
from pyro_flows.compiled import graph as graph_module
from pyro_flows.compiled import inductor
from pyro_flows.compiled.graph import LAUNCH, LossGraph

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Graphs run as they are: compiling takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)


def pretend(monkeypatch, kind):
    """Take steps as on a GPU."""
    kind.launches.clear()
    monkeypatch.setattr(graph_module, "CudaGraph", kind)
    monkeypatch.setattr(LossGraph, "_is_on_gpu", True)


class LaunchedAtOnce:
    """In place of a CUDA graph, which a test without a GPU does not have: it counts launches, and takes the steps."""

    launches: ClassVar[list[int]] = []

    def __init__(self, run, inputs, moving=()):
        self._run = run
        run(*inputs)

    def __call__(self, *inputs):
        found = self._run(*inputs)
        self.launches.append(found[0].numel())
        return found


@pytest.mark.parametrize("make", [Adam, ClippedAdam])
def test_steps_of_one_launch_are_those_of_single_steps(monkeypatch, make):
    """A GPU takes them as one CUDA graph; learning rates and their corrections follow the step."""
    found = {}
    for at_once in (False, True):
        if at_once:
            pretend(monkeypatch, LaunchedAtOnce)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        options = {"lr": 0.05} if make is Adam else {"lr": 0.05, "lrd": 0.9}
        svi = CompiledSVI(schools, AutoNormal(schools), make(options), Trace_ELBO())
        losses = [*svi._steps(53, (Y,), {}), svi.step(Y)]
        (state,) = next(iter(svi.optim.optim_objs.values())).state.values()
        found[at_once] = losses, [p.tolist() for p in svi.guide.parameters()], int(state["step"])
    assert found[True] == found[False] and len(set(found[True][0])) == 54
    assert LaunchedAtOnce.launches.count(LAUNCH.num_steps) == 3  # one to check them, and two of the 53


def test_a_launch_that_does_otherwise_is_not_used(monkeypatch):
    class Wrong(LaunchedAtOnce):
        def __call__(self, *inputs):
            found = super().__call__(*inputs)
            return [found[0] + 1.0] if found[0].numel() > 1 else found

    pretend(monkeypatch, Wrong)
    svi = CompiledSVI(schools, AutoNormal(schools), Adam({"lr": 0.02}), Trace_ELBO())
    assert len(svi._steps(50, (Y,), {})) == 50
    assert LaunchedAtOnce.launches.count(LAUNCH.num_steps) == 1


def test_launches_leave_comparisons_with_the_model_to_single_steps(monkeypatch):
    """What nothing sees, such as the contents of a NumPy array, is found at the 2000th step."""
    pretend(monkeypatch, LaunchedAtOnce)
    monkeypatch.setattr(graph_module, "AGREEMENT", replace(graph_module.AGREEMENT, first_check=100))
    hidden = np.zeros(1)

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc + float(hidden[0]), 3.0), obs=y)

    svi = CompiledSVI(model, AutoNormal(model), Adam({"lr": 0.02}), Trace_ELBO())
    svi._steps(21, (Y,), {})
    hidden[0] = 100.0
    with pytest.warns(UserWarning, match="contents of a NumPy array"):
        svi._steps(100, (Y,), {})
