# SPDX-License-Identifier: Apache-2.0
"""Base distributions: densities, path derivatives, draws from a generator, and recipes as data."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import flows
from pyro_flows.flows.bases import Base, resolve_base, spread_components
from pyro_flows.flows.noise import DiagonalNormalMixture, base_score
from tests.common import randomize_parameters

names = pytest.mark.parametrize("name", ["normal", "student_t", "mixture"])


def _parameters(count: int, dim: int) -> list[Tensor]:
    locs = torch.randn(count, dim, dtype=torch.double)
    scales = 0.4 + torch.rand(count, dim, dtype=torch.double)
    logits = torch.randn(count, dtype=torch.double)
    return [p.requires_grad_() for p in (locs, scales, logits)]


def _base(name: str, dim: int) -> Base:
    base = resolve_base("test", name).build(dim).double()
    randomize_parameters(base)
    return base


@pytest.mark.parametrize("dim", [1, 3])
def test_density_of_a_mixture(dim: int) -> None:
    locs, scales, logits = (p.detach() for p in _parameters(3, dim))
    expected = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, scales).to_event(1))
    mixture = DiagonalNormalMixture(locs, scales, logits)
    z = 3.0 * torch.randn(5, 2, dim, dtype=torch.double)
    torch.testing.assert_close(mixture.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(mixture.mean, expected.mean)
    torch.testing.assert_close(mixture.variance, expected.variance)
    assert mixture.expand(torch.Size([4])).rsample((2,)).shape == (2, 4, dim)


@names
@pytest.mark.parametrize("dim", [1, 3])
def test_scores(name: str, dim: int) -> None:
    base_dist = _base(name, dim)(torch.zeros((), dtype=torch.double))
    for given in (base_dist, dist.Normal(torch.ones(dim, dtype=torch.double), 2.0).to_event(1)):
        leaf = base_dist.sample((6,)).requires_grad_()
        (expected,) = torch.autograd.grad(given.log_prob(leaf).sum(), leaf)
        found = base_score(given, leaf)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": lambda z: (z + 0.3).sin().sum(-1),
    "product": lambda z: (1.0 + z).prod(-1),
    "bump": lambda z: (-(z - 0.5).square().sum(-1)).exp(),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_path_derivatives_of_a_mixture_are_unbiased(dim: int, function: str) -> None:
    """Against component by component, where locations and scales reparameterize and weights are factors."""
    parameters = _parameters(3, dim)
    locs, scales, logits = parameters
    f = FUNCTIONS[function]
    found, expected = [], []
    for _ in range(200):
        draws = DiagonalNormalMixture(*parameters).rsample(torch.Size([500]))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(f(draws).mean(), parameters)]))
        each = locs.unsqueeze(1) + scales.unsqueeze(1) * torch.randn(3, 500, dim, dtype=torch.double)
        total = (logits.softmax(-1) * f(each).mean(-1)).sum()
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]))
    apart = torch.stack(found) - torch.stack(expected)
    standard_error = apart.std(0) / len(apart) ** 0.5
    assert (apart.mean(0).abs() < 4.0 * standard_error).all()
    # Errors are small beside what is estimated.
    assert standard_error.max() < 0.1 * torch.stack(expected).mean(0).abs().max()


@pytest.mark.parametrize("dim", [1, 200])
def test_mixtures_in_many_dimensions_and_with_equal_components(dim: int) -> None:
    """Where products of densities underflow, and there is no line from one center to the other."""
    locs = torch.zeros(3, dim, requires_grad=True)
    scales = torch.ones(3, dim, requires_grad=True)
    logits = torch.zeros(3, requires_grad=True)
    draws = DiagonalNormalMixture(locs, scales, logits).rsample(torch.Size([8]))
    gradients = torch.autograd.grad(draws.sin().sum(), (locs, scales, logits))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().min() > 0 and gradients[2].abs().max() < 1e-4  # equal components: weights do nothing


@pytest.mark.parametrize("dim", [1, 2, 50])
def test_components_start_as_about_one_standard_normal(dim: int) -> None:
    locs, scales = spread_components(4, torch.zeros(dim, dtype=torch.double))
    mixture = DiagonalNormalMixture(locs, scales, torch.zeros(4, dtype=torch.double))
    torch.testing.assert_close(mixture.mean, torch.zeros(dim, dtype=torch.double), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(mixture.variance, torch.ones(dim, dtype=torch.double))
    draws = mixture.sample((4000,))
    apart = mixture.log_prob(draws) - dist.Normal(torch.zeros(dim), 1.0).to_event(1).log_prob(draws)
    assert apart.mean() < 0.003 + 4 * apart.std() / 4000**0.5
    assert torch.pdist(locs).min() > 1e-3


@names
def test_draws_from_a_generator(name: str) -> None:
    """The same law as the distribution's, repeatable, in mirrored pairs, and no business of the global generator."""
    base = _base(name, 2)
    like = torch.zeros((), dtype=torch.double).expand(40_001, 2)
    state = torch.random.get_rng_state()
    draws = base.sample(like, torch.Generator().manual_seed(3))
    assert torch.equal(draws, base.sample(like, torch.Generator().manual_seed(3)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draws.shape == like.shape and draws.dtype == torch.double
    if name != "mixture":
        assert torch.equal(draws[:20_000], -draws[20_000:40_000])
    base_dist = base(like)
    for sample in (draws, base.sample(like)):
        assert not sample.requires_grad
        with torch.no_grad():
            expected = base_dist.log_prob(base_dist.sample((40_001,)))
            found = base_dist.log_prob(sample)
        # Pairs count once.
        error = ((expected.var() + 2.0 * found.var()) / 40_001).sqrt()
        assert (found.mean() - expected.mean()).abs() < 4.0 * error
        assert (found.var() / expected.var()).log().abs() < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flows.Auto(base="cauchy"), r"Auto: expected base to be one of 'normal', 'student_t', 'mixture', or"),
        (lambda: flows.Auto(base=dist.Normal(0.0, 1.0)), r"expected base to be one of .*but got Normal"),
        (lambda: flows.StudentT(df=1.0), r"StudentT: expected df to be a number > 1, but got 1.0"),
        (lambda: flows.StudentT(df="3"), r"StudentT: expected df to be a number > 1, but got '3'"),
        (lambda: flows.Mixture(num_components=1), r"Mixture: expected num_components to be an integer >= 2, but got 1"),
    ],
)
def test_messages(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_recipes_are_data() -> None:
    spec = flows.Auto(base=flows.Mixture(num_components=3))
    assert spec == pickle.loads(pickle.dumps(spec)) == flows.get("auto", base=flows.Mixture(num_components=3))
    assert spec != flows.Auto(base="mixture") and hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert eval(repr(spec), vars(flows)) == spec
    assert flows.Auto().base == "normal"
    assert not list(flows.Auto().build(3).base.parameters())
    assert flows.RealNVP(base=flows.StudentT(df=4.0)).build(3).base.df.tolist() == pytest.approx([4.0] * 3)
    assert spec.build(3).base.locs.shape == (3, 3)
