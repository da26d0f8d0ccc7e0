# SPDX-License-Identifier: Apache-2.0
"""Pareto smoothing: known tails, ArviZ's numbers, and weights that have no tail."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from pyro_flows.diagnostics import khat_threshold, pareto_smooth


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_weights_have_their_own_shape(shape: float) -> None:
    count = 40_000
    uniform = torch.rand(20, count, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    khats = torch.tensor([pareto_smooth(row).khat for row in -shape * uniform.log()])
    # The tail has 600 weights; the error of the maximum-likelihood shape is (1 + k) / sqrt(600), and the prior of ten
    # observations at 1/2 pulls by (1/2 - k) / 61.
    error = (1 + shape) / math.sqrt(600 * 20)
    assert abs(khats.mean().item() - shape) < 4 * error + abs(0.5 - shape) / 61


@pytest.mark.parametrize("scale", [0.01, 0.5, 1.5, 5.0, 400.0])
@pytest.mark.parametrize("count", [100, 4000])
def test_k_hat_and_weights_are_those_of_arviz(scale: float, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    weights = scale * torch.randn(count, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(arviz, "psislw"):
            expected, khat = arviz.psislw(weights.numpy())
        else:
            from arviz_stats.base import array_stats

            expected, khat = array_stats.psislw(weights.numpy())
    found = pareto_smooth(weights)
    assert found.khat == pytest.approx(float(khat), abs=1e-6)
    torch.testing.assert_close(found.log_weights, torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def test_smoothed_weights_are_normalized_and_keep_their_order() -> None:
    weights = 2.0 * torch.randn(4000, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    smooth = pareto_smooth(weights).log_weights
    assert smooth.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(smooth.argsort(), weights.argsort())


def test_constant_weights_have_no_tail() -> None:
    found = pareto_smooth(torch.full((1000,), -3.0))
    assert found.khat == 0.0
    torch.testing.assert_close(found.log_weights.exp(), torch.full((1000,), 1e-3, dtype=torch.double))


def test_the_limit_depends_on_the_number_of_draws() -> None:
    # Vehtari and others (2024), table of S against 1 - 1 / log10 S.
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(100_000) == 0.7
