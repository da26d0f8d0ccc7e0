# SPDX-License-Identifier: Apache-2.0
"""Multivariate normal priors that follow other latents: what is read off a model, and the guide that results."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, fit
from pyro_flows.diagnostics import log_weights
from pyro_flows.models.covariances import ReadCovariance, read_covariances
from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout
from pyro_flows.models.priors import read_joint_prior
from pyro_flows.models.sites import read_sites
from pyro_flows.transforms import CovarianceHead

ONES = torch.ones(20_000)
X = torch.linspace(-2.0, 2.0, 12)
Y = torch.tensor([0.2, 0.9, 1.4, 1.1, 0.3, -0.8, -1.2, -0.9, 0.1, 0.7, 1.5, 1.0])


def kernel(length: Tensor, amplitude: Tensor, jitter: float = 1e-3) -> Tensor:
    squares = (X.unsqueeze(-1) - X).square()
    return amplitude**2 * (-squares / (2 * length**2)).exp() + jitter * torch.eye(len(X))


def process() -> Tensor:
    """As users write it: a covariance matrix of the latent length scale and amplitude."""
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 0.3))
    f: Tensor = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(X)), kernel(length, amplitude)))
    return f


def regression() -> None:
    f = process()
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal(f, 0.3), obs=Y)


def classification() -> None:
    f = process()
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=f), obs=(Y > 0).float())


def jitter_in_place() -> None:
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    covariance = (-(X.unsqueeze(-1) - X).square() / length).exp()
    covariance.view(-1)[:: len(X) + 1] += 1e-3
    pyro.sample("f", dist.MultivariateNormal(X, scale_tril=torch.linalg.cholesky(covariance)))


def low_rank() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("f", dist.LowRankMultivariateNormal(X, scale * X.unsqueeze(-1), torch.ones(len(X))))


def outputs() -> None:
    """Three processes with the same covariance, and a mean each."""
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("outputs", 3):
        loc = mean.unsqueeze(-1).expand(3, len(X))
        pyro.sample("f", dist.MultivariateNormal(loc, kernel(length, torch.ones(()))))


def layout_of(model: Callable[..., object]) -> Layout:
    return Layout(read_sites(trace_latents(model, (), {})))


def read(model: Callable[..., object]) -> tuple[Layout, list[ReadCovariance]]:
    layout = layout_of(model)
    return layout, read_covariances(model, (), {}, layout, layout.names)


def values_at(layout: Layout, packed: Tensor) -> dict[str, Tensor]:
    return {site.name: site.to_support(part) for site, part in layout.split(packed)}


@pytest.mark.parametrize(
    ("model", "parents", "num"),
    [
        (regression, {"length", "amplitude"}, 1),
        (jitter_in_place, {"length"}, 1),
        (low_rank, {"scale"}, 1),
        (outputs, {"length", "mean"}, 3),
    ],
)
def test_location_and_covariance_are_the_models_own(model: Callable[[], object], parents: set[str], num: int) -> None:
    layout, (found,) = read(model)
    assert found.covariance[:3] == (layout.slices["f"].start, num, len(X))
    assert {name for name, where in layout.slices.items() if found.parents[where].any()} == parents
    points = layout.init_loc + 0.5 * torch.randn(4, layout.latent_dim)
    loc, factor = found.covariance.prior(points)
    for index, packed in enumerate(points):
        trace = pyro.poutine.trace(pyro.poutine.condition(model, values_at(layout, packed))).get_trace()
        fn = trace.nodes["f"]["fn"]
        torch.testing.assert_close(loc[index], fn.loc.expand(num, len(X)).reshape(-1))
        expected = fn.scale_tril.expand(num, -1, -1)[0]
        torch.testing.assert_close(factor[index] @ factor[index].mT, expected @ expected.mT, rtol=1e-4, atol=1e-4)
        for one, other in zip(found.covariance.prior(packed), (loc[index], factor[index]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def constant() -> None:
    pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(X)), kernel(torch.ones(()), torch.ones(()))))


def different_outputs() -> None:
    """Covariances that differ between vectors."""
    lengths = pyro.sample("lengths", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    covariances = torch.stack([kernel(length, torch.ones(())) for length in lengths])
    with pyro.plate("outputs", 2):
        pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(X)), covariances))


def branching() -> None:
    """Python reads the length."""
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    pyro.sample("f", dist.MultivariateNormal(X, kernel(length if length > 0.1 else torch.ones(()), torch.ones(()))))


def random_kernel() -> None:
    """A covariance that changes from run to run."""
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    pyro.sample("f", dist.MultivariateNormal(X, kernel(length + torch.rand(()), torch.ones(()))))


def not_definite() -> None:
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    pyro.sample("f", dist.MultivariateNormal(X, kernel(length, torch.ones(()), jitter=-1.0)))


def learned() -> None:
    """The covariance is of the model's own parameter too, which training moves."""
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    amplitude = pyro.param("amplitude", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("f", dist.MultivariateNormal(X, kernel(length, amplitude)))


def scaled() -> None:
    """The model scores a third of the prior's log density."""
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    with pyro.poutine.scale(scale=0.3):
        pyro.sample("f", dist.MultivariateNormal(X, kernel(length, torch.ones(()))))


def masked() -> None:
    length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
    pyro.sample("f", dist.MultivariateNormal(X, kernel(length, torch.ones(()))).mask(False))


@pytest.mark.parametrize("model", [constant, different_outputs, branching, random_kernel, learned, scaled, masked])
def test_others_are_left_to_what_there_is_for_them(model: Callable[[], object]) -> None:
    assert not read(model)[1]


def test_a_process_in_a_process_has_its_own_covariance_left_out() -> None:
    """The inner one's values are drawn given the outer ones, which a head with two steps cannot."""

    def deep() -> None:
        f = process()
        squares = (f.unsqueeze(-1) - f).square()
        pyro.sample("g", dist.MultivariateNormal(torch.zeros(len(X)), (-squares).exp() + 0.1 * torch.eye(len(X))))

    prior = read_joint_prior(deep, (), {}, layout_of(deep))
    assert prior is None or not prior.covariances


def test_large_ones_are_not_even_built() -> None:
    """A low-rank normal of 20,000 dimensions, whose dense factor would take gigabytes."""

    def large() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("f", dist.LowRankMultivariateNormal(torch.zeros(20_000), scale * torch.ones(20_000, 1), ONES))

    assert not read(large)[1]


def test_a_discrete_site_before_is_none_of_its_business() -> None:
    @config_enumerate
    def mixed() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        regression()

    layout = Layout(read_sites(trace_latents(mixed, (), {})))
    assert [found.covariance.size for found in read_covariances(mixed, (), {}, layout, layout.names)] == [len(X)]


def test_vectors_with_latent_correlations_that_a_process_follows() -> None:
    """They are drawn before it, so that the head does not correlate them."""

    def model() -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("groups", 3):
            b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale * factor))
        length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
        f = pyro.sample("f", dist.MultivariateNormal(b[..., 0, :1] + X, kernel(length, torch.ones(()))))
        with pyro.plate("rows", len(X)):
            pyro.sample("y", dist.Normal(f, 0.3), obs=Y)

    head = AutoFlowGuide(model).warm_start().posterior.only_block.flow.head
    assert isinstance(head, CovarianceHead)
    assert head.correlated == ()
    assert head.is_full


