# SPDX-License-Identifier: Apache-2.0
"""The pace of a guide's nonlinear layers under any optimizer and rate; the head's Gaussian goes at the user's."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.optim import SGD, Adam, ClippedAdam, RMSprop
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, fit
from pyro_flows.compiled import inductor
from pyro_flows.posterior.step_limit import STEPS
from pyro_flows.transforms.networks import Packed
from tests.common import randomize_parameters

Y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.double)
TINY = 1e-9


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.double), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0, dtype=torch.double)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def far_away() -> None:
    """The posterior is N(5, 1/2) in both coordinates, so that the first steps from zero go one way."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.double), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.full((2,), 10.0, dtype=torch.double))


def new(optim: Any = None, flow: str = "auto", kind: type[SVI] = SVI, **options: Any) -> tuple[AutoFlowGuide, SVI]:
    guide = AutoFlowGuide(schools, flow, **options).setup(Y)
    return guide, kind(schools, guide, optim or Adam({"lr": 1.0}), Trace_ELBO())


def limited(guide: AutoFlowGuide) -> Tensor:
    """The parameters whose steps are limited, in their units, as they are: the guide's own attributes would limit them
    first."""
    posterior = guide._modules["posterior"]
    assert posterior is not None
    limit = posterior.step_limit
    pairs = zip(limit.parameters, limit.units, strict=True)
    return torch.cat([(p.detach() / (1.0 if unit is None else unit)).reshape(-1).clone() for p, unit in pairs])


def everything(guide: AutoFlowGuide) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in guide.parameters()])


def head(guide: AutoFlowGuide) -> Tensor:
    """Rows of the head's Gaussian as it is stored: locations, and scales by the inverse of softplus."""
    return guide.posterior.joint.flow.head.raw.value.detach().clone()


def assert_limited(found: Tensor, before: Tensor, *, is_full: bool = True) -> None:
    longest = (found - before).abs().max()
    assert longest <= STEPS.largest_step * (1.0 + TINY)
    if is_full:
        assert longest > STEPS.largest_step * (1.0 - 1e-6)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "Adam(1)": lambda: Adam({"lr": 1.0}),
    "Adam(0.05)": lambda: Adam({"lr": 0.05}),
    "ClippedAdam(0.1)": lambda: ClippedAdam({"lr": 0.1}),
    # The head's Gaussian at such a rate would be no Gaussian any more: that pace is the user's affair.
    "SGD(1e3)": lambda: SGD(lambda name: {"lr": 1e-3 if "raw" in name else 1e3}),
    "RMSprop(0.1)": lambda: RMSprop({"lr": 0.1}),
}
each_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
FLOWS = ["auto", "full_rank_normal", "low_rank_normal", "realnvp", "iaf", "spline", "planar"]


# How far


@each_optimizer
def test_no_entry_moves_further_than_the_limit(optim: Callable[[], Any]) -> None:
    guide, svi = new(optim())
    start = limited(guide)
    for _ in range(5):
        before = limited(guide)
        svi.step(Y)
        guide.sample_posterior(1)
        assert_limited(limited(guide), before, is_full=False)
    assert (limited(guide) - start).abs().max() > STEPS.largest_step


def test_linear_parts_go_at_the_pace_of_their_values() -> None:
    """At zero, the slope of powerpropagated weights is a tenth: a limit on their steps would be ten times as strict."""
    guide, svi = new(SGD(lambda name: {"lr": 1e-3 if "raw" in name else 1e3}))
    packed = next(part for part in guide.modules() if isinstance(part, Packed) and part.unit is not None)
    assert packed.unit is not None and set(packed.unit.tolist()) == {1.0, 10.0}
    start = packed.flat.detach().clone()
    svi.step(Y)
    guide.sample_posterior(1)
    step = (packed.flat.detach() - start).abs()
    assert step[packed.unit == 10.0].max() > 1.5 * STEPS.largest_step
    assert step[packed.unit == 1.0].max() <= STEPS.largest_step * (1.0 + TINY)


@pytest.mark.parametrize("flow", FLOWS)
def test_every_family(flow: str) -> None:
    guide, svi = new(Adam({"lr": 0.05}), flow)
    assert guide.step_limit.parameters
    before = limited(guide)
    svi.step(Y)
    guide.sample_posterior(1)
    assert_limited(limited(guide), before)


@pytest.mark.parametrize("path_gradient", [True, False], ids=["path", "total"])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_every_elbo(elbo: Callable[..., Any], path_gradient: bool) -> None:
    guide = AutoFlowGuide(schools, path_gradient=path_gradient).setup(Y)
    svi = SVI(schools, guide, Adam({"lr": 1.0}), elbo())
    before = limited(guide)
    svi.step(Y)
    guide.sample_posterior(1)
    assert_limited(limited(guide), before)


