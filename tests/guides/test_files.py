# SPDX-License-Identifier: Apache-2.0
"""A guide's file gives the same guide, or an error that says what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, flows
from pyro_flows.flows.recipe import Recipe
from tests.common import randomize_parameters, schools

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def items(index: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", 12, subsample=index):
        pyro.sample("theta", dist.Normal(mu, 5.0))


def plate_of(index: Tensor) -> Any:
    return pyro.plate("groups", 12, subsample=index)


def points(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def encoder() -> torch.nn.Module:
    return torch.nn.Linear(2, 5)


def planar(input_dim: int) -> Any:
    return [T.planar(input_dim)]


SMALL = flows.get("auto", hidden_dims=(4, 4), coupling_dims=(4, 4))
# Model, its arguments, and options that the file has; those that are given again.
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "auto": (schools, (Y,), {"flow": "auto"}, dict),
    "a spec": (schools, (Y,), {"flow": SMALL, "init_scale": 0.3, "path_gradient": False}, dict),
    "mixture": (schools, (Y,), {"flow": flows.get("realnvp", base=flows.Mixture(num_components=3))}, dict),
    "all local": (schools, (Y,), {"flow": SMALL, "structure": "plates"}, dict),
    "mini-batches": (items, (torch.arange(4),), {"flow": SMALL}, lambda: {"create_plates": plate_of}),
    "amortized": (points, (torch.randn(7, 2),), {"flow": SMALL}, lambda: {"amortize": {"data": encoder()}}),
    "a function": (schools, (Y,), {}, lambda: {"flow": planar}),
}


def draws(guide: AutoFlowGuide, args: tuple[Any, ...]) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return guide.sample_posterior(5, *args)


def trained(name: str) -> AutoFlowGuide:
    model, args, options, again = CASES[name]
    guide = AutoFlowGuide(model, **options, **again())
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(*args)
    guide.warm_start(*args) if name == "auto" else None
    randomize_parameters(guide, 0.1)
    return guide


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_guide_is_the_same(name: str, tmp_path: Path) -> None:
    model, args, _, again = CASES[name]
    guide = trained(name)
    guide.save(tmp_path / "guide.pt")
    pyro.clear_param_store()
    options, state = again(), torch.random.get_rng_state()
    loaded = AutoFlowGuide.load(tmp_path / "guide.pt", model, args, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    found, expected = draws(loaded, args), draws(guide, args)
    for site, value in expected.items():
        assert torch.equal(found[site], value), site
    if name != "a function":
        assert torch.equal(loaded.log_prob(expected, *args), guide.log_prob(expected, *args))
    assert (loaded.init_scale, loaded.path_gradient) == (guide.init_scale, guide.path_gradient)
    # It trains on.
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    SVI(model, loaded, Adam({"lr": 0.01}), Trace_ELBO()).step(*args)
    assert any((value != before[key]).any() for key, value in loaded.state_dict().items())


def test_parameters_in_the_store_are_replaced_by_those_of_the_file(tmp_path: Path) -> None:
    guide = AutoFlowGuide(schools, "diagonal_normal", name="posterior").setup(Y)
    guide(Y)
    guide.save(tmp_path / "guide.pt")
    expected = draws(guide, (Y,))
    SVI(schools, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(Y)  # the store has others now
    loaded = AutoFlowGuide.load(tmp_path / "guide.pt", schools, (Y,))
    loaded(Y)
    assert torch.equal(draws(loaded, (Y,))["theta"], expected["theta"])
    assert pyro.get_param_store()["posterior.posterior.joint.flow.transform.parts.0.raw.value"].shape


def other_prior(y: Tensor) -> None:
    pyro.sample("mu", dist.HalfNormal(5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        pyro.sample("theta", dist.Normal(0.0, tau))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "data": ("a spec", {"args": (Y[:3],)}, r"site 'theta' is of shape \(4\) in plate 'schools'.* and of shape \(3\)"),
    "model": ("a spec", {"model": other_prior}, "site 'mu' is of shape .* there and of shape"),
    "no arguments for a function": ("a function", {"flow": None}, r"can be made anew.*planar.*flow=\.\.\."),
    "flow": ("a spec", {"flow": "realnvp"}, "a guide with flow=realnvp.*but it has auto"),
    "no encoder": ("amortized", {"amortize": None}, r"encoders for \[\], but it has them for \['data'\]"),
    "another encoder": ("amortized", {"amortize": {"data": torch.nn.Linear(2, 6)}}, r"'encoders\.plate_data.*shape"),
    "no create_plates": ("mini-batches", {"create_plates": None}, "was made with create_plates"),
}


@pytest.mark.parametrize(("name", "changed", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(name: str, changed: dict[str, Any], text: str, tmp_path: Path) -> None:
    model, args, _, again = CASES[name]
    trained(name).save(tmp_path / "guide.pt")
    options = {"model": model, "args": args, **again(), **changed}
    with pytest.raises(ValueError, match=rf"AutoFlowGuide\.load: expected '.*guide\.pt' to .*{text}"):
        AutoFlowGuide.load(tmp_path / "guide.pt", **options)


def test_precision_is_named(tmp_path: Path) -> None:
    trained("a spec").save(tmp_path / "guide.pt")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"torch\.float32 of .* there and torch\.float64 .*set_default_dtype"):
            AutoFlowGuide.load(tmp_path / "guide.pt", schools, (Y.double(),))
    finally:
        torch.set_default_dtype(torch.float32)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-900]), "it was cut off"),
    "damaged": (lambda path: path.write_bytes(path.read_bytes().replace(b"mu", b"nu", 1)), "its checksum is wrong"),
    "text": (lambda path: path.write_text("x = 1"), "something else has written it"),
    "state_dict": (lambda path: torch.save({"weight": Y}, path), r"call guide\.load_state_dict"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
}


@pytest.mark.parametrize(("spoil", "text"), FILES.values(), ids=FILES)
def test_what_is_not_a_guide_is_refused(spoil: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "guide.pt"
    AutoFlowGuide(schools, SMALL).setup(Y).save(path)
    spoil(path)
    with pytest.raises(ValueError, match=rf"AutoFlowGuide\.load: expected '.*guide\.pt' to .*{text}"):
        AutoFlowGuide.load(path, schools, (Y,))


def test_saving_says_what_is_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Call `guide.setup\(\*args, \*\*kwargs\)`"):
        AutoFlowGuide(schools).save(tmp_path / "guide.pt")
    guide = AutoFlowGuide(schools, SMALL).setup(Y)
    with pytest.raises(ValueError, match=r"AutoFlowGuide\.save: expected '.*none/guide\.pt'.*No such file"):
        guide.save(tmp_path / "none" / "guide.pt")
    with pytest.raises(ValueError, match="Is a directory"):
        guide.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"AutoFlowGuide\.save: expected path to be the path of a file, but got 3"):
        guide.save(3)  # type: ignore[arg-type]


def test_a_state_dict_needs_a_guide_that_is_set_up() -> None:
    state = AutoFlowGuide(schools, SMALL).setup(Y).state_dict()
    with pytest.raises(RuntimeError, match=r"set up before a state_dict is loaded.*Call `guide\.setup"):
        AutoFlowGuide(schools, SMALL).load_state_dict(state)
    several = AutoGuideList(schools)
    several.append(AutoFlowGuide(pyro.poutine.block(schools, hide=["y"]), SMALL))
    with pytest.raises(RuntimeError, match="set up before a state_dict is loaded"):
        several.load_state_dict({f"0.{name}": value for name, value in state.items()})


@pytest.mark.parametrize("name", flows.names())
def test_recipes_are_the_specs(name: str) -> None:
    for base in ("normal", flows.StudentT(df=7.0)):
        spec = flows.get(name, base=base)
        recipe = Recipe.of(spec)
        assert recipe.spec() == spec and recipe.title.startswith(f"{name}(")
        assert Recipe(recipe.family, dict(recipe.hyper), recipe.title).spec() == spec
