# SPDX-License-Identifier: Apache-2.0
"""Transport maps that are fitted on fixed draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.starts.fixed_draws import _minimize


def test_a_factor_by_columns_may_leave_the_support() -> None:
    """torch's L-BFGS reads gradients as they lie in memory, and those of its line search's failures were by columns."""
    factor = torch.ones(2, 3).mT.clone().requires_grad_()
    assert not factor.is_contiguous()

    def loss_and_gradients() -> list[Tensor]:
        distance = factor.detach() - 0.6
        loss = torch.where(factor.detach().min() > 0.5, distance.square().sum(), math.nan)
        return [loss, 2e3 * distance]  # long steps, beyond the edge

    _minimize(loss_and_gradients, [factor], 5)
    assert factor.isfinite().all()
