# SPDX-License-Identifier: Apache-2.0
"""Objectives other than the ELBO: their gradients against brute force, and what fits by them cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.flows.noise import WideNormal
from pyro_flows.training.batches import Batches
from pyro_flows.training.cycles import ScheduleSettings
from pyro_flows.training.estimates import EstimateSettings
from pyro_flows.training.settings import FitSettings
from pyro_flows.training.weighted import WeightedLoss
from pyro_flows.training.weighted_objective import WeightedObjective, WeightedSettings
from tests.common import randomize_parameters

KINDS = ("importance_weighted", "forward_kl")
Z_SCORE = 4.5  # of some dozens of comparisons
NARROW = 0.6

GUIDES: dict[str, Callable[..., Any]] = {
    "path": partial(AutoFlowGuide, flow="diagonal_normal", init_scale=NARROW),
    "flow": partial(AutoFlowGuide, flow="spline", init_scale=NARROW),
    "ordinary": partial(AutoFlowGuide, flow="diagonal_normal", init_scale=NARROW, path_gradient=False),
    "AutoNormal": partial(AutoNormal, init_scale=NARROW),
}
guides = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)


def posterior(target: Any, dim: int = 1) -> Callable[[], None]:
    """A model with evidence 1, whose prior says nothing about its posterior."""
    prior = dist.Normal(torch.zeros(dim), 30.0).to_event(1)

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.factor("target", target(z) - prior.log_prob(z))

    return model


def logistic() -> None:
    """A posterior that is no normal, on the real line."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Bernoulli(logits=3.0 * z), obs=torch.tensor(1.0))


def loss_of(kind: str, model: Any, guide: Any, num_draws: int, num_sets: int = 1) -> WeightedLoss:
    objective = WeightedObjective(
        kind, model, guide, Batches((), {}), EstimateSettings(), WeightedSettings(bound_draws=num_draws)
    )
    assert objective.batched is not None
    return WeightedLoss(objective.batched, kind, num_draws, num_sets)


def parameters(guide: Any) -> list[Tensor]:
    return [p for p in guide.parameters() if p.requires_grad]


def gradients(loss: WeightedLoss, model: Any, guide: Any, count: int) -> tuple[Tensor, Tensor]:
    """Mean of so many gradients, one entry per parameter's sum, and its standard error."""
    rows = []
    for seed in range(count):
        torch.manual_seed(seed)
        parts = torch.autograd.grad(loss.differentiable_loss(model, guide), parameters(guide), allow_unused=True)
        rows.append(torch.stack([torch.zeros(()) if part is None else part.sum() for part in parts]))
    found = torch.stack(rows)
    return found.mean(0), found.std(0) / math.sqrt(count)


def differences(value: Callable[[], float], guide: Any, step: float = 1e-4) -> Tensor:
    """Finite differences of a function in each parameter, all of whose entries move together."""
    found = []
    for p in parameters(guide):
        with torch.no_grad():
            p += step
            high = value()
            p -= 2 * step
            low = value()
            p += step
        found.append((high - low) / (2 * step))
    return torch.tensor(found)


def prepared(make: Callable[..., Any], model: Any) -> Any:
    guide = make(model)
    guide()
    if isinstance(guide, AutoFlowGuide):
        guide.limits_steps = False
        randomize_parameters(guide, 0.1)
    return guide


@guides
def test_the_bound_has_the_gradient_of_finite_differences(make: Callable[..., Any]) -> None:
    guide = prepared(make, logistic)
    loss = loss_of("importance_weighted", logistic, guide, 4, 500)
    mean, error = gradients(loss, logistic, guide, 30)

    def seeded(seed: int) -> float:
        torch.manual_seed(seed)
        return loss.loss(logistic, guide)

    rows = torch.stack([differences(partial(seeded, 100 + seed), guide) for seed in range(30)])
    error = torch.hypot(error, rows.std(0) / math.sqrt(30))
    assert ((mean - rows.mean(0)).abs() < Z_SCORE * error + 1e-6).all()
    assert (error > 0).any() and mean.abs().max() > 10 * error.max()


