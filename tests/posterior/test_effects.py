# SPDX-License-Identifier: Apache-2.0
"""Guides of non-centered models: their draws, files, states of guides without effects, and fits."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, diagnose, fit
from pyro_flows.posterior import joint
from tests.common import assert_same_guides, randomize_parameters

GROUP = torch.arange(60) % 12
Y = (0.8 * torch.randn(12, generator=torch.Generator().manual_seed(0)))[GROUP] + torch.randn(
    60, generator=torch.Generator().manual_seed(1)
)


def funnel(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    with pyro.plate("groups", 12):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal((mu + tau * z)[..., GROUP], 1.0), obs=y)


def made(monkeypatch: pytest.MonkeyPatch, *, has_effects: bool) -> AutoFlowGuide:
    with monkeypatch.context() as patch:
        if not has_effects:
            for finder in ("with_effects", "read_linear_predictor"):
                patch.setattr(joint, finder, lambda *args: None)
        guide = AutoFlowGuide(funnel).setup(Y)
    randomize_parameters(guide, 0.1)
    return guide


def has_effects(guide: AutoFlowGuide) -> bool:
    block = guide.posterior.only_block
    return block.inner_layout is not block.layout


def test_a_warm_start_is_the_posterior_but_for_the_scale() -> None:
    """Given the scale it is exact; the best Gaussian of the non-centered latents is 0.4 nats short."""
    guide = AutoFlowGuide(funnel).warm_start(Y)
    assert diagnose(funnel, guide, (Y,), seed=0, progress=False).gap < 0.1


def test_a_fit_and_its_density() -> None:
    guide = AutoFlowGuide(funnel)
    result = fit(funnel, guide, (Y,), seed=0, progress=False)
    assert result.diagnosis is not None
    assert result.diagnosis.gap < 0.02
    draws = guide.sample_posterior(5, Y)
    assert set(draws) == {"mu", "tau", "z"}
    assert guide.log_prob(draws, Y).isfinite().all()


@pytest.mark.parametrize("with_effects", [True, False])
def test_states_bring_their_own_kind(monkeypatch: pytest.MonkeyPatch, *, with_effects: bool) -> None:
    """That of a guide which was saved before there were effects, say."""
    saved = made(monkeypatch, has_effects=with_effects)
    guide = AutoFlowGuide(funnel).setup(Y)
    guide.load_state_dict(saved.state_dict())
    assert has_effects(guide) == with_effects
    assert_same_guides(guide, saved, Y)


def test_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved = made(monkeypatch, has_effects=True)
    saved.save(tmp_path / "guide.pt")
    loaded = AutoFlowGuide.load(tmp_path / "guide.pt", funnel, (Y,))
    assert has_effects(loaded)
    assert_same_guides(loaded, saved, Y)


def test_plain_steps() -> None:
    guide = AutoFlowGuide(funnel)
    svi = SVI(funnel, guide, Adam({"lr": 0.03}), Trace_ELBO())
    pyro.set_rng_seed(0)
    losses = torch.tensor([svi.step(Y) for _ in range(600)])
    assert losses.isfinite().all()
    assert losses[-200:].mean() < losses[:50].mean() - 5.0
