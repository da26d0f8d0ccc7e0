# SPDX-License-Identifier: Apache-2.0
"""What is read off a model about its priors, and what the joint flow makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_median
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.diagnostics import log_weights
from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout
from pyro_flows.models.priors import LinearPrior, read_joint_prior
from pyro_flows.models.sites import read_sites
from pyro_flows.transforms import (
    Correlated,
    DiagonalAffine,
    DiagonalPrecisionHead,
    FullPrecisionHead,
    MultilevelHead,
    SiteOrderedAffine,
)

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# Exact by quadrature over mu and tau; see pyro_flows.__main__.
LOG_EVIDENCE = -31.3113473523


def many_priors() -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("rows", 3):
        pyro.sample("linear", dist.Normal(1.0 + X @ beta, 2.0 * tau))
        pyro.sample("log_normal", dist.LogNormal(beta[0], tau.sqrt()))
        pyro.sample("bent", dist.Normal(beta[0] ** 2, 1.0))
        pyro.sample("tailed", dist.StudentT(4.0, beta[0], tau))
        pyro.sample("constant", dist.Normal(3.0, 2.0))
    pyro.sample("deep", dist.Normal(beta[1], 1.0))


def read(model: object) -> tuple[Layout, LinearPrior | None]:
    layout = Layout(read_sites(trace_latents(model, (), {})))  # type: ignore[arg-type]
    return layout, read_joint_prior(model, (), {}, layout)  # type: ignore[arg-type]


def test_gaussian_priors_that_are_linear_are_found_and_no_others() -> None:
    layout, prior = read(many_priors)
    assert prior is not None
    known = {name: prior.known[where] for name, where in layout.slices.items()}
    assert {name for name, mask in known.items() if mask.all()} == {"linear", "log_normal", "deep"}
    assert not any(mask.any() for name, mask in known.items() if name not in {"linear", "log_normal", "deep"})
    packed = torch.randn(layout.latent_dim)
    values = {site.name: part for site, part in layout.split(packed)}
    loc, log_scale = prior(packed).chunk(2)
    at = layout.slices
    torch.testing.assert_close(loc[at["linear"]], 1.0 + X @ values["beta"], rtol=1e-4, atol=1e-4)
    expected = (torch.tensor(2.0).log() + values["tau"]).expand(3)
    torch.testing.assert_close(log_scale[at["linear"]], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loc[at["log_normal"]], values["beta"][0].expand(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_scale[at["log_normal"]], 0.5 * values["tau"].expand(3), rtol=1e-4, atol=1e-4)


def test_reading_leaves_no_trace() -> None:
    """Neither in the random state, nor in the parameter store, nor by asking for starts again."""
    layout, _ = read(many_priors)
    state = torch.random.get_rng_state()
    read_joint_prior(many_priors, (), {}, layout)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not list(pyro.get_param_store().keys())


def test_a_model_without_such_priors() -> None:
    def flat() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.StudentT(3.0, 0.0, scale))

    assert read(flat)[1] is None


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def gap(guide: AutoFlowGuide) -> Tensor:
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return LOG_EVIDENCE + elbo.loss(schools, guide)


@pytest.mark.parametrize(
    "flow, head", [("auto", DiagonalPrecisionHead), ("site_ordered", DiagonalPrecisionHead), ("iaf", DiagonalAffine)]
)
def test_families_that_follow_the_model_know_its_priors(flow: str, head: type) -> None:
    guide = AutoFlowGuide(schools, flow)
    guide()
    assert type(guide.posterior.joint.flow.head) is head


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_a_funnel_is_there_within_some_hundred_steps(seed: int) -> None:
    """The head moves as fast as AutoNormal's, which is at 2.2 then; without the prior it ends at 0.2 to 0.9."""
    pyro.set_rng_seed(seed)
    guide = AutoFlowGuide(schools)
    svi = SVI(schools, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(1500):
        svi.step()
    assert gap(guide) < 0.1


def test_warm_start_of_a_funnel() -> None:
    """Far better than any Gaussian (about 1.6): the fixed-draws fit lets the priors have their share."""
    pyro.set_rng_seed(1)
    assert gap(AutoFlowGuide(schools).warm_start()) < 0.6


def test_a_model_that_does_not_bear_other_values_goes_without() -> None:
    def careful() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        assert loc.abs().max() < 0.5, "the start is at 0"
        pyro.sample("x", dist.Normal(loc, 1.0))

    guide = AutoFlowGuide(careful).setup()
    assert type(guide.posterior.joint.flow.head) is DiagonalAffine


def test_a_family_that_has_no_use_for_priors_does_not_look_for_them() -> None:
    runs = []

    def counted() -> None:
        runs.append(1)
        schools()

    AutoFlowGuide(counted, "iaf", init_loc_fn=init_to_median).setup()
    assert len(runs) == 1  # the start


def correlated_slopes() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("groups", 4):
        pyro.sample("slopes", dist.MultivariateNormal(mu, scale_tril=tau.unsqueeze(-1) * factor))


def test_of_a_multivariate_normal_the_marginals_are_known() -> None:
    layout, prior = read(correlated_slopes)
    assert prior is not None
    sites = layout.slices
    assert prior.known[sites["slopes"]].all() and prior.known.sum() == 12
    packed = torch.randn(layout.latent_dim)
    values = {site.name: part for site, part in layout.split(packed)}
    loc, log_scale = prior(packed).chunk(2)
    torch.testing.assert_close(loc[sites["slopes"]], values["mu"].repeat(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_scale[sites["slopes"]], values["tau"].repeat(4), rtol=1e-4, atol=1e-4)
    expected = Correlated(sites["slopes"].start, num=4, size=3, factor_offset=sites["factor"].start)
    assert prior.correlated == (expected,)


ROWS, COLUMNS = torch.arange(6).repeat_interleave(5), torch.arange(5).repeat(6)
CROSSED = torch.randn(30, generator=torch.Generator().manual_seed(1)) + 2.0


def crossed() -> None:
    """The data tell the sum of three terms, of which two have unknown spreads."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sd_row, sd_column = (pyro.sample(f"sd_{name}", dist.HalfNormal(2.0)) for name in ("row", "column"))
    with pyro.plate("rows", 6):
        row = pyro.sample("row", dist.Normal(0.0, sd_row))
    with pyro.plate("columns", 5):
        column = pyro.sample("column", dist.Normal(0.0, sd_column))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal(mu + row[..., ROWS] + column[..., COLUMNS], 0.3), obs=CROSSED)


GROUPS = torch.arange(60) % 6
COVARIATES = torch.randn(60, 3, generator=torch.Generator().manual_seed(3)).cumsum(-1)


def varying_slopes() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", 6):
        slopes = pyro.sample("slopes", dist.MultivariateNormal(mu, scale_tril=tau.unsqueeze(-1) * factor))
    with pyro.plate("rows", 60):
        mean = (slopes[..., GROUPS, :] * COVARIATES).sum(-1)
        pyro.sample("y", dist.Normal(mean, noise), obs=COVARIATES[:, 0] + CROSSED.repeat(2))


def counted() -> None:
    """The data tell each effect by itself, and with a precision that depends on it."""
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("rows", 20):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        pyro.sample("y", dist.Poisson(effect.exp()), obs=torch.arange(20.0) % 5)


def chained() -> None:
    """The data tell sums of neighbors."""
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("rows", 20):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
    with pyro.plate("pairs", 19):
        pyro.sample("y", dist.Normal(effect[..., 1:] + effect[..., :-1], 1.0), obs=torch.arange(19.0) % 5)


@pytest.mark.parametrize("model, independent", [(schools, True), (counted, True), (crossed, False), (chained, False)])
def test_what_the_data_tell_apart_needs_no_matrices(model: Callable[[], None], independent: bool) -> None:
    prior = read(model)[1]
    assert prior is not None
    assert prior.conditionally_independent is independent
    head = AutoFlowGuide(model).setup().posterior.only_block.flow.head
    assert type(head) is (DiagonalPrecisionHead if independent else FullPrecisionHead)


def test_warm_start_correlates_what_priors_leave() -> None:
    """Half the variance of log weights is about the gap: 0.3 to 0.4, and 1.5 to 2.4 with each coordinate on its own."""
    guide = AutoFlowGuide(crossed).warm_start()
    assert log_weights(crossed, guide, 4000)[0].var() / 2 < 0.2


@pytest.mark.slow
def test_slopes_with_correlations_start_near_the_posterior() -> None:
    """Covariates that are correlated too; by marginals alone, the gap is several nats."""
    guide = AutoFlowGuide(varying_slopes).warm_start()
    assert isinstance(guide.posterior.only_block.flow.head, FullPrecisionHead)
    assert log_weights(varying_slopes, guide, 4000)[0].var() / 2 < 0.5


def walk() -> None:
    """A random walk by a loop, both scales unknown."""
    step, noise = (pyro.sample(name, dist.HalfNormal(1.0)) for name in ("step", "noise"))
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in range(6):
        x = x if t == 0 else pyro.sample(f"x_{t}", dist.Normal(x, step))
        pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=torch.tensor(0.3 * t))


def nested() -> None:
    """Classes in schools: locations follow each other, and each level has a scale."""
    scales = [pyro.sample(name, dist.HalfNormal(1.0)) for name in ("between", "within", "noise")]
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", 3):
        school = pyro.sample("school", dist.Normal(mean, scales[0]))
    of_class = torch.arange(6) // 2
    with pyro.plate("classes", 6):
        group = pyro.sample("group", dist.Normal(school[..., of_class], scales[1]))
    of_row = torch.arange(24) // 4
    with pyro.plate("rows", 24):
        pyro.sample("y", dist.Normal(group[..., of_row], scales[2]), obs=torch.sin(torch.arange(24.0)))


def known_scales() -> None:
    """All latents are links of the chain: no coordinate is free."""
    a = pyro.sample("a", dist.Normal(1.0, 2.0))
    b = pyro.sample("b", dist.Normal(a, 0.5))
    c = pyro.sample("c", dist.Normal(0.5 * b - 1.0, 1.0))
    pyro.sample("y", dist.Normal(c, 0.7), obs=torch.tensor(1.5))


def scales_that_follow() -> None:
    """Volatility: the scale of each step follows the one before, which no Gaussian head can pool at once."""
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in range(1, 4):
        x = pyro.sample(f"x_{t}", dist.Normal(x, (0.5 * x).exp()))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(("model", "pooled"), [(walk, 6), (nested, 10)])
def test_a_chain_of_priors_is_pooled_at_once(model: Callable[[], None], pooled: int) -> None:
    """The exact conditional of a linear model given its scales: what is left is two or three scales' own posterior."""
    guide = AutoFlowGuide(model).warm_start()
    head = guide.posterior.only_block.flow.head
    assert isinstance(head, FullPrecisionHead)
    assert head.is_chained
    assert head.sizes[1] == pooled
    # The data's location does not depend on their noise, their precision does; small precisions are floored.
    torch.testing.assert_close(head.own_slope.detach(), torch.zeros_like(head.own_slope), rtol=0.0, atol=0.03)
    assert sorted(head.own_tilt.tolist()) == pytest.approx([0.0] * (len(head.own_tilt) - 1) + [1.0], abs=1e-3)
    assert log_weights(model, guide, 4000)[0].var() / 2 < 0.35  # 0.8 and 0.4 with each link on its own


def test_a_chain_without_free_coordinates_is_exact() -> None:
    guide = AutoFlowGuide(known_scales).warm_start()
    assert guide.posterior.only_block.flow.head.sizes == [0, 3]
    assert log_weights(known_scales, guide, 1000)[0].std() < 1e-3
    # From the default start, in a loop of one's own, too.
    guide = AutoFlowGuide(known_scales)
    svi = SVI(known_scales, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(500)]
    exact = dist.Normal(-0.5, (1.0 + 0.25 * 4.25 + 0.49) ** 0.5).log_prob(torch.tensor(1.5))
    assert sum(losses[-50:]) / 50 < -exact + 0.3


def test_links_of_a_chain_are_one_block_of_the_flow() -> None:
    layers = AutoFlowGuide(walk).setup().posterior.only_block.flow.transform.parts
    assert [part.block_sizes for part in layers if isinstance(part, SiteOrderedAffine)] == [(1, 1, 6)]


def test_scales_that_follow_each_other_keep_an_elementwise_head() -> None:
    head = AutoFlowGuide(scales_that_follow).setup().posterior.only_block.flow.head
    assert type(head) is MultilevelHead
