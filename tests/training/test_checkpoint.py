# SPDX-License-Identifier: Apache-2.0
"""A run of ``fit`` that is cut off goes on from its checkpoint."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.training import checkpoint

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


class Schools:
    """Fails after so many runs, as a process does that is killed."""

    def __init__(self, num_runs=10**9):
        self.runs_left = num_runs

    def __call__(self, y):
        self.runs_left -= 1
        if self.runs_left < 0:
            raise MemoryError
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def train(model, path, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = AutoFlowGuide(model, "realnvp")
    options = {"num_steps": 60, "num_particles": 4, "seed": 0, "progress": False, **options}
    return guide, fit(model, guide, (Y,), checkpoint=path, **options)


def parameters(guide):
    return torch.cat([p.detach().reshape(-1) for p in guide.parameters()])


def test_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    model = Schools()
    _, whole = train(model, None)
    used = 10**9 - model.runs_left
    path = tmp_path / "run.pt"
    with pytest.raises(MemoryError):
        # The last runs are 60 steps and three estimates of 20 runs.
        train(Schools(used - 90), path)
    done = torch.load(path, weights_only=True)
    assert 0 < done["step"] < 60 and len(done["losses"]) == done["steps"] == done["step"]
    guide, result = train(Schools(), path)
    assert result.steps == 60
    assert list(result.losses[: done["step"]]) == done["losses"]
    assert result.start_elbo == pytest.approx(whole.start_elbo, abs=5 * whole.elbo_se + 0.05)
    assert abs(result.elbo - whole.elbo) < 0.3
    # Once more: a run that is done is not repeated.
    again, repeated = train(Schools(), path)
    assert repeated.steps == 60 and repeated.kept == result.kept and repeated.reason == result.reason
    assert torch.equal(parameters(again), parameters(guide))
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    path = tmp_path / "run.pt"
    train(Schools(), path, num_steps=20)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "reason": "interrupted", "cycle": 0, "step": 10, "steps": 10}, path)
    _, result = train(Schools(), path, num_steps=20)
    assert result.steps == 20 and result.reason == "all 20 steps done"


def test_refuses_the_state_of_another_guide(tmp_path):
    path = tmp_path / "run.pt"
    train(Schools(), path, num_steps=2)
    with pytest.raises(ValueError, match=r"expected 'run.pt' to hold the state of this model and guide"):
        fit(Schools(), AutoFlowGuide(Schools(), "diagonal_normal"), (Y,), checkpoint=path, progress=False)
