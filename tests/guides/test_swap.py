# SPDX-License-Identifier: Apache-2.0
"""``AutoNormal(model)`` becomes ``AutoFlowGuide(model)`` in users' own loops: nothing breaks, nothing gets worse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import SGD, Adam, ClippedAdam
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, fit, flows
from pyro_flows.compiled import inductor
from pyro_flows.transforms.representable import Representable

FAMILIES = [name for name in flows.names() if flows.get(name).one_pass_sampling]
# These ended in NaN, or thousands of nats off, in the loops below.
BROKE = ("auto", "site_ordered", "spline_coupling", "realnvp")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: compiling takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)


def all_finite(guide: torch.nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in guide.parameters())


# Loops that ended in NaN


def terrain() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((170,), 0.3), generator=generator)
    w = torch.rand(170, generator=generator) * 6.0
    noise = torch.randn(170, generator=generator)
    return x, w, 9.2 - 1.9 * x - 0.2 * w + 0.4 * x * w + 0.95 * noise


def regression(x: Tensor, w: Tensor, y: Tensor) -> None:
    """As in Pyro's first tutorials: for one particle."""
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_x = pyro.sample("b_x", dist.Normal(0.0, 1.0))
    b_w = pyro.sample("b_w", dist.Normal(0.0, 1.0))
    b_xw = pyro.sample("b_xw", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b_x * x + b_w * w + b_xw * x * w, sigma), obs=y)


SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# With the mean loss of AutoNormal's steps 180 to 200, and a tenth.
LOOPS: dict[str, tuple[Callable[..., None], tuple[Tensor, ...], Callable[[], Any], float]] = {
    "regression": (regression, terrain(), lambda: ClippedAdam({"lr": 0.02}), 440.0),
    "schools": (schools, SCHOOLS, lambda: Adam({"lr": 0.1}), 40.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data", "optim", "usual"), LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("flow", FAMILIES)
def test_all_stays_finite(
    flow: str, model: Callable[..., None], data: tuple[Tensor, ...], optim: Callable[[], Any], usual: float
) -> None:
    guide = AutoFlowGuide(model, flow)
    svi = SVI(model, guide, optim(), Trace_ELBO())
    losses = [svi.step(*data) for _ in range(200 if flow in BROKE else 60)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < sum(losses[:20])
    if flow in BROKE:
        assert sum(losses[-20:]) / 20 < usual
    assert all_finite(guide)
    assert guide.num_refused == 0


def last_losses(make: Callable[..., Any], seed: int, num_steps: int = 600) -> Tensor:
    data = terrain()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make(regression)
    svi = SVI(regression, guide, Adam({"lr": 0.03}), Trace_ELBO())
    return torch.tensor([svi.step(*data) for _ in range(num_steps)][-100:], dtype=torch.double)


@pytest.mark.slow
def test_no_worse_than_auto_normal() -> None:
    theirs, ours = last_losses(AutoNormal, 1), last_losses(AutoFlowGuide, 1)
    error = ((theirs.var() + ours.var()) / len(ours)).sqrt()
    assert ours.mean() - theirs.mean() < 3.0 * error


# Gradients that are no numbers


def odd(factors: Tensor) -> None:
    """Two latents, whose log density is what the argument makes of it."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("odd", (z * factors).sum(-1))


def odd_items(factors: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 2):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.factor("odd", z * factors)


def left_of(edge: float) -> Callable[[], None]:
    """A model without a density right of an edge."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("edge", 1e-3 * (edge - z).sqrt())

    return model


def caught(step: Callable[[], Any], num: int) -> list[warnings.WarningMessage]:
    """What the guide said in so many steps; Pyro's own words on losses left out."""
    with pyro.validation_enabled(False), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(num):
            step()
    return [warning for warning in said if "AutoFlowGuide" in str(warning.message)]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", [SVI, CompiledSVI])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    ("model", "structure"),
    [(odd, "joint"), (odd_items, "joint"), (odd_items, "plates")],
    ids=["site", "joint", "local"],
)
def test_a_step_of_no_numbers_costs_one_step(
    model: Callable[..., None], structure: str, bad: float, kind: type[SVI]
) -> None:
    with pyro.validation_enabled(False):
        guide = AutoFlowGuide(model, structure=structure).setup(torch.zeros(2))
    svi = kind(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    batches = [torch.zeros(2)] * 5 + [torch.tensor([bad, 0.0])] + [torch.ones(2)] * 20
    steps = iter(batches)
    caught(lambda: svi.step(next(steps)), len(batches))
    assert all_finite(guide)
    # And it goes on: the posterior of the factor is N(1, 1).
    name = "mu" if model is odd_items else "z"
    assert (guide.median(torch.ones(2))[name] > 0.1).all()


@pytest.mark.parametrize("structure", ["joint", "plates"])
def test_what_was_refused_is_counted_and_said_once(structure: str) -> None:
    with pyro.validation_enabled(False):
        guide = AutoFlowGuide(odd_items, structure=structure).setup(torch.zeros(2))
    svi = SVI(odd_items, guide, Adam({"lr": 0.05}), Trace_ELBO())
    good, bad = torch.zeros(2), torch.tensor([math.nan, 0.0])
    steps = iter([good, bad, good, bad, good, bad, good])
    (said,) = caught(lambda: svi.step(next(steps)), 7)
    assert issubclass(said.category, UserWarning)
    assert "gradient of a draw was not finite" in str(said.message)
    assert guide.num_refused == 3


def test_the_site_to_blame_is_named() -> None:
    model = left_of(0.05)
    guide = AutoFlowGuide(model, init_loc_fn=init_to_value(values={"z": torch.tensor(0.0)})).setup()
    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    said = caught(svi.step, 60)
    assert all_finite(guide)
    (message,) = [str(warning.message) for warning in said if "not finite" in str(warning.message)]
    assert "'edge'" in message
    assert "'z'" not in message


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fit_leaves_out_what_has_no_gradient(compiled: bool) -> None:
    model = left_of(2.0)
    results = []
    with pyro.validation_enabled(False):
        guide = AutoFlowGuide(model, init_scale=1.0).setup()  # set up, so that no warm start keeps off the edge
    options = {"num_steps": 60, "num_particles": 8, "seed": 0, "progress": False, "compile": compiled}
    said = caught(lambda: results.append(fit(model, guide, **options)), 1)
    assert all_finite(guide)
    assert results[0].steps == 60
    assert 0 < results[0].skipped < 60
    assert len(said) <= 1  # a graph tells nobody, and the result has the count
    assert compiled or "'edge'" in str(said[0].message)


def test_a_second_look_at_a_model_that_fails_there_is_no_crash() -> None:
    """Whatever a model does at the refused draw, the warning comes without a site."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if state["strict"]:
            raise ZeroDivisionError
        pyro.factor("odd", z * state["factor"])

    state: dict[str, Any] = {"strict": False, "factor": 1.0}
    guide = AutoFlowGuide(model).setup()
    elbo = Trace_ELBO()
    state["factor"] = math.nan
    caught(lambda: elbo.loss_and_grads(model, guide), 1)
    state["strict"] = True
    (said,) = caught(guide, 1)
    assert "the log density of" not in str(said.message)


# Draws that are far out


def precise() -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    pyro.sample("x", dist.Normal(0.0, tau), obs=torch.tensor(0.1))


@pytest.mark.parametrize("loc", [-500.0, -100.0, 100.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_scale_never_underflows(dtype: torch.dtype, loc: float) -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones((), dtype=dtype)))
        pyro.sample("x", dist.Normal(0.0, tau), obs=torch.tensor(0.1, dtype=dtype))

    guide = AutoFlowGuide(model).setup()
    (flow,) = (part for part in guide.posterior.modules() if isinstance(part, flows.Flow))
    flow.head.initialize(torch.tensor([loc], dtype=dtype), torch.ones(1, dtype=dtype))
    values = guide.sample_posterior(100)
    tau = values["tau"]
    assert tau.isfinite().all()
    assert (tau > 0.0).all()
    assert (tau.square() > 0.0).all()
    assert guide.log_prob(values).isfinite().all()
    assert math.isfinite(Trace_ELBO(num_particles=5, vectorize_particles=True).loss(model, guide))
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(10):
        assert math.isfinite(svi.step())
    assert guide.num_refused == 0
    if loc < 0.0:  # the likelihood's pull is strong there, and the way back is open
        assert flow.head.gaussian()[0].item() > loc + 0.5


SUPPORTS = {
    "positive": (constraints.positive, ()),
    "less_than": (constraints.less_than(-1.0), ()),
    "interval": (constraints.interval(-1.0, 3.0), ()),
    "simplex": (constraints.simplex, (3,)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "independent_positive": (constraints.independent(constraints.positive, 1), (3,)),
}


@pytest.mark.parametrize(("support", "shape"), SUPPORTS.values(), ids=SUPPORTS)
def test_densities_of_far_draws_are_those_of_their_maps(support: Any, shape: tuple[int, ...]) -> None:
    """Where half of the draws are beyond the limit: log q of the guide is the flow's, less the log-determinant."""
    start = torch.distributions.biject_to(support)(
        torch.zeros(torch.distributions.biject_to(support).inverse_shape(torch.Size(shape)), dtype=torch.double)
    )

    def model() -> None:
        pyro.sample("x", dist.ImproperUniform(support, (), torch.Size(shape)))

    guide = AutoFlowGuide(model, "diagonal_normal", init_loc_fn=init_to_value(values={"x": start})).setup()
    (site,) = guide.posterior.joint.layout
    assert isinstance(site.to_support, Representable)
    limit = 1.5
    site.to_support.limits = -limit, limit
    (flow,) = (part for part in guide.posterior.modules() if isinstance(part, flows.Flow))
    size = guide.latent_dim
    flow.head.initialize(torch.full((size,), limit, dtype=torch.double), torch.ones(size, dtype=torch.double))
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    value = trace.nodes["x"]["value"].detach()
    density = trace.log_prob_sum().item()
    torch.testing.assert_close(guide.log_prob({"x": value}).item(), density, rtol=1e-6, atol=1e-6)
    unconstrained = site.to_support.inv(value)
    drawn = trace.nodes["_AutoFlowGuide_latent"]["value"].detach()
    torch.testing.assert_close(unconstrained.reshape(-1), drawn, rtol=1e-6, atol=1e-6)
    ladj = site.to_support.log_abs_det_jacobian(unconstrained, value).sum().item()
    plain = guide.get_posterior().log_prob(drawn).item()
    assert density == pytest.approx(plain - ladj, abs=1e-6)


# ELBOs


def test_mean_field_and_trace_elbo_agree() -> None:
    """Of a positive site. Of ``AutoNormal`` they do not: Pyro's divergence of a ``Delta`` leaves out its density, and
    with it the Jacobian of the exponential."""

    def model() -> None:
        tau = pyro.sample("tau", dist.LogNormal(1.0, 0.5))
        pyro.sample("x", dist.Normal(0.0, tau), obs=torch.tensor(2.0))

    options = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 0}

    def gap(guide: Any) -> float:
        guide()
        losses = []
        for elbo in (Trace_ELBO, TraceMeanField_ELBO):
            pyro.set_rng_seed(1)  # the same draws; what differs is which parts are exact
            losses.append(elbo(**options).loss(model, guide))
        return losses[0] - losses[1]

    start = init_to_value(values={"tau": torch.tensor(3.0)})
    # A log density of an own draw has a standard deviation of 0.71: the standard error of its mean is 0.016.
    assert abs(gap(AutoFlowGuide(model, init_loc_fn=start))) < 4.5 * 0.016
    assert abs(gap(AutoNormal(model, init_loc_fn=start))) > 0.5


def test_mean_field_elbo_trains_to_where_trace_elbo_does() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.LogNormal(1.0, 0.5))
        pyro.sample("x", dist.Normal(0.0, tau), obs=torch.tensor(2.0))

    medians = []
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoFlowGuide(model, "diagonal_normal")
        loss = elbo(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(model, guide, Adam({"lr": 0.02}), loss)
        for _ in range(200):
            svi.step()
        medians.append(guide.median()["tau"].item())
    assert medians[0] == pytest.approx(medians[1], rel=0.1)


# Calls of other kinds


def batched(index: Tensor | None, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("items", 20, subsample=index) as chosen:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[chosen])


@pytest.mark.parametrize("make", [AutoNormal, AutoFlowGuide])
def test_all_items_first_and_mini_batches_afterwards(make: Callable[..., Any]) -> None:
    y = torch.linspace(-2.0, 4.0, 20)
    guide = make(batched, create_plates=lambda index, y: pyro.plate("items", 20, subsample=index))
    svi = SVI(batched, guide, Adam({"lr": 0.05}), Trace_ELBO())
    assert math.isfinite(svi.step(None, y))
    seen = [guide(index, y)["z"].shape for index in (torch.arange(5), torch.arange(12, 20))]
    assert seen == [(5,), (8,)]
    for step in range(40):
        index = torch.arange(5) + 5 * (step % 4)
        assert math.isfinite(svi.step(index, y))
    assert math.isfinite(svi.step(None, y))
    medians = guide.median(None, y)["z"]
    assert medians.shape == (20,)
    assert medians[-5:].mean() > medians[:5].mean() + 0.5


@pytest.mark.parametrize("plates", ["one", "list"])
def test_a_plate_that_was_given_is_local(plates: str) -> None:
    def create(index: Tensor | None, y: Tensor) -> Any:
        plate = pyro.plate("items", 20, subsample=index)
        return plate if plates == "one" else [plate]

    y = torch.linspace(-2.0, 4.0, 20)
    guide = AutoFlowGuide(batched, create_plates=create).setup(None, y)
    (block,) = guide.posterior.blocks()
    assert block.layout.plate_names == ("items",)
    joint = AutoFlowGuide(batched, create_plates=create, structure="joint").setup(None, y)
    assert not list(joint.posterior.blocks())


@config_enumerate
def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 1.0]), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        which = pyro.sample("which", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[..., which], scale), obs=y)


