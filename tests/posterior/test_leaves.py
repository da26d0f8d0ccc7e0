# SPDX-License-Identifier: Apache-2.0
"""Guides with leaves: files, states of guides without them, wider flows and training."""

from __future__ import annotations

from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.posterior import joint
from tests.common import abilities, assert_same_guides, randomize_parameters

COUNT = 210
Y = torch.bernoulli(torch.full((COUNT, 5), 0.5), generator=torch.Generator().manual_seed(0))


def made(monkeypatch: pytest.MonkeyPatch, *, has_leaves: bool, y: Tensor = Y) -> AutoFlowGuide:
    with monkeypatch.context() as patch:
        patch.setattr(joint, "are_leaves", lambda *args: has_leaves)
        guide = AutoFlowGuide(abilities).setup(y)
    randomize_parameters(guide, 0.1)
    return guide


def num_leaves(guide: AutoFlowGuide) -> int:
    return guide.posterior.only_block.layout.num_leaves


@pytest.mark.parametrize("has_leaves", [True, False])
def test_a_file_is_of_the_kind_that_it_was_saved_as(
    has_leaves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guides of earlier versions had none; and data that do not show the leaves find none."""
    pyro.set_rng_seed(0)
    saved = made(monkeypatch, has_leaves=has_leaves)
    saved.posterior.widen()
    randomize_parameters(saved, 0.1)
    saved.save(tmp_path / "guide.pt")
    with monkeypatch.context() as patch:
        patch.setattr(joint, "are_leaves", lambda *args: not has_leaves)
        loaded = AutoFlowGuide.load(tmp_path / "guide.pt", abilities, (Y,))
    assert num_leaves(loaded) == num_leaves(saved) == (COUNT if has_leaves else 0)
    assert loaded.posterior.only_block.is_wide
    assert_same_guides(saved, loaded, Y)


def test_a_state_dict_brings_its_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    pyro.set_rng_seed(0)
    one, other = made(monkeypatch, has_leaves=True), made(monkeypatch, has_leaves=False)
    other.load_state_dict(one.state_dict())
    assert num_leaves(other) == COUNT
    assert_same_guides(one, other, Y)


@pytest.mark.filterwarnings("error")
def test_a_guide_in_use_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store held the parameters of the kind before, some under the same names, and the guide took another name."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    y = Y.repeat(6, 1)  # a flow without couplings, if there are no leaves
    one, other = made(monkeypatch, has_leaves=True, y=y), made(monkeypatch, has_leaves=False, y=y)
    svi = SVI(abilities, other, Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(y)
    names = set(pyro.get_param_store())
    other.load_state_dict(one.state_dict())
    svi.step(y)
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {name.split(".")[0] for name in names}
    assert all(there is own for there, own in zip(stored(other), other.posterior.parameters(), strict=True))


def stored(guide: AutoFlowGuide) -> list[Tensor]:
    params = pyro.get_param_store()._params
    return [params[f"{guide._pyro_name}.posterior.{name}"] for name, _ in guide.posterior.named_parameters()]


def test_a_wider_flow_leaves_the_distribution_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pyro.set_rng_seed(0)
    guide = made(monkeypatch, has_leaves=True)
    values = guide.sample_posterior(4, Y)
    before = guide.log_prob(values, Y)
    guide.posterior.widen()
    torch.testing.assert_close(guide.log_prob(values, Y), before)


def test_fit() -> None:
    """Steps are recorded, and gain what a Gaussian leaves."""
    pyro.set_rng_seed(0)
    guide = AutoFlowGuide(abilities)
    result = fit(abilities, guide, (Y,), num_steps=300, compile=True, seed=0, progress=False)
    assert num_leaves(guide) == COUNT
    assert result.elbo > result.start_elbo + 0.3
    assert result.diagnosis is not None
    assert result.diagnosis.khat < 0.7
