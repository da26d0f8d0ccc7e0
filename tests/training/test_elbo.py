# SPDX-License-Identifier: Apache-2.0
"""``VectorizedTrace_ELBO`` is ``Trace_ELBO`` whose particles share a run, for models as they are written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, autoguide, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide, CompiledSVI, VectorizedTrace_ELBO
from pyro_flows.compiled import inductor

X = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
Y = torch.tensor([0.3, -0.2, 0.9, 1.4, -0.7, 0.1])
NUM_PARTICLES = 7


def regression(y: Tensor, broadcasts: bool = False) -> None:
    """Runs in an outer plate, or only under ``torch.vmap``."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    mean = (X * w).sum(-1) if broadcasts else X @ w
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


both_ways = pytest.mark.parametrize("broadcasts", [True, False], ids=["plate", "vmap"])


def gradients_of(loss: Tensor, guide: nn.Module) -> Tensor:
    parts = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    return torch.cat([part.reshape(-1) for part in parts if part is not None])


def recorded(guide: Callable[..., Any]) -> tuple[Callable[..., Any], list[poutine.Trace]]:
    """A guide that keeps its traces."""
    traces = []

    def run(*args: Any, **kwargs: Any) -> None:
        with poutine.trace() as tape:
            guide(*args, **kwargs)
        traces.append(tape.trace)

    return run, traces


def noise_of(trace: poutine.Trace, row: int) -> dict[str, Tensor]:
    """Standardized noise of one particle, by site of an ``AutoNormal``."""
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and name.endswith("_unconstrained"):
            base = node["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            eps = ((node["value"] - base.loc) / base.scale).detach()
            rank = node["fn"].event_dim
            found[name] = eps.reshape(-1, *eps.shape[eps.dim() - rank :])[row]
    return found


class _FromNoise(poutine.messenger.Messenger):
    """Draws of an ``AutoNormal`` from given noise, as functions of its parameters."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.noise:
            base = msg["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            msg["value"] = base.loc + base.scale * self.noise[msg["name"]]
            msg["done"] = True


@both_ways
def test_value_and_gradient_at_the_same_draws(broadcasts: bool) -> None:
    guide = AutoNormal(regression)
    guide(Y)
    keeping, traces = recorded(guide)
    elbo = VectorizedTrace_ELBO(NUM_PARTICLES)
    loss = elbo.differentiable_loss(regression, keeping, Y, broadcasts)
    assert elbo._batched.is_mapped != broadcasts
    singles = [
        Trace_ELBO().differentiable_loss(regression, _FromNoise(noise_of(traces[-1], row))(guide), Y, broadcasts)
        for row in range(NUM_PARTICLES)
    ]
    assert len({single.item() for single in singles}) == NUM_PARTICLES
    expected = torch.stack(singles).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients_of(loss, guide), gradients_of(expected, guide))


@both_ways
def test_loss_and_grads_are_those_of_the_differentiable_loss(broadcasts: bool) -> None:
    guide = AutoNormal(regression)
    guide(Y)
    found = []
    for method in ("loss", "loss_and_grads", "differentiable_loss"):
        elbo = VectorizedTrace_ELBO(NUM_PARTICLES)
        pyro.set_rng_seed(3)
        guide.zero_grad()
        found.append(getattr(elbo, method)(regression, guide, Y, broadcasts))
        if method == "loss_and_grads":
            left = torch.cat([p.grad.reshape(-1) for p in guide.parameters()])
    assert found[0] == pytest.approx(found[1]) == pytest.approx(found[2].item())
    torch.testing.assert_close(left, gradients_of(found[2], guide))


@both_ways
def test_a_site_without_a_reparameterised_draw(broadcasts: bool) -> None:
    """The score function's gradient, against the exact one: a Bernoulli guide of two states."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        mean = 2.0 * z if broadcasts else (torch.tensor([[2.0]]) @ z.reshape(1, 1)).reshape(())
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.7))

    logit = torch.tensor(-1.0, requires_grad=True)

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=logit))

    elbo = VectorizedTrace_ELBO(10)
    found = torch.stack([torch.autograd.grad(elbo.differentiable_loss(model, guide), logit)[0] for _ in range(400)])
    assert elbo._batched.is_mapped != broadcasts
    q = logit.sigmoid()
    states = []
    for z, weight in ((1.0, q), (0.0, 1.0 - q)):
        log_p = dist.Bernoulli(0.3).log_prob(torch.tensor(z)) + dist.Normal(2.0 * z, 1.0).log_prob(torch.tensor(1.7))
        states.append(weight * (log_p - weight.log()))
    (expected,) = torch.autograd.grad(-sum(states), logit)
    error = found.std() / math.sqrt(len(found))
    assert error < 0.1 * expected.abs()
    assert (found.mean() - expected).abs() < 4.0 * error


