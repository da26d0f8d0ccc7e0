# SPDX-License-Identifier: Apache-2.0
"""Steps on what was read of a loop over time, against steps on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.compiled.parameters import trial
from pyro_flows.compiled.unread import tensor_loss
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.training import EstimateSettings, FitSettings, TrainerSettings
from pyro_flows.training import read_loss as read_losses
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective
from pyro_flows.training.read_loss import read_loss
from pyro_flows.training.trainer import Trainer
from pyro_flows.training.weighted_objective import WeightedObjective, WeightedSettings
from tests.common import a_site_a_day

T = 60
RETURNS = torch.randn(T, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have short loops read."""
    monkeypatch.setattr(read_losses, "SETTINGS", read_losses.ReadLossSettings(min_operations=200))


def volatility(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    h = sigma * z[0]
    path = [h]
    for t in range(1, len(y)):
        h = phi * h + sigma * z[t]
        path.append(h)
    pyro.sample("y", dist.Normal(0.0, (0.5 * torch.stack(path)).exp()).to_event(1), obs=y)


def short(y: Tensor) -> None:
    volatility(y[:5])


def without_chain(y: Tensor) -> None:
    """As many operations, in which states are squared."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    h = scale * z[0]
    path = [h]
    for t in range(1, len(y)):
        h = 0.5 * torch.tanh(h).square() + scale * z[t]
        path.append(h)
    pyro.sample("y", dist.Normal(torch.stack(path), 1.0).to_event(1), obs=y)


def trained(y: Tensor) -> None:
    bias = pyro.param("bias", torch.tensor(0.1))
    volatility(y - bias)


def of_days_that_are_scaled(y: Tensor) -> None:
    """A mini-batch of another plate."""
    volatility(y)
    with pyro.plate("rest", 10, subsample_size=5):
        pyro.sample("more", dist.Normal(0.0, 1.0), obs=torch.zeros(5))


def objective_of(model: Callable[..., None]) -> Objective:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoFlowGuide(model)
    guide.setup(RETURNS)
    if model is volatility:
        guide.warm_start(RETURNS)
    return Objective(model, guide, Batches((RETURNS,), {}))


@pytest.mark.parametrize("model", [volatility, a_site_a_day])
def test_loss_and_gradient_are_those_of_the_model(model: Callable[..., None]) -> None:
    objective = objective_of(model)
    read = read_loss(objective, 3)
    assert read is not None
    elbo = objective.elbo(3)
    of_model = tensor_loss(elbo)
    programs = objective._programs(elbo, 0)
    leaves = [leaf for leaf in objective.leaves if leaf.requires_grad]
    found = []
    for loss in (lambda: read(RETURNS), lambda: of_model(*programs, RETURNS)):
        torch.manual_seed(1)
        with pyro.validation_enabled(False), trial(objective.buffers):  # averages of gradients move
            value = loss()
            parts = torch.autograd.grad(value, leaves, allow_unused=True)
        gradient = torch.cat([part.reshape(-1) for part in parts if part is not None])
        found.append((value.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-3)
    assert (found[0][1] - found[1][1]).norm() < 2e-3 * found[1][1].norm()


@pytest.mark.parametrize("model", [short, without_chain, trained, of_days_that_are_scaled])
def test_other_models_are_run(model: Callable[..., None]) -> None:
    assert read_loss(objective_of(model), 2) is None


def test_another_loss_has_its_own_step() -> None:
    elbo = objective_of(volatility)
    forward_kl = WeightedObjective(
        "forward_kl", elbo.model, elbo.guide, elbo.batches, EstimateSettings(), WeightedSettings()
    )
    assert read_loss(forward_kl, 2) is None


def test_a_model_that_refuses_a_run_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("unlikely")

    objective = objective_of(volatility)
    monkeypatch.setattr(RunRecorder, "scored", refuse)
    assert read_loss(objective, 2) is None


def test_steps_of_fit_do_not_run_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """But the first, the recording, and a check."""
    calls, steps = 0, 0

    def model(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        volatility(y)

    def counted(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        before = calls
        cycle(trainer, *args, **kwargs)
        steps += calls - before

    cycle = Trainer.cycle
    monkeypatch.setattr(Trainer, "cycle", counted)
    trainer = TrainerSettings(min_steps_to_record=0, min_seconds_to_record=0.0, compile_seconds=1e9)
    settings = FitSettings(estimates=EstimateSettings(num_runs=2, num_particles=10), trainer=trainer)
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model)
    result = fit(model, guide, args=(RETURNS,), num_steps=100, seed=0, progress=False, settings=settings)
    assert result.steps == 100
    assert 0 < steps < 20


def test_a_change_of_the_model_or_the_data_is_seen() -> None:
    """A number that the model reads, and data that change in place."""
    options: dict[str, Any] = {"scale": 1.0}
    data = RETURNS.clone()

    def model() -> None:
        volatility(options["scale"] * data)

    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model)
    guide.setup()
    objective = Objective(model, guide, Batches((), {}))
    graph = objective.record(objective.elbo(2))
    assert objective.is_read and graph.matches((), {})

    def loss() -> float:
        torch.manual_seed(2)
        return float(graph((), {})[0])

    first = loss()
    data.mul_(2.0)
    assert loss() > first + 1.0
    data.mul_(0.5)
    assert loss() == pytest.approx(first, rel=1e-5)
    options["scale"] = 2.0
    assert not graph.matches((), {})
