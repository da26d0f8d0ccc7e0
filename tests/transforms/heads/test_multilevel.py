# SPDX-License-Identifier: Apache-2.0
"""The head that pools a coordinate's site approximation with its prior given others."""

from __future__ import annotations

import pytest
import torch

from pyro_flows.transforms import MultilevelHead
from pyro_flows.transforms.networks import inverse_powerprop

# Coordinates (mu, log tau, theta_1, theta_2), with theta ~ N(mu, tau).
KNOWN = torch.tensor([False, False, True, True])


def slopes() -> torch.Tensor:
    slope = torch.zeros(2, 4, 4)
    slope[0, 2:, 0] = slope[1, 2:, 1] = 1.0
    return slope.flatten(0, 1)


def test_full_share_is_the_exact_conditional_of_a_gaussian_hierarchy() -> None:
    head = MultilevelHead(KNOWN, slopes(), torch.zeros(8))
    y_observed, sigma = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    head.initialize(torch.cat([torch.zeros(2), y_observed]), torch.cat([torch.ones(2), sigma]))
    with torch.no_grad():
        head.log_share.zero_()  # a factor of 1
        head.raw.value[0, 2:] = y_observed
        head.raw.value[1, 2:] = sigma.expm1().log()  # the inverse of softplus
    for mu, log_tau in [(0.0, 0.0), (2.0, -6.0), (-1.0, 4.0)]:
        noise = torch.randn(7, 4)
        noise[:, 0], noise[:, 1] = mu, log_tau
        y, _ = head.forward_and_ladj(noise)
        precision = torch.tensor(-2 * log_tau).exp() + sigma**-2
        mean = (torch.tensor(-2 * log_tau).exp() * mu + y_observed * sigma**-2) / precision
        torch.testing.assert_close(y[:, 2:], mean + precision.rsqrt() * noise[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_share", [1e-3, 0.9])
def test_starts_where_it_is_told_whatever_the_prior(max_share: float) -> None:
    """At the location, which the noise's mean goes to, the scale is exact; a wide start takes its share down."""
    for scale in (0.01, 1.0, 100.0):
        head = MultilevelHead(KNOWN, slopes(), torch.zeros(8)).double()
        loc = torch.tensor([0.5, -0.3, 2.0, -7.0], dtype=torch.float64)
        head.initialize(loc, torch.full((4,), scale, dtype=torch.float64), max_share)
        y, ladj = head.forward_and_ladj(torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(y, loc)
        torch.testing.assert_close(ladj.exp(), torch.tensor(scale, dtype=torch.float64) ** 4)


def test_the_default_start_is_gaussian_within_a_thousandth() -> None:
    head = MultilevelHead(KNOWN, slopes(), torch.zeros(8)).double()
    head.initialize(torch.zeros(4).double(), torch.full((4,), 3.0).double())
    noise = torch.randn(1000, 4).double().clamp(-2.0, 2.0) * torch.tensor([1.0, 0.1, 1.0, 1.0])
    y, _ = head.forward_and_ladj(noise)
    assert (y - 3.0 * noise).abs().max() < 0.02  # a prior's share of 1e-3, times e^(0.6 * 2), of values up to 6


def test_a_long_chain_is_solved_as_it_would_be_drawn_level_by_level() -> None:
    """A random walk of unknown drift and scale: coordinates (drift, log scale, level_1, ...), shuffled."""
    length = 7
    dim = length + 2
    slope = torch.zeros(2, dim, dim, dtype=torch.float64)
    for t in range(2, dim):
        slope[0, t, 0] = slope[1, t, 1] = 1.0
        if t > 2:
            slope[0, t, t - 1] = 0.9
    known = torch.arange(dim) > 1
    place = torch.randperm(dim, generator=torch.Generator().manual_seed(0))
    known, slope = known[place], slope[:, place][:, :, place]
    head = MultilevelHead(known, slope.flatten(0, 1), torch.randn(2 * dim, dtype=torch.float64)).double()
    assert head.is_solved
    with torch.no_grad():
        for parameter in (head.raw.value, head.log_share):
            parameter.normal_()
    x, score = torch.randn(2, 5, dim, dtype=torch.float64)
    found = (*head.forward_and_ladj(x), *head.forward_with_score(x, score))
    head.is_solved = False
    expected = (*head.forward_and_ladj(x), *head.forward_with_score(x, score))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_levels_and_cycles() -> None:
    slope = torch.zeros(2, 3, 3)
    slope[0, 0, 1] = slope[1, 1, 2] = 1.0
    head = MultilevelHead(torch.tensor([True, True, False]), slope.flatten(0, 1), torch.zeros(6))
    assert head.order.tolist() == [2, 1, 0]
    slope[0, 2, 0] = 1.0
    with pytest.raises(ValueError, match="cycle"):
        MultilevelHead(torch.tensor([True, True, True]), slope.flatten(0, 1), torch.zeros(6))


def test_raw_shares_rest_at_one() -> None:
    """A narrow start leaves the prior its full weight, so that nothing has to be learned for it."""
    head = MultilevelHead(KNOWN, slopes(), torch.zeros(8))
    head.initialize(torch.zeros(4), torch.full((4,), 0.01))
    assert (head.log_share == inverse_powerprop(torch.zeros(2))).all()


def test_an_origin_changes_units_and_nothing_else() -> None:
    head = MultilevelHead(KNOWN, slopes(), torch.zeros(8)).double()
    head.initialize(torch.tensor([0.5, -0.3, 2.0, -7.0]).double(), torch.tensor([1.0, 0.1, 1e-3, 30.0]).double(), 0.9)
    noise = torch.randn(100, 4).double()
    before = head.forward_and_ladj(noise)
    head.set_origin()
    assert (head.raw.value[0] == 0).all()
    torch.testing.assert_close(head.raw.value[1], torch.ones(4).double().expm1().log())
    for found, expected in zip(head.forward_and_ladj(noise), before, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head.inverse_and_ladj(before[0])[0], noise)