@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorized"])
def test_several_draws_a_step_are_one_step(vectorized: bool) -> None:
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    guide = AutoFlowGuide(schools).setup(Y)
    svi = SVI(schools, guide, Adam({"lr": 1.0}), elbo)
    for _ in range(3):
        before = limited(guide)
        svi.step(Y)
        guide.sample_posterior(1)
        assert_limited(limited(guide), before)


def test_looks_between_steps_are_no_steps() -> None:
    """Losses, draws and medians between steps, with gradients or without, neither move nor hold anything."""
    found = []
    for looks in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide, svi = new()
        for seed in range(4):
            pyro.set_rng_seed(seed)
            svi.step(Y)
            if looks:
                svi.evaluate_loss(Y)
                guide(Y)
                guide.median(Y)
                guide.sample_posterior(2, Y)
        guide.sample_posterior(1)
        found.append(everything(guide))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_the_direction_is_the_optimizers() -> None:
    guide, svi = new()
    svi.step(Y)
    guide.sample_posterior(1)
    before = limited(guide)
    svi.step(Y)
    wanted = limited(guide) - before
    assert wanted.abs().max() > 10.0 * STEPS.largest_step
    guide.sample_posterior(1)
    factor = STEPS.largest_step / wanted.abs().max()
    torch.testing.assert_close(limited(guide) - before, factor * wanted, rtol=1e-6, atol=1e-12)


def test_a_low_rate_is_not_touched() -> None:
    found = []
    for limits in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide, svi = new(Adam({"lr": 1e-3}))
        guide.limits_steps = limits
        for _ in range(5):
            svi.step(Y)
        guide.sample_posterior(1)
        found.append(everything(guide))
    assert torch.equal(*found)


@pytest.mark.parametrize("rate", [1e-3, 0.05, 1.0])
def test_the_head_moves_as_that_of_auto_normal(rate: float) -> None:
    """A step of Adam's from one start: by the rate in location and in the inverse softplus of the scale.

    The way is the first draw's affair, which by path gradients has noise of its own.
    """
    found = []
    for make in (AutoNormal, functools.partial(AutoFlowGuide, flow="diagonal_normal")):
        pyro.set_rng_seed(0)
        zeros = torch.zeros(2, dtype=torch.double)  # AutoNormal trains this very tensor
        guide = make(far_away, init_loc_fn=init_to_value(values={"z": zeros}), init_scale=0.1)
        guide()
        SVI(far_away, guide, Adam({"lr": rate}), Trace_ELBO()).step()
        if make is AutoNormal:
            found.append((guide.locs.z.detach(), guide.scales.z.detach()))
        else:
            found.append(tuple(part.detach() for part in guide.posterior.joint.flow.head.gaussian()))
    (loc, scale), (own_loc, own_scale) = found
    torch.testing.assert_close(own_loc.abs(), loc.abs(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loc, torch.full_like(loc, rate), rtol=1e-6, atol=1e-6)
    # The first step's noise decides which way a scale goes; how far is the rate's affair.
    start = math.log(math.expm1(0.1))
    for part in (scale, own_scale):
        moved = (part.expm1().log() - start).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_head_of_each_family_is_the_users(flow: str) -> None:
    guide, svi = new(Adam({"lr": 0.5}), flow)
    before = head(guide)
    svi.step(Y)
    guide.sample_posterior(1)
    moved = (head(guide) - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), rtol=1e-4, atol=0.0)


def test_items_have_gaussians_at_the_users_rate_too() -> None:
    guide, svi = new(Adam({"lr": 0.5}), structure="plates")
    (block,) = guide.posterior.blocks()
    assert block.items is not None
    shared, items = limited(guide), block.items.detach().clone()
    svi.step(Y)
    guide.sample_posterior(1)
    assert_limited(limited(guide), shared)
    assert (block.items.detach() - items)[:, -2:].abs().max() == pytest.approx(0.5, rel=1e-4)


# What is no step


def load(guide: AutoFlowGuide) -> Tensor:
    other = AutoFlowGuide(schools).setup(Y)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    guide.load_state_dict(other.state_dict())
    return limited(other)


def by_hand(guide: AutoFlowGuide) -> Tensor:
    guide.median(Y)  # ends the step before; right after it, nothing could tell a user's hand from an optimizer's
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3)
    return limited(guide)


def start_warmly(guide: AutoFlowGuide) -> Tensor:
    guide.warm_start(Y)
    return limited(guide)


def by_fit(guide: AutoFlowGuide) -> Tensor:
    fit(schools, guide, (Y,), num_steps=20, seed=0, progress=False, compile=False)
    return limited(guide)


SETTERS = {"load_state_dict": load, "by_hand": by_hand, "warm_start": start_warmly, "fit": by_fit}


