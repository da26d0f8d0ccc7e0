# SPDX-License-Identifier: Apache-2.0
"""Programs of docs/recipes, which need packages that the library does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlowGuide, fit

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def banana() -> None:
    """Evidence 1; no Gaussian comes closer than 0.4 nat."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


def test_zuko() -> None:
    pytest.importorskip("zuko")
    module = recipe("zuko_flow")
    transform = module.zuko_flow(3)
    noise = torch.randn(5, 3)
    latents = transform(noise)
    torch.testing.assert_close(transform.inv(latents), noise, atol=1e-4, rtol=1e-4)
    jacobian = torch.func.vmap(torch.func.jacrev(transform._call))(noise)
    found = transform.log_abs_det_jacobian(noise, latents)
    torch.testing.assert_close(found, jacobian.det().abs().log(), atol=1e-4, rtol=1e-4)

    guide = AutoFlowGuide(banana, flow=module.zuko_flow)
    result = fit(banana, guide, num_steps=300, num_particles=16, compile=False, seed=0, progress=False)
    assert -0.3 < result.elbo < 4 * result.elbo_se


@pytest.mark.filterwarnings("ignore")  # Lightning's, about loggers and workers
def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    module = recipe("lightning_training")

    def model(y: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 100, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = 3.0 + torch.randn(100)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=50, shuffle=True)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlowGuide(model)
        module.train(model, guide, batches, learning_rate=0.05, max_epochs=100, default_root_dir=tmp_path, **options)
        draws = guide.sample_posterior(4000)["loc"]
    # The posterior is N(mean of y, 0.1); steps of a constant rate leave noise in the mean.
    assert draws.mean().item() == pytest.approx(y.mean().item(), abs=0.2)
    assert draws.std().item() == pytest.approx(0.1, rel=0.5)
