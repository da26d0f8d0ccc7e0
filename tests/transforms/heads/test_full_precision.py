# SPDX-License-Identifier: Apache-2.0
"""The head that pools a likelihood factor of several coordinates with correlated priors given others."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from pyro_flows.transforms import Correlated, DiagonalPrecisionHead, FullPrecisionHead, MultilevelHead
from pyro_flows.transforms.heads.conditional import Factor, conditional_draw
from tests.common import randomize_parameters

# Coordinates (mu, log tau, theta_1, theta_2, theta_3), with theta ~ N(mu, tau).
KNOWN = torch.tensor([False, False, True, True, True])


def slopes() -> torch.Tensor:
    slope = torch.zeros(2, 5, 5, dtype=torch.double)
    slope[0, 2:, 0] = slope[1, 2:, 1] = 1.0
    return slope.flatten(0, 1)


def head() -> FullPrecisionHead:
    return FullPrecisionHead(KNOWN, slopes(), torch.zeros(10, dtype=torch.double)).double()


def test_without_correlations_it_pools_each_coordinate_alone() -> None:
    matrix = head()
    alone = MultilevelHead(KNOWN, slopes(), torch.zeros(10, dtype=torch.double)).double()
    alone.initialize(torch.randn(5).double(), torch.rand(5).double() + 0.1, 0.5)
    matrix.load_state_dict(alone.state_dict(), strict=False)
    noise, score = torch.randn(2, 7, 5, dtype=torch.double)
    noise.requires_grad_()
    for one, other in zip(alone.forward_with_score(noise, score), matrix.forward_with_score(noise, score), strict=True):
        torch.testing.assert_close(one, other)


def test_without_correlations_it_is_the_diagonal_one() -> None:
    matrix = head()
    diagonal = DiagonalPrecisionHead(KNOWN, slopes(), torch.zeros(10, dtype=torch.double)).double()
    given = (torch.randn(2).double(), torch.rand(2).double() + 0.5), torch.randn(3).double()
    precision = (torch.rand(3).double() + 0.2).diag()
    for one in (matrix, diagonal):
        torch.manual_seed(0)
        one.set_likelihood(*given, precision, torch.randn(3, 2).double(), torch.randn(2).double())
    noise, score = torch.randn(2, 7, 5, dtype=torch.double)
    noise.requires_grad_()
    pairs = zip(diagonal.forward_with_score(noise, score), matrix.forward_with_score(noise, score), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(diagonal.log_prior(noise), matrix.log_prior(noise))


def test_the_exact_conditional_of_a_linear_mixed_model() -> None:
    """y = X theta + e, whose noise scale is e^log tau too: the precision of the data follows it."""
    x = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.4, 2.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.double)
    y = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.double)
    matrix = head()
    origin = torch.tensor([0.3, -0.2], dtype=torch.double)
    precision = x.mT @ x * (-2 * origin[1]).exp()
    tilt = torch.tensor([0.0, 1.0], dtype=torch.double)
    matrix.set_likelihood((origin, torch.ones_like(origin)), torch.linalg.lstsq(x, y).solution, precision,
                  torch.zeros(3, 2, dtype=torch.double), tilt)  # fmt: skip
    noise = torch.randn(5, 5, dtype=torch.double)
    drawn, _ = matrix.forward_and_ladj(noise)
    for (mu, log_tau, *theta), eps in zip(drawn, noise[:, 2:], strict=True):
        exact = (torch.eye(3, dtype=torch.double) + x.mT @ x) * (-2 * log_tau).exp()
        mean = torch.linalg.solve(exact, (mu + x.mT @ y) * (-2 * log_tau).exp())
        away = torch.stack(theta) - mean
        torch.testing.assert_close(away @ exact @ away, eps.square().sum())


def test_a_step_moves_draws_by_as_many_standard_deviations() -> None:
    """However differently precise the likelihood's directions are: a change of a coordinate's own scale would turn the
    precise one, a thousandth as wide as the others."""
    matrix = head()
    direction = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.double) / math.sqrt(14.0)
    precision = 1e6 * direction.mT @ direction + torch.eye(3, dtype=torch.double)
    zeros = torch.zeros(2, dtype=torch.double)
    matrix.set_likelihood((zeros, zeros + 1.0), torch.randn(3).double(), precision, torch.zeros(3, 2).double(), zeros)
    before = copy.deepcopy(matrix)
    noise = torch.randn(1000, 5, dtype=torch.double)
    for row in range(2):
        for column in range(2, 5):
            matrix.load_state_dict(before.state_dict())
            with torch.no_grad():
                matrix.raw.value[row, column] += 1e-3
            moved = before.inverse_and_ladj(matrix.forward_and_ladj(noise)[0])[0] - noise
            assert moved.square().mean(0).sum().sqrt() < 2e-3


def test_correlated_priors() -> None:
    """Without data the draw has the prior's covariance; the density says the same."""
    known = torch.tensor([False, False, True, True, True, True])
    slope = torch.zeros(12, 6, dtype=torch.double)
    slope[8:, 1] = 1.0
    matrix = FullPrecisionHead(known, slope, torch.zeros(12, dtype=torch.double), [Correlated(2, 2, 2, 0)]).double()
    tiny = 1e-8 * torch.eye(4, dtype=torch.double)
    zeros = torch.zeros(2, dtype=torch.double)
    matrix.set_likelihood((zeros, zeros + 1.0), torch.zeros(4).double(), tiny, torch.zeros(4, 2).double(), zeros)
    noise = torch.randn(9, 6, dtype=torch.double)
    drawn, ladj = matrix.forward_and_ladj(noise)
    for y, value in zip(drawn, matrix.log_prior(drawn), strict=True):
        correlation = torch.tanh(y[0])
        covariance = torch.stack([torch.ones(()).double(), correlation, correlation, torch.ones(()).double()])
        covariance = (2 * y[1]).exp() * covariance.reshape(2, 2)
        target = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
        constant = 4 * 0.5 * torch.log(torch.tensor(2 * torch.pi).double())
        torch.testing.assert_close(value, target.log_prob(y[2:].reshape(2, 2)).sum() + constant)
    expected = -0.5 * noise[:, 2:].square().sum(-1) - ladj
    torch.testing.assert_close(matrix.log_prior(drawn), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_skewed", [False, True])
def test_derivatives_of_a_draw_given_a_factor(is_skewed: bool) -> None:
    root, pull, skew, noise = (torch.randn(2, 3, size, dtype=torch.double, requires_grad=True) for size in (3, 1, 1, 1))

    def draw(root: Tensor, pull: Tensor, skew: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return conditional_draw(Factor(root, pull, skew if is_skewed else None), noise)[:2]

    assert torch.autograd.gradcheck(draw, (root, pull, skew, noise))
    assert torch.autograd.gradgradcheck(draw, (root, pull, skew, noise))


def log_rates() -> tuple[Tensor, Tensor]:
    """Means of the best normals for log rates with an N(0, 1) prior, and mean rates, for some numbers of counts."""
    mean, rate = torch.tensor([-0.5, 0.5, 1.5], dtype=torch.double), torch.ones(3, dtype=torch.double)
    for _ in range(50):
        rate = (mean + 0.5 / (1.0 + rate)).exp()
    return mean, rate


def poisson_head() -> FullPrecisionHead:
    """Of log rates with priors N(mu, 1), and the factor that is best at mu = 0."""
    matrix = head()
    zeros = torch.zeros(2, dtype=torch.double)
    mean, rate = log_rates()
    matrix.set_likelihood((zeros, zeros + 1.0), mean + mean / rate, rate.diag(), torch.zeros(3, 2).double(), zeros)
    return matrix


def gap_to_poisson(matrix: FullPrecisionHead, prior_loc: float) -> float:
    """KL divergence from the conditional at mu to the posterior there, by quadrature for each rate alone."""
    counts = sum(log_rates())
    grid = torch.linspace(-6.0, 6.0, 4001, dtype=torch.double)
    log_joint = counts * grid[:, None] - grid[:, None].exp() - 0.5 * (grid[:, None] - prior_loc) ** 2
    log_evidence = log_joint.logsumexp(0) + math.log(grid[1] - grid[0])
    noise = torch.zeros(len(grid), 5, dtype=torch.double)
    noise[:, 0] = prior_loc
    noise[:, 2:] = grid[:, None]
    with torch.no_grad():
        drawn, _ = matrix.forward_and_ladj(noise)
        steps = 1e-4
        moved, _ = matrix.forward_and_ladj(noise + steps * torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]).double())
    theta = drawn[:, 2:]
    log_q = -0.5 * grid[:, None] ** 2 - 0.5 * math.log(2 * math.pi) - ((moved[:, 2:] - theta) / steps).log()
    at = counts * theta - theta.exp() - 0.5 * (theta - prior_loc) ** 2 - log_evidence
    weight = (-0.5 * grid**2).exp()[:, None] / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    return float((weight * (log_q - at)).sum())


