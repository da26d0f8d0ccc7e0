# SPDX-License-Identifier: Apache-2.0
"""A run of ``fit`` that is cut off goes on from its checkpoint."""

import gzip
import shutil
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.training.batches import Batches
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.fit import FitSettings
from pyro_flows.training.objective import Objective
from pyro_flows.training.schedule import ScheduleSettings
from pyro_flows.training.state import TrainingState
from pyro_flows.training.trainer import Trainer
from pyro_flows.transforms.preconditioner import look_again
from tests.data.version_0_1_0.guides import DATA, densities, eight_schools, small

OLD = Path(__file__).parents[1] / "data" / "version_0_1_0"

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
    settings = FitSettings(checkpoint_interval=0.0)
    options = {"num_steps": 60, "num_particles": 4, "seed": 0, "progress": False, "settings": settings, **options}
    return guide, fit(model, guide, (Y,), checkpoint=path, **options)


def parameters(guide):
    return torch.cat([p.detach().reshape(-1) for p in guide.parameters()])


@pytest.mark.slow
def test_goes_on_where_it_was_cut_off(tmp_path):
    model = Schools()
    _, whole = train(model, None)
    used = 10**9 - model.runs_left
    path = tmp_path / "run.pt"
    with pytest.raises(MemoryError):
        # The last runs are 60 steps and three estimates of 20 runs.
        train(Schools(used - 90), path)
    done = torch.load(path, weights_only=True)
    assert 0 < done["step"] < 60 and len(done["losses"]) == done["num_steps"] == done["step"]
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


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "run.pt"
    train(Schools(), path, num_steps=20)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "reason": "interrupted", "cycle": 0, "step": 10, "num_steps": 10}, path)
    _, result = train(Schools(), path, num_steps=20)
    assert result.steps == 20 and result.reason == "all 20 steps done"


def test_refuses_the_state_of_another_guide(tmp_path):
    path = tmp_path / "run.pt"
    train(Schools(), path, num_steps=2)
    with pytest.raises(ValueError, match=r"expected 'run.pt' to hold the state of this model and guide"):
        fit(Schools(), AutoFlowGuide(Schools(), "diagonal_normal"), (Y,), checkpoint=path, progress=False)


def test_a_run_of_version_0_1_0_goes_on(tmp_path):
    path = tmp_path / "run.pt"
    shutil.copy(OLD / "run.pt", path)
    old = torch.load(path, weights_only=True)
    assert old["cycle"] == 1 and 0 < old["step"] < 250 and not old["start_is_best"]

    # At the stored point the guide is the distribution that it was.
    guide = AutoFlowGuide(eight_schools, small("auto")).setup(*DATA)
    objective = Objective(eight_schools, guide, Batches(DATA, None))
    trainer = Trainer(objective, 1, 0.01)
    state = Checkpoint(path, 60.0).load(objective.leaves, guide)
    trainer.restore(state.point)
    with gzip.open(OLD / "guides.pt.gz") as file:
        written = torch.load(file, weights_only=True)["run"]
    look_again(guide)
    torch.testing.assert_close(densities(guide, written["values"])[1], written["log_prob"], rtol=1e-5, atol=1e-4)

    guide = AutoFlowGuide(eight_schools, small("auto"))
    settings = FitSettings(schedule=ScheduleSettings(max_steps=500))
    result = fit(eight_schools, guide, DATA, seed=0, progress=False, checkpoint=path, settings=settings)
    assert result.steps == 500 and result.kept == "flow"
    assert list(result.losses[: old["steps"]]) == old["losses"]
    assert result.elbo > result.start_elbo
    # The file is this version's now.
    assert TrainingState.from_dict({k: v for k, v in torch.load(path).items() if k != "format"}).num_steps == 500


def test_a_run_of_version_0_1_0_of_another_guide_is_refused():
    guide = AutoNormal(eight_schools)
    with pytest.raises(ValueError, match="to hold the state of this model and guide"):
        fit(eight_schools, guide, DATA, checkpoint=OLD / "run.pt", progress=False)


def test_a_state_is_its_dictionary():
    state = TrainingState(0.01, [torch.zeros(2)], [torch.ones(2)], step=3, losses=[1.0], reason="interrupted")
    assert TrainingState.from_dict(state.to_dict()) == state
    values = state.to_dict()
    del values["seed"]
    with pytest.raises(ValueError, match="Pass a checkpoint that fit has written"):
        TrainingState.from_dict(values)


def test_one_rollback_restores_and_halves():
    pyro.clear_param_store()
    guide = AutoNormal(Schools())
    trainer = Trainer(Objective(Schools(), guide, Batches((Y,), None)), 1, 0.02)
    before = trainer.snapshot()
    trainer.cycle(3)
    trainer.roll_back(before)
    assert all(torch.equal(a, b) for a, b in zip(trainer.snapshot(), before, strict=True))
    assert (trainer.state.learning_rate, trainer.state.num_rollbacks) == (0.01, 1)
