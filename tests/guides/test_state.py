# SPDX-License-Identifier: Apache-2.0
"""Parameters, names, copies and files: nothing of a guide is lost, and no guide disturbs another."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam, PyroOptim
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.guides import summaries
from pyro_flows.transforms import FixedParameter
from tests import common
from tests.common import randomize_parameters


def model() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Gamma(2.0, torch.ones(2)).to_event(1))
    with pyro.plate("plate", 2):
        pyro.sample("z", dist.Beta(2.0, 2.0))
        pyro.sample("obs", dist.Normal(x, 1.0), obs=torch.tensor([1.0, 2.0]))


start = init_to_value(values={"x": torch.tensor(0.0), "y": torch.ones(2), "z": torch.full((2,), 0.5)})
GUIDES = {"AutoNormal": AutoNormal, "AutoFlowGuide": AutoFlowGuide}
each_guide = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)


def draws(guide: Any, num: int = 3) -> list[Tensor]:
    pyro.set_rng_seed(7)
    with torch.no_grad():
        return [value.clone() for _ in range(num) for value in guide.call()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any((a - b).abs().max() > 1e-4 for a, b in zip(found, expected, strict=True))


def train(guide: Any, steps: int = 3, fn: Callable[..., Any] = model) -> bool:
    """A few SVI steps; whether every parameter that can move has moved."""
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi = SVI(fn, guide, Adam({"lr": 2e-3}), Trace_ELBO())
    for _ in range(steps):
        svi.step()
    return bool(before) and any((p != before[name]).any() for name, p in guide.named_parameters())


def trained(**options: Any) -> AutoFlowGuide:
    guide = AutoFlowGuide(model, init_loc_fn=start, **options).setup()
    randomize_parameters(guide, 0.2)
    assert train(guide)
    return guide


def through_torch(guide: AutoFlowGuide) -> Any:
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(guide: AutoFlowGuide) -> Any:
    return pickle.loads(pickle.dumps(guide))


# Files and copies


@pytest.mark.parametrize("load", [through_torch, through_pickle])
@pytest.mark.parametrize("flow", ["auto", "full_rank_normal", "realnvp"])
def test_a_file_gives_the_same_guide(load: Callable[..., Any], flow: str) -> None:
    guide = trained(flow=flow)
    expected = draws(guide)
    loaded = load(guide)
    assert_same(draws(loaded), expected)
    torch.testing.assert_close(loaded.median(), guide.median())
    values = {"x": torch.zeros(()), "y": torch.ones(2), "z": torch.ones(2) / 2}
    torch.testing.assert_close(loaded.log_prob(values), guide.log_prob(values))
    with pytest.raises(RuntimeError, match=r"loaded from a file has none.*fresh AutoFlowGuide\(model\)"):
        _ = loaded.model

    # The live guide is unharmed, and both train on, apart from each other.
    assert guide.model is not None
    assert_same(draws(guide), expected)
    assert train(guide)
    assert_same(draws(loaded), expected)
    assert train(loaded)


def test_a_file_of_a_guide_whose_model_has_parameters() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.concentration = PyroParam(torch.ones(3), dist.constraints.positive)
            self.loc = torch.nn.Parameter(torch.zeros(2))

        def forward(self) -> None:
            pyro.sample("p", dist.Dirichlet(self.concentration))
            pyro.sample("q", dist.MultivariateNormal(self.loc, torch.eye(2)))

    module = Model()
    guide = AutoFlowGuide(module).setup()
    assert train(guide, fn=module)
    assert_same(draws(through_torch(guide)), draws(guide))
    assert_same(draws(copy.deepcopy(guide)), draws(guide))
    twin = copy.deepcopy(module)  # The guide leaves nothing in its model.
    assert train(AutoFlowGuide(twin).setup(), fn=twin)
    assert (module.loc != 0).all()  # It trained along.


def test_a_list_goes_through_a_file() -> None:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["x"])))
    guide.append(AutoFlowGuide(poutine.block(model, hide=["x"])))
    guide()
    expected = draws(guide)
    flow = guide[1]
    loaded = through_torch(flow)
    assert set(loaded.median()) == {"y", "z"}
    assert flow.master() is guide
    assert_same(draws(guide), expected)


def test_state_dict_into_a_fresh_guide() -> None:
    guide = trained()
    fresh = AutoFlowGuide(model).setup()
    assert differ(draws(fresh), draws(guide))
    fresh.load_state_dict(guide.state_dict())
    assert_same(draws(fresh), draws(guide))
    assert train(fresh)
    assert train(guide)


@pytest.mark.parametrize("when", ["before", "after"])
def test_deep_copy(when: str) -> None:
    guide = trained() if when == "after" else AutoFlowGuide(model, init_loc_fn=start)
    twin = copy.deepcopy(guide)
    assert twin.model is guide.model
    if when == "before":
        guide.setup()
        twin.setup()
        twin.load_state_dict(guide.state_dict())
    expected = draws(guide)
    assert_same(draws(twin), expected)
    assert train(twin)
    assert_same(draws(guide), expected)
    assert train(guide)


def test_deep_copy_of_a_module_that_holds_a_guide() -> None:
    class Holder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.guide = AutoFlowGuide(model)

        def forward(self) -> Any:
            return self.guide()

    holder = Holder()
    train(holder)
    twin = copy.deepcopy(holder)
    assert_same(draws(twin.guide), draws(holder.guide))
    assert train(twin)
    assert train(holder)


# Names in the parameter store


@each_guide
def test_two_guides_in_one_process_both_train(make: Callable[..., Any]) -> None:
    first = make(model, init_loc_fn=start)
    first()
    assert train(first, 20)
    if make is AutoNormal:
        return  # The second AutoNormal starts from the first one's parameters, and does not train.
    expected = draws(first)
    second = make(model, init_loc_fn=start).setup()
    begin = draws(second)
    assert differ(begin, expected)
    assert train(second, 20)
    assert differ(draws(second), begin)
    assert_same(draws(first), expected)
    assert train(first)  # And the first goes on.


def test_two_lists_in_one_process_both_train() -> None:
    lists = []
    for _ in range(2):
        guide = AutoGuideList(model)
        guide.append(AutoFlowGuide(poutine.block(model, expose=["x", "z"])))
        guide.append(AutoFlowGuide(poutine.block(model, expose=["y"])))
        guide()
        assert all(train(guide, 3) for _ in range(2))
        lists.append(guide)
    expected = draws(lists[1])
    assert train(lists[0])
    assert_same(draws(lists[1]), expected)


def test_a_cleared_store_changes_nothing() -> None:
    guide = trained()
    expected = draws(guide)
    pyro.clear_param_store()
    assert_same(draws(guide), expected)
    assert train(guide)


@pytest.mark.parametrize("flow", ["auto", "realnvp", "low_rank_normal"])
def test_a_named_guide_takes_over_a_loaded_store(flow: str, tmp_path: Path) -> None:
    expected = draws(trained(flow=flow, name="posterior"))
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    pyro.set_rng_seed(99)
    guide = AutoFlowGuide(model, flow, name="posterior")
    guide()
    assert_same(draws(guide), expected)
    assert all(name.startswith("posterior.") for name in pyro.get_param_store())
    assert train(guide)
    assert differ(draws(guide), expected)


def test_a_named_guide_of_another_shape_is_refused() -> None:
    trained(name="posterior", flow="full_rank_normal")

    def other() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = AutoFlowGuide(other, flow="full_rank_normal", name="posterior")
    with pytest.raises(RuntimeError, match=r"'posterior\..*to have shape .* but got .*name=.*clear_param_store"):
        guide()


def test_an_unnamed_guide_says_that_it_goes_on_with_its_own_parameters() -> None:
    guide = trained()
    expected = draws(guide)
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    with pytest.warns(UserWarning, match=r"goes on with its own as 'AutoFlowGuide_\d+'.*name="):
        guide()
    assert_same(draws(guide), expected)
    assert train(guide)


def test_a_name_given_to_a_part_does_not_outlive_its_place_in_a_list() -> None:
    # The list names its parts, so two lists with equally named parts must not take each other's parameters.
    lists = []
    for _ in range(2):
        guide = AutoGuideList(model)
        guide.append(AutoFlowGuide(model, init_loc_fn=start, name="part"))
        guide()
        lists.append(guide)
        assert train(guide, 10)
    expected = draws(lists[1])
    assert train(lists[0], 10)
    assert_same(draws(lists[1]), expected)


# Ways to train


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
@each_guide
def test_module_local_params(make: Callable[..., Any], local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        guides = [make(model, init_loc_fn=start) for _ in range(2 if local else 1)]
        for guide in guides:
            guide()
            assert train(guide)
        assert len(pyro.get_param_store()) == (0 if local else len(list(guides[0].parameters())))


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
@each_guide
def test_torch_optimizer(make: Callable[..., Any], local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        guide = make(model, init_loc_fn=start)
        guide()
        loss_fn = Trace_ELBO(num_particles=2, vectorize_particles=True)(model, guide)
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.02)
        before = [p.detach().clone() for p in guide.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        assert any((p != q).any() for p, q in zip(guide.parameters(), before, strict=True))


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
def test_every_parameter_gets_a_gradient(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        guide = AutoFlowGuide(model, init_loc_fn=start).setup()
        randomize_parameters(guide)
        Trace_ELBO().loss_and_grads(model, guide)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in common.trained(guide))


def test_frozen_parameters_stay() -> None:
    guide = AutoFlowGuide(model, init_loc_fn=start).setup()
    first = next(guide.parameters())
    first.requires_grad_(False)
    before = first.clone()
    assert train(guide)
    assert torch.equal(first, before)
    guide.requires_grad_(False)
    guide()


def test_parameters_exist_after_setup_and_not_before() -> None:
    guide = AutoFlowGuide(model)
    assert not list(guide.parameters())
    names = [name for name, _ in guide.setup().named_parameters()]
    assert names
    assert guide.setup() is guide
    assert [name for name, _ in guide.named_parameters()] == names
    trace = poutine.trace(guide).get_trace()
    assert trace.param_nodes == [f"AutoFlowGuide.{name}" for name in names]


@pytest.mark.parametrize("make", [AutoFlowGuide, functools.partial(AutoFlowGuide, flow="diagonal_normal")])
def test_a_subclass_and_a_partial_are_guides_too(make: Callable[..., Any]) -> None:
    class Mine(AutoFlowGuide):
        pass

    assert train(make(model).setup())
    guide = Mine(model)
    assert "_Mine_latent" in poutine.trace(guide).get_trace().nodes
    assert train(guide)


def test_svi_steps_one_fixed_parameter_for_all() -> None:
    """They are in the store, to be saved with it; an optimizer's step takes as long for one without a gradient."""
    pyro.clear_param_store()
    guide = AutoFlowGuide(model)
    stepped: list[Any] = []

    class Recorded(PyroOptim):  # type: ignore[misc]
        def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            stepped.extend(params)
            super().__call__(params, *args, **kwargs)

    SVI(model, guide, Recorded(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO()).step()
    parameters = list(guide.parameters())
    fixed = {id(param) for param in parameters if isinstance(param, FixedParameter)}
    assert len(fixed) > 1
    assert {id(param) for param in stepped} - fixed == {id(param) for param in parameters} - fixed
    assert len({id(param) for param in stepped} & fixed) == 1
    assert fixed <= {id(param) for param in pyro.get_param_store()._params.values()}


def test_local_parameters_are_not_taken_from_the_store() -> None:
    pyro.clear_param_store()
    options: dict[str, Any] = {"num_steps": 5, "seed": 0, "progress": False}
    fit(model, AutoFlowGuide(model, name="mine"), **options)
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlowGuide(model, name="mine")
        assert fit(model, guide, **options).steps == 5


def test_whether_a_guide_is_initial_needs_no_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AutoFlowGuide(model).setup()
    monkeypatch.setattr(summaries, "SUMMARY", replace(summaries.SUMMARY, max_parameters=8))
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            sizes.extend([result.numel()] if torch.is_tensor(result) and result.dtype == torch.float64 else [])
            return result

    with Watch():
        assert guide.is_initial
    assert max(p.numel() for p in guide.parameters()) > max(sizes) == 8
    with torch.no_grad():
        max(guide.parameters(), key=torch.numel).view(-1)[-1] += 1e-3
    assert not guide.is_initial