@pytest.mark.slow
@both_ways
def test_such_sites_in_a_plate(broadcasts: bool) -> None:
    """Each item's score has the costs of that item only, as in ``Trace_ELBO``, so that its noise is small."""
    weights = torch.full((1, 1), 2.0)

    def model() -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            mean = 2.0 * z if broadcasts else (z.unsqueeze(-1) @ weights).reshape(6)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    logits = torch.linspace(-1.5, 1.5, 6).requires_grad_()

    def guide() -> None:
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    found, variances = [], []
    for elbo, count in ((VectorizedTrace_ELBO(10), 200), (Trace_ELBO(10), 200)):
        drawn = [torch.autograd.grad(elbo.differentiable_loss(model, guide), logits)[0] for _ in range(count)]
        found.append(torch.stack(drawn))
        variances.append(found[-1].var(0).sum())
    q = logits.sigmoid()
    prior, likelihood = dist.Bernoulli(0.3), dist.Normal(torch.tensor([[0.0], [2.0]]), 1.0).log_prob(Y)
    log_p = prior.log_prob(torch.tensor([[0.0], [1.0]])) + likelihood  # (2, 6)
    weight = torch.stack([1.0 - q, q])
    (expected,) = torch.autograd.grad(-(weight * (log_p - weight.log())).sum(), logits)
    assert ((found[0].mean(0) - expected).abs() < 4.5 * found[0].std(0) / math.sqrt(200)).all()
    assert 0.7 < variances[0] / variances[1] < 1.4  # of two variances of 1200 numbers


def parts(model: Callable[..., Any]) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["sigma"])))
    guide.append(AutoFlowGuide(poutine.block(model, expose=["w"])))
    return guide


GUIDES: dict[str, Callable[..., Any]] = {
    "AutoFlowGuide": AutoFlowGuide,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoStructured": lambda model: autoguide.AutoStructured(
        model, conditionals={"w": "normal", "sigma": "normal"}, dependencies={"sigma": {"w": "linear"}}
    ),
    "AutoGuideList": parts,
}


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES.keys())
def test_guides_have_the_mean_of_single_particles(make: Callable[..., Any], broadcasts: bool) -> None:
    guide = make(regression)
    guide(Y, broadcasts)
    elbo = VectorizedTrace_ELBO(50)
    with torch.no_grad():
        found = torch.tensor([elbo.loss(regression, guide, Y, broadcasts) for _ in range(40)])
        expected = torch.tensor([Trace_ELBO().loss(regression, guide, Y, broadcasts) for _ in range(400)])
    assert elbo._batched.is_mapped != broadcasts
    error = (found.var() / len(found) + expected.var() / len(expected)).sqrt()
    assert (found.mean() - expected.mean()).abs() < 4.0 * error
    # Particles have noise of their own: else the variance would not fall with their number.
    assert 0.4 < found.var() * 50 / expected.var() < 2.5
    for parameter in guide.parameters():
        parameter.grad = None
    elbo.loss_and_grads(regression, guide, Y, broadcasts)
    assert any(parameter.grad is not None for parameter in guide.parameters())
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.grad is not None)


