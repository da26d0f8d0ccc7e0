# SPDX-License-Identifier: Apache-2.0
"""Path gradients where ``torch.jit.trace`` cannot record a score."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO

from pyro_flows import AutoFlowGuide
from tests.common import trained


def model():
    pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path_gradient", [True, False])
def test_gradient_vanishes_at_the_posterior(path_gradient):
    guide = AutoFlowGuide(model, "full_rank_normal", init_scale=1.0, path_gradient=path_gradient)
    elbo = JitTrace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0, ignore_jit_warnings=True)
    for _ in range(2):  # recorded, then replayed with fresh noise
        guide.zero_grad()
        elbo.loss_and_grads(model, guide)
        largest = max(param.grad.abs().max() for param in trained(guide))
        assert (largest < 1e-12) == path_gradient
