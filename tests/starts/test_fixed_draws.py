# SPDX-License-Identifier: Apache-2.0
"""Transport maps that are fitted on fixed draws."""

from __future__ import annotations

import math

import torch

from pyro_flows.starts.fixed_draws import minimize


def test_a_factor_by_columns_may_begin_without_a_density() -> None:
    """torch's L-BFGS wants gradients that are contiguous, and those without a density were laid out as the factor."""
    factor = torch.ones(2, 3).mT.clone().requires_grad_()
    assert not factor.is_contiguous()
    minimize(lambda: [torch.tensor(math.nan), torch.ones(3, 2)], [factor], 5)
    assert torch.equal(factor, torch.ones(3, 2))
