# SPDX-License-Identifier: Apache-2.0
"""A flow that becomes wider: the same distribution, further parameters that files and stores carry along."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI
from pyro_flows.transforms import AffineCouplings, Chain, DirectedCouplings, FixedParameter, ItemCouplings
from tests.common import randomize_parameters, schools

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def scales(y: Tensor) -> None:
    """Weights with a scale each, in a plate, and a vector of as many offsets without one."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("columns", len(y)):
        own = pyro.sample("scales", dist.HalfCauchy(1.0))
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0))
    offsets = pyro.sample("offsets", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(tau * own * weights + offsets, 1.0).to_event(1), obs=y)


def random_guide(model: Any = scales, **options: Any) -> AutoFlowGuide:
    pyro.clear_param_store()
    guide = AutoFlowGuide(model, **options).setup(Y)
    randomize_parameters(guide, 0.1)
    return guide


def draws(guide: AutoFlowGuide) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        pyro.set_rng_seed(5)
        return guide.sample_posterior(4, Y)


def assert_same(one: AutoFlowGuide, other: AutoFlowGuide) -> None:
    expected = draws(other)
    for name, found in draws(one).items():
        torch.testing.assert_close(found, expected[name], rtol=0.0, atol=0.0)


def test_the_distribution_stays_and_can_be_trained() -> None:
    guide = random_guide()
    values = draws(guide)
    expected = guide.log_prob(values, Y)
    assert guide.posterior.can_widen
    guide.posterior.widen()
    assert not guide.posterior.can_widen
    for name, found in draws(guide).items():
        torch.testing.assert_close(found, values[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guide.log_prob(values, Y), expected, rtol=1e-5, atol=1e-4)
    inserted = guide.posterior.joint.flow.transform.inserted
    inner, outer = inserted["0"], inserted["1"]
    assert isinstance(inner, Chain) and isinstance(outer, Chain)
    assert [type(part) for part in inner] == [AffineCouplings, DirectedCouplings]
    (items,) = outer
    assert isinstance(items, ItemCouplings)
    assert items.coordinates.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # scales, weights, offsets
    assert items.shared.tolist() == [0]  # tau
    before = [p.detach().clone() for p in inserted.parameters()]
    svi = SVI(scales, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        svi.step(Y)
    assert all((p != q).any() for p, q in zip(before, inserted.parameters(), strict=True))


def test_states_files_stores_and_copies_carry_the_layers_along(tmp_path: Path) -> None:
    guide = random_guide(name="mine")
    narrow = copy.deepcopy(guide.state_dict())
    guide.posterior.widen()
    randomize_parameters(guide, 0.1)
    guide(Y)  # puts the parameters in the store
    guide.save(tmp_path / "guide.pt")
    state = pyro.get_param_store().get_state()
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert_same(twin, guide)
    loaded = random_guide()
    loaded.load_state_dict(guide.state_dict())
    assert_same(loaded, guide)
    assert_same(AutoFlowGuide.load(tmp_path / "guide.pt", scales, (Y,)), guide)
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    adopted = AutoFlowGuide(scales, name="mine").setup(Y)
    adopted(Y)
    assert_same(adopted, guide)
    # And back: a state without them.
    guide.load_state_dict(narrow)
    assert guide.posterior.can_widen
    other = random_guide()
    other.load_state_dict(narrow)
    assert_same(other, guide)


@pytest.mark.parametrize("how", ["load_state_dict", "adopt"])
def test_a_store_forgets_layers_that_went(how: str) -> None:
    guide = random_guide(name="mine")
    narrow = copy.deepcopy(guide.state_dict())
    guide.posterior.widen()
    guide(Y)  # puts the parameters in the store
    if how == "load_state_dict":
        guide.load_state_dict(narrow)
    else:
        guide.posterior.adopt({name.removeprefix("posterior."): value.shape for name, value in narrow.items()})
        guide(Y)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    adopted = AutoFlowGuide(scales, name="mine").setup(Y)
    adopted(Y)
    assert adopted.posterior.can_widen
    assert_same(adopted, guide)


def test_a_state_that_is_loaded_leaves_a_store_that_was_loaded_before(tmp_path: Path) -> None:
    guide = random_guide(name="mine")
    narrow = copy.deepcopy(guide.state_dict())
    guide.posterior.widen()
    randomize_parameters(guide, 0.1)
    guide(Y)
    twin, store = copy.deepcopy(guide), pyro.get_param_store()
    store.save(str(tmp_path / "store.pt"))
    pyro.clear_param_store()
    store.load(str(tmp_path / "store.pt"))
    guide.load_state_dict(narrow)
    guide(Y)  # takes the parameters over from the store, as a guide with a name does
    assert_same(guide, twin)


def test_compiled_steps_train_layers_that_came_later_and_not_those_that_went() -> None:
    guide = random_guide()
    narrow = copy.deepcopy(guide.state_dict())
    svi = CompiledSVI(scales, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        svi.step(Y)
    guide.posterior.widen()
    for state in (None, narrow):
        if state is not None:
            guide.load_state_dict(state)
        before = {name: p.detach().clone() for name, p in guide.named_parameters() if not isinstance(p, FixedParameter)}
        for _ in range(3):
            svi.step(Y)
        still = [name for name, p in guide.named_parameters() if name in before and torch.equal(p, before[name])]
        assert not still, still


def test_a_state_of_other_parts_leaves_the_layers() -> None:
    guide = random_guide()
    guide.posterior.widen()
    guide.load_state_dict({}, strict=False)
    assert not guide.posterior.can_widen


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y), subsample_size=2) as rows:
        theta = pyro.sample("theta", dist.Normal(mu, 5.0))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y[rows])


def single(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(mu, 10.0), obs=y)


@pytest.mark.parametrize(
    "model, flow",
    [(schools, "diagonal_normal"), (schools, "realnvp"), (single, "auto"), (subsampled, "auto")],
    ids=["normal", "another family", "one dimension", "local latents"],
)
def test_no_wider_flow(model: Any, flow: str) -> None:
    pyro.clear_param_store()
    assert not AutoFlowGuide(model, flow).setup(Y).posterior.can_widen


def test_no_couplings_within_items_of_a_single_latent() -> None:
    guide = random_guide(schools)
    guide.posterior.widen()
    assert list(guide.posterior.joint.flow.transform.inserted) == ["0"]


@pytest.mark.parametrize(
    "items, shared, match",
    [
        ([[0], [1]], None, r"shape \(num_items, m\)"),
        ([[0, 1], [1, 2]], None, "each once"),
        ([[0, 4]], None, "each once"),
        ([[0, 1]], [1], "each once"),
    ],
)
def test_items_that_are_none(items: list[list[int]], shared: list[int] | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ItemCouplings(4, torch.tensor(items), None if shared is None else torch.tensor(shared))