@pytest.mark.parametrize("prior_loc", [0.0, 1.0])
def test_a_skewed_factor_is_closer_to_the_posterior(prior_loc: float) -> None:
    """Also where the prior is elsewhere than where it was set, for which a Gaussian factor has the wrong precision."""
    matrix = poisson_head()
    gaussian = gap_to_poisson(matrix, prior_loc)
    # The log likelihood's third derivative is minus the rate, as is the second one.
    matrix.set_skew(torch.zeros(2).double(), -log_rates()[1].rsqrt() / 3.0)
    assert 0.0 <= gap_to_poisson(matrix, prior_loc) < 0.2 * gaussian


def test_a_skewed_factor_is_saved_and_unset() -> None:
    matrix = poisson_head()
    gaussian = matrix.forward_and_ladj(torch.ones(5).double())[0]
    matrix.set_skew(torch.zeros(2).double(), torch.ones(3).double())
    skewed = matrix.forward_and_ladj(torch.ones(5).double())[0]
    assert not torch.allclose(gaussian, skewed)
    other = head()
    other.load_state_dict(matrix.state_dict())
    torch.testing.assert_close(other.forward_and_ladj(torch.ones(5).double())[0], skewed)
    other.initialize(torch.zeros(5).double(), torch.ones(5).double())
    assert not other.is_skewed


