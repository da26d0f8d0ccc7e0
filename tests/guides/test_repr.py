# SPDX-License-Identifier: Apache-2.0
"""What a guide shows of itself at the prompt."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import torch

from pyro_flows import AutoFlowGuide, fit, flows

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def test_a_joint_guide():
    guide = AutoFlowGuide(schools)
    assert repr(guide) == "AutoFlowGuide(flow='auto', not set up: has not seen the model's arguments)"
    guide.setup(Y)
    shown = "AutoFlowGuide(flow='auto', {})\n  joint, 5 dimensions: mu (), theta (4,)"
    assert repr(guide) == shown.format("not trained")
    guide.sample_posterior(10)
    guide(Y)
    assert repr(guide) == repr(copy.deepcopy(guide)) == shown.format("not trained")
    fit(schools, guide, (Y,), num_steps=3, progress=False)
    assert repr(guide) == shown.format("warm-started or trained")
    other = AutoFlowGuide(schools, flows.get("auto")).setup(Y)
    assert "flow='auto', not trained" in repr(other)
    other.load_state_dict(guide.state_dict())
    assert "warm-started or trained" in repr(other)


def test_local_latents():
    guide = AutoFlowGuide(schools, "realnvp", structure="plates").setup(Y)
    assert repr(guide).splitlines() == [
        "AutoFlowGuide(flow='realnvp', not trained)",
        "  joint, 1 dimension: mu ()",
        "  each item of plate 'schools' of 4, 1 dimension: theta (4,)",
    ]
    guide = AutoFlowGuide(schools, amortize={"schools": lambda y: y.unsqueeze(-1)}).setup(Y)
    assert "  each item of plate 'schools', by an encoder, 1 dimension: theta (4,)" in repr(guide).splitlines()
