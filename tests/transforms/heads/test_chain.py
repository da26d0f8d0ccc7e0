# SPDX-License-Identifier: Apache-2.0
"""The head of a chain of states, or of its innovations, against dense algebra."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from torch import Tensor

from pyro_flows.transforms import ChainHead, LinearPredictor, LinearPredictorHead, StateChain
from tests.common import randomize_parameters

FREE = 2


class Autoregression:
    """``h_t = y_1 / 2 + t / 10 + tanh(y_0 + t / 5) h_(t-1) + exp(y_1) z_t``, every other scale negative."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time = torch.arange(self.num).to(y)
        sign = 1.0 - 2.0 * (time % 2)
        return 0.5 * y[..., 1:2] + 0.1 * time, torch.tanh(y[..., :1] + 0.2 * time), y[..., 1:2].exp() * sign

    def to_states(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets and slopes of the states in z, ``(..., n)`` and ``(..., n, n)``, by the recursion."""
        offset, lag, scale = self(y)
        state, slope = torch.zeros_like(offset[..., 0]), torch.zeros_like(offset)
        states, slopes = [], []
        for t in range(self.num):
            state = offset[..., t] + lag[..., t] * state
            own = torch.zeros(self.num).to(y)
            own[t] = 1.0
            slope = lag[..., t, None] * slope + scale[..., t, None] * own
            states.append(state)
            slopes.append(slope)
        return torch.stack(states, -1), torch.stack(slopes, -2)


def factors(num: int, seed: int = 1) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where factors are set, locations and log-scales there, and their slopes."""
    draw = torch.Generator().manual_seed(seed)
    where = torch.randn(FREE, generator=draw).double(), torch.rand(FREE, generator=draw).double() + 0.5
    return where, torch.randn(2, num, generator=draw).double(), 0.3 * torch.randn(2, num, FREE, generator=draw).double()


def make(num: int, *, is_skewed: bool = False, is_centered: bool = False) -> ChainHead:
    """With coordinates (y_0, y_1, z_1, ..., z_n), or states in place of z."""
    chain = StateChain(slice(FREE, FREE + num), Autoregression(num), is_centered)
    head = ChainHead(FREE + num, chain).double()
    where, *given = factors(num)
    head.set_factors(where, *given)
    if is_skewed:
        head.set_skew(where[0], torch.randn(num, generator=torch.Generator().manual_seed(2)).double())
    return head


def conditional(head: ChainHead, free: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the states of a head with Gaussian factors, by dense algebra."""
    num = head.sizes[1]
    where, origin, slope = factors(num)
    loc, log_scale = origin + slope @ (free - where[0])
    prior_loc, root = Autoregression(num).to_states(free)
    prior, likelihood = torch.linalg.inv(root @ root.mT), (-2.0 * log_scale).exp().diag()
    covariance = torch.linalg.inv(prior + likelihood)
    return covariance @ (prior @ prior_loc + likelihood @ loc), covariance


@pytest.mark.parametrize("num", [1, 5, 6])
def test_the_exact_conditional_of_gaussian_factors(num: int) -> None:
    head = make(num)
    for seed in range(3):
        noise = torch.randn(num + 1, FREE + num, generator=torch.Generator().manual_seed(seed)).double()
        noise[:, :FREE] = noise[0, :FREE]
        noise[0, FREE:] = 0.0
        noise[1:, FREE:] = torch.eye(num)
        drawn, ladj = head.forward_and_ladj(noise)
        offset, slope = Autoregression(num).to_states(drawn)
        states = offset + (slope @ drawn[:, FREE:, None]).squeeze(-1)
        mean, covariance = conditional(head, drawn[0, :FREE])
        torch.testing.assert_close(states[0], mean)
        away = (states[1:] - mean).mT
        torch.testing.assert_close(away @ away.mT, covariance)
        scale = factors(num)[0][1]
        expected = scale.log().sum() + 0.5 * torch.logdet(covariance) - torch.linalg.slogdet(slope).logabsdet
        torch.testing.assert_close(ladj, expected)


@pytest.mark.parametrize("is_skewed", [False, True])
def test_states_are_those_that_innovations_drive(is_skewed: bool) -> None:
    num, noise = 5, torch.randn(3, FREE + 5, generator=torch.Generator().manual_seed(0)).double()
    drawn, ladj = make(num, is_skewed=is_skewed).forward_and_ladj(noise)
    centered, centered_ladj = make(num, is_skewed=is_skewed, is_centered=True).forward_and_ladj(noise)
    offset, slope = Autoregression(num).to_states(drawn)
    torch.testing.assert_close(centered[:, FREE:], offset + (slope @ drawn[:, FREE:, None]).squeeze(-1))
    torch.testing.assert_close(centered_ladj, ladj + torch.linalg.slogdet(slope).logabsdet)


def test_the_first_coefficient_is_ignored() -> None:
    head, noise = make(5), torch.randn(4, 7).double()
    expected = head.forward_and_ladj(noise)

    def read(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        offset, lag, scale = Autoregression(5)(y)
        return offset, torch.cat([torch.full_like(lag[..., :1], 7.0), lag[..., 1:]], -1), scale

    head.chain = head.chain._replace(read=read)
    torch.testing.assert_close(head.forward_and_ladj(noise), expected)


@pytest.mark.parametrize("is_centered", [False, True])
@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize("num", [5, 6])
def test_maps_agree(num: int, is_skewed: bool, is_centered: bool) -> None:
    """Inverse, log-determinant and score against autograd, with all parameters random."""
    head = make(num, is_skewed=is_skewed, is_centered=is_centered)
    randomize_parameters(head)
    if not is_skewed:
        head.skew.data.zero_()
        head.look()
    noise = torch.randn(FREE + num).double()
    drawn, ladj = head.forward_and_ladj(noise)
    back, inverse_ladj = head.inverse_and_ladj(drawn)
    torch.testing.assert_close(back, noise)
    torch.testing.assert_close(inverse_ladj, -ladj)
    jacobian = torch.autograd.functional.jacobian(lambda x: head.forward_and_ladj(x)[0], noise)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj)

    def log_density(value: Tensor) -> Tensor:
        x, ladj = head.inverse_and_ladj(value)
        return ladj - 0.5 * x.square().sum()

    leaf = drawn.detach().requires_grad_()
    (expected,) = torch.autograd.grad(log_density(leaf), leaf)
    *same, score = head.forward_with_score(noise.unsqueeze(0).requires_grad_(), -noise.unsqueeze(0))
    torch.testing.assert_close(score.squeeze(0), expected)
    torch.testing.assert_close([part.squeeze(0) for part in same], [drawn, ladj])


@pytest.mark.parametrize("is_skewed", [False, True])
def test_it_is_a_head_of_linear_predictors(is_skewed: bool) -> None:
    """Which has other noise, but the same density; so the skewness follows the posterior's mean in the same way."""
    num = 6
    head = make(num, is_skewed=is_skewed)
    predictor = LinearPredictor(slice(FREE, FREE + num), num, Autoregression(num).to_states)
    dense = LinearPredictorHead(FREE + num, predictor).double()
    where, *given = factors(num)
    dense.set_factors(where, *given)
    if is_skewed:
        dense.set_skew(where[0], head.skew.detach())
        torch.testing.assert_close(head.factor_origin.detach(), dense.factor_origin.detach())
        torch.testing.assert_close(head.rest.detach(), dense.rest.detach())
    points = head.forward_and_ladj(1.5 * torch.randn(20, FREE + num).double())[0]
    found, expected = (
        ladj - 0.5 * x.square().sum(-1) for x, ladj in (one.inverse_and_ladj(points) for one in (head, dense))
    )
    torch.testing.assert_close(found, expected)
    plain = make(num).inverse_and_ladj(points)
    assert torch.allclose(found, plain[1] - 0.5 * plain[0].square().sum(-1)) is not is_skewed


def test_skewness_leaves_the_mean() -> None:
    """To first order: with a small one, by the mean over antithetic noise."""
    num = 6
    head = make(num)
    where = factors(num)[0][0]
    noise = torch.randn(20000, FREE + num).double()
    noise[:, :FREE] = 0.0
    noise = torch.cat([noise, noise * torch.tensor([1.0] * FREE + [-1.0] * num).double()])
    gaussian = head.forward_and_ladj(noise)[0].mean(0)
    head.set_skew(where, 0.1 * torch.ones(num).double())
    skewed = head.forward_and_ladj(noise)[0]
    moved = (skewed.mean(0) - gaussian)[FREE:].abs().max()
    head.factor_origin.data.copy_(factors(num)[1])
    without_shift = (head.forward_and_ladj(noise)[0].mean(0) - gaussian)[FREE:].abs().max()
    assert moved < 0.1 * without_shift
    assert ((skewed - skewed.mean(0))[:, FREE:].pow(3).mean(0) / skewed[:, FREE:].std(0) ** 3).abs().max() > 0.02


def test_it_starts_as_a_mean_field_normal() -> None:
    """Also after factors were set, and relative to itself as origin."""
    head, loc, scale = make(5, is_skewed=True), torch.randn(7).double(), torch.rand(7).double() + 0.1
    head.initialize(loc, scale, max_share=0.3)
    assert not head.is_full and not head.is_skewed
    noise = torch.randn(4, 7).double().requires_grad_()
    for _ in range(2):
        torch.testing.assert_close(head.gaussian(), (loc, scale))
        drawn, ladj, score = head.forward_with_score(noise, -noise.detach())
        torch.testing.assert_close(drawn, loc + scale * noise)
        torch.testing.assert_close(ladj, scale.log().sum().expand(4))
        torch.testing.assert_close(score, -noise.detach() / scale)
        torch.testing.assert_close(head.inverse_and_ladj(drawn), (noise, -ladj))
        head.set_origin()
        torch.testing.assert_close(head.raw.value[0].detach(), torch.zeros(7).double())


def test_factors_stay_where_they_are_when_the_origin_moves() -> None:
    head = make(5, is_skewed=True)
    with torch.no_grad():
        head.raw.value[:, :FREE] += torch.tensor([[0.3, -0.5], [0.2, 0.1]])
    noise = torch.randn(4, 7).double()
    expected = head.forward_and_ladj(noise)
    head.set_origin()
    torch.testing.assert_close(head.forward_and_ladj(noise), expected)


def test_a_step_is_in_units_of_scales() -> None:
    head = make(5)
    where, *given = factors(5)
    head.set_factors((where[0], torch.tensor([1e-3, 1.0]).double()), *given)
    noise = torch.zeros(7).double()
    before = head.forward_and_ladj(noise)[0]
    with torch.no_grad():
        head.raw.value[0, :FREE] += 0.1
    moved = (head.forward_and_ladj(noise)[0] - before)[:FREE]
    torch.testing.assert_close(moved, torch.tensor([1e-4, 0.1]).double())


def test_coordinates_anywhere() -> None:
    """With a free coordinate behind the innovations."""
    num, rows = 5, slice(1, 6)
    head = ChainHead(FREE + num, StateChain(rows, lambda y: Autoregression(num)(y[..., [0, -1]]))).double()
    where, *given = factors(num)
    head.set_factors(where, *given)
    noise = torch.randn(3, FREE + num).double()
    order = [0, 6, 1, 2, 3, 4, 5]
    drawn, ladj = head.forward_and_ladj(noise)
    expected, expected_ladj = make(num).forward_and_ladj(noise[:, order])
    torch.testing.assert_close(drawn[:, order], expected)
    torch.testing.assert_close(ladj, expected_ladj)


def test_it_is_saved_and_loaded() -> None:
    head, noise = make(5, is_skewed=True), torch.randn(3, 7).double()
    expected = head.forward_and_ladj(noise)
    other = ChainHead(7, StateChain(slice(FREE, 7), Autoregression(5))).double()
    assert not other.is_full
    other.load_state_dict(head.state_dict())
    assert other.is_full and other.is_skewed
    torch.testing.assert_close(other.forward_and_ladj(noise), expected)
    torch.testing.assert_close(copy.deepcopy(head).forward_and_ladj(noise), expected)
    head.set_factors(*factors(5))
    assert head.is_full and not head.is_skewed


@pytest.mark.parametrize("is_skewed", [False, True])
def test_under_vmap(is_skewed: bool) -> None:
    head, noise = make(5, is_skewed=is_skewed), torch.randn(4, 7).double()
    drawn = head.forward_and_ladj(noise)
    torch.testing.assert_close(torch.vmap(head.forward_and_ladj)(noise), drawn)
    torch.testing.assert_close(torch.vmap(head.inverse_and_ladj)(drawn[0]), (noise, -drawn[1]))


def walk(num: int, scale: float) -> ChainHead:
    """A random walk with steps of a narrow prior, in single precision."""
    one = torch.ones(num)

    def read(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 0.0 * one, one, scale * y[..., 1:2].exp() * one

    head = ChainHead(FREE + num, StateChain(slice(FREE, FREE + num), read))
    head.set_factors((torch.zeros(2), 0.3 * torch.ones(2)), 0.3 * torch.randn(2, num), 0.1 * torch.randn(2, num, FREE))
    head.set_skew(torch.zeros(2), 0.3 * torch.randn(num))
    return head


def test_a_long_random_walk() -> None:
    """Its draws are as precise as single precision allows, and take no time."""
    num = 3000
    head, noise = walk(num, 1e-3), torch.randn(16, FREE + num)
    expected, expected_ladj = copy.deepcopy(head).double().forward_and_ladj(noise.double())
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        drawn, ladj = head.forward_and_ladj(noise)
        (drawn.square().sum() - ladj.sum()).backward()
        best = min(best, time.perf_counter() - start)
    assert best < 0.5
    assert drawn.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ladj.double(), expected_ladj, rtol=1e-5, atol=0.0)
    back = head.double().inverse_and_ladj(expected)[0]
    torch.testing.assert_close(back, noise.double(), rtol=0.0, atol=1e-8)