@pytest.mark.parametrize("trained", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("put", SETTERS.values(), ids=SETTERS)
def test_what_is_set_stays(put: Callable[[AutoFlowGuide], Tensor], trained: bool) -> None:
    guide, svi = new(Adam({"lr": 0.02}))
    guide(Y)
    for _ in range(3 * trained):
        svi.step(Y)
    wanted = put(guide)
    guide.median(Y)
    assert torch.equal(limited(guide), wanted)
    # And the next step is one from there.
    svi.step(Y)
    guide.median(Y)
    assert_limited(limited(guide), wanted, is_full=False)


@pytest.mark.parametrize("trained", [False, True], ids=["before", "after"])
def test_what_a_store_holds_is_taken_over(trained: bool) -> None:
    source = AutoFlowGuide(schools, name="posterior").setup(Y)
    randomize_parameters(source, 0.2)
    source(Y)
    wanted, state = limited(source), copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    guide, svi = new(name="posterior")
    for _ in range(3 * trained):
        svi.step(Y)
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    guide(Y)
    guide.median(Y)
    assert torch.equal(limited(guide), wanted)


# Who sees the limited parameters


def from_median(guide: AutoFlowGuide, svi: SVI) -> None:
    guide.median(Y)


def from_sample_posterior(guide: AutoFlowGuide, svi: SVI) -> None:
    guide.sample_posterior(2, Y)


def from_evaluate_loss(guide: AutoFlowGuide, svi: SVI) -> None:
    svi.evaluate_loss(Y)


def from_log_prob(guide: AutoFlowGuide, svi: SVI) -> None:
    one = torch.ones((), dtype=torch.double)
    guide.log_prob({"mu": one, "tau": one, "theta": one.expand(4)}, Y)


def from_get_posterior(guide: AutoFlowGuide, svi: SVI) -> None:
    guide.get_posterior()


LOOKS = (from_median, from_sample_posterior, from_evaluate_loss, from_log_prob, from_get_posterior)


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_asks_sees_limited_parameters(look: Callable[[AutoFlowGuide, SVI], None]) -> None:
    guide, svi = new()
    before = limited(guide)
    svi.step(Y)
    look(guide, svi)
    assert_limited(limited(guide), before)


def through_state_dict(guide: AutoFlowGuide) -> AutoFlowGuide:
    state = copy.deepcopy(guide.state_dict())
    other = AutoFlowGuide(schools).setup(Y)
    other.load_state_dict(state)
    return other


def through_torch(guide: AutoFlowGuide) -> AutoFlowGuide:
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded: AutoFlowGuide = torch.load(file, weights_only=False)
    return loaded


def through_pickle(guide: AutoFlowGuide) -> AutoFlowGuide:
    copied: AutoFlowGuide = pickle.loads(pickle.dumps(guide))
    return copied


COPIES = {"state_dict": through_state_dict, "deepcopy": copy.deepcopy, "pickle": through_pickle, "torch": through_torch}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_have_what_the_guide_has(copied: Callable[[AutoFlowGuide], AutoFlowGuide]) -> None:
    """Copied right after a step, before anybody asked the guide for anything."""
    guide, svi = new()
    for _ in range(3):
        svi.step(Y)
    twin = copied(guide)
    guide.median(Y)
    twin.median(Y)
    torch.testing.assert_close(limited(twin), limited(guide), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_go_on_limiting(copied: Callable[[AutoFlowGuide], AutoFlowGuide]) -> None:
    guide, svi = new()
    for _ in range(3):
        svi.step(Y)
    guide.median(Y)
    original = limited(guide)
    twin = copied(guide)
    own = {id(parameter) for parameter in twin.parameters()}
    assert all(id(parameter) in own for parameter in twin.step_limit.parameters)
    pyro.clear_param_store()
    again = SVI(schools, twin, Adam({"lr": 1.0}), Trace_ELBO())
    for _ in range(3):
        before = limited(twin)
        again.step(Y)
        twin.median(Y)
        assert_limited(limited(twin), before)
    assert torch.equal(limited(guide), original)


# Around the guide


def as_it_is(guide: AutoFlowGuide) -> Callable[..., Any]:
    return guide


def blocked(guide: AutoFlowGuide) -> Callable[..., Any]:
    wrapped: Callable[..., Any] = poutine.block(guide, hide=["nothing"])
    return wrapped


def in_a_function(guide: AutoFlowGuide) -> Callable[..., Any]:
    return lambda y: guide(y)


def in_a_list(guide: AutoFlowGuide) -> Callable[..., Any]:
    guides = AutoGuideList(schools)
    guides.append(guide)
    return guides


WRAPS = (as_it_is, blocked, in_a_function, in_a_list)


@pytest.mark.parametrize("kind", [SVI, CompiledSVI])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_guide(monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., Any], kind: type[SVI]) -> None:
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)
    guide = AutoFlowGuide(schools).setup(Y)
    svi = kind(schools, wrap(guide), Adam({"lr": 1.0}), Trace_ELBO())
    for _ in range(4):
        before = limited(guide)
        svi.step(Y)
        guide.sample_posterior(1)
        assert_limited(limited(guide), before)
    if kind is CompiledSVI:
        assert svi._graphs