@both_ways
def test_parameters_of_the_model_have_their_gradients(broadcasts: bool) -> None:
    layer = nn.Linear(2, 1)

    def model(y: Tensor) -> None:
        net = pyro.module("net", layer)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (X * w).sum(-1) if broadcasts else X @ w
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean + net(X).squeeze(-1), scale), obs=y)

    # All particles are at one point: gradients are exact.
    guide = autoguide.AutoDelta(model, init_loc_fn=init_to_median)
    guide(Y)
    found = []
    for elbo in (VectorizedTrace_ELBO(NUM_PARTICLES), Trace_ELBO()):
        with poutine.trace(param_only=True) as tape:
            loss = elbo.differentiable_loss(model, guide, Y)
        names = {name for name in tape.trace.nodes if not name.startswith("AutoDelta")}
        assert names == {"scale", "net$$$weight", "net$$$bias"}
        leaves = [pyro.param("scale").unconstrained(), *layer.parameters()]
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@both_ways
def test_svi_trains_what_the_model_has(broadcasts: bool) -> None:
    """Its parameters reach the optimizer."""

    def model(y: Tensor) -> None:
        offset = pyro.param("offset", torch.tensor(0.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.1).to_event(1))
        mean = (X * w).sum(-1) if broadcasts else X @ w
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean + offset, 1.0), obs=y + 3.0)

    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.1}), VectorizedTrace_ELBO(4))
    for _ in range(100):
        svi.step(Y)
    assert abs(pyro.param("offset").item() - float(Y.mean() + 3.0)) < 0.2


@both_ways
def test_subsampled_plates(broadcasts: bool) -> None:
    """Model and guide see the same items, scaled."""
    data = torch.linspace(-2.0, 2.0, 12)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        slope = w[..., 0] if broadcasts else w[0]
        with pyro.plate("data", 12, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(data[index], 0.1))
            pyro.sample("y", dist.Normal(z + slope, 0.5), obs=data[index])

    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 0.1).to_event(1))
        with pyro.plate("data", 12, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(data[index], 0.1))

    elbo = VectorizedTrace_ELBO(20)
    found = torch.tensor([elbo.loss(model, guide) for _ in range(60)])
    assert elbo._batched.is_mapped != broadcasts
    # z has its prior: 12 terms of the likelihood, with mean zero and variance 0.02, and KL(q(w) || p(w)).
    kl = torch.distributions.kl_divergence(dist.Normal(0.0, 0.1), dist.Normal(0.0, 1.0)) * 2
    expected = float(kl) + 12 * (0.5 * 0.02 / 0.25 + math.log(0.5) + 0.5 * math.log(2 * math.pi))
    assert abs(found.mean() - expected) < 4.0 * found.std() / math.sqrt(len(found))


@config_enumerate
def mixture(y: Tensor, broadcasts: bool = False) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        which = pyro.sample("which", dist.Bernoulli(0.3)).long()
        mean = torch.where(which == 1, locs[..., 1], locs[..., 0]) if broadcasts else locs[which]
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@both_ways
def test_enumerated_sites(broadcasts: bool) -> None:
    guide = AutoNormal(poutine.block(mixture, expose=["locs"]))
    guide(Y)
    keeping, traces = recorded(guide)
    elbo = VectorizedTrace_ELBO(NUM_PARTICLES)
    loss = elbo.differentiable_loss(mixture, keeping, Y, broadcasts)
    assert elbo._batched.is_mapped != broadcasts
    singles = [
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(
            mixture, _FromNoise(noise_of(traces[-1], row))(guide), Y, broadcasts
        )
        for row in range(NUM_PARTICLES)
    ]
    expected = torch.stack(singles).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients_of(loss, guide), gradients_of(expected, guide))