def test_a_hyperprior_above_the_covariance() -> None:
    """What a covariance follows has no known prior of its own; other effects keep theirs."""

    def model() -> None:
        center = pyro.sample("center", dist.Normal(0.0, 1.0))
        length = pyro.sample("length", dist.LogNormal(center, 0.3))
        pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(X)), kernel(length, torch.ones(()))))
        with pyro.plate("groups", 3):
            pyro.sample("effect", dist.Normal(center, 1.0))

    layout = layout_of(model)
    prior = read_joint_prior(model, (), {}, layout)
    assert prior is not None
    known = {name for name, where in layout.slices.items() if prior.known[where].all()}
    assert known == {"f", "effect"}
    assert [group.size for group in prior.covariances] == [len(X)]


def test_where_the_covariance_is_not_positive_definite_the_factor_is_the_identity() -> None:
    layout, (found,) = read(process)
    far = layout.init_loc.clone()
    far[layout.slices["length"]] = far[layout.slices["amplitude"]] = 8.0  # the jitter is lost in rounding
    for points in (far, torch.stack([far, layout.init_loc])):
        factor = found.covariance.prior(points)[1].reshape(-1, len(X), len(X))[0]
        assert torch.equal(factor, torch.eye(len(X)))


def test_a_model_whose_covariance_is_never_definite_is_pyros_error() -> None:
    with pytest.raises(Exception, match="PositiveDefinite"):
        AutoFlowGuide(not_definite).setup()


