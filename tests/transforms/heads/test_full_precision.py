# SPDX-License-Identifier: Apache-2.0
"""The head that pools a likelihood factor of several coordinates with correlated priors given others."""

from __future__ import annotations

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


def test_initialize_undoes_a_likelihood() -> None:
    matrix = head()
    randomize_parameters(matrix)
    matrix.initialize(torch.zeros(5).double(), torch.ones(5).double())
    noise = torch.randn(20, 5).double().clamp(-2.0, 2.0)
    torch.testing.assert_close(matrix.forward_and_ladj(noise)[0], noise, rtol=0.05, atol=0.05)
