# SPDX-License-Identifier: Apache-2.0
"""The default start: the prior's exact median."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

from pyro_flows import AutoFlowGuide, init_to_prior_median

MEDIANS = {
    "normal": (dist.Normal(3.0, 2.0), 3.0),
    "half_cauchy": (dist.HalfCauchy(5.0), 5.0),
    "log_normal": (dist.LogNormal(1.0, 2.0), math.e),
    "exponential": (dist.Exponential(2.0), math.log(2.0) / 2.0),
    "uniform": (dist.Uniform(-1.0, 3.0), 1.0),
    "cauchy": (dist.Cauchy(-2.0, 1.0), -2.0),
}


@pytest.mark.parametrize("name", MEDIANS)
def test_median_is_exact_and_draws_nothing(name):
    fn, median = MEDIANS[name]
    state = torch.get_rng_state()
    value = init_to_prior_median({"name": "z", "fn": fn.expand([4]).to_event(1)})
    assert value.shape == (4,)
    torch.testing.assert_close(value, torch.full((4,), median))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("fn", [dist.Gamma(2.0, 1.0), dist.Beta(2.0, 5.0), dist.Dirichlet(torch.ones(3))], ids=str)
def test_others_fall_back_on_the_support(fn):
    value = init_to_prior_median({"name": "z", "fn": fn})
    assert fn.support.check(value).all()


IMPROPER = {"real": (), "positive": (), "simplex": (3,)}


@pytest.mark.parametrize(("name", "shape"), IMPROPER.items(), ids=IMPROPER)
def test_improper_priors_start_at_zero_in_unconstrained_space(name, shape):
    """They have no draws, and Pyro's error about that was told as one about their support."""
    support = getattr(constraints, name)

    def model():
        with pyro.plate("plate", 4):
            pyro.sample("z", dist.ImproperUniform(support, (), shape))

    median = AutoFlowGuide(model).median()["z"]
    assert median.shape == (4, *shape)
    torch.testing.assert_close(
        biject_to(support).inv(median), torch.zeros(biject_to(support).inverse_shape((4, *shape)))
    )


def test_members_start_at_their_parent():
    def model():
        mu = pyro.sample("mu", dist.Normal(7.0, 5.0))
        with pyro.plate("members", 6):
            pyro.sample("theta", dist.Normal(mu, 20.0))

    medians = AutoFlowGuide(model).median()
    torch.testing.assert_close(medians["theta"], torch.full((6,), 7.0), atol=1e-3, rtol=0.0)


def test_starts_are_compared_with_enumerated_sites_summed_out():
    """A value of such a site was drawn for each start, and decided."""

    def model():
        z = pyro.sample("z", dist.Normal(3.0, 1.0))  # 3, or 0 as AutoNormal
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z + 100.0 * k, 1.0), obs=torch.tensor(101.0))

    for seed in range(6):
        pyro.set_rng_seed(seed)
        torch.testing.assert_close(AutoFlowGuide(model).median()["z"], torch.tensor(3.0))


def test_starts_are_compared_on_the_same_items():
    """A plate drew its items anew for each start."""
    y = torch.tensor([0.0, 0.0, 0.0, 100.0])

    def model():
        pyro.sample("scale", dist.Gamma(2.0, 1.0))  # without a quantile function: the median is that of draws
        z = pyro.sample("z", dist.Normal(3.0, 1.0))
        with pyro.plate("items", 4, subsample_size=1) as index:
            pyro.sample("y", dist.Normal(z - 2.5, 1.0), obs=y[index])

    for seed in range(6):
        pyro.set_rng_seed(seed)
        torch.testing.assert_close(AutoFlowGuide(model).median()["z"], torch.tensor(3.0))
