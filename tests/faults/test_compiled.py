# SPDX-License-Identifier: Apache-2.0
"""Faults under :class:`CompiledSVI`: what its graph would freeze is noticed, and bad batches cost themselves only."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide, CompiledSVI, fit
from pyro_flows.compiled import graph as graph_module
from pyro_flows.compiled import inductor
from pyro_flows.compiled.graph import AgreementSettings

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])
# What models of these tests read.
SCALE = 10.0
CONFIG = types.SimpleNamespace(scale=10.0)
OPTIONS = {"likelihood": {"scales": [10.0]}}


def widen(loc: Tensor) -> Any:
    return dist.Normal(loc, 10.0)


def narrow(loc: Tensor) -> Any:
    return dist.Normal(loc, 2.0)


LIKELIHOOD: Callable[[Tensor], Any] = widen


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: compiling takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)


def model_with(scale: Callable[[], Any]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale()), obs=y)

    return model


def of_global() -> Iterator[Any]:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, SCALE), obs=y)

    yield model
    while True:
        globals()["SCALE"] = yield


def of_function() -> Iterator[Any]:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", LIKELIHOOD(loc), obs=y)

    yield model
    while True:
        value = yield
        globals()["LIKELIHOOD"] = widen if value > 5.0 else narrow


def of_attribute_of_a_global() -> Iterator[Any]:
    yield model_with(lambda: CONFIG.scale)
    while True:
        CONFIG.scale = yield


def of_nested_items() -> Iterator[Any]:
    yield model_with(lambda: OPTIONS["likelihood"]["scales"][0])
    while True:
        OPTIONS["likelihood"]["scales"][0] = yield


def of_enclosing_variable() -> Iterator[Any]:
    scale = 10.0
    yield model_with(lambda: scale)
    while True:
        scale = yield


def of_loop() -> Iterator[Any]:
    """Of several objects, which are known by no name."""
    layers = [types.SimpleNamespace(power=1.0) for _ in range(3)]

    def scale() -> float:
        product = 10.0
        for layer in layers:
            product *= layer.power
        return product

    yield model_with(scale)
    while True:
        layers[1].power = (yield) / 10.0


class Counted:
    shared = 10.0

    def __init__(self) -> None:
        self.own = 1.0
        self.steps = 0

    @property
    def scale(self) -> float:
        return self.own * self.shared

    def model(self, y: Tensor) -> None:
        model_with(lambda: self.scale)(y)

    def step(self) -> None:
        self.steps += 1


def of_own_attribute() -> Iterator[Any]:
    owner = Counted()
    yield owner.model
    while True:
        owner.own = (yield) / 10.0


def of_class_attribute() -> Iterator[Any]:
    yield Counted().model
    while True:
        Counted.shared = yield


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 10.0


def of_slot() -> Iterator[Any]:
    owner = Slotted()
    yield model_with(lambda: owner.scale)
    while True:
        owner.scale = yield


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(10.0))
        self.drop = nn.Dropout(0.0)

    def forward(self, y: Tensor) -> None:
        model_with(lambda: self.drop(self.scale) + 1.0)(y)


def of_another_tensor() -> Iterator[Any]:
    module = Module()
    yield module
    while True:
        value = yield
        if value != module.scale:
            module.scale = torch.tensor(value)


def of_a_layer_of_torch() -> Iterator[Any]:
    module = Module()
    yield module
    while True:
        value = yield
        module.drop.p = 0.0 if value > 5.0 else 1.0


def of_a_handler() -> Iterator[Any]:
    """The model behind one of Pyro's handlers."""
    yield poutine.block(model_with(lambda: CONFIG.scale), hide=["nothing"])
    while True:
        CONFIG.scale = yield


