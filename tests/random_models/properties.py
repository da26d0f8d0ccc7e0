# SPDX-License-Identifier: Apache-2.0
"""What must hold for any model: properties of a guide on it, each an assertion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible, init_to_value
from pyro.optim import Adam
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, diagnose, fit, to_inference_data
from pyro_flows.compiled import inductor
from pyro_flows.diagnostics import log_weights
from tests.common import randomize_parameters
from tests.random_models.models import Program, RandomModel

__all__ = ["QUICK", "SLOW", "check"]

RATES = (1e-3, 1e-2, 1e-1)
# Standard errors that a difference may have: beyond it by chance once in two million.
ERRORS = 5.0
# Below this many nats, a difference is of no interest.
NATS = 0.5
REPEATS = 8  # seeds that confirm a finding
BASELINE_RATE = 0.02


class Estimate(NamedTuple):
    """An ELBO and its standard error, in nats."""

    mean: float
    error: float


class Case:
    """A model and what one does with it.

    Args:
        random_model: The model.
        num_steps: Number of training steps.
    """

    def __init__(self, random_model: RandomModel, num_steps: int) -> None:
        self._random_model = random_model
        self.num_steps = num_steps
        self.features = random_model.features
        self.is_double = "double" in random_model.features
        self.chooses_items = "subsample=idx" in random_model.source  # the arguments do, rather than a plate
        self.fresh(0)

    def fresh(self, seed: int) -> None:
        """Make the model anew, since training changes its networks, and empty Pyro's store."""
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.program: Program = self._random_model.run()
        self.model, self.args = self.program.model, self.program.calls[0]

    def guide(self, **options: Any) -> AutoFlowGuide:
        return AutoFlowGuide(self.model, **{**self.program.options, **options})

    def baseline(self, **options: Any) -> AutoNormal:
        """AutoNormal, as its user has to write it where sites are enumerated."""
        hidden = poutine.block(self.model, hide_fn=is_enumerated) if "enumerated" in self.features else self.model
        return AutoNormal(hidden, **{**self.program.plain_options, **options})

    def loss(self) -> Any:
        return TraceEnum_ELBO() if "enumerated" in self.features else Trace_ELBO()

    @torch.no_grad()
    def plain_elbo(self, guide: Any, num_draws: int) -> Estimate:
        """By Pyro, one draw at a time."""
        loss, calls = self.loss(), self.program.calls
        rounds = max(2, num_draws // len(calls))
        return estimate([[-loss.loss(self.model, guide, *call) for call in calls] for _ in range(rounds)])

    def elbo(self, guide: Any, num_draws: int, calls: list[tuple[Any, ...]] | None = None) -> Estimate:
        """In few runs, where there is a single mini-batch; of all mini-batches, or of some."""
        calls = calls or self.program.calls
        if "subsampled" in self.features:
            num_draws = min(num_draws, 100)  # a mini-batch each
        return estimate(torch.stack([log_weights(self.model, guide, num_draws, call)[0] for call in calls], 1).tolist())

    def baseline_runs(self) -> bool:
        """Whether AutoNormal runs on all mini-batches: bounds of its supports, such as Pareto's, keep the size of the
        first one."""
        self.fresh(0)
        guide = self.baseline()
        try:
            for call in self.program.calls:
                guide(*call)
        except ValueError as error:
            if "Shape mismatch" not in str(error):
                raise
            return False
        return True

    def trained(self, make: Callable[[], Any], rate: float, num_steps: int, seed: int) -> tuple[Any, list[float]]:
        """A fresh guide after steps of plain SVI with one particle, and the losses."""
        self.fresh(seed)
        guide = make()
        svi = SVI(self.model, guide, Adam({"lr": rate}), self.loss())
        calls = self.program.calls
        return guide, [svi.step(*calls[step % len(calls)]) for step in range(num_steps)]


def estimate(values: list[list[float]]) -> Estimate:
    """From draws of each mini-batch, ``(draws, mini-batches)``."""
    means = torch.tensor(values, dtype=torch.double).mean(1)
    return Estimate(means.mean().item(), means.std().item() / math.sqrt(len(means)))


def is_enumerated(site: Any) -> bool:
    """Whether the model marks a site for enumeration."""
    return bool(site.get("infer", {}).get("enumerate"))


def latent_nodes(trace: Any) -> dict[str, Any]:
    """Latent sites that a guide has."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not (node["is_observed"] or is_enumerated(node) or site_is_subsample(node))
        and not node["infer"].get("is_auxiliary")
    }


def pair(case: Case, guide: Any) -> tuple[Any, Any]:
    """Traces of the guide and of the model at its draw, with log densities."""
    guide_trace = poutine.trace(guide).get_trace(*case.args)
    model_trace = poutine.trace(poutine.replay(case.model, trace=guide_trace)).get_trace(*case.args)
    return guide_trace, model_trace


def full_shape(node: Any) -> tuple[int, ...]:
    """Shape of a site's value over full plates."""
    shape = list(node["value"].shape)
    for frame in node["cond_indep_stack"]:
        if frame.vectorized:
            shape[frame.dim - node["fn"].event_dim] = frame.full_size or frame.size
    return tuple(shape)


# Properties


def builds(case: Case) -> None:
    """Sites, shapes, dtypes and supports of draws are the model's."""
    guide = case.guide()
    for call in case.program.calls:
        drawn = guide(*call)
    guide_trace, model_trace = pair(case, guide)
    expected = latent_nodes(model_trace)
    assert set(drawn) == set(expected) == set(latent_nodes(guide_trace))
    many = guide.sample_posterior(7, *case.args)
    median = guide.median(*case.args)
    assert set(many) == set(median) == set(expected)
    for name, node in expected.items():
        value, fn = node["value"], node["fn"]
        assert value.shape == fn.shape(), name
        assert value.dtype == (torch.double if case.is_double else torch.float32), name
        full = full_shape(node)
        assert many[name].shape == (7, *full), name
        assert median[name].shape == full, name
        for draws in (value, many[name], median[name]):
            assert draws.isfinite().all(), name
            if draws.shape[-value.dim() :] == value.shape or not value.dim():
                assert fn.support.check(draws).all(), name
    if "enumerated" not in case.features:
        model_trace.compute_log_prob()
        assert math.isfinite(model_trace.log_prob_sum())


def density(case: Case) -> None:
    """log_prob is the trace's, of batches too; and that of the flow's noise by autograd's Jacobian."""
    guide = case.guide().setup(*case.args)
    randomize_parameters(guide, 0.1)
    is_whole = "subsampled" not in case.features
    if is_whole:
        trace = poutine.trace(guide).get_trace(*case.args)
        values = {name: node["value"].detach() for name, node in latent_nodes(trace).items()}
        assert_close(case, guide, guide.log_prob(values, *case.args), trace.log_prob_sum(), values)
    draws = guide.sample_posterior(3, *case.args)
    together = guide.log_prob(draws, *case.args)
    assert together.shape == (3,)
    for row in range(3):
        values = {name: value[row] for name, value in draws.items()}
        assert_close(case, guide, guide.log_prob(values, *case.args), together[row], values)
    if len(guide.posterior.local):
        return
    # By noise -> unconstrained vector (autograd) -> values (the supports' own log-determinants).
    eps = guide.get_base_dist().sample()
    transform = guide.get_transform()
    jacobian = torch.autograd.functional.jacobian(lambda noise: transform(noise.unsqueeze(0)).squeeze(0), eps)
    unconstrained = transform(eps)
    expected = guide.get_base_dist().log_prob(eps) - jacobian.double().slogdet().logabsdet
    values = {}
    for site, part in guide.posterior.split({(): unconstrained}):
        value = site.to_support(part)
        values[site.name] = value.detach()
        log_det = site.to_support.log_abs_det_jacobian(part, value)
        if value.shape == part.shape and log_det.shape == part.shape:  # one number each: by autograd too
            (slope,) = torch.autograd.grad(site.to_support(leaf := part.detach().requires_grad_()).sum(), leaf)
            torch.testing.assert_close(slope.abs().log(), log_det, rtol=1e-3, atol=1e-3)
        expected = expected - log_det.sum()
    assert_close(case, guide, guide.log_prob(values), expected, values)


def assert_close(case: Case, guide: AutoFlowGuide, found: Tensor, expected: Tensor, values: dict[str, Tensor]) -> None:
    """Equal up to rounding: that of values near a bound of their support grows with the distance in logits."""
    far = 0.0
    for layout in guide.posterior.layouts():
        for site in layout:
            far = max(far, site.to_support.inv(values[site.name]).abs().max().item())
    eps = 1e-9 if case.is_double else 2e-4
    scale = (1.0 + abs(expected.item())) * (1.0 + math.exp(min(far, 12.0)))
    assert abs(found.item() - expected.item()) <= eps * scale, f"{found.item()} but {expected.item()}, |u| <= {far:.1f}"


def outside(case: Case) -> None:
    """log_prob outside the support is minus infinity, or an error that names the site."""
    guide = case.guide().setup(*case.args)
    _, model_trace = pair(case, guide)
    inside = {name: value[0] for name, value in guide.sample_posterior(1, *case.args).items()}
    for name, node in latent_nodes(model_trace).items():
        for far in (-1e3, 1e3):
            wrong = torch.full_like(inside[name], far)
            own = torch.full_like(node["value"], far)
            if bool(node["fn"].support.check(own).all()):
                continue
            try:
                found = guide.log_prob({**inside, name: wrong}, *case.args)
            except ValueError as error:
                assert name in str(error), error
            else:
                assert found.item() == -math.inf, f"{name} = {far}: {found.item()}"


def start(case: Case) -> None:
    """The first ELBO is AutoNormal's, from the same location; and not below it from its own, on the data of the first
    call, which are all that the guide has seen."""
    if "amortized" in case.features or not case.baseline_runs():
        assert math.isfinite(case.elbo(case.guide().setup(*case.args), 20).mean)
        return
    given = case.program.options.get("init_loc_fn")
    values = {} if given is None else given.keywords["values"]
    # AutoNormal's default; other sites of a partial init_to_value start at random, at no common location.
    same = {"init_loc_fn": partial(init_to_value, values=values, fallback=init_to_feasible)}
    elbos = []
    for make in (partial(case.baseline, **same), partial(case.guide, **same)):
        case.fresh(0)
        guide = make()
        guide(*case.args)
        elbos.append(case.elbo(guide, 200))
    normal, ours = elbos
    if not math.isfinite(normal.mean):
        return
    margin = ERRORS * math.hypot(ours.error, normal.error) + 1e-3 * (1.0 + abs(normal.mean))
    assert abs(ours.mean - normal.mean) <= margin, f"{ours} but AutoNormal {normal}"
    if values:
        return
    elbos = []
    for make in (case.baseline, case.guide):
        case.fresh(0)
        guide = make()
        guide(*case.args)
        elbos.append(case.elbo(guide, 200, [case.args]))
    normal, default = elbos
    margin = ERRORS * math.hypot(default.error, normal.error) + NATS
    assert default.mean >= normal.mean - margin, f"{default} but AutoNormal {normal}, each from its own location"


def state(case: Case) -> None:
    """A fresh guide that loads the state has the same density and the same draws."""
    guide = case.guide().setup(*case.args)
    randomize_parameters(guide, 0.1)
    saved = {name: value.clone() for name, value in guide.state_dict().items()}
    pyro.set_rng_seed(5)
    draws = guide.sample_posterior(3, *case.args)
    found = guide.log_prob(draws, *case.args)
    case.fresh(1)
    other = case.guide().setup(*case.args)
    other.load_state_dict(saved)
    pyro.set_rng_seed(5)
    for name, value in other.sample_posterior(3, *case.args).items():
        assert torch.equal(value, draws[name]), name
    assert torch.equal(other.log_prob(draws, *case.args), found)


def svi(case: Case, rate: float) -> None:
    """Under plain SVI with one particle, losses are finite and the guide does not end below AutoNormal."""

    has_baseline = "amortized" not in case.features and case.baseline_runs()

    def outcome(seed: int, num_draws: int) -> tuple[Estimate, Estimate]:
        guide, losses = case.trained(case.guide, rate, case.num_steps, seed)
        ours = case.elbo(guide, num_draws)
        assert all(bool(p.isfinite().all()) for p in guide.parameters()), "a parameter is not finite"
        if not has_baseline:
            assert math.isfinite(losses[-1]), "a loss that is not finite"
            return ours, ours
        base, base_losses = case.trained(case.baseline, rate, case.num_steps, seed)
        if all(map(math.isfinite, base_losses)):
            assert all(map(math.isfinite, losses)), "a loss that is not finite"
        return ours, case.elbo(base, num_draws)

    not_below(outcome)


def fitted(case: Case) -> None:
    """fit runs, reports the ELBO that its guide has, and does not end below a trained AutoNormal."""

    has_baseline = "amortized" not in case.features and case.baseline_runs()

    def outcome(seed: int, num_draws: int) -> tuple[Estimate, Estimate]:
        case.fresh(seed)
        guide = case.guide()
        args: Any = case.args if len(case.program.calls) == 1 else case.program.calls
        result = fit(case.model, guide, args, num_steps=case.num_steps, progress=False, compile=False)
        assert math.isfinite(result.elbo), result
        ours = case.elbo(guide, num_draws)
        error = math.hypot(ours.error, result.elbo_se)
        if not (abs(ours.mean - result.elbo) <= ERRORS * error + 1e-3 * (1.0 + abs(ours.mean))):
            again = case.elbo(guide, 10 * num_draws)
            error = math.hypot(again.error, result.elbo_se)
            assert abs(again.mean - result.elbo) <= ERRORS * error + NATS, f"fit reports {result!r}, but it is {again}"
        if not has_baseline:
            return ours, ours
        if {"subsampled", "parameters"} & case.features:  # of which there is no warm start: steps as many and as long
            case.fresh(seed)
            base = case.baseline()
            args = case.args if len(case.program.calls) == 1 else case.program.calls
            fit(case.model, base, args, num_steps=case.num_steps, progress=False, compile=False)
            return ours, case.elbo(base, num_draws)
        return ours, case.elbo(case.trained(case.baseline, BASELINE_RATE, 2 * case.num_steps, seed)[0], num_draws)

    not_below(outcome)


def not_below(outcome: Callable[[int, int], tuple[Estimate, Estimate]]) -> None:
    """The first of two ELBOs is not lower: for one seed, or else on average over others."""
    ours, theirs = outcome(0, 400)
    assert not math.isnan(ours.mean) or math.isnan(theirs.mean), f"NaN, but AutoNormal has {theirs}"
    if not ours.mean < theirs.mean - ERRORS * math.hypot(ours.error, theirs.error) - NATS:
        return
    pairs = [outcome(seed, 400) for seed in range(1, REPEATS + 1)]
    differences = torch.tensor([one.mean - other.mean for one, other in pairs], dtype=torch.double)
    error = differences.std().item() / math.sqrt(REPEATS)
    mean = differences.mean().item()
    assert mean >= -ERRORS * error - NATS, (
        f"{-mean:.2f} nats (standard error {error:.2f}) below AutoNormal on average over {REPEATS} seeds; "
        f"the first was {ours} against {theirs}"
    )


def diagnosed(case: Case) -> None:
    """diagnose reports the ELBO of plain Monte Carlo."""
    guide, _ = case.trained(case.guide, 1e-2, 20, 0)
    report = diagnose(case.model, guide, case.args, num_samples=400, progress=False)
    if len(case.program.calls) > 1:
        case.program.calls[1:] = []
    for num_draws in (200, 1000):
        ours = case.plain_elbo(guide, num_draws)
        error = math.hypot(ours.error, report.elbo_se)
        if abs(ours.mean - report.elbo) <= ERRORS * error + 1e-3 * (1.0 + abs(ours.mean)):
            break
        report = diagnose(case.model, guide, case.args, num_samples=4000, progress=False)
    else:
        raise AssertionError(f"diagnose has {report.elbo} +/- {report.elbo_se}, but plain Monte Carlo {ours}")
    str(report)
    assert report.verdict
    if "subsampled" not in case.features:
        assert report.log_evidence >= report.elbo - ERRORS * error - 1e-3 or math.isnan(report.log_evidence)


def exported(case: Case) -> None:
    """to_inference_data has all sites with the model's shapes over full plates; plates whose items the arguments choose
    are refused."""
    guide = case.guide().setup(*case.args)
    options = {"num_samples": 12, "log_likelihood": "enumerated" not in case.features}
    _, model_trace = pair(case, guide)
    frames = [frame for node in model_trace.nodes.values() for frame in node.get("cond_indep_stack", ())]
    if case.chooses_items and any(frame.size < (frame.full_size or 0) for frame in frames):
        try:
            to_inference_data(case.model, guide, case.args, **options)
        except NotImplementedError as error:
            assert "rows" in str(error)
            return
        raise AssertionError("a part of a plate was exported")
    data = to_inference_data(case.model, guide, case.args, **options)
    for name, node in latent_nodes(model_trace).items():
        found = data["posterior"][name]
        assert found.shape == (1, 12, *full_shape(node)), name
        plates = {frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
        assert plates <= set(found.dims), name
    for name, node in model_trace.nodes.items():
        if node["type"] == "sample" and node["is_observed"] and node["value"].numel() and not site_is_subsample(node):
            assert data["observed_data"][name].shape == full_shape(node), name
            assert data["posterior_predictive"][name].shape == (1, 12, *full_shape(node)), name
    for name in ("lp", "log_q"):
        assert bool((data["sample_stats"][name] == data["sample_stats"][name]).all()), name


def compiled(case: Case) -> None:
    """CompiledSVI has the losses of SVI, with the graph as it is."""
    if "branch" in case.features:
        return
    losses = []
    with mock.patch.object(inductor, "_inductor", lambda graph, inputs, options: graph):
        for kind in (SVI, CompiledSVI):
            case.fresh(0)
            stepper = kind(case.model, case.guide(), Adam({"lr": 1e-2}), case.loss())
            losses.append(
                torch.tensor([stepper.step(*call) for call in (case.program.calls * 6)[:6]], dtype=torch.double)
            )
    expected, found = losses
    rtol = 1e-6 if case.is_double else 5e-3
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol, equal_nan=True)


QUICK: dict[str, Callable[[Case], None]] = {
    "builds": builds,
    "density": density,
    "state": state,
    "outside": outside,
}
SLOW: dict[str, Callable[[Case], None]] = {
    "start": start,
    **{f"svi {rate:g}": partial(svi, rate=rate) for rate in RATES},
    "fit": fitted,
    "diagnose": diagnosed,
    "export": exported,
    "compiled": compiled,
}


def check(model: RandomModel, name: str, num_steps: int = 120) -> None:
    """Assert one property of a model; warnings, which are many and about its numbers, are not shown."""
    with warnings.catch_warnings(), model.default_dtype():
        warnings.simplefilter("ignore")
        {**QUICK, **SLOW}[name](Case(model, num_steps))
