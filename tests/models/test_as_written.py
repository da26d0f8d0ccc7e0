# SPDX-License-Identifier: Apache-2.0
"""Models as users write them, for one draw: many draws at once have the densities of one run each, and ``fit`` takes as
many as if the model were written to broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.models.scoring import ModelScorer
from pyro_flows.models.sites import read_sites
from pyro_flows.models.structure import read_structure
from tests.benchmarks.any_models import (
    TWINS,
    Twins,
    arms,
    gaussian_process,
    logistic_regression,
    mixture,
    network,
    random_slopes,
    random_walk,
    spike_and_slab,
)

# What is large, or a loop, small: a test is to take a second or two.
SMALL: dict[str, Callable[[], Twins]] = {
    "logistic regression, 25-D": partial(logistic_regression, 6, 40),
    "logistic regression, 35-D, prior sd 10": partial(logistic_regression, 5, 60, 10.0),
    "logistic regression, 61-D": partial(logistic_regression, 9, 30),
    "random slopes, 11 firms": partial(random_slopes, 4, 6),
    "twelve arms": partial(arms, 12, 36),
    "random walk by a loop": partial(random_walk, 4),
    "neural network": partial(network, 2, 12),
    "Gaussian process": partial(gaussian_process, 8),
    "mixture, enumerated": partial(mixture, 20),
    "spike and slab, enumerated": partial(spike_and_slab, 3, 30),
}
CASES = [pytest.param({**TWINS, **SMALL}[name], id=name) for name in TWINS]
every_model = pytest.mark.parametrize("build", CASES)

NUM_DRAWS = 5


def table_of(twins: Twins) -> Layout:
    return Layout(read_sites(trace_latents(twins.broadcasting, twins.args, {})))


def some_draws(table: Layout) -> Tensor:
    """Packed, around the start."""
    return table.init_loc + 0.5 * torch.randn(NUM_DRAWS, table.latent_dim)


def log_density(twins: Twins, model: Callable[..., Any], values: Mapping[str, Tensor]) -> Tensor:
    """Of one draw, by a plain trace; by two where a site of values 0 and 1 is summed out, by hand."""
    if not twins.enumerated:
        return poutine.trace(poutine.condition(model, data=dict(values))).get_trace(*twins.args).log_prob_sum()
    total, states = torch.zeros(()), []
    for state in (0, 1):
        given = {**values, twins.enumerated: state_of(twins, model, state)}
        trace = poutine.trace(poutine.condition(model, data=given)).get_trace(*twins.args)
        trace.compute_log_prob()
        plate = trace.nodes[twins.enumerated]["cond_indep_stack"]
        nodes = [node for node in trace.nodes.values() if "log_prob" in node]
        # By item of the plate; the rest does not depend on the state.
        states.append(sum(node["log_prob"] for node in nodes if node["cond_indep_stack"] == plate))
        total = sum((node["log_prob"].sum() for node in nodes if node["cond_indep_stack"] != plate), torch.zeros(()))
    return total + torch.stack(states).logsumexp(0).sum()


def state_of(twins: Twins, model: Callable[..., Any], state: int) -> Tensor:
    """The enumerated site with one value everywhere."""
    site = poutine.trace(model).get_trace(*twins.args).nodes[twins.enumerated]
    return torch.full_like(site["value"], state)


def log_jacobian(twins: Twins, values: Mapping[str, Tensor]) -> Tensor:
    """Of the maps from unconstrained space."""
    trace = poutine.trace(poutine.condition(twins.as_written, data=dict(values))).get_trace(*twins.args)
    total = torch.zeros(())
    for name, value in values.items():
        to_support = biject_to(trace.nodes[name]["fn"].support)
        total = total + to_support.log_abs_det_jacobian(to_support.inv(value), value).sum()
    return total


@every_model
def test_the_forms_are_one_model(build: Callable[[], Twins]) -> None:
    twins = build()
    table = table_of(twins)
    for draw in some_draws(table):
        values = table.unpack(draw)[0]
        found, expected = (log_density(twins, model, values) for model in (twins.as_written, twins.broadcasting))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def loss_of_copies(twins: Twins, model: Callable[..., Any], num_particles: int) -> float:
    """Of a guide at a point, whose particles are all the same."""
    kind = TraceEnum_ELBO if twins.enumerated else Trace_ELBO
    elbo = kind(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    pyro.set_rng_seed(0)
    guide = AutoDelta(poutine.block(model, hide=[twins.enumerated]), init_loc_fn=init_to_median)
    with torch.no_grad():
        return float(elbo.loss(model, guide, *twins.args))


@every_model
def test_particles_break_one_form_and_not_the_other(build: Callable[[], Twins]) -> None:
    twins = build()
    expected = loss_of_copies(twins, twins.as_written, 1)
    assert math.isclose(loss_of_copies(twins, twins.broadcasting, 3), expected, rel_tol=1e-4)
    try:
        found = loss_of_copies(twins, twins.as_written, 3)
    except (ValueError, RuntimeError, IndexError, AssertionError):
        return
    assert not math.isclose(found, expected, rel_tol=1e-2)


def test_draws_of_models_with_many_observations_are_evaluated_in_small_chunks() -> None:
    """All at once they took four times as long, and the memory of all observations of all draws."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    few, many = (
        LogJoint(model, Layout(read_sites(trace_latents(model, (y,), {}))), (y,), {})
        for y in (torch.zeros(10), torch.zeros(100_000))
    )
    assert many.chunk < 10 < 1000 < few.chunk
    assert many.affordable(100, 200) == 16 and few.affordable(100, 200) == 100


@every_model
def test_log_joint_of_many_draws(build: Callable[[], Twins]) -> None:
    twins = build()
    table = table_of(twins)
    draws = some_draws(table)
    log_joint = LogJoint(twins.as_written, table, twins.args, {})
    found = log_joint(draws)
    for value, draw in zip(found, draws, strict=True):
        values = table.unpack(draw)[0]
        expected = log_density(twins, twins.as_written, values) + log_jacobian(twins, values)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)


@every_model
def test_scores_of_many_draws(build: Callable[[], Twins]) -> None:
    twins = build()
    table = table_of(twins)
    singles = [table.unpack(draw)[0] for draw in some_draws(table)]
    values = {name: torch.stack([single[name] for single in singles]) for name in table.names}
    guide = AutoFlowGuide(twins.as_written).setup(*twins.args)
    structure = read_structure("test", twins.as_written, guide, twins.args, {})
    found = ModelScorer("test", twins.as_written, twins.args, {}, structure, values)(values).log_joint.sum(-1)
    for value, single in zip(found, singles, strict=True):
        expected = log_density(twins, twins.as_written, single).double()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
@every_model
def test_fit_takes_as_many_draws_as_of_its_twin(build: Callable[[], Twins]) -> None:
    twins = build()
    results = []
    for model in (twins.broadcasting, twins.as_written):
        pyro.clear_param_store()
        guide = AutoFlowGuide(model)
        results.append(fit(model, guide, twins.args, num_steps=30, seed=0, progress=False))
        assert math.isfinite(results[-1].elbo)
    assert results[1].num_particles == results[0].num_particles
