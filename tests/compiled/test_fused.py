# SPDX-License-Identifier: Apache-2.0
"""A graph whose large operations are compiled alone gives its numbers, and the order of what has one is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.fx import GraphModule

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.compiled import fused
from pyro_flows.compiled.fused import FusionSettings, large_part, to_fused
from pyro_flows.compiled.graph import LossGraph
from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.training import EstimateSettings, FitSettings, TrainerSettings
from pyro_flows.training.trainer import Trainer
from tests.common import Killed, kill_after, schools
from tests.compiled.test_script import from_seed, graph_of

ROWS = 20_000
X = torch.linspace(-1.0, 1.0, 2 * ROWS).reshape(ROWS, 2)
Y = (X[:, 0] > 0.3).float()


def large_regression(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", ROWS):
        pyro.sample("y", dist.Bernoulli(logits=X @ w / sigma), obs=torch.where(y[0] > 0.5, 1.0 - Y, Y))


def graph(function: Callable[..., Tensor], *inputs: Tensor) -> GraphModule:
    return trace_operations(lambda *inputs: (function(*inputs),), inputs).graph


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations on ten elements are large."""
    monkeypatch.setattr(fused, "FUSION", FusionSettings(min_elements=10))


def test_numbers_of_the_graph_from_the_same_seed() -> None:
    given = torch.zeros(6)
    recorded = graph_of(large_regression, AutoNormal(large_regression))
    expected = [from_seed(recorded, y) for y in (given, given + 1.0)]
    assert recorded.part is not None
    assert recorded.part.num_operations < recorded.num_operations / 2
    assert recorded.part.elements > 10 * 4 * ROWS
    assert recorded.fuse((given,), {})
    for y, numbers in zip((given, given + 1.0), expected, strict=True):  # data stay inputs
        for one, other in zip(from_seed(recorded, y), numbers, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected[0][0], expected[0][2])  # noise is drawn afresh


def test_a_model_of_few_rows_has_no_large_part() -> None:
    def few(y: Tensor) -> None:
        schools(y[:4])

    assert graph_of(few, AutoNormal(few)).part is None