def test_a_wrong_shape_is_not_blamed_on_float32() -> None:
    """A process inside of the rows' plate: the model's own error, and no advice about precision, which cannot help."""

    def model() -> None:
        with pyro.plate("rows", len(X)):
            pyro.sample("y", dist.Normal(process(), 0.3), obs=Y)

    with pytest.raises(ValueError, match="invalid log_prob shape") as error:
        AutoFlowGuide(model).warm_start()
    assert "float64" not in str(error.value)


def test_a_prior_follows_sites_before_it_only() -> None:
    """The marginals of an autoregression with jitter are nearly linear: a fit by all coordinates had cycles, and the
    guide raised."""

    def model() -> None:
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        times = torch.arange(40.0)
        covariance = scale**2 * rho ** (times.unsqueeze(-1) - times).abs() + 1e-5 * torch.eye(40)
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(40), covariance))

    layout = layout_of(model)
    prior = read_joint_prior(model, (), {}, layout)
    assert prior is not None
    assert not prior.dense(layout.latent_dim)[0][:, layout.slices["z"]].any()
    assert AutoFlowGuide(model).setup().posterior.only_block.flow.head.covariances


def conditional_of(guide: AutoFlowGuide, length: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of f given the others, from draws' noise: the head is affine in it."""
    head = guide.posterior.only_block.flow.head
    packed = torch.cat([torch.stack([length, amplitude]).log(), torch.zeros(len(X))])
    noise = head.inverse_and_ladj(packed)[0]
    units = torch.cat([torch.zeros(1, len(X)), torch.eye(len(X))])
    drawn = head.forward_and_ladj(torch.cat([noise[:2].expand(len(units), 2), units], -1))[0][:, 2:]
    root = (drawn[1:] - drawn[0]).mT
    return drawn[0], root @ root.mT


def test_the_exact_conditional_of_gaussian_process_regression() -> None:
    """Rasmussen, Williams. Gaussian Processes for Machine Learning. 2006, eq. (2.25)-(2.26); at any hyperparameters."""
    guide = AutoFlowGuide(regression).warm_start()
    for length, amplitude in ((0.4, 0.8), (0.6, 1.0), (1.0, 1.6)):
        prior = kernel(torch.tensor(length), torch.tensor(amplitude)).double()
        gain = torch.linalg.solve(prior + 0.09 * torch.eye(len(X)), prior).mT
        mean, covariance = conditional_of(guide, torch.tensor(length), torch.tensor(amplitude))
        torch.testing.assert_close(mean.double(), gain @ Y.double(), rtol=0.0, atol=5e-3)
        torch.testing.assert_close(covariance.double(), prior - gain @ prior, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize(("model", "most"), [(regression, 0.03), (classification, 0.15)])
def test_a_warm_start_leaves_little_of_the_gap(model: Callable[[], None], most: float) -> None:
    """Half the variance of log weights; with marginal scales only it is 0.5 and 0.9."""
    guide = AutoFlowGuide(model).warm_start()
    assert isinstance(guide.posterior.only_block.flow.head, CovarianceHead)
    assert log_weights(model, guide, 4000)[0].var() / 2 < most


def test_it_starts_as_auto_normal() -> None:
    """Before any training: mean-field, in the latents' own coordinates."""
    guide = AutoFlowGuide(regression, init_scale=0.1).setup()
    draws = guide.sample_posterior(4000)["f"].reshape(4000, -1)
    assert draws.std(0).sub(0.1).abs().max() < 0.1 * 4 / 4000**0.5 + 1e-3
    correlation = torch.corrcoef(draws.mT) - torch.eye(len(X))
    assert correlation.abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_in_a_users_loop_it_does_no_worse(rate: float) -> None:
    """By the losses of the second half, since a single point moves by several nats at a constant rate of 0.1."""
    means, variances = [], []
    for make in (AutoNormal, AutoFlowGuide):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(regression, make(regression), Adam({"lr": rate}), Trace_ELBO())
        losses = torch.tensor([svi.step() for _ in range(500)])
        blocks = losses[250:].reshape(10, 25).mean(-1)  # neighbors are correlated
        means.append(blocks.mean())
        variances.append(blocks.var() / len(blocks))
    assert means[1] < means[0] + 3 * (variances[0] + variances[1]).sqrt()


def test_a_guide_with_a_recorded_prior_is_copied_saved_and_loaded(tmp_path: Path) -> None:
    guide = AutoFlowGuide(regression).warm_start()
    values = guide.sample_posterior(5)
    expected = guide.log_prob(values)
    guide.save(tmp_path / "guide.pt")
    loaded = AutoFlowGuide.load(tmp_path / "guide.pt", regression)
    for other in (copy.deepcopy(guide), loaded, pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(other.log_prob(values), expected)
    assert not any("captured" in name or "graph" in name for name in guide.state_dict())


def test_data_changed_in_place_do_not_change_the_guide() -> None:
    x = X.clone()

    def model() -> None:
        length = pyro.sample("length", dist.LogNormal(-0.5, 0.3))
        squares = (x.unsqueeze(-1) - x).square()
        covariance = (-squares / length).exp() + 1e-3 * torch.eye(len(x))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), covariance))
        pyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=Y)

    guide = AutoFlowGuide(model).warm_start()
    values = guide.sample_posterior(5)
    expected = guide.log_prob(values)
    x.mul_(1.5)
    assert torch.equal(guide.log_prob(values), expected)


