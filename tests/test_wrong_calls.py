# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of the whole public interface: each raises our own error, which says what was expected and what came,
before anything is trained. None ends in a traceback from inside of torch, Pyro or Python, and none is accepted.

The tables are in ``wrong_calls/``, by area. Calls that look wrong and are right are at the end.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import pyro_flows
from pyro_flows import AutoFlowGuide, __main__, diagnose, plots
from pyro_flows.diagnostics import pareto_smooth
from tests.wrong_calls import figures, guides, inference, loops, parts, predictions
from tests.wrong_calls.programs import X, Y, hierarchy, pair, ready, regression, supports

PACKAGE = Path(pyro_flows.__file__).parent
TABLES = {
    "guides": guides,
    "inference": inference,
    "loops": loops,
    "predictions": predictions,
    "figures": figures,
    "parts": parts,
}
ROWS = {f"{area}: {name}": row for area, table in TABLES.items() for name, row in table.CALLS.items()}
# Seconds of a call, at most; one that trains takes several times as long.
MAX_SECONDS = 5.0
MAX_LENGTH = 900


@pytest.fixture(autouse=True)
def figures_are_closed() -> Iterator[None]:
    plt = pytest.importorskip("matplotlib.pyplot")
    yield
    if len(plt.get_fignums()) > 10:
        plt.close("all")


@pytest.fixture
def untrained() -> Iterator[None]:
    """Fails where an optimizer takes a step."""

    def refuse(*args: Any) -> None:
        pytest.fail("An optimizer took a step.")

    hook = register_optimizer_step_pre_hook(refuse)
    yield
    hook.remove()


@pytest.mark.usefixtures("untrained")
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # NumPy's, of a tensor times an array
@pytest.mark.parametrize(("call", "kind", "words"), ROWS.values(), ids=ROWS)
def test_a_wrong_call_gets_our_own_error(
    call: Callable[[], Any], kind: type[Exception], words: str, request: pytest.FixtureRequest
) -> None:
    if "to_inference_data" in request.node.name or "export" in request.node.name:
        pytest.importorskip("arviz")
    begin = time.process_time()
    with pytest.raises(kind) as caught:
        call()
    assert time.process_time() - begin < MAX_SECONDS
    assert type(caught.value) is kind
    text = str(caught.value)
    assert re.search(words, text, re.DOTALL), text
    assert len(text) < MAX_LENGTH, text
    place = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(place.filename).is_relative_to(PACKAGE), f"raised in {place.filename}, line {place.lineno}"


def test_the_tables_are_large() -> None:
    assert len(ROWS) >= 1200


COMMANDS = {
    "no steps": (["--steps", "0"], r"--steps: expected an integer >= 1, but got '0'"),
    "negative steps": (["--steps=-5"], r"--steps: expected an integer >= 1, but got '-5'"),
    "steps as a word": (["--steps", "many"], r"--steps: expected an integer >= 1, but got 'many'"),
    "steps as a float": (["--steps", "1.5"], r"--steps: expected an integer >= 1, but got '1.5'"),
    "a negative seed": (["--seed=-1"], r"--seed: expected an integer in \[0, 4294967295\], but got '-1'"),
    "a seed as a word": (["--seed", "a"], r"--seed: expected an integer in \[0, 4294967295\], but got 'a'"),
    "a large seed": (["--seed", str(2**32)], r"--seed: expected an integer in \[0, 4294967295\], but got '4294967296'"),
    "an unknown flow": (["--flow", "nsf"], r"--flow: invalid choice: 'nsf'"),
    "a flow that draws dimension by dimension": (["--flow", "maf"], r"--flow: invalid choice: 'maf'"),
    "a missing folder": (["--out", "/no/such/folder/x.png"], r"--out: expected a file in an existing folder.*x\.png"),
    "a folder": (["--out", "/"], r"--out: expected a file in an existing folder, but got /"),
    "an unknown format": (["--out", "x.xyz"], r"--out: expected a file that ends in one of .*\.png.*but got x\.xyz"),
    "no format": (["--out", "figure"], r"--out: expected a file that ends in one of .*\.png.*but got figure"),
    "an unknown option": (["--stepss", "3"], r"unrecognized arguments: --stepss"),
    "an option without a value": (["--seed"], r"--seed: expected one argument"),
    "a word": (["run"], r"unrecognized arguments: run"),
}


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("argv", "words"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(argv)
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)


# Values outside of the support


OUTSIDE = {
    "a negative scale": ("tau", [-1.0]),
    "a scale of zero": ("tau", [0.0]),
    "an infinite scale": ("tau", [float("inf")]),
    "a probability above one": ("p", [1.5]),
    "a negative probability": ("p", [-0.1]),
    "above a bound": ("u", [5.0]),
    "below a bound": ("u", [-1.001]),
    "a sum above one": ("w", [[0.5, 0.5, 0.5]]),
    "a negative part": ("w", [[-0.5, 0.5, 1.0]]),
    "a part of zero": ("w", [[0.0, 0.5, 0.5]]),
}


