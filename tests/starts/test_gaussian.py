# SPDX-License-Identifier: Apache-2.0
"""Warm starts: what they find, and that the guide then is what they found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_flows import AutoFlowGuide
from pyro_flows.diagnostics import log_weights
from pyro_flows.models.layout import Layout
from pyro_flows.models.log_joint import LogJoint, joined
from pyro_flows.models.sites import read_sites
from pyro_flows.starts import gaussian, lbfgs, mixture
from pyro_flows.starts.gaussian import Gaussian, refined
from pyro_flows.starts.lbfgs import gradient_and_hessian, lbfgs_paths

COVARIANCE = torch.tensor([[4.0, 1.9, 0.002], [1.9, 1.0, 0.0], [0.002, 0.0, 1e-4]])
MEAN = torch.tensor([10.0, -3.0, 0.5])


def correlated() -> None:
    """A Gaussian posterior with evidence 1, in two sites and far from its start."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    z = torch.cat([a.unsqueeze(-1).expand(*b.shape[:-1], 1), b], -1)
    pyro.factor("target", dist.MultivariateNormal(MEAN, COVARIANCE).log_prob(z))


def unvectorized(x: Tensor, y: Tensor) -> None:
    """``x @ slope`` does not bear outer plates."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 100.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


def branching() -> None:
    """Python control flow on a value: neither an outer plate nor vmap bears it."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    scale = 2.0 if a.item() > 0 else 1.0
    pyro.sample("y", dist.Normal(a, scale), obs=torch.tensor(0.3))


def elbo(guide: Any, *args: Any, count: int = 400) -> tuple[float, float]:
    losses = torch.tensor([Trace_ELBO().loss(guide.model, guide, *args) for _ in range(count)])
    return -losses.mean().item(), losses.std().item() / math.sqrt(count)


@pytest.mark.parametrize("flow", ["auto", "site_ordered", "full_rank_normal"])
def test_a_gaussian_posterior_is_found_exactly(flow: str) -> None:
    """With correlation 0.95 and scales from 0.01 to 2: the ELBO is the evidence, draw by draw."""
    guide = AutoFlowGuide(correlated, flow=flow).warm_start()
    mean, error = elbo(guide, count=50)
    assert mean == pytest.approx(0.0, abs=0.02)
    assert error < 0.01
    draws = guide.get_posterior().sample((20_000,))
    torch.testing.assert_close(draws.mean(0), MEAN, atol=4 * 2 / 20_000**0.5, rtol=0.0)
    assert (draws.std(0) / COVARIANCE.diagonal().sqrt()).log().abs().max() < 4 / (2 * 20_000) ** 0.5


def test_a_family_of_independent_coordinates_gets_the_conditional_scales() -> None:
    guide = AutoFlowGuide(correlated, flow="diagonal_normal").warm_start()
    scale = guide.get_posterior().sample((4000,)).std(0)
    torch.testing.assert_close(scale, COVARIANCE.inverse().diagonal().rsqrt(), rtol=0.1, atol=0.0)


@pytest.mark.slow
def test_of_a_funnel_an_early_iterate_or_a_mean_field_normal_is_taken() -> None:
    """The mode is at a scale of zero. AutoNormal reaches -2.2 or so below the evidence, 0."""

    def funnel() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("nine", 9):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    guide = AutoFlowGuide(funnel).warm_start()
    assert elbo(guide)[0] > -6.0


@pytest.mark.parametrize("case", ["correlated", "unvectorized", "branching"])
def test_log_joint_of_many_draws_is_that_of_each(case: str) -> None:
    args: tuple[Tensor, ...] = ()
    model: Any = {"correlated": correlated, "unvectorized": unvectorized, "branching": branching}[case]
    if case == "unvectorized":
        args = (torch.randn(7, 2), torch.randn(7))
    guide = AutoFlowGuide(model).setup(*args)
    table = Layout(read_sites(guide.prototype_trace))
    log_joint = LogJoint(guide.model, table, args, {})
    used = {"correlated": "_in_a_plate", "unvectorized": "_by_vmap", "branching": "_one_by_one"}[case]
    assert log_joint.batched._run.__name__ == used
    draws = torch.randn(5, table.latent_dim)
    for draw, found in zip(draws, log_joint(draws), strict=True):
        values, _ = table.unpack(draw)
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args)
        jacobian = values["noise"].log() if case == "unvectorized" else 0.0
        torch.testing.assert_close(found, trace.log_prob_sum() + jacobian)


