# SPDX-License-Identifier: Apache-2.0
"""log_prob is the density of the guide's draws, in the model's own space; and what else uses the flow's map."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam
from torch.distributions.transforms import ComposeTransform

from pyro_flows import AutoFlowGuide
from tests.common import randomize_parameters, trained

FLOWS = ("auto", "site_ordered", "full_rank_normal", "realnvp")


def model() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.double), 2.0))
    with pyro.plate("plate", 2):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3, dtype=torch.double)))
        pyro.sample("obs", dist.Normal(x + z[..., 0], 1.0), obs=torch.tensor([1.0, 2.0], dtype=torch.double))


def funnel(dim: int) -> None:
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    with pyro.plate("D", dim):
        pyro.sample("x", dist.Normal(0.0, torch.exp(y / 2)))


def randomized(fn: Any, *args: Any, **options: Any) -> AutoFlowGuide:
    guide = AutoFlowGuide(fn, **options).setup(*args)
    randomize_parameters(guide)
    return guide


@pytest.mark.parametrize("flow", FLOWS)
def test_log_prob_is_that_of_the_trace(flow: str) -> None:
    guide = randomized(model, flow=flow)
    trace = poutine.trace(guide).get_trace()
    values = {name: trace.nodes[name]["value"].detach() for name in ("x", "z")}
    torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("flow", FLOWS)
def test_log_prob_of_batches(flow: str) -> None:
    guide = randomized(model, flow=flow)
    values = guide.sample_posterior(6)
    assert {name: tuple(value.shape) for name, value in values.items()} == {"x": (6,), "z": (6, 2, 3)}
    log_prob = guide.log_prob(values)
    assert log_prob.shape == (6,)
    single = [guide.log_prob({name: value[i] for name, value in values.items()}) for i in range(6)]
    torch.testing.assert_close(torch.stack(single), log_prob)
    pairs = guide.log_prob({name: value.reshape(3, 2, *value.shape[1:]) for name, value in values.items()})
    torch.testing.assert_close(pairs.reshape(6), log_prob)


@pytest.mark.parametrize("site", ["real", "positive", "unit"])
@pytest.mark.parametrize("flow", ["auto", "spline", "diagonal_normal"])
def test_one_dimensional_density_integrates_to_one(flow: str, site: str) -> None:
    fn, grid = {
        "real": (dist.Normal(0.0, 1.0), torch.linspace(-40.0, 40.0, 200_001, dtype=torch.double)),
        "positive": (dist.Gamma(2.0, 1.0), torch.logspace(-8, 4, 200_001, dtype=torch.double)),
        "unit": (dist.Beta(2.0, 2.0), torch.linspace(-30.0, 30.0, 200_001, dtype=torch.double).sigmoid()),
    }[site]
    guide = randomized(lambda: pyro.sample("x", fn), flow=flow, init_scale=0.7).double()
    density = guide.log_prob({"x": grid}).exp()
    # The trapezoidal rule is exact to about 1e-6 here; the rest is what lies outside of the grid.
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-3)


def test_no_density_at_matrices_without_a_cholesky_factor() -> None:
    """One of them in a batch was an error about its factor."""
    guide = randomized(lambda: pyro.sample("x", dist.LKJ(2, 1.0)))
    inside = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    found = guide.log_prob({"x": torch.stack([inside, torch.full((2, 2), -1e3), inside])})
    assert found[1] == -torch.inf
    torch.testing.assert_close(found[::2], guide.log_prob({"x": inside}).expand(2))


def test_draws_have_that_density() -> None:
    guide = randomized(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), init_scale=1.0)
    draws = guide.sample_posterior(20_000)["x"]
    grid = torch.linspace(draws.min().item() - 5, draws.max().item() + 5, 20_001)
    cdf = torch.cumulative_trapezoid(guide.log_prob({"x": grid}).exp(), grid)
    for level in (0.1, 0.5, 0.9):
        share = (draws < grid[int((cdf < level).sum())]).float().mean().item()
        assert share == pytest.approx(level, abs=5 * (level * (1 - level) / 20_000) ** 0.5)


def test_log_prob_is_differentiable_in_values_and_parameters() -> None:
    guide = randomized(model)
    values = {name: value.requires_grad_() for name, value in guide.sample_posterior(3).items()}
    guide.log_prob(values).sum().backward()
    assert all(value.grad.isfinite().all() and value.grad.abs().sum() > 0 for value in values.values())
    assert all(p.grad is not None for p in trained(guide))


def test_log_prob_takes_single_precision_for_a_double_guide() -> None:
    guide = randomized(model)
    values = guide.sample_posterior(3)
    found = guide.log_prob({name: value.float() for name, value in values.items()})
    assert found.dtype == torch.double
    torch.testing.assert_close(found, guide.log_prob(values), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x": torch.zeros(())}, r"missing are \['z'\]"),
        ({"x": torch.zeros(()), "z": torch.ones(2, 3) / 3, "obs": torch.zeros(2)}, r"unknown are \['obs'\]"),
        ({"x": torch.zeros(()), "z": torch.ones(3, 3) / 3}, r"'z' to have shape"),
        ({"x": torch.zeros(4, 1), "z": torch.ones(4, 2, 3) / 3}, r"'z' to have the batch shape .*reshape"),
    ],
    ids=["missing", "unknown", "shape", "batch"],
)
def test_log_prob_says_what_is_wrong(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AutoFlowGuide(model).log_prob(values)


# The flow's map under Pyro's own tools


@pytest.mark.parametrize("flow", ["auto", "full_rank_normal", "realnvp"])
def test_neutra_keeps_the_joint_density(flow: str) -> None:
    guide = randomized(funnel, 4, flow=flow)
    neutra = NeuTraReparam(guide)
    _, potential, transforms, _ = initialize_model(funnel, model_args=(4,))
    init, neutra_potential, _, _ = initialize_model(neutra.reparam(funnel), model_args=(4,))
    (eps,) = init.values()
    values = neutra.transform_sample(eps)
    flow_map = ComposeTransform(guide.get_posterior().transforms)
    ladj = flow_map.log_abs_det_jacobian(eps, flow_map(eps))
    expected = potential({name: transforms[name](value) for name, value in values.items()}) - ladj
    torch.testing.assert_close(neutra_potential(init), expected, atol=1e-4, rtol=1e-4)


def test_neutra_under_nuts() -> None:
    guide = AutoFlowGuide(funnel)
    svi = SVI(funnel, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(3)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    mcmc = MCMC(NUTS(neutra.reparam(funnel), max_tree_depth=2), num_samples=4, warmup_steps=4, disable_progbar=True)
    mcmc.run(3)
    (latent,) = mcmc.get_samples().values()
    values = neutra.transform_sample(latent.unsqueeze(-2))
    assert values["x"].shape == (4, 3)
    assert values["y"].shape[0] == 4
    assert values["x"].isfinite().all()


def test_base_dist_and_transform_make_the_posterior() -> None:
    guide = randomized(model)
    eps = guide.get_base_dist().sample((5,))
    latent = guide.get_transform()(eps)
    assert eps.shape == latent.shape == (5, guide.latent_dim)
    ladj = guide.get_transform().log_abs_det_jacobian(eps, latent)
    expected = guide.get_base_dist().log_prob(eps) - ladj
    torch.testing.assert_close(guide.get_posterior().log_prob(latent), expected, atol=1e-5, rtol=1e-5)


def test_importance_weights_give_the_evidence() -> None:
    def conjugate() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    start = init_to_value(values={"z": torch.tensor(0.5)})
    guide = AutoFlowGuide(conjugate, init_loc_fn=start, init_scale=0.5**0.5)  # The posterior, exactly.
    values = guide.sample_posterior(5)
    joint = dist.Normal(0.0, 1.0).log_prob(values["z"]) + dist.Normal(values["z"], 1.0).log_prob(torch.tensor(1.0))
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(joint - guide.log_prob(values), evidence.expand(5), atol=1e-4, rtol=1e-4)
