# SPDX-License-Identifier: Apache-2.0
"""Guides on other bases than the normal: gradients, modes and their weights, tails, summaries and state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit, flows
from pyro_flows.diagnostics import log_weights, pareto_smooth
from pyro_flows.flows.bases import Base, MixtureBase, StudentTBase
from pyro_flows.flows.noise import DiagonalNormalMixture
from tests.common import randomize_parameters, trained

Model = Callable[..., None]
bases = pytest.mark.parametrize("base", ["student_t", "mixture"])


def two_modes(apart: float, dim: int) -> Model:
    """Weights 0.3 and 0.7, evidence 1."""
    components = dist.Normal(torch.tensor([[-apart], [apart]]).expand(2, dim), 1.0).to_event(1)
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 5.0).to_event(1).mask(False))
        pyro.factor("target", target.log_prob(z))

    return model


def student(df: float, dim: int) -> Model:
    def model() -> None:
        with pyro.plate("dims", dim):
            pyro.sample("z", dist.StudentT(df, 0.0, 1.0))

    return model


def exact(base: str) -> AutoFlowGuide:
    """A guide that is its model's posterior, with all layers at the identity."""
    if base == "student_t":
        target: Any = dist.StudentT(torch.full((2,), 4.0).double(), torch.tensor([1.0, -1.0]).double(), 0.5).to_event(1)
    else:
        locs = torch.tensor([[-1.0, 0.0], [1.5, 0.5], [0.0, 2.0]]).double()
        logits = torch.tensor([0.2, 0.5, 0.3]).double().log()
        target = DiagonalNormalMixture(locs, 0.5 + 0.1 * locs.abs(), logits)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1).mask(False))
        pyro.factor("target", target.log_prob(z))

    spec = flows.StudentT(df=4.0) if base == "student_t" else flows.Mixture(num_components=3)
    loc, scale = ([1.0, -1.0], 0.5) if base == "student_t" else ([0.0, 0.0], 1.0)
    init_loc_fn = init_to_value(values={"z": torch.tensor(loc).double()})
    guide = AutoFlowGuide(model, flow=flows.Auto(base=spec), init_loc_fn=init_loc_fn, init_scale=scale).setup()
    base_module = guide.posterior.joint.flow.base
    if isinstance(base_module, MixtureBase):
        base_module.set(target.locs, target.scales, target.logits.exp())
    return guide


def gradient(guide: AutoFlowGuide, num_particles: int, elbo: Any = Trace_ELBO) -> Tensor:
    guide.zero_grad()
    vectorized = num_particles > 1
    loss = elbo(num_particles=num_particles, vectorize_particles=vectorized, max_plate_nesting=0)
    loss.loss_and_grads(guide.model, guide)
    return torch.cat([p.grad.reshape(-1) for p in trained(guide)])


@bases
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, JitTrace_ELBO])
@pytest.mark.parametrize("num_particles", [1, 8])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
def test_no_noise_at_the_exact_posterior(base: str, elbo: Any, num_particles: int) -> None:
    """Whole, parameters of the base and weights included; the ordinary gradient is noise."""
    guide = exact(base)
    for _ in range(3):
        assert gradient(guide, num_particles, elbo).abs().max() < 1e-5
    guide.path_gradient = False
    assert gradient(guide, num_particles).abs().max() > 0.1


@pytest.mark.slow
@bases
def test_same_mean_as_the_total_gradient(base: str) -> None:
    guide = exact(base)
    randomize_parameters(guide, 0.1)
    names = [name for name, p in guide.named_parameters() if any(p is q for q in trained(guide))]
    sizes = [p.numel() for p in trained(guide)]
    of_base = torch.cat([torch.full((n,), ".base." in name) for name, n in zip(names, sizes, strict=True)])
    assert of_base.any()
    differences, directions = [], None
    for seed in range(80):
        pair = []
        for guide.path_gradient in (True, False):
            pyro.set_rng_seed(seed)
            pair.append(gradient(guide, 50))
        apart = pair[0] - pair[1]
        if directions is None:
            directions = torch.randn(len(apart), 10, dtype=torch.double)
        differences.append(torch.cat([apart[of_base], apart @ directions]))
    # The same noise on both sides: what remains is the score term, whose mean is zero.
    difference = torch.stack(differences)
    standard_error = difference.std(0) / len(differences) ** 0.5
    assert (standard_error > 0).all()
    assert (difference.mean(0).abs() < 4.5 * standard_error).all()