def test_a_regression_that_is_not_vectorized_starts_well() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 2)
    y = 100.0 * x[:, 0] - 30.0 * x[:, 1] + 0.1 * torch.randn(60)
    guide = AutoFlowGuide(unvectorized).warm_start(x, y)
    median = guide.median()
    assert median["slope"][0].item() == pytest.approx(100.0, rel=0.02)
    assert median["noise"].item() < 3.0


def test_what_warm_start_cannot_do() -> None:
    def plated(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"'data'.* has one"):
        AutoFlowGuide(plated, amortize={"data": torch.nn.Linear(2, 3)}).warm_start(torch.zeros(10, 2))

    @config_enumerate(default="sequential")
    def mixture() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(loc + k, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(NotImplementedError, match="'k' is enumerated one value after"):
        AutoFlowGuide(mixture).warm_start()

    def nowhere() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", z * 0.0 - torch.inf)

    with pytest.raises(RuntimeError, match="init_loc_fn"):
        AutoFlowGuide(nowhere).warm_start()


@pytest.mark.slow
def test_a_draw_that_a_model_refuses_spoils_no_others() -> None:
    """A Cholesky factorization fails for the whole batch if one of its matrices is not positive definite."""

    def model() -> None:
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        one = torch.ones_like(c)
        covariance = torch.stack([torch.stack([one, c], -1), torch.stack([c, one], -1)], -2)
        factor = torch.linalg.cholesky(covariance)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=torch.tensor([0.3, 0.5]))

    guide = AutoFlowGuide(model).setup()
    log_joint = LogJoint(guide.model, guide.posterior.joint.layout, (), {})
    draws = torch.tensor([[0.2], [1.5], [-0.4]], requires_grad=True)
    found = log_joint(draws)
    assert found[1].isnan() and found[[0, 2]].isfinite().all()
    torch.testing.assert_close(found[[0, 2]], log_joint(draws[[0, 2]]))
    (gradient,) = torch.autograd.grad(found[[0, 2]].sum(), draws)
    assert gradient.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that are not finite
        guide.warm_start()
    assert abs(guide.median()["c"].item()) < 1.0


class Poisson:
    """Of a rate exp(z) with a flat prior; as much of a target as a refinement looks at."""

    sizes: Sequence[int] = (1, 2)
    chunk, is_vectorized = 1000, True

    def affordable(self, count: int, gradients: int) -> int:
        return count

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        draws = joined(draws)
        return (COUNTS * draws - draws.exp()).sum(-1)


COUNTS = torch.tensor([2.0, 5.0, 40.0], dtype=torch.float64)


def test_newton_steps_find_the_best_normal() -> None:
    """Its variance is 1 / count, and its mean log(count) less half of that: where both mean derivatives are right."""
    torch.manual_seed(0)
    begin = Gaussian(torch.zeros(3).double(), torch.ones(3).double())
    found = refined(Poisson(), begin)
    torch.testing.assert_close(found.factor @ found.factor.mT, COUNTS.reciprocal().diag(), rtol=0.2, atol=0.02)
    expected = COUNTS.log() - 0.5 / COUNTS
    assert ((found.loc - expected) * COUNTS.sqrt()).abs().max() < 0.1


@pytest.mark.parametrize("moving", [None, torch.tensor([0, 2])])
def test_newton_steps_by_a_few_draws_at_a_time_are_the_same(moving: Tensor | None) -> None:
    """Each draw goes with its mirror image, whose differences are in the other direction."""

    class Few(Poisson):
        chunk = 7

    found = []
    for target in (Poisson(), Few()):
        torch.manual_seed(0)
        begin = Gaussian(COUNTS.log(), torch.ones(3).double())
        found.append(refined(target, begin, moving))
    torch.testing.assert_close(found[0].loc, found[1].loc)
    torch.testing.assert_close(found[0].factor, found[1].factor)


