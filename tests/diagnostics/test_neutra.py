# SPDX-License-Identifier: Apache-2.0
"""The three lines that the verdict gives: NUTS in the coordinates of a guide that is close."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam

from pyro_flows import AutoFlowGuide
from pyro_flows.diagnostics.verdict import NEUTRA
from tests.fits import regression, regression_data, regression_posterior

DATA = regression_data(3, 2.0)


@pytest.mark.slow
def test_the_recipe_gives_draws_of_the_posterior() -> None:
    guide = AutoFlowGuide(regression).warm_start(*DATA)
    namespace: dict[str, Any] = {
        **{"guide": guide, "model": regression, "args": DATA, "kwargs": {}},
        **{"MCMC": lambda *a, **k: MCMC(*a, **k, disable_progbar=True), "NUTS": NUTS, "NeuTraReparam": NeuTraReparam},
    }
    recipe = NEUTRA.replace("num_samples=1000", "num_samples=200").replace("warmup_steps=500", "warmup_steps=60")
    assert recipe != NEUTRA and len(recipe.splitlines()) == 3
    exec(recipe, namespace)
    draws = namespace["draws"]["w"].reshape(200, 3)
    mean, covariance = regression_posterior(*DATA)
    sd = covariance.diagonal().sqrt()
    # In these coordinates NUTS draws nearly independently: errors of 0.07 sds for means. Squares mix worse than the
    # draws themselves; 50 independent ones leave errors of 0.1 for sds.
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.25
    assert (draws.std(0) / sd - 1).abs().max() < 0.3
    assert torch.isfinite(draws).all()
