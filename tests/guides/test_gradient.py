# SPDX-License-Identifier: Apache-2.0
"""Path gradients: nothing left at the exact posterior, the same mean as the total gradient, and only for own draws."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyro_flows import AutoFlowGuide
from tests.common import randomize_parameters, trained

DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)


def conjugate() -> None:
    """Prior N(0, 1), likelihood N(z, 1): the posterior is N(y / 2, 1 / 2)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.double), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=DATA)


def at_the_posterior(**options: Any) -> AutoFlowGuide:
    init_loc_fn = init_to_value(values={"z": DATA / 2})
    return AutoFlowGuide(conjugate, init_loc_fn=init_loc_fn, init_scale=0.5**0.5, **options).setup()


def gradient(guide: AutoFlowGuide, elbo: Any, model: Any = conjugate) -> Tensor:
    guide.zero_grad()
    elbo.loss_and_grads(model, guide)
    return torch.cat([p.grad.reshape(-1) for p in trained(guide)])


@pytest.mark.parametrize("num_particles", [1, 8])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("flow", ["diagonal_normal", "full_rank_normal", "low_rank_normal", "auto"])
def test_no_noise_at_the_exact_posterior(flow: str, elbo: Any, num_particles: int) -> None:
    loss = elbo(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=0)
    guide = at_the_posterior(flow=flow)
    for _ in range(3):
        assert gradient(guide, loss).abs().max() < 1e-6
    guide = at_the_posterior(flow=flow, path_gradient=False)
    assert torch.stack([gradient(guide, loss) for _ in range(3)]).std(0).max() > 0.1


@pytest.mark.parametrize("flow", ["full_rank_normal", "auto"])
def test_same_mean_as_the_total_gradient(flow: str) -> None:
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    guide = AutoFlowGuide(conjugate, flow=flow, init_scale=0.5).setup()
    randomize_parameters(guide, 0.1)
    directions, differences = None, []
    for seed in range(60):
        pair = []
        for guide.path_gradient in (True, False):
            pyro.set_rng_seed(seed)
            pair.append(gradient(guide, elbo))
        if directions is None:
            directions = torch.randn(len(pair[0]), 10, dtype=torch.double)
        differences.append((pair[0] - pair[1]) @ directions)
    # The same noise on both sides: what remains is the score term, whose mean is zero.
    difference = torch.stack(differences)
    standard_error = difference.std(0) / len(differences) ** 0.5
    assert (standard_error > 0).all()
    assert (difference.mean(0).abs() < 4.5 * standard_error).all()


@pytest.mark.parametrize("change", [lambda z: z.detach(), lambda z: z + 0.0, lambda z: z.detach() + 1.0])
def test_other_values_get_the_full_gradient(change: Any) -> None:
    guide = AutoFlowGuide(conjugate).setup()
    randomize_parameters(guide)
    posterior = guide.get_posterior()
    value = change(posterior.rsample())
    params = trained(guide)
    grads = [
        torch.autograd.grad(term.sum(), params, retain_graph=True, allow_unused=True)
        for term in (posterior.score_parts(value).entropy_term, posterior.log_prob(value))
    ]
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


def test_the_value_of_the_loss_is_not_touched() -> None:
    losses = []
    for path_gradient in (True, False):
        pyro.set_rng_seed(1)
        guide = AutoFlowGuide(conjugate, path_gradient=path_gradient).setup()
        randomize_parameters(guide)
        losses.append(Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=0).loss(conjugate, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_parameters_of_the_model_get_their_gradient() -> None:
    def model() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    guide = AutoFlowGuide(model).setup()
    pyro.set_rng_seed(1)
    Trace_ELBO().loss_and_grads(model, guide)
    pyro.set_rng_seed(1)
    z = guide()["z"]
    expected = pyro.param("loc") - z  # d/dloc of -log N(z | loc, 1).
    torch.testing.assert_close(pyro.param("loc").grad, expected, atol=1e-5, rtol=1e-5)


def test_graphs_die_with_their_loss() -> None:
    guide = AutoFlowGuide(conjugate).setup()
    trace = poutine.trace(guide).get_trace()
    loss = Trace_ELBO().differentiable_loss(conjugate, guide)
    watched = [weakref.ref(trace.nodes["z"]["value"]), weakref.ref(loss)]
    copy.deepcopy(guide)
    del trace, loss
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_draws_without_gradients() -> None:
    guide = AutoFlowGuide(conjugate).setup()
    with torch.no_grad():
        assert not guide()["z"].requires_grad
    assert guide()["z"].requires_grad
    assert not any(value.requires_grad for value in guide.sample_posterior(3).values())
