# SPDX-License-Identifier: Apache-2.0
"""The head that pools a likelihood factor of several coordinates with correlated priors given others."""

from __future__ import annotations

import copy
import math

import torch

from pyro_flows.transforms import Correlated, DiagonalPrecisionHead, FullPrecisionHead, MultilevelHead
from pyro_flows.transforms.heads.full_precision import _Conditional
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


def test_derivatives_of_a_draw_given_a_factor() -> None:
    inputs = [torch.randn(2, 3, size, dtype=torch.double, requires_grad=True) for size in (3, 1, 1)]
    assert torch.autograd.gradcheck(_Conditional.apply, inputs)
    assert torch.autograd.gradgradcheck(_Conditional.apply, inputs)


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
