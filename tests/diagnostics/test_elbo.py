# SPDX-License-Identifier: Apache-2.0
"""The ELBO and its terms from log densities of draws."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_flows.diagnostics.elbo import estimate_elbo

LIKELIHOOD = torch.tensor([1.0, 2.0, 4.0, 9.0] * 10, dtype=torch.double)
RATIO = torch.tensor([0.5, 0.5, 1.5, 1.5] * 10, dtype=torch.double)
WEIGHTS = (LIKELIHOOD - RATIO).unsqueeze(-1)


def test_independent_draws() -> None:
    found = estimate_elbo(LIKELIHOOD, RATIO, WEIGHTS)
    assert (found.expected_log_likelihood, found.kl_to_prior, found.mean) == (4.0, 1.0, 3.0)
    assert found.error == pytest.approx(WEIGHTS.std().item() / math.sqrt(40))
    assert found.by_item.tolist() == [3.0] and found.num_refused == 0


def test_draws_that_share_a_mini_batch() -> None:
    """Ten groups with one mean: no error. Without a draw the mean of its group is that of the others."""
    assert estimate_elbo(LIKELIHOOD, RATIO, WEIGHTS, [4] * 10).error == 0
    likelihood = LIKELIHOOD.clone()
    likelihood[0] = math.nan
    found = estimate_elbo(likelihood, RATIO, WEIGHTS, [4] * 10)
    groups = torch.tensor([(1.5 + 2.5 + 7.5) / 3] + [3.0] * 9)
    assert found.error == pytest.approx(groups.std().item() / math.sqrt(10), rel=1e-6)


def test_refused_draws() -> None:
    likelihood, ratio = LIKELIHOOD.clone(), RATIO.clone()
    likelihood[0], ratio[4] = math.nan, math.nan
    found = estimate_elbo(likelihood, ratio, WEIGHTS)
    assert found.num_refused == 2
    kept = (WEIGHTS.sum().item() - WEIGHTS[0].item() - WEIGHTS[4].item()) / 38
    assert found.mean == pytest.approx(kept + math.log(38 / 40))
    assert found.mean == pytest.approx(found.expected_log_likelihood - found.kl_to_prior)
    assert found.by_item.sum().item() == pytest.approx(found.mean)
    likelihood[:5] = math.nan  # more than a tenth
    found = estimate_elbo(likelihood, ratio, WEIGHTS)
    assert found.mean == -math.inf == found.expected_log_likelihood and math.isfinite(found.kl_to_prior)
    assert estimate_elbo(torch.full_like(likelihood, math.nan), ratio, WEIGHTS).mean == -math.inf


def test_a_density_of_zero() -> None:
    likelihood, ratio, weights = LIKELIHOOD.clone(), RATIO.clone(), WEIGHTS.clone()
    likelihood[0], ratio[1], weights[:2] = -math.inf, math.inf, -math.inf
    found = estimate_elbo(likelihood, ratio, weights)
    assert found.mean == -math.inf and found.num_refused == 0