@guides
def test_the_forward_divergence_has_the_gradient_of_quadrature(make: Callable[..., Any]) -> None:
    guide = prepared(make, logistic)
    z = torch.linspace(-9.0, 9.0, 4001)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + torch.nn.functional.logsigmoid(3.0 * z)
    p = log_p.softmax(0)
    normal = math.log(p.max() / (z[1] - z[0])) - log_p.max()

    def log_q() -> Tensor:
        if isinstance(guide, AutoFlowGuide):
            return guide.log_prob({"z": z})
        scale = guide.scales.z
        return dist.Normal(guide.locs.z, scale).log_prob(z)

    def divergence() -> float:
        return float((p * (log_p + normal - log_q().detach())).sum())

    loss = loss_of("forward_kl", logistic, guide, 4000)  # a bias of 1 / 4000, less than the standard error
    mean, error = gradients(loss, logistic, guide, 40)
    assert ((mean - differences(divergence, guide)).abs() < Z_SCORE * error + 1e-3 * mean.abs().max()).all()
    assert mean.abs().max() > 10 * error.max()
    values = torch.tensor([loss.loss(logistic, guide) for _ in range(40)])
    assert abs(values.mean() - divergence()) < Z_SCORE * values.std() / math.sqrt(40) + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_locals_are_those_without_paths(kind: str) -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 0.0, 2.0]))

    found = []
    for path_gradient in (True, False):
        torch.manual_seed(0)
        make = partial(AutoFlowGuide, flow="spline", structure="plates", path_gradient=path_gradient, init_scale=NARROW)
        guide = prepared(make, model)
        loss = loss_of(kind, model, guide, 8, 250)
        found.append(gradients(loss, model, guide, 15))
    (mean, error), (other, its_error) = found
    assert ((mean - other).abs() < Z_SCORE * torch.hypot(error, its_error) + 1e-6).all()
    assert mean.abs().max() > 10 * error.max()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_vanish_at_the_posterior(kind: str) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), NARROW).to_event(1))

    guide = AutoFlowGuide(model, flow="diagonal_normal", init_scale=NARROW)
    guide()
    guide.limits_steps = False
    mean, error = gradients(loss_of(kind, model, guide, 16), model, guide, 3)
    assert mean.abs().max() < 1e-6 and error.max() < 1e-6


def test_the_models_parameters_get_the_bounds_gradient() -> None:
    loc = torch.tensor(0.3, requires_grad=True)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.5))

    guide = prepared(GUIDES["path"], model)
    loss = loss_of("importance_weighted", model, guide, 4, 100)
    torch.manual_seed(0)
    (found,) = torch.autograd.grad(loss.differentiable_loss(model, guide), loc)
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            loc += step
            torch.manual_seed(0)
            values.append(loss.loss(model, guide))
            loc -= step
    assert found == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.005)


def test_wide_draws_have_the_density_that_they_say() -> None:
    torch.manual_seed(0)
    normal = WideNormal(torch.zeros(3), torch.ones(3))
    eps = normal.rsample(torch.Size([200_000]))
    weights = (-normal.log_ratio).exp()  # normal / wide
    assert weights.max() <= 2.0
    for moment, exact in ((torch.ones(len(eps)), 1.0), (eps[:, 0] ** 2, 1.0), (eps[:, 1] ** 4, 3.0)):
        terms = weights * moment
        assert abs(terms.mean() - exact) < 4 * terms.std() / math.sqrt(len(eps))
    assert (eps.norm(dim=-1) > 10.0).double().mean() > 0.005  # a normal's: 1e-20


def test_a_recorded_step_is_the_eager_one() -> None:
    guide = prepared(partial(AutoFlowGuide, flow="spline"), logistic)
    for kind in KINDS:
        objective = WeightedObjective(kind, logistic, guide, Batches((), {}), EstimateSettings(), WeightedSettings())
        loss = objective.elbo(1)
        torch.manual_seed(0)
        eager = loss.loss_and_grads(logistic, guide)
        graph = objective.record(loss)  # compares its gradient with the eager one
        torch.manual_seed(0)
        value, _ = graph((), {})
        objective.release()
        assert float(value) == pytest.approx(eager, abs=1e-6)
        guide.zero_grad()


# Fits

QUICK = FitSettings(
    estimates=EstimateSettings(num_runs=10, num_particles=200), schedule=ScheduleSettings(first_cycle=200)
)
quick = partial(fit, seed=0, progress=False, settings=QUICK, num_steps=200, num_particles=16, compile=False)


def half_width(guide: Any, level: float = 0.9) -> float:
    """Half the width of the central interval of a coordinate."""
    torch.manual_seed(0)
    z = guide.sample_posterior(50_000)["z"][:, 0]
    low, high = z.quantile(torch.tensor([0.5 - level / 2, 0.5 + level / 2])).tolist()
    return (high - low) / 2