def test_another_dtype() -> None:
    guide = AutoFlowGuide(regression).warm_start()
    values = guide.sample_posterior(5)
    expected = guide.log_prob(values)
    guide.double()
    found = guide.log_prob({name: value.double() for name, value in values.items()})
    assert found.dtype == torch.double
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-2)


def test_compiled_steps_notice_a_warm_start() -> None:
    """A recorded step takes one of two branches of the head: it went on with the other one's density."""
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(regression)
    svi = CompiledSVI(regression, guide, Adam({"lr": 1e-4}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    guide.warm_start()
    with pytest.warns(UserWarning, match="recorded again"):
        losses = [svi.step() for _ in range(100)]
    with torch.no_grad():
        expected = torch.tensor([Trace_ELBO().loss(regression, guide) for _ in range(100)])
    # Both have a standard error of about 0.03, since log weights hardly vary.
    assert abs(sum(losses) / 100 - expected.mean()) < 0.2


def test_a_refused_checkpoint_leaves_the_guide_as_it_was(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        f = process()
        pyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=y)

    fit(model, AutoFlowGuide(model), (Y,), num_steps=1, seed=0, progress=False, checkpoint=tmp_path / "run")
    guide = AutoFlowGuide(model).setup(Y)
    values = guide.sample_posterior(5)
    expected = guide.log_prob(values)
    with pytest.raises(ValueError, match="data"):
        fit(model, guide, (Y + 0.1,), num_steps=1, seed=0, progress=False, checkpoint=tmp_path / "run")
    assert torch.equal(guide.log_prob(values), expected)