def walk(scale_slope: float = 1.0) -> FullPrecisionHead:
    """Coordinates (log sigma, log tau, x_0, ..., x_3): x_0 ~ N(1, 1), x_t ~ N(0.9 x_(t-1) + 0.2, sigma)."""
    slope, bias = torch.zeros(2, 6, 6, dtype=torch.double), torch.zeros(2, 6, dtype=torch.double)
    slope[0, 3:, 2:5] = 0.9 * torch.eye(3, dtype=torch.double)
    slope[1, 3:, 0] = scale_slope
    bias[0] = torch.tensor([0.0, 0.0, 1.0, 0.2, 0.2, 0.2])
    known = torch.tensor([False, False, True, True, True, True])
    return FullPrecisionHead(known, slope.flatten(0, 1), bias.flatten()).double()


def test_the_exact_conditional_of_a_random_walk() -> None:
    """y_t = x_t + tau e_t, both scales latent: the draws' density is the conditional posterior's."""
    y = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.double)
    head, origin = walk(), torch.tensor([0.3, -0.2], dtype=torch.double)
    precision = torch.eye(4, dtype=torch.double) * (-2 * origin[1]).exp()
    tilt = torch.tensor([0.0, 1.0], dtype=torch.double)
    head.set_likelihood((origin, torch.ones_like(origin)), y, precision, torch.zeros(4, 2, dtype=torch.double), tilt)
    noise = torch.randn(5, 6, dtype=torch.double)
    for (log_sigma, log_tau, *x), eps in zip(head.forward_and_ladj(noise)[0], noise[:, 2:], strict=True):
        steps = torch.eye(4, dtype=torch.double) - 0.9 * torch.ones(3, dtype=torch.double).diag(-1)
        prior = torch.cat([torch.zeros(1, dtype=torch.double), (-2 * log_sigma).expand(3)]).exp()
        exact = steps.mT @ prior.diag() @ steps + torch.eye(4, dtype=torch.double) * (-2 * log_tau).exp()
        drift = torch.tensor([1.0, 0.2, 0.2, 0.2], dtype=torch.double)
        mean = torch.linalg.solve(exact, steps.mT @ (prior * drift) + y * (-2 * log_tau).exp())
        away = torch.stack(x) - mean
        torch.testing.assert_close(away @ exact @ away, eps.square().sum())


def test_maps_of_a_chain_agree() -> None:
    """Inverse, log-determinant and score against autograd, with all parameters random."""
    head = walk()
    randomize_parameters(head)
    noise = torch.randn(6, dtype=torch.double)
    drawn, ladj = head.forward_and_ladj(noise)
    back, inverse_ladj = head.inverse_and_ladj(drawn)
    torch.testing.assert_close(back, noise)
    torch.testing.assert_close(inverse_ladj, -ladj)
    jacobian = torch.autograd.functional.jacobian(lambda x: head.forward_and_ladj(x)[0], noise)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj)

    def log_density(value: torch.Tensor) -> torch.Tensor:
        x, ladj = head.inverse_and_ladj(value)
        return ladj - 0.5 * x.square().sum()

    leaf = drawn.detach().requires_grad_()
    (expected,) = torch.autograd.grad(log_density(leaf), leaf)
    *_, score = head.forward_with_score(noise.unsqueeze(0).requires_grad_(), -noise.unsqueeze(0))
    torch.testing.assert_close(score.squeeze(0), expected)


def test_log_prior_of_a_chain() -> None:
    head, value = walk(), torch.randn(6, dtype=torch.double)
    scale = torch.cat([torch.ones(1, dtype=torch.double), value[0].exp().expand(3)])
    loc = torch.cat([torch.ones(1, dtype=torch.double), 0.9 * value[2:5] + 0.2])
    expected = torch.distributions.Normal(loc, scale).log_prob(value[2:]).sum() + 2.0 * math.log(2 * math.pi)
    torch.testing.assert_close(head.log_prior(value), expected)


def test_a_chain_is_initialized_to_a_mean_field_normal() -> None:
    """Up to the prior's share of a thousandth, twice that for a link with a successor."""
    head, loc, scale = walk(0.0), torch.randn(6, dtype=torch.double), torch.rand(6, dtype=torch.double) + 0.5
    head.initialize(loc, scale)
    zeros = torch.zeros(6, dtype=torch.double)
    torch.testing.assert_close(head.forward_and_ladj(zeros)[0], loc)
    jacobian = torch.autograd.functional.jacobian(lambda x: head.forward_and_ladj(x)[0], zeros)
    torch.testing.assert_close(jacobian, scale.diag(), rtol=0.0, atol=4e-3)


def test_initialize_undoes_a_likelihood() -> None:
    matrix = head()
    randomize_parameters(matrix)
    matrix.initialize(torch.zeros(5).double(), torch.ones(5).double())
    noise = torch.randn(20, 5).double().clamp(-2.0, 2.0)
    torch.testing.assert_close(matrix.forward_and_ladj(noise)[0], noise, rtol=0.05, atol=0.05)