@pytest.mark.slow
@bases
def test_centered_gradients_have_the_same_mean(base: str) -> None:
    guide = exact(base)
    randomize_parameters(guide, 0.1)
    posterior = guide.get_posterior().expand(torch.Size([64]))
    parameters = list(guide.posterior.joint.flow.base.parameters())
    differences = []
    for _ in range(150):
        pair = []
        for q in (posterior.centered(), posterior):
            z = guide.get_posterior().expand(torch.Size([64])) if q is posterior else q
            loss = (z.rsample() - 0.3).square().sum(-1).mean()
            pair.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]))
        differences.append(pair[0] - pair[1])
    difference = torch.stack(differences)
    standard_error = difference.std(0) / len(differences) ** 0.5
    assert (difference.mean(0).abs() < 4.5 * standard_error).all()


@pytest.mark.slow
@pytest.mark.parametrize(("apart", "dim"), [(4.0, 1), (4.0, 5), (10.0, 1), (10.0, 5)])
def test_a_mixture_keeps_both_modes(apart: float, dim: int) -> None:
    model = two_modes(apart, dim)
    guide = AutoFlowGuide(model, flow=flows.Auto(base=flows.Mixture(num_components=3)))
    result = fit(model, guide, seed=0, progress=False)
    assert result.elbo > -0.02 - 3 * result.elbo_se
    draws = guide.sample_posterior(10_000)["z"]
    share = (draws > 0).double().mean(0)
    assert ((share - 0.7).abs() < 0.03 + 3 * (0.21 / 10_000) ** 0.5).all()


def test_without_it_a_mode_is_lost() -> None:
    model = two_modes(4.0, 1)
    guide = AutoFlowGuide(model, "spline").warm_start()
    assert (guide.sample_posterior(1000)["z"] > 0).double().mean() > 0.99


@pytest.mark.parametrize("dim", [1, 5])
def test_the_default_takes_a_mixture_by_itself(dim: int) -> None:
    model = two_modes(4.0, dim)
    guide = AutoFlowGuide(model)
    result = fit(model, guide, seed=0, progress=False)
    assert result.num_modes == guide.posterior.num_modes == 2
    assert "2 modes" in str(result)
    assert result.elbo > -0.01 - 3 * result.elbo_se
    share = (guide.sample_posterior(10_000)["z"] > 0).double().mean(0)
    assert ((share - 0.7).abs() < 0.02 + 3 * (0.21 / 10_000) ** 0.5).all()