def marginal(y: Tensor) -> None:
    """The same mixture summed by hand: for any number of particles."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 1.0]), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    log_density = dist.Normal(locs[..., None, :], scale[..., None, None]).log_prob(y[:, None])
    pyro.factor("y", (weights.log()[..., None, :] + log_density).logsumexp(-1).sum(-1))


def exposed(model: Callable[[Tensor], None]) -> Any:
    """A fit of a guide on a part of the model."""
    y = torch.cat([torch.linspace(-1.0, 1.0, 5) - 10.0, torch.linspace(-1.0, 1.0, 5) + 10.0])
    guide = AutoFlowGuide(poutine.block(model, expose=["weights", "locs", "scale"]))
    return fit(model, guide, (y,), num_steps=1, num_particles=2, seed=0, progress=False, compile=False)


@pytest.mark.parametrize("model", [pytest.param(mixture, marks=pytest.mark.slow), marginal])
def test_fit_starts_on_the_model_that_it_trains(
    monkeypatch: pytest.MonkeyPatch, model: Callable[[Tensor], None]
) -> None:
    """Of a guide on exposed latents, whose own model has no likelihood."""
    started = exposed(model).start_elbo
    whole = AutoFlowGuide.warm_start_on
    monkeypatch.setattr(AutoFlowGuide, "warm_start_on", lambda self, calls, watch, *_: whole(self, calls, watch))
    blind = exposed(model).start_elbo
    assert started > -60.0
    assert started > blind + 100.0


def test_an_exposed_guide_trains_with_the_enumeration_of_the_model() -> None:
    y = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    guide = AutoFlowGuide(poutine.block(mixture, expose=["weights", "locs", "scale"]))
    svi = SVI(mixture, guide, Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step(y)) for _ in range(50))
    assert set(guide.median(y)) == {"weights", "locs", "scale"}


def test_gradient_descent_learns_a_correlation() -> None:
    """``SGD`` does not forget a gradient's size, so that a weight whose gradient is scaled down is slow twice."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.9 * a, math.sqrt(0.19)))

    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(model, "site_ordered")
    svi = SVI(model, guide, SGD({"lr": 0.01}), Trace_ELBO())
    for _ in range(600):
        svi.step()
    with torch.no_grad():
        gap = sum(Trace_ELBO().loss(model, guide) for _ in range(400)) / 400
    # Of independent normals 0.83, half of it before; the standard error is 0.04.
    assert gap < 0.45