READS = [
    of_global, of_function, of_attribute_of_a_global, of_nested_items, of_enclosing_variable, of_loop, of_own_attribute,
    of_class_attribute, of_slot, of_another_tensor, of_a_layer_of_torch, of_a_handler,
]  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    globals().update(SCALE=10.0, LIKELIHOOD=widen)
    CONFIG.scale, OPTIONS["likelihood"]["scales"][0], Counted.shared = 10.0, 10.0, 10.0


def losses_of(cls: Any, read: Callable[[], Iterator[Any]], values: list[float]) -> tuple[Tensor, Any]:
    pyro.clear_param_store()
    process = read()
    model = next(process)
    next(process)
    svi = cls(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    process.send(10.0)
    svi.guide(Y)
    pyro.set_rng_seed(1)
    losses = []
    for value in values:
        process.send(value)
        losses.append(svi.step(Y))
    return torch.tensor(losses), svi


@pytest.mark.parametrize("read", READS)
def test_a_changed_value_is_found(read: Callable[[], Iterator[Any]]) -> None:
    """The graph had 10 for good, in silence."""
    values = [10.0] * 3 + [2.0] * 3 + [10.0] * 2
    with pytest.warns(UserWarning, match=r"CompiledSVI: `.+` (was .+ and is .+|is another object) since") as caught:
        found, svi = losses_of(CompiledSVI, read, values)
    assert [warning.filename for warning in caught] == [__file__]
    torch.testing.assert_close(found, losses_of(SVI, read, values)[0], rtol=1e-4, atol=1e-4)
    assert len(svi._graphs) == 2 + (read is of_another_tensor)  # a third one is equal to the first, but not the same


def test_an_annealed_value_takes_eager_steps_in_the_end() -> None:
    values = [10.0 * 0.9**step for step in range(20)]
    with pytest.warns(UserWarning, match=r"`CONFIG.scale` was 10.0 and is 9.0 since") as caught:
        found, _ = losses_of(CompiledSVI, of_attribute_of_a_global, values)
    assert len(caught) == 1
    torch.testing.assert_close(found, losses_of(SVI, of_attribute_of_a_global, values)[0], rtol=1e-4, atol=1e-4)


def test_what_the_model_does_not_read_may_change() -> None:
    owner = Counted()
    svi = CompiledSVI(owner.model, AutoNormal(owner.model), Adam({"lr": 0.05}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            svi.step(Y)
            owner.step()
    assert len(svi._graphs) == 1


def test_what_the_model_changes_itself_is_no_change() -> None:
    class Counter:
        calls = 0

    def model(y: Tensor) -> None:
        Counter.calls += 1
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        Counter.last = loc
        pyro.sample("y", dist.Normal(Counter.last, 10.0).expand([len(y)]).to_event(1), obs=y)

    svi = CompiledSVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (4, 4, 3, 3, 4, 3):
            svi.step(Y[:size])
    assert len(svi._graphs) == 2


def test_an_object_among_the_arguments() -> None:
    def model(config: types.SimpleNamespace, y: Tensor) -> None:
        model_with(lambda: config.beta)(y)

    runs = []
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        config = types.SimpleNamespace(beta=10.0)
        svi = cls(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
        svi.guide(config, Y)
        pyro.set_rng_seed(1)
        losses = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for beta in (10.0, 10.0, 1.0, 0.1):
                config.beta = beta
                losses.append(svi.step(config, Y))
        runs.append((torch.tensor(losses), len(caught)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-4)
    assert (runs[0][1], runs[1][1]) == (1, 0)


def test_a_handler_around_the_step() -> None:
    runs = []
    model = model_with(lambda: 10.0)
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        svi = cls(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
        svi.guide(Y)
        pyro.set_rng_seed(1)
        losses = [svi.step(Y), svi.step(Y)]
        for scale in (0.1, 0.5):
            with poutine.scale(scale=scale):
                losses.append(svi.step(Y))
        losses.append(svi.step(Y))
        runs.append(torch.tensor(losses))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-4)


def test_what_no_guard_sees_is_found_by_comparing_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "AGREEMENT", AgreementSettings(first_check=8))
    array = np.array([10.0])
    model = model_with(lambda: float(array[0]))
    svi = CompiledSVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):  # among them a comparison that finds nothing
            svi.step(Y)
    array[:] = 1.0
    with pytest.warns(
        UserWarning, match="takes eager steps, as pyro.infer.SVI does, since the model's loss is"
    ) as seen:
        for _ in range(10):
            svi.step(Y)
    assert len(seen) == 1
    before = svi.guide.locs.loc.item()
    pyro.set_rng_seed(3)
    expected = Trace_ELBO().loss(model, svi.guide, Y)
    pyro.set_rng_seed(3)
    assert svi.step(Y) == pytest.approx(expected)
    assert svi.guide.locs.loc.item() != before


def test_comparing_losses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for first_check in (2, 2000):
        monkeypatch.setattr(graph_module, "AGREEMENT", AgreementSettings(first_check=first_check))
        losses.append(losses_of(CompiledSVI, of_global, [10.0] * 20)[0])
    assert torch.equal(*losses)


def test_many_shapes_take_the_steps_of_svi() -> None:
    """Beyond the fourth, steps had moments of Adam of their own."""
    sizes = [1, 2, 3, 4, 5, 6, 7, 5, 1, 6, 7, 2]
    data = torch.arange(7.0)
    model = model_with(lambda: 10.0)
    runs = []
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        svi = cls(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
        svi.guide(Y)
        pyro.set_rng_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = torch.tensor([svi.step(data[:size]) for size in sizes])
        runs.append((losses, len(caught)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-4)
    assert (runs[0][1], runs[1][1]) == (1, 0)


def test_a_wrong_shape_is_refused_by_pyro() -> None:
    """Validation is off while a step is recorded: (N, 1) was broadcast to (N, N)."""
    model = model_with(lambda: 10.0)
    svi = CompiledSVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(Y)
    with pytest.raises(ValueError, match="invalid log_prob shape"):
        svi.step(Y.unsqueeze(-1))
    svi.step(Y)
    assert len(svi._graphs) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [AutoNormal, AutoFlowGuide])
def test_a_bad_batch_leaves_parameters_finite(bad: float, make: Callable[..., Any]) -> None:
    model = model_with(lambda: 10.0)
    svi = CompiledSVI(model, make(model), Adam({"lr": 0.05}), Trace_ELBO())
    wrong = Y.clone()
    wrong[1] = bad
    for _ in range(5):
        svi.step(Y)
    with pytest.warns(UserWarning, match="the loss of a step is not finite") as caught:
        losses = [svi.step(wrong) for _ in range(3)]
    assert len(caught) == 1
    assert not torch.tensor(losses).isfinite().any()
    assert all(p.isfinite().all() for p in svi.guide.parameters())
    assert torch.tensor([svi.step(Y) for _ in range(20)]).isfinite().all()


def test_a_bad_first_batch_is_refused_as_by_svi() -> None:
    model = model_with(lambda: 10.0)
    svi = CompiledSVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    with pytest.raises(ValueError, match="nan"):
        svi.step(Y * float("nan"))
    assert torch.tensor([svi.step(Y) for _ in range(5)]).isfinite().all()


def test_a_changed_value_under_fit() -> None:
    """Its recorded steps are those of the model as it is."""

    class Changing:
        def __iter__(self) -> Iterator[Any]:
            self.count = getattr(self, "count", 0) + 1
            CONFIG.scale = 10.0 if self.count < 40 else 2.0
            yield (Y,)

    model = model_with(lambda: CONFIG.scale)
    losses = []
    for compile in (True, False):
        pyro.clear_param_store()
        options = {"num_steps": 60, "num_particles": 4, "seed": 0, "progress": False, "compile": compile}
        losses.append(torch.tensor(fit(model, AutoNormal(model), Changing(), **options).losses))
    assert losses[0][-1] > 2.0 * losses[0][10]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
