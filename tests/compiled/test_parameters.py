# SPDX-License-Identifier: Apache-2.0
"""What a compiled step knows of a guide: parameters, and limits on how far they may move."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flows import CompiledSVI
from pyro_flows.compiled import inductor
from pyro_flows.compiled.parameters import limits_of

LARGEST = 0.01


class Limit:
    """Keeps no parameter back by itself."""

    largest_step = LARGEST

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = list(parameters)
        self.units: list[Tensor | None] = [None for _ in parameters]
        self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1


class MeanField(nn.Module):
    """A guide that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.step_limit = Limit(self.log_scale)

    def forward(self) -> None:
        pyro.module("guide", self)
        pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


def model() -> None:
    pyro.sample("z", dist.Normal(5.0, 0.1))


@pytest.mark.parametrize("held", [False, True], ids=["guide", "function"])
def test_a_limit_of_any_guide_is_kept(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)
    guide = MeanField()
    svi = CompiledSVI(model, (lambda: guide()) if held else guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(4):
        loc, log_scale = guide.loc.item(), guide.log_scale.item()
        svi.step()
        assert abs(guide.log_scale.item() - log_scale) <= LARGEST * (1.0 + 1e-5)
        assert abs(guide.loc.item() - loc) > 2 * LARGEST
    assert guide.step_limit.forgotten


def test_a_limit_is_in_the_units_of_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)
    guide = MeanField()
    guide.step_limit.units = [torch.tensor(5.0)]
    svi = CompiledSVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    assert abs(guide.log_scale.item()) == pytest.approx(5.0 * LARGEST)


def test_another_attribute_of_that_name_is_none() -> None:
    guide = MeanField()
    assert limits_of(guide) == [guide.step_limit]
    guide.step_limit = 5
    assert limits_of(guide) == []