def test_a_loop_of_torch() -> None:
    guide = AutoFlowGuide(schools).setup(Y)
    loss_fn = Trace_ELBO()(schools, guide)
    loss_fn(Y)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=1.0)
    for _ in range(3):
        before = limited(guide)
        optimizer.zero_grad()
        loss_fn(Y).backward()
        optimizer.step()
        guide.sample_posterior(1)
        assert_limited(limited(guide), before)


def test_gradients_of_several_calls_are_one_step() -> None:
    """Accumulated, as users do by hand."""
    guide = AutoFlowGuide(schools).setup(Y)
    elbo = Trace_ELBO()
    optimizer = torch.optim.Adam(guide.parameters(), lr=1.0)
    before = limited(guide)
    for _ in range(3):
        elbo.differentiable_loss(schools, guide, Y).backward()
    assert torch.equal(limited(guide), before)
    optimizer.step()
    guide.sample_posterior(1)
    assert_limited(limited(guide), before)


def test_other_draws_between_a_gradient_and_its_step() -> None:
    """Somebody looks at the guide, or draws from it, before the optimizer moves."""
    guide = AutoFlowGuide(schools).setup(Y)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1.0)
    before = limited(guide)
    Trace_ELBO().differentiable_loss(schools, guide, Y).backward()
    guide(Y)
    guide.median(Y)
    optimizer.step()
    guide.sample_posterior(1)
    assert_limited(limited(guide), before)


@pytest.mark.parametrize("where", ["double", "single"])
def test_a_guide_of_another_precision_goes_on(where: str) -> None:
    guide, svi = new()
    svi.step(Y)
    guide.double() if where == "double" else guide.float()
    guide.sample_posterior(1)
    dtype = torch.double if where == "double" else torch.float
    assert all(parameter.dtype == dtype for parameter in guide.parameters())


def test_a_parameter_that_is_frozen_stays() -> None:
    guide, svi = new()
    frozen = guide.step_limit.parameters[0]
    frozen.requires_grad_(False)
    before = frozen.clone()
    for _ in range(2):
        svi.step(Y)
    guide.sample_posterior(1)
    assert torch.equal(frozen, before)


# Compiled, and by fit


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Adam({"lr": 0.05}), lambda: RMSprop({"lr": 0.05})], ids=["Adam", "RMSprop"])
def test_compiled_steps_have_the_same_limit(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)
    found = []
    for kind in (CompiledSVI, SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide, svi = new(make(), kind=kind)
        pyro.set_rng_seed(1)
        start = limited(guide)
        for _ in range(50):
            svi.step(Y)
        if kind is CompiledSVI:
            assert svi._graphs
        else:
            guide.sample_posterior(1)
        found.append(everything(guide))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert (limited(guide) - start).abs().max() <= 50 * STEPS.largest_step * (1.0 + TINY)


def test_compiled_steps_are_limited_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)
    guide, svi = new(kind=CompiledSVI)
    for _ in range(4):
        before = limited(guide)
        svi.step(Y)
        assert_limited(limited(guide), before)


def test_fit_has_a_pace_of_its_own() -> None:
    guide = AutoFlowGuide(schools).setup(Y)
    before = limited(guide)
    result = fit(schools, guide, (Y,), num_steps=30, num_particles=8, seed=0, progress=False, compile=False)
    assert guide.limits_steps
    assert result.steps == 30
    # Thirty steps of at most 0.002 could not go so far.
    assert (limited(guide) - before).abs().max() > 1.5 * 30 * STEPS.largest_step
    svi = SVI(schools, guide, Adam({"lr": 1.0}), Trace_ELBO())
    before = limited(guide)
    svi.step(Y)
    guide.sample_posterior(1)
    assert_limited(limited(guide), before)


def test_fit_gives_the_limit_back_when_it_fails() -> None:
    guides: list[AutoFlowGuide] = []

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        if guides and not guides[0].limits_steps:
            raise ZeroDivisionError

    guide = AutoFlowGuide(model).setup()
    guides.append(guide)
    with pytest.raises(ZeroDivisionError):
        fit(model, guide, num_steps=20, num_particles=2, seed=0, progress=False, compile=False)
    assert guide.limits_steps


def test_another_dtype_is_no_step() -> None:
    """What was marked is of the old one."""
    guide, svi = new(Adam({"lr": 0.05}))
    svi.step(Y)
    guide.float()
    with torch.no_grad():
        guide(Y.float())
    assert all(p.dtype == torch.float32 for p in guide.parameters())