def test_one_mode_needs_no_mixture() -> None:
    """A skewed posterior, too, of which a mixture of two would have the higher ELBO than one Gaussian."""

    def model() -> None:
        pyro.sample("z", dist.Gumbel(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlowGuide(model).warm_start()
    assert guide.posterior.num_modes == 1
    assert type(guide.posterior.joint.flow.base) is Base


def test_a_base_that_was_chosen_is_kept_in_every_kind_of_file(tmp_path: Path) -> None:
    model = two_modes(4.0, 2)
    value = {"z": torch.tensor([1.0, -2.0])}
    pyro.clear_param_store()
    guide = AutoFlowGuide(model, name="kept")
    options: dict[str, Any] = {"seed": 0, "progress": False, "checkpoint": tmp_path / "run"}
    fit(model, guide, num_steps=20, **options)
    expected = guide.log_prob(value).item()
    guide.save(tmp_path / "guide")
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    found = {"save": AutoFlowGuide.load(tmp_path / "guide", model), "deepcopy": copy.deepcopy(guide)}
    found["state_dict"] = AutoFlowGuide(model).setup()
    found["state_dict"].load_state_dict(guide.state_dict())
    found["checkpoint"] = AutoFlowGuide(model)
    fit(model, found["checkpoint"], num_steps=20, **options)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    found["store"] = AutoFlowGuide(model, name="kept").setup()
    found["store"]()
    assert {name: each.log_prob(value).item() for name, each in found.items()} == dict.fromkeys(found, expected)
    for each in found.values():  # a warm start begins anew, and a step limit knows the new parameters
        pyro.clear_param_store()
        each.warm_start()
        assert sum(".base." in name for name, _ in each.posterior.listed_parameters()) == 3
        SVI(model, each, Adam({"lr": 1.0}), Trace_ELBO()).step()
        limited = {id(p) for p in each.step_limit.parameters}
        assert all(id(p) in limited for p in each.posterior.joint.flow.base.parameters())


@pytest.mark.parametrize("flow", [flows.DiagonalNormal, flows.ElementwiseSpline, flows.SplineCoupling])
def test_modes_of_other_widths_and_weights(flow: type[flows.FlowSpec]) -> None:
    """Of a Gaussian mixture with covariances that are diagonal the start is exact, in every family."""
    locs = torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, 9.0]])
    scales = torch.tensor([[0.2, 1.0], [1.0, 0.5], [0.5, 2.0]])
    weights = torch.tensor([0.5, 0.1, 0.4])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 5.0).to_event(1).mask(False))
        pyro.factor("target", DiagonalNormalMixture(locs, scales, weights.log()).log_prob(z))

    guide = AutoFlowGuide(model, flow=flow(base=flows.Mixture(num_components=3))).warm_start()
    values, _ = log_weights(model, guide, 1000)
    assert values.abs().max() < 0.05
    found = guide.posterior.joint.flow.base.logits.softmax(-1).sort().values
    torch.testing.assert_close(found, weights.sort().values, atol=0.01, rtol=0.0)