@pytest.mark.parametrize("fails", ["compiler", "numbers"])
def test_goes_on_with_the_graph_where_that_fails(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        if fails == "compiler":
            raise RuntimeError("no C++ compiler")
        return lambda *values: [1.1 * value for value in graph(*values)]

    recorded = graph_of(large_regression, AutoNormal(large_regression))
    monkeypatch.setattr(fused, "to_machine_code", made)
    before = recorded._run
    assert not recorded.fuse((torch.zeros(6),), {})
    assert recorded._run is before


def long_chain(x: Tensor) -> Tensor:
    return (2.0 * (x + 1.0).exp() - x).square().log() * 3.0


def test_the_part_has_all_that_is_between_its_operations(all_large: None) -> None:
    def function(x: Tensor) -> Tensor:
        y = long_chain(x)
        return (y - y.sum().exp().log() / 200.0).tanh()

    made = graph(function, torch.rand(200))
    part = large_part(made)
    assert part is not None
    assert {str(node.target) for node in part.nodes} >= {"aten.log.default", "aten.sum.default", "aten.tanh.default"}


def test_results_of_several_tensors_stay_together(all_large: None) -> None:
    def function(x: Tensor) -> Tensor:
        y = long_chain(x).reshape(4, 50)
        values, places = y.max(-1)
        return (y - values.unsqueeze(-1)).exp().sum(-1) + places

    inputs = [torch.rand(200)]
    made = graph(function, *inputs)
    part = large_part(made)
    assert part is not None
    assert any("max" in str(node.target) for node in part.nodes)
    torch.testing.assert_close(to_fused(made, part, inputs)(*inputs)[0], function(*inputs))


def test_noise_that_does_not_follow_the_part_stays_before_it(all_large: None) -> None:
    def function(x: Tensor) -> Tensor:
        first = torch.rand(3) * long_chain(x).sum()
        return first + torch.rand(3)

    inputs = [torch.rand(200)]
    made = graph(function, *inputs)
    part = large_part(made)
    assert part is not None
    run = to_fused(made, part, inputs)
    torch.manual_seed(3)
    (found,) = run(*inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(found, function(*inputs))


def noise_before_other_noise(x: Tensor) -> Tensor:
    """The first noise waits for the large operations, the second one does not."""
    return torch.bernoulli((0.1 * long_chain(x).mean()).sigmoid()) + torch.rand(())


def noise_within(x: Tensor) -> Tensor:
    y = long_chain(x)
    return (y - torch.bernoulli(y.sigmoid())).exp()


def read_before_it_is_written(x: Tensor, count: Tensor) -> Tensor:
    read = long_chain(x).sum() * count
    count.mul_(0.5)
    return read


@pytest.mark.parametrize("function", [noise_before_other_noise, noise_within, read_before_it_is_written])
def test_there_is_no_part_that_would_change_an_order(function: Callable[..., Any], all_large: None) -> None:
    inputs = [torch.rand(200), torch.ones(())]
    made = graph(function, *inputs[: function.__code__.co_argcount])
    assert large_part(made) is None


def test_memory_that_is_written_before_it_is_read(all_large: None) -> None:
    """As running means are."""

    def function(x: Tensor, count: Tensor) -> Tensor:
        count.mul_(0.5)
        return long_chain(x).sum() * count

    x, count = torch.rand(200), torch.ones(())
    made = graph(function, x, count.clone())
    part = large_part(made)
    assert part is not None
    run = to_fused(made, part, [x, count.clone()])
    torch.testing.assert_close(run(x, count)[0], 0.5 * long_chain(x).sum())
    assert count == 0.5


# In fit


RATES = TrainerSettings(
    min_steps_to_record=0,
    min_seconds_to_record=0.0,
    saved_operation=1e-12,
    saved_element=1e-15,
    compile_seconds=1e-9,
    fuse_seconds=1e-9,
    fused_element=1e-6,
)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What steps of a fit were."""
    found, step = [], Trainer._step

    def noted(self: Trainer, rate: float) -> None:
        step(self, rate)
        found.append(self.state.step_kind)

    monkeypatch.setattr(Trainer, "_step", noted)
    return found


def run(trainer: TrainerSettings, **options: Any) -> Any:
    pyro.clear_param_store()
    guide = AutoFlowGuide(large_regression, "diagonal_normal")
    few = EstimateSettings(num_runs=2, num_particles=4, num_tail_draws=40)
    settings = FitSettings(trainer=trainer, checkpoint_interval=0.0, estimates=few)
    default = {"num_steps": 20, "num_particles": 4, "seed": 0, "progress": False, "settings": settings}
    return fit(large_regression, guide, (torch.zeros(6),), **{**default, **options})


def test_fit_fuses_where_that_saves_time(kinds: list[str]) -> None:
    result = run(RATES)
    assert kinds == ["eager"] + 19 * ["fused"]
    expected = run(TrainerSettings(min_steps_to_record=0, min_seconds_to_record=0.0, fuse_seconds=1e9))
    assert kinds[20:] == ["eager"] + 19 * ["recorded"]
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-4, atol=1e-2)


def test_fit_goes_on_without_a_compiler(kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossGraph, "fuse", lambda *_: False)
    run(RATES)
    assert kinds == ["eager"] + 19 * ["recorded"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(RATES).losses
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, 12)
        run(RATES, checkpoint=path)
    assert torch.load(path, weights_only=True)["state"]["step_kind"] == "fused"
    assert run(RATES, checkpoint=path).losses == expected


def test_a_run_that_is_resumed_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    expected = run(RATES, checkpoint=path, num_steps=10).losses
    monkeypatch.setattr(LossGraph, "fuse", lambda *_: False)
    with pytest.warns(UserWarning, match="goes on without compilation"):
        found = run(RATES, checkpoint=path, num_steps=20).losses
    assert found[:10] == expected and len(found) == 20