def test_heavy_tails_are_covered() -> None:
    target = dist.StudentT(2.0).to_event(0)
    model = posterior(lambda z: target.log_prob(z).sum(-1))
    found = {}
    for objective in ("elbo", *KINDS):
        guide = AutoFlowGuide(model, flow="diagonal_normal")
        result = quick(model, guide, objective=objective)
        found[objective] = result.khat, half_width(guide), result
    exact = 2.92
    (khat, width, elbo), (khat_bound, width_bound, _), (khat_forward, width_forward, forward) = found.values()
    assert khat > 1.0 and width < 0.85 * exact
    assert khat_bound < khat and width < width_bound
    assert khat_forward < 0.7 and width_forward > exact
    assert elbo.weighted is None and forward.weighted.kept and forward.weighted.steps == 200
    assert forward.elbo < elbo.elbo and "Forward KL, by 256 draws" in str(forward)


def test_correlations_that_a_diagonal_normal_lacks_do_not_narrow_it() -> None:
    target = dist.MultivariateNormal(torch.zeros(3), 0.1 * torch.eye(3) + 0.9)
    model = posterior(target.log_prob, 3)
    widths = []
    for objective in ("elbo", "forward_kl"):
        guide = AutoFlowGuide(model, flow="diagonal_normal")
        result = quick(model, guide, objective=objective, num_steps=500)
        widths.append(half_width(guide) / 1.645)
    assert widths[0] < 0.5 and 0.85 < widths[1] < 1.1
    # The divergence of the best one: the covariance's diagonal against itself.
    assert -result.weighted.value == pytest.approx(-0.5 * target.covariance_matrix.logdet().item(), abs=0.3)


def test_a_lost_mode_is_found() -> None:
    parts = dist.Normal(torch.tensor([-3.0, 3.0]), 1.0)
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)
    model = posterior(lambda z: target.log_prob(z.squeeze(-1)))
    guide = AutoFlowGuide(model, flow="diagonal_normal")
    quick(model, guide)
    assert half_width(guide) < 2.0  # one of them
    result = quick(model, guide, objective="forward_kl", num_steps=800)  # goes on from there
    torch.manual_seed(0)
    z = guide.sample_posterior(50_000)["z"]
    assert z.mean().item() == pytest.approx(1.2, abs=0.4)
    assert z.std().item() == pytest.approx(math.sqrt(target.variance), rel=0.2)
    assert result.khat < 0.7


def test_the_posterior_itself_is_left_alone() -> None:
    model = posterior(dist.Normal(1.0, 2.0).to_event(0).log_prob)
    guide = AutoFlowGuide(model, flow="diagonal_normal")
    result = fit(model, guide, objective="forward_kl", seed=0, progress=False)
    assert result.weighted is not None and result.weighted.steps == 0 and not result.weighted.kept
    assert result.verdict == "trust it"


def test_the_same_seed_gives_the_same_run_and_the_callback_stops_it() -> None:
    model = posterior(lambda z: dist.StudentT(2.0).log_prob(z).sum(-1))
    first, second = (quick(model, AutoFlowGuide(model), objective="forward_kl").weighted for _ in range(2))
    assert first == second
    seen = []
    quick(model, AutoFlowGuide(model), objective="forward_kl", callback=lambda now: seen.append(now.objective))
    assert seen == ["elbo", "forward_kl"]
    stopped = quick(model, AutoFlowGuide(model), objective="forward_kl", callback=lambda now: True)
    assert stopped.weighted is None and "callback" in stopped.reason


# Refusals


def steered() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0 if z > 0 else 2.0), obs=torch.tensor(1.0))


def in_batches(index: Tensor) -> None:
    with pyro.plate("items", 10, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(len(index)))


def discrete() -> None:
    logits = pyro.param("logits", torch.zeros(()))
    pyro.sample("z", dist.Bernoulli(logits=logits))


def coin() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("model", "guide", "args", "message"),
    [
        (steered, AutoFlowGuide(steered), (), "run at many draws at once for objective='forward_kl'"),
        (in_batches, AutoNormal(in_batches, create_plates=lambda index: pyro.plate("items", 10, subsample=index)),
         (torch.arange(5),), "all data at once"),
        (logistic, AutoDelta(logistic), (), "AutoDelta is a point"),
        (coin, discrete, (), "those of site 'z' are not"),
    ],
    ids=["steered", "batches", "point", "discrete"],
)  # fmt: skip
def test_what_cannot_be_weighted_is_refused_before_any_step(model: Any, guide: Any, args: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        fit(model, guide, args, objective="forward_kl", progress=False)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="importance_weighted"):
        fit(logistic, AutoFlowGuide(logistic), objective="iwae")