def test_weights_of_modes_that_are_not_normal() -> None:
    """Their normals alone say 0.67."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 8.0).mask(False))
        skew = dist.Gumbel(0.0, 1.0).log_prob(z) + torch.tensor(0.4).log()
        heavy = dist.StudentT(6.0, 12.0, 0.7).log_prob(z) + torch.tensor(0.6).log()
        pyro.factor("target", torch.logaddexp(skew, heavy))

    guide = AutoFlowGuide(model, flow=flows.Auto(base="mixture")).warm_start()
    values, _ = log_weights(model, guide, 10_000)
    assert values.mean() > -0.01 - 3 * values.std() / 10_000**0.5
    share = (guide.sample_posterior(10_000)["z"] > 6.0).double().mean()
    assert (share - 0.6).abs() < 0.03 + 3 * (0.24 / 10_000) ** 0.5


def test_a_single_mode_gets_the_gaussian() -> None:
    """Components that are left over do no harm."""

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]])))

    guide = AutoFlowGuide(model, flow=flows.Auto(base="mixture")).warm_start()
    values, _ = log_weights(model, guide, 4000)
    assert values.mean() > -0.005 - 3 * values.std() / 4000**0.5


@pytest.mark.slow
@pytest.mark.parametrize(("df", "dim", "quantile"), [(3.0, 1, 10.215), (5.0, 5, 5.893)])
def test_a_student_t_gets_its_tails(df: float, dim: int, quantile: float) -> None:
    """Against a normal base: 99.9 % quantile, log weights far out, and k-hat."""
    model = student(df, dim)
    far = torch.full((1, dim), 100.0)
    outcomes = {}
    for base in ("normal", "student_t"):
        pyro.set_rng_seed(1)
        guide = AutoFlowGuide(model, flow=flows.Auto(base=base)).warm_start()
        draws = guide.sample_posterior(100_000)["z"].abs().quantile(0.998, 0)
        weights, _ = log_weights(model, guide, 10_000)
        with torch.no_grad():
            beyond = dist.StudentT(df, 0.0, 1.0).log_prob(far).sum() - guide.log_prob({"z": far})
        outcomes[base] = (draws, pareto_smooth(weights).khat, beyond.abs().item())
    # The standard error of a 99.9 % quantile from 2 x 100,000 tail draws is 0.07 df^-1 of it; twice that for the fit.
    draws, khat, beyond = outcomes["student_t"]
    assert ((draws / quantile).log().abs() < 4 * 2 * 0.07 / df).all()
    assert khat < 0.4
    assert beyond < 1.0 * dim
    draws, khat, beyond = outcomes["normal"]
    assert (draws < 0.8 * quantile).all()
    assert khat > 0.5
    assert beyond > 100.0


def test_a_normal_posterior_gets_a_normal_from_a_student_t() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([0.1, 10.0])).to_event(1))

    guide = AutoFlowGuide(model, flow=flows.DiagonalNormal(base="student_t")).warm_start()
    values, _ = log_weights(model, guide, 4000)
    assert values.mean() > -0.01
    assert guide.posterior.joint.flow.base.df.min() > 25.0


@bases
def test_summaries(base: str) -> None:
    """Repeat, leave the global random state alone, and agree with draws; densities are those of the draws."""
    guide = AutoFlowGuide(two_modes(2.0, 2), flow=flows.Auto(base=base)).setup()
    randomize_parameters(guide, 0.2)
    state = torch.random.get_rng_state()
    quartiles = guide.quantiles([0.25, 0.5, 0.75])["z"]
    assert torch.equal(quartiles, guide.quantiles([0.25, 0.5, 0.75])["z"])
    assert torch.equal(torch.random.get_rng_state(), state)
    draws = guide.sample_posterior(20_000)["z"]
    below = (draws.unsqueeze(0) < quartiles.unsqueeze(1)).double().mean(1)
    expected = torch.tensor([0.25, 0.5, 0.75]).double()[:, None]
    # Of 4000 draws, half of which are mirror images.
    error = (expected * (1 - expected) * (2 / 4000 + 1 / 20_000)).sqrt()
    assert ((below - expected).abs() < 4 * error).all()
    values, log_q = guide.get_posterior().rsample_and_log_prob((7,))
    torch.testing.assert_close(guide.log_prob({"z": values.detach()}), log_q, atol=1e-3, rtol=1e-4)
    assert guide.get_base_dist().event_shape == (2,)


@bases
def test_state(base: str) -> None:
    """State dicts, pickles, copies and the parameter store carry the base along."""
    model = two_modes(2.0, 2)

    def draws(guide: AutoFlowGuide) -> Tensor:
        pyro.set_rng_seed(5)
        return guide.sample_posterior(4)["z"]

    def make(**options: Any) -> AutoFlowGuide:
        return AutoFlowGuide(model, flow=flows.Auto(base=base), **options).setup()

    guide = make(name="mine")
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    before = [p.detach().clone() for p in guide.posterior.joint.flow.base.parameters()]
    for _ in range(3):
        svi.step()
    after = list(guide.posterior.joint.flow.base.parameters())
    assert all((p != q).any() for p, q in zip(before, after, strict=True))
    expected = draws(guide)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    loaded = make()
    assert not torch.equal(draws(loaded), expected)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (loaded, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.equal(draws(twin), expected)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    adopted = make(name="mine")
    adopted()
    assert torch.equal(draws(adopted), expected)


@bases
def test_dtype_is_the_models(base: str) -> None:
    guide = exact(base)
    assert guide()["z"].dtype == torch.double
    assert {p.dtype for p in guide.parameters()} == {torch.double}


def items(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", 20, subsample_size=5) as rows:
        theta = pyro.sample("theta", dist.StudentT(3.0, mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 5.0), obs=y[rows])


@pytest.mark.slow
def test_local_latents() -> None:
    """Student-t noise serves items too; a mixture is refused."""
    y = torch.randn(20)
    with pytest.raises(NotImplementedError, match=r"'theta' in plate 'data'.*Mixture\(num_components=2\).*structure="):
        AutoFlowGuide(items, flow=flows.Auto(base=flows.Mixture(num_components=2))).setup(y)
    guide = AutoFlowGuide(items, flow=flows.SiteOrdered(base=flows.StudentT(df=5.0)))
    guide.warm_start(y)
    (block,) = guide.posterior.blocks()
    assert isinstance(block.flow.base, StudentTBase)
    svi = SVI(items, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=2, vectorize_particles=True))
    svi.step(y)
    assert (block.flow.base.df - 5.0).abs().min() > 1e-3
    draws = guide.sample_posterior(50, y)
    assert draws["theta"].shape == (50, 20)
    assert guide.log_prob(draws, y).isfinite().all()
    assert torch.equal(guide.median(y)["theta"], guide.median(y)["theta"])