def test_newton_steps_end_where_there_are_no_second_derivatives() -> None:
    begin = Gaussian(torch.zeros(2).double(), torch.ones(2).double())

    class Linear(Poisson):
        sizes = (2,)

        def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
            return -joined(draws).sum(-1)

    found = refined(Linear(), begin)
    assert torch.equal(found.loc, begin.loc) and torch.equal(found.factor, torch.eye(2).double())


def gaussian_process(count: int) -> tuple[LogJoint, Tensor]:
    """The log joint of a Gaussian process of unknown length scale, and points, ``(3, 1, count + 1)``."""

    def model(x: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(torch.zeros_like(x[0]), 0.5))
        covariance = (-(x.unsqueeze(-1) - x).square() / (2 * length**2)).exp() + 0.01 * torch.eye(len(x)).to(x)
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(x), covariance))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson(f.exp()), obs=torch.arange(len(x)).to(x))

    x = torch.linspace(-1.0, 1.0, count).double()
    sites = read_sites(AutoFlowGuide(model).setup(x).prototype_trace)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 1, count + 1, dtype=torch.double, generator=generator)
    return LogJoint(model, Layout(sites), (x,), {}), points


def test_hessians_by_parts_are_those_of_the_whole() -> None:
    target, points = gaussian_process(5)
    whole = gradient_and_hessian(lambda z: target(z.squeeze(1)).unsqueeze(1), points)
    parts = gradient_and_hessian(lambda z: target([p.squeeze(1) for p in z]).unsqueeze(1), points, target.sizes)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_hessians_of_parts_that_do_not_depend_on_each_other(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few passes, too: of independent sites, and of a site on which nothing depends."""
    passes = 0
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return grad(*args, **kwargs)

    def of_parts(z: Sequence[Tensor]) -> Tensor:
        return sum((k + 1.0) * (part.exp() + part.square()).sum(-1) for k, part in enumerate(z[:-1])) + z[-1].sum(-1)

    sizes = [count, 2, count, 0, 3]
    points = torch.randn(4, 1, sum(sizes), dtype=torch.double, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("torch.autograd.grad", counted)
    gradient, hessian = gradient_and_hessian(of_parts, points, sizes)
    assert passes <= 8
    expected = gradient_and_hessian(lambda z: of_parts(z.split(sizes, -1)), points)
    assert torch.allclose(gradient, expected[0]) and torch.allclose(hessian, expected[1])


def test_hessians_do_not_go_through_a_factorization_for_each_row() -> None:
    """With a hundred points a warm start took 150 seconds and more, most of them in derivatives of the covariance."""
    target, points = gaussian_process(40)
    numbers = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            numbers.append(sum(value.numel() for value in tree_leaves(found) if isinstance(value, Tensor)))
            return found

    with Counter():
        gradient_and_hessian(lambda z: target([p.squeeze(1) for p in z]).unsqueeze(1), points, target.sizes)
    matrices = sum(numbers) / (len(points) * 40 * 40)  # intermediate matrices of a draw
    assert matrices < 41 * 20


def test_climbs_far_below_one_that_has_arrived_are_given_up() -> None:
    """One that crawled through a plain, 100 nats below all others, cost most of a warm start."""

    def target(z: Tensor) -> Tensor:
        """A mode at 1, and a plain with a slope of a half."""
        return torch.where(z > 0, -((z - 1.0) ** 2), 0.5 * z - 1.0).squeeze(-1)

    start = torch.tensor([0.5, -1e4]).reshape(2, 1, 1)
    assert len(list(lbfgs_paths(target, start, 100, 1e-4))) == 100
    assert len(list(lbfgs_paths(target, start, 100, 1e-4, patience=1.5))) < 10
    assert len(list(lbfgs_paths(target, start[1:], 100, 1e-4, patience=1.5))) == 100


def test_many_observations_take_few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hessians at all points on the way up, and at a hundred draws a Newton step, took minutes for 30,000 counts."""
    points: list[int] = []

    def counted(target: Any, at: Tensor, *args: Any, **kwargs: Any) -> Any:
        points.append(at[..., 0].numel())
        return gradient_and_hessian(target, at, *args, **kwargs)

    for module in (gaussian, lbfgs):
        monkeypatch.setattr(module, "gradient_and_hessian", counted)

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(12), 1.0).to_event(1))
        size = pyro.sample("size", dist.Gamma(2.0, 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.GammaPoisson(size, size / (x @ slope).exp()), obs=y)

    def work(num_rows: int) -> int:
        points.clear()
        x = torch.randn(num_rows, 12)
        AutoFlowGuide(model).warm_start(x, torch.poisson((x @ torch.linspace(-0.3, 0.3, 12)).exp()))
        return sum(points)

    few, many = work(50), work(20_000)
    assert few > 200 and many < 70


def test_ends_of_climbs_on_a_ridge_are_no_modes() -> None:
    """Of 30,000 counts in float32, whose log density has rounding errors of some hundredths of a nat: climbs end on the
    way, further from each other than three standard deviations, and a mixture was fitted to them."""

    def target(z: Tensor) -> Tensor:
        ridge = (z[:, 1] - 0.5 * z[:, 0].square()) / 0.005
        return -3e5 - 0.5 * z[:, 0].square() - 0.5 * ridge.square()

    ends = torch.tensor([[-3.0, 4.5], [0.1, 0.005], [3.0, 4.5]])
    found = mixture.modes_above(Ridge(target), ends)
    assert len(found) == 1 and found[0].loc.abs().max() < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_modes_on_curved_ridges_are_not_lost_by_the_noise_of_their_elbos(seed: int) -> None:
    """Two factors of a product, both positive or both negative: ELBOs of Gaussians there are hundreds of nats too low,
    and apart, so that the lower one was none; the fit had one of the signs."""

    def target(z: Tensor) -> Tensor:
        return -0.5 * ((z.prod(-1) - 2.0) / 0.05).square() - 0.5 * (z / 3.0).square().sum(-1)

    torch.manual_seed(seed)
    found = mixture.modes_above(Ridge(target), torch.tensor([[2.5, 0.8], [-1.4, -1.4]]))
    assert sorted(gaussian.loc.sum().sign().item() for gaussian in found) == [-1.0, 1.0]


class Ridge(Poisson):
    """A function of two coordinates as a target."""

    sizes = (2,)

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        return self.function(joined(draws))


@config_enumerate
def two_groups(y: Tensor) -> None:
    """Each point comes from one of two groups."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-3.0, 3.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        group = pyro.sample("group", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(Vindex(locs)[..., group.long()], 0.5), obs=y)


def summed_by_hand(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(2.0, 2.0)).unsqueeze(-1)
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-3.0, 3.0]), 1.0).to_event(1))
    parts = dist.Normal(locs.unsqueeze(-2), 0.5).log_prob(y.unsqueeze(-1))
    weights = torch.stack([(1 - share).log(), share.log()], -1)
    pyro.factor("y", (weights + parts).logsumexp(-1).sum(-1))


def test_enumerated_sites_are_summed_out() -> None:
    """Models with mixtures started cold: 12 nats below what the best Gaussian has here."""
    torch.manual_seed(0)
    y = torch.cat([torch.randn(30) * 0.5 - 2.0, torch.randn(20) * 0.5 + 2.0])
    table = AutoFlowGuide(two_groups).setup(y).posterior.only_block.layout
    enumerated = LogJoint(two_groups, table, (y,), {})
    by_hand = LogJoint(summed_by_hand, table, (y,), {})
    draws = torch.randn(7, 3)
    assert enumerated.is_vectorized
    torch.testing.assert_close(enumerated(draws), by_hand(draws), rtol=1e-5, atol=1e-3)

    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(two_groups).warm_start(y)
    median = guide.median(y)
    assert (median["locs"] - torch.tensor([-2.0, 2.0])).abs().max() < 0.3
    weights, _ = log_weights(two_groups, guide, 2000, (y,))
    assert weights.var() / 2 < 0.02
