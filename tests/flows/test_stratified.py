# SPDX-License-Identifier: Apache-2.0
"""Draws that are spread evenly over the particles: each by itself as before, their means better known."""

import math

import pytest
import torch

from pyro_flows import flows

COUNT, RUNS = 16, 2000


@pytest.fixture
def spread():
    torch.manual_seed(0)
    flow = flows.get("realnvp").build(3)
    distribution = flow().expand([COUNT])
    with torch.no_grad():
        draws = torch.stack([distribution.stratified().rsample() for _ in range(RUNS)])
    return flow, draws


@pytest.mark.slow
def test_each_n_th_of_the_line_has_one_draw(spread):
    flow, draws = spread
    with torch.no_grad():
        eps, _ = flow.transform.inverse_and_ladj(draws)
    bins = (torch.special.ndtr(eps) * COUNT).floor().clamp(0, COUNT - 1)
    expected = torch.arange(COUNT, dtype=bins.dtype).reshape(1, COUNT, 1).expand_as(bins)
    # Rounding moves a draw over the edge of its bin now and then.
    assert (bins.sort(1).values == expected).all(1).float().mean() > 0.99


@pytest.mark.slow
def test_each_draw_is_distributed_as_before(spread):
    _, draws = spread
    one = draws[:, 3].double()  # the same particle in all runs
    error = 1 / math.sqrt(RUNS)
    assert (one.mean(0).abs() < 4 * error).all()
    assert ((one.square().mean(0) - 1.0).abs() < 4 * math.sqrt(2) * error).all()
    assert ((one[:, 0] * one[:, 1]).mean().abs() < 4 * error).all()
    other = draws[:, 7].double()
    assert ((one * other).mean(0) < 0.0).all()  # where one draw is, another is not


@pytest.mark.slow
def test_means_are_known_better(spread):
    _, draws = spread
    draws = draws.double()
    assert (draws.mean(1).var(0) < 0.05 / COUNT).all()  # of independent draws: 1 / COUNT
    assert (draws.square().mean(1).var(0) < 0.3 * 2 / COUNT).all()


def test_another_base_stays_as_it_is():
    distribution = flows.RealNVP(base="student_t").build(3)().expand([COUNT])
    assert type(distribution.stratified().base_dist) is type(distribution.base_dist)