@pytest.mark.parametrize(("site", "values"), OUTSIDE.values(), ids=OUTSIDE)
def test_density_outside_of_the_support(site: str, values: list[Any]) -> None:
    """It is zero there, and what it is elsewhere does not depend on it."""
    guide = ready(supports)
    inside = {name: value.detach() for name, value in guide.sample_posterior(3).items()}
    expected = guide.log_prob(inside)
    assert expected.isfinite().all()
    mixed = {**inside, site: torch.cat([torch.tensor(values), inside[site][1:]])}
    found = guide.log_prob(mixed)
    assert found[0].item() == -float("inf")
    torch.testing.assert_close(found[1:], expected[1:])
    found[1:].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters())
    guide.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_guide_s_own_draws_are_in_the_support(dtype: torch.dtype) -> None:
    def model() -> None:
        ones = torch.ones(60, dtype=dtype)
        pyro.sample("w", dist.Dirichlet(ones))
        pyro.sample("u", dist.Uniform(-3.0 * ones, 7.0 * ones).to_event(1))
        pyro.sample("corr", dist.LKJCholesky(12, ones[0]))
        pyro.sample("tau", dist.Gamma(0.01 * ones, 0.01 * ones).to_event(1))

    guide = AutoFlowGuide(model, init_scale=0.5)
    draws = guide.sample_posterior(500)
    assert guide.log_prob(draws).isfinite().all()


# What is right, though it may not look so


def test_numbers_of_numpy_are_numbers() -> None:
    assert len(ready().sample_posterior(np.int64(3))["b"]) == 3
    guide = AutoFlowGuide(regression, init_scale=np.float32(0.5)).setup(X, Y)
    assert guide.init_scale == 0.5
    report = diagnose(regression, guide, (X, Y), num_samples=np.int32(100), seed=np.int64(3), progress=np.bool_(False))
    assert report.num_samples == 100


def test_keyword_arguments_may_be_any_mapping() -> None:
    one = diagnose(regression, ready(), (X,), MappingProxyType({"y": Y}), num_samples=100, seed=0, progress=False)
    two = diagnose(regression, ready(), (X, Y), num_samples=100, seed=0, progress=False)
    assert one.elbo == two.elbo


def test_negative_seeds_are_torch_s() -> None:
    one, two = (diagnose(pair, ready(pair), num_samples=100, search=False, seed=seed) for seed in (-1, 2**64 - 1))
    assert one.elbo == two.elbo


def test_values_of_a_density_may_be_numbers_and_of_another_dtype() -> None:
    guide = ready()
    expected = guide.log_prob({"b": torch.tensor(0.5)})
    for value in (0.5, np.array(0.5), torch.tensor(0.5, dtype=torch.float64)):
        torch.testing.assert_close(guide.log_prob({"b": value}), expected, check_dtype=False)


def test_plates_may_come_in_a_tuple_and_indices_as_a_list() -> None:
    def model(y: Tensor, index: list[int]) -> None:
        with pyro.plate("items", len(y), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def plates(y: Tensor, index: list[int]) -> tuple[pyro.plate]:
        return (pyro.plate("items", len(y), subsample=index),)

    guide = AutoFlowGuide(model, create_plates=plates)
    assert guide(Y, [0, 3])["z"].shape == (2,)
    assert guide(Y, [1, 2, 5])["z"].shape == (3,)
    with pytest.raises(ValueError, match=r"indices of plate 'items' in \[0, 7\], but got 8"):
        guide(Y, [1, 8])


def test_weights_without_a_tail() -> None:
    assert pareto_smooth(torch.zeros(1)).khat == 0.0
    assert pareto_smooth(torch.full((100,), -float("inf"))).khat == float("inf")


def test_an_auxiliary_site_of_the_guide_is_its_own() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 0.1), infer={"is_auxiliary": True})
        pyro.sample("b", dist.Normal(1.0 + shift, 0.5))

    assert diagnose(regression, guide, (X, Y), num_samples=100, progress=False).elbo < 0.0


def test_a_guide_may_have_a_point_at_what_the_model_computes() -> None:
    def model(y: Tensor) -> None:
        half = pyro.sample("half", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(pyro.deterministic("whole", 2.0 * half), 1.0), obs=y.sum())

    def guide(y: Tensor) -> None:
        half = pyro.sample("half", dist.Normal(0.0, 1.0))
        pyro.sample("whole", dist.Delta(2.0 * half))

    assert diagnose(model, guide, (Y,), num_samples=100, progress=False).elbo < 0.0


def test_a_number_of_a_tensor_is_a_number_in_a_figure() -> None:
    ax = plots.training(torch.tensor([3.0, 2.0, 1.0]), gaussian=torch.tensor(-2.0))
    assert ax.get_ylabel() == "ELBO (nats)"


def test_a_refused_call_leaves_the_guide_as_it_was() -> None:
    guide = AutoFlowGuide(hierarchy)
    with pytest.raises(TypeError, match="arguments that model takes"):
        guide()
    with pytest.raises(TypeError, match="values to be a dictionary"):
        guide.log_prob(None, Y)
    assert guide.prototype_trace is None
    assert guide(Y)["theta"].shape == (8,)


def test_one_subclass_is_named_by_its_own_name() -> None:
    class Mine(AutoFlowGuide):
        pass

    with pytest.raises(ValueError, match="Mine: expected init_scale to be a number > 0"):
        Mine(regression, init_scale=0.0)