@both_ways
def test_one_particle(broadcasts: bool) -> None:
    """Has the numbers of ``Trace_ELBO`` from one seed, whatever was looked at before."""
    guide = AutoNormal(regression)
    guide(Y)
    found = []
    for elbo in (VectorizedTrace_ELBO(), Trace_ELBO()):
        elbo.loss(regression, guide, Y, broadcasts)
        pyro.set_rng_seed(1)
        found.append([elbo.loss(regression, guide, Y, broadcasts) for _ in range(3)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@both_ways
def test_one_particle_without_a_reparameterised_draw(broadcasts: bool) -> None:
    """Its score has the costs that ``Trace_ELBO`` gives it."""

    def model() -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            mean = 2.0 * z if broadcasts else (z.unsqueeze(-1) @ torch.full((1, 1), 2.0)).reshape(6)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    logits = torch.linspace(-1.5, 1.5, 6).requires_grad_()

    def guide() -> None:
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    found = []
    for elbo in (VectorizedTrace_ELBO(), Trace_ELBO()):
        elbo.loss(model, guide)
        pyro.set_rng_seed(1)
        found.append(torch.autograd.grad(elbo.differentiable_loss(model, guide), logits)[0])
    torch.testing.assert_close(*found)


def steered(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0 if mu.item() > 0.0 else 2.0), obs=y)


def test_a_model_that_steers_python_is_told_the_line() -> None:
    guide = AutoNormal(steered)
    with pytest.raises(RuntimeError, match=r"test_elbo\.py, line \d+, `.*mu\.item\(\) > 0\.0.*Trace_ELBO\(num_partic"):
        VectorizedTrace_ELBO(3).loss(steered, guide, Y)
    pyro.set_rng_seed(0)
    found = VectorizedTrace_ELBO(1).loss(steered, guide, Y)  # one particle is a plain run
    assert math.isfinite(found)


def test_another_model_is_looked_at_anew() -> None:
    guide = AutoNormal(regression)
    guide(Y)
    elbo = VectorizedTrace_ELBO(200)
    first = elbo.loss(regression, guide, Y)

    def vague(y: Tensor, broadcasts: bool = True) -> None:
        with poutine.scale(scale=2.0):
            regression(y, broadcasts=True)

    assert elbo._batched.is_mapped
    second = elbo.loss(vague, guide, Y)
    assert not elbo._batched.is_mapped
    with torch.no_grad():
        expected = torch.tensor([Trace_ELBO().loss(vague, guide, Y) for _ in range(400)])
    error = expected.std() * math.sqrt(1 / 200 + 1 / 400)
    assert abs(second - expected.mean()) < 4.0 * error
    assert abs(second - first) > 8.0 * error  # the two are told apart
    elbo.loss(regression, guide, Y)
    assert elbo._batched.is_mapped


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: compiling takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize(
    "model, make", [(regression, AutoNormal), (regression, AutoFlowGuide), (mixture, AutoFlowGuide)]
)
def test_compiled_svi_has_the_losses_of_svi(
    interpreted: None, model: Callable[..., Any], make: Callable[..., Any], broadcasts: bool
) -> None:
    losses = []
    for kind in (CompiledSVI, SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            svi = kind(model, make(model), Adam({"lr": 0.02}), VectorizedTrace_ELBO(4))
            losses.append(torch.tensor([svi.step(Y, broadcasts) for _ in range(20)]))
        if kind is CompiledSVI:
            assert svi._graphs
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


# Refused particles


def covariance(y: Tensor) -> None:
    """Refused where ``|r| >= 2``."""
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    matrix = torch.eye(2) + 0.5 * r * (1.0 - torch.eye(2))
    mean = torch.linalg.cholesky(matrix) @ torch.ones(2)
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


class _At:
    """A guide of given draws around a location."""

    def __init__(self, draws: list[float]) -> None:
        self.loc = torch.tensor(0.0, requires_grad=True)
        self.draws = torch.tensor(draws)

    def __call__(self, y: Tensor) -> None:
        pyro.sample("r", _Fixed(dist.Normal(self.loc, 0.5), self.draws))


class _Fixed(dist.TorchDistribution):
    """A normal whose draws are known: the first of them, if fewer are asked for."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, fn: dist.Normal, eps: Tensor) -> None:
        self.fn, self.eps = fn, eps
        super().__init__(fn.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Fixed:
        return _Fixed(self.fn.expand(batch_shape), self.eps)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.fn.loc + self.fn.scale * self.eps[: shape.numel()].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.fn.log_prob(value)


def test_refused_particles_are_left_out() -> None:
    """One of twenty draws: the loss and the gradient are the means over the others."""
    draws = [0.1 * index - 0.9 for index in range(19)] + [5.0]
    guide = _At(draws)
    elbo = VectorizedTrace_ELBO(20)
    loss = elbo.differentiable_loss(covariance, guide, Y[:2])
    (gradient,) = torch.autograd.grad(loss, guide.loc)
    terms = []
    for draw in draws[:-1]:
        r = guide.loc + 0.5 * draw
        trace = poutine.trace(poutine.condition(covariance, data={"r": r})).get_trace(Y[:2])
        terms.append(dist.Normal(guide.loc, 0.5).log_prob(r) - trace.log_prob_sum())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, guide.loc)[0])


def test_many_refused_particles_are_not_hidden() -> None:
    guide = _At([0.1, 0.2, 5.0, 0.3])  # a quarter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = VectorizedTrace_ELBO(4).differentiable_loss(covariance, guide, Y[:2])
    assert loss.isnan()


def test_svi_goes_on_where_particles_are_refused() -> None:
    """In a single run, such a draw ends the program; here a hundredth of them are."""
    guide = AutoNormal(covariance, init_scale=0.75, init_loc_fn=init_to_value(values={"r": torch.tensor(0.0)}))
    svi = SVI(covariance, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(64))
    with pytest.raises(torch.linalg.LinAlgError):
        for _ in range(1000):
            Trace_ELBO().loss(covariance, guide, Y[:2])
    losses = torch.tensor([svi.step(Y[:2]) for _ in range(20)])
    assert losses.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in guide.parameters())


# Swapped or foreign guides, and arguments


def test_a_guide_of_another_model_is_refused() -> None:
    def other() -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latent sites are 'w', 'sigma', but the guide draws 'other'"):
        VectorizedTrace_ELBO(3).loss(regression, lambda y: other(), Y)
    with pytest.raises(ValueError, match=r"it observes 'y'\. Write the model first"):
        VectorizedTrace_ELBO(3).loss(AutoNormal(regression), regression, Y)


def test_an_incomplete_guide_is_warned_of() -> None:
    guide = AutoNormal(poutine.block(regression, expose=["w"]))
    guide(Y)
    with pytest.warns(UserWarning, match="does not draw 'sigma', which the model draws from the prior"):
        VectorizedTrace_ELBO(3).loss(regression, guide, Y)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="VectorizedTrace_ELBO: expected num_particles"):
        VectorizedTrace_ELBO(0)
    assert VectorizedTrace_ELBO(3, vectorize_particles=False).vectorize_particles


def test_more_batch_dimensions_than_plates() -> None:
    guide = AutoNormal(regression)
    guide(Y)
    found = []
    for nesting in (math.inf, 3):
        pyro.set_rng_seed(2)
        elbo = VectorizedTrace_ELBO(NUM_PARTICLES, nesting)
        elbo.loss(regression, guide, Y, True)
        pyro.set_rng_seed(2)
        found.append(elbo.loss(regression, guide, Y, True))
    assert elbo.max_plate_nesting == 4
    assert found[0] == pytest.approx(found[1], rel=1e-5)
