# SPDX-License-Identifier: Apache-2.0
"""Many draws in one run of a model have the densities, gradients and values of a run each, however it is run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor, nn

from pyro_flows.models.batching import ENUMERATED, BatchedModel
from pyro_flows.models.traces import Call, by_draw, sample_nodes

X = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
Y = torch.tensor([0.3, -0.2, 0.9, 1.4, -0.7, 0.1])
GROUP = torch.tensor([0, 1, 2, 0, 1, 2])
COUNT = 5


def broadcasting(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def matrix_product(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


def indexing(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[GROUP], 0.5), obs=y)


def factor_of_a_sum(y: Tensor) -> None:
    """In an outer plate the sum is over draws as well, without an error."""
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("soft", -0.5 * a.sum().square())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def stacked_walk(y: Tensor) -> None:
    """In an outer plate the steps are stacked in front of the draws."""
    steps = [pyro.sample("x_0", dist.Normal(0.0, 1.0))]
    for time in range(1, len(y)):
        steps.append(pyro.sample(f"x_{time}", dist.Normal(steps[-1], 0.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(steps), 0.3), obs=y)


def written_in_place(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = torch.zeros(len(y))
    for item, group in enumerate(GROUP.tolist()):
        mean[item] = a[group]
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def counted(y: Tensor) -> None:
    """torch's ``Multinomial`` writes where its logits have no density."""
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    weights = torch.stack([a[0] + a[1], a[1] + a[2], a[2] + a[0]])  # not for a batch of draws
    pyro.sample("y", dist.Multinomial(3, logits=weights), obs=torch.tensor([2.0, 0.0, 1.0]))


def masked(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = a[GROUP].clone()
    mean[mean < 0.0] = 0.0
    mean[mean > 1.0] = a.sum()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def with_missing(y: Tensor) -> Tensor:
    """Three of the values are missing."""
    return torch.where(torch.arange(len(y)) % 2 == 0, torch.nan, y)


def imputed(y: Tensor) -> None:
    """Missing data, filled in as users do: in a copy, where a mask of the data says."""
    y = with_missing(y)
    missing = y.isnan()
    a = pyro.sample("a", dist.Normal(torch.zeros(int(missing.sum())), 1.0).mask(False).to_event(1))
    filled = y.clone()
    filled[missing] = a
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 0.5), obs=filled)


def imputed_where_missing(y: Tensor) -> None:
    """The same in a matrix, of which the mask is that of the copy."""
    y = torch.stack([with_missing(y), torch.ones(len(y))], -1)
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).mask(False).to_event(1))
    filled = y.nan_to_num(-9.0)
    filled[filled == -9.0] = a
    rows = y.clone()
    rows[rows[:, 0].isnan()] = torch.stack([a, 2.0 * a], -1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 0.5).expand([2]).to_event(1), obs=filled)
        pyro.sample("rows", dist.Normal(0.0, 0.5).expand([2]).to_event(1), obs=rows)


def steered(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0 if mu.item() > 0.0 else 2.0), obs=y)


class Case(NamedTuple):
    model: Callable[..., Any]
    way: str
    shapes: dict[str, tuple[int, ...]]


CASES = {
    "broadcasts": Case(broadcasting, "_in_a_plate", {"loc": ()}),
    "matrix product": Case(matrix_product, "_by_vmap", {"w": (2,)}),
    "indexing": Case(indexing, "_by_vmap", {"a": (3,)}),
    "factor of a sum": Case(factor_of_a_sum, "_by_vmap", {"a": (3,)}),
    "stacked walk": Case(stacked_walk, "_by_vmap", {f"x_{time}": () for time in range(6)}),
    "in place": Case(written_in_place, "_by_vmap_in_place", {"a": (3,)}),
    "counted": Case(counted, "_by_vmap_in_place", {"a": (3,)}),
    "masked": Case(masked, "_by_vmap_in_place", {"a": (3,)}),
    "imputed": Case(imputed, "_by_vmap_in_place", {"a": (3,)}),
    "imputed where missing": Case(imputed_where_missing, "_by_vmap_in_place", {"a": (3,)}),
    "steered": Case(steered, "_one_by_one", {"mu": ()}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draws_of(shapes: dict[str, tuple[int, ...]], count: int = COUNT) -> dict[str, Tensor]:
    return {name: torch.randn(count, *shape) for name, shape in shapes.items()}


def run_at(model: Callable[..., Any], values: dict[str, Tensor], *args: Any) -> dict[str, dict[str, Any]]:
    """Sample sites of a plain run, with log densities."""
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args)
    trace.compute_log_prob()
    return sample_nodes(trace)


def total(batched: BatchedModel, values: dict[str, Tensor], **options: Any) -> Tensor:
    """Log joint, ``(S,)``."""
    return torch.stack([by_draw(n["log_prob"]) for n in sample_nodes(batched(values, **options)).values()]).sum(0)


@every_case
def test_the_way_that_a_model_is_run(case: Case) -> None:
    batched = BatchedModel("test", case.model, Call((Y,), {}), draws_of(case.shapes, 3))
    assert batched._run.__name__ == case.way
    assert batched.is_vectorized == (case.way != "_one_by_one") == (not batched.obstacle)
    assert batched.is_mapped == case.way.startswith("_by_vmap")


@every_case
def test_sites_and_gradients_are_those_of_plain_runs(case: Case) -> None:
    batched = BatchedModel("test", case.model, Call((Y,), {}), draws_of(case.shapes, 3))
    values = {name: value.requires_grad_() for name, value in draws_of(case.shapes).items()}
    found = sample_nodes(batched(values))
    singles = [run_at(case.model, {name: value[row] for name, value in values.items()}, Y) for row in range(COUNT)]
    assert set(found) == set(singles[0])
    for name, node in found.items():
        assert node["log_prob"].shape[0] == COUNT and node["log_prob"].dim() == batched.nesting + 1
        expected = torch.stack([single[name]["log_prob"] for single in singles])
        torch.testing.assert_close(node["log_prob"].reshape(expected.shape), expected)
    gradients = torch.autograd.grad(total(batched, values).sum(), list(values.values()))
    log_joint = sum(node["log_prob"].sum() for single in singles for node in single.values())
    for gradient, expected in zip(gradients, torch.autograd.grad(log_joint, list(values.values())), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_an_obstacle_names_the_line() -> None:
    batched = BatchedModel("test", steered, Call((Y,), {}), draws_of({"mu": ()}, 3))
    assert batched.obstacle.startswith("test_batching.py, line ")
    assert "mu.item() > 0.0" in batched.obstacle
    assert "a value of a tensor steers Python" in batched.obstacle


def test_an_obstacle_names_the_site_whose_density_differs() -> None:
    calls = iter(range(1000))

    def by_calls(y: Tensor) -> None:
        """Another density wherever there are draws: a state that no way of running can share."""
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        next(calls)
        pyro.factor("odd", -loc.reshape(-1)[0] if loc.dim() or torch._C._functorch.is_batchedtensor(loc) else loc)

    batched = BatchedModel("test", by_calls, Call((Y,), {}), draws_of({"loc": ()}, 3))
    assert batched.obstacle == "site 'odd' has another log density where draws share a run"
    values = draws_of({"loc": ()})
    expected = torch.stack(
        [sum(n["log_prob"] for n in run_at(by_calls, {"loc": v}, Y).values()) for v in values["loc"]]
    )
    torch.testing.assert_close(total(batched, values), expected)


# Models that draw numbers of their own


@pytest.mark.parametrize("by_matrix", [False, True], ids=["plate", "vmap"])
def test_models_that_draw_numbers_of_their_own(by_matrix: bool) -> None:
    """Agreement is on average, and every draw has numbers of its own."""

    def noisy(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = X @ w if by_matrix else (X * w).sum(-1)
        with pyro.plate("data", len(y)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mean + noise, 1.0), obs=y)

    batched = BatchedModel("test", noisy, Call((Y,), {}), draws_of({"w": (2,)}, 3))
    assert batched.is_vectorized and batched.is_mapped == by_matrix
    values = {"w": torch.tensor([0.5, -1.0]).expand(2000, 2)}
    found = total(batched, values)
    assert len(found.unique()) > 1900
    expected = torch.stack(
        [
            torch.stack([n["log_prob"].sum() for n in run_at(noisy, {"w": w}, Y).values()]).sum()
            for w in values["w"][:500]
        ]
    )
    error = (found.var() / len(found) + expected.var() / len(expected)).sqrt()
    assert (found.mean() - expected.mean()).abs() < 4 * error


# Draws that the model refuses


def covariance(y: Tensor) -> None:
    """Not positive definite where ``|r| >= 1``."""
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    matrix = torch.eye(2) + r * (1.0 - torch.eye(2))
    mean = torch.linalg.cholesky(matrix) @ torch.ones(2)
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def test_a_refused_draw_costs_itself_only() -> None:
    batched = BatchedModel("test", covariance, Call((Y[:2],), {}), {"r": torch.tensor([0.1, -0.2, 0.3])})
    assert batched.is_mapped
    r = torch.tensor([0.5, 3.0, -0.4, 0.2, -2.0]).requires_grad_()
    log_joint = total(batched, {"r": r})
    kept = torch.tensor([True, False, True, True, False])
    assert log_joint.isnan().equal(~kept)
    (gradient,) = torch.autograd.grad(log_joint[kept].sum(), r)
    for row in kept.nonzero().squeeze(-1):
        one = r.detach()[row].requires_grad_()
        expected = sum(node["log_prob"].sum() for node in run_at(covariance, {"r": one}, Y[:2]).values())
        torch.testing.assert_close(log_joint[row], expected)
        torch.testing.assert_close(gradient[row], torch.autograd.grad(expected, one)[0])
    assert gradient[kept].isfinite().all()


def test_a_probe_that_is_refused_says_nothing() -> None:
    batched = BatchedModel("test", covariance, Call((Y[:2],), {}), {"r": torch.tensor([5.0, -0.2, 0.3])})
    assert batched.is_mapped
    with pytest.raises(torch.linalg.LinAlgError):
        BatchedModel("test", covariance, Call((Y[:2],), {}), {"r": torch.tensor([5.0, 6.0])})


# Parameters, mini-batches, other models


@pytest.mark.parametrize("by_matrix", [False, True], ids=["plate", "vmap"])
def test_parameters_are_in_the_trace_and_have_gradients(by_matrix: bool) -> None:
    layer = nn.Linear(2, 1)

    def model(y: Tensor) -> None:
        net = pyro.module("net", layer)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = X @ w if by_matrix else (X * w).sum(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean + net(X).squeeze(-1), scale), obs=y)

    batched = BatchedModel("test", model, Call((Y,), {}), draws_of({"w": (2,)}, 3))
    assert batched.is_mapped == by_matrix
    values = draws_of({"w": (2,)})
    trace = batched(values)
    assert set(trace.param_nodes) == {"scale", "net$$$weight", "net$$$bias"}
    leaves = [pyro.param("scale").unconstrained(), *layer.parameters()]
    found = torch.autograd.grad(trace.log_prob_sum(), leaves)
    singles = [run_at(model, {"w": w}, Y)["y"]["log_prob"].sum() for w in values["w"]]
    for gradient, expected in zip(found, torch.autograd.grad(torch.stack(singles).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("by_index", [False, True], ids=["plate", "vmap"])
def test_mini_batches_of_other_sizes(by_index: bool) -> None:
    def model(index: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(Y), subsample=index):
            mean = a[GROUP[index]] if by_index else a[..., GROUP[index]]
            pyro.sample("y", dist.Normal(mean, 0.5), obs=Y[index])

    index = torch.tensor([0, 2, 5])
    batched = BatchedModel("test", model, Call((index,), {}), draws_of({"a": (3,)}, 3))
    values = draws_of({"a": (3,)})
    for index in (torch.tensor([1, 3, 4, 5]), torch.tensor([2])):
        expected = [sum(n["log_prob"].sum() for n in run_at(model, {"a": a}, index).values()) for a in values["a"]]
        torch.testing.assert_close(total(batched, values, call=Call((index,), {})), torch.stack(expected))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by_matrix", [False, True], ids=["plate", "vmap"])
def test_mini_batches_that_the_model_draws(by_matrix: bool, seed: int) -> None:
    """Ways are compared on one of them: what they differ by hid that ways agree, or do not, whatever the seed."""
    pyro.set_rng_seed(seed)
    covariates, data = torch.randn(200, 2), 3.0 * torch.randn(200)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 200, subsample_size=10) as index:
            mean = covariates[index] @ w if by_matrix else (covariates[index] * w).sum(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=data[index])

    def wrong() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("soft", -0.1 * w.sum().square())
        with pyro.plate("data", 200, subsample_size=10) as index:
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=data[index])

    batched = BatchedModel("test", model, Call((), {}), draws_of({"w": (2,)}, 3))
    assert batched.is_vectorized and batched.is_mapped == by_matrix
    assert BatchedModel("test", wrong, Call((), {}), draws_of({"w": (2,)}, 3)).is_mapped
    # Which mini-batch it was is forgotten.
    values = {"w": torch.zeros(1, 2)}
    assert len({total(batched, values).item() for _ in range(5)}) == 5


def test_another_model_with_the_same_sites() -> None:
    batched = BatchedModel("test", matrix_product, Call((Y,), {}), draws_of({"w": (2,)}, 3))
    values = draws_of({"w": (2,)})
    found = total(batched, values, model=poutine.scale(matrix_product, scale=0.25))
    torch.testing.assert_close(found, 0.25 * total(batched, values))


# Reading


@every_case
def test_values_are_those_of_plain_runs(case: Case) -> None:
    batched = BatchedModel("test", case.model, Call((Y,), {}), draws_of(case.shapes, 3))
    values = draws_of(case.shapes)
    found = batched.read(values, lambda trace: {n: trace.nodes[n]["value"] for n in case.shapes}, case.shapes)
    for name, value in values.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("case", [CASES["broadcasts"], CASES["indexing"]], ids=["plate", "vmap"])
def test_new_data_have_their_distribution(case: Case) -> None:
    """Each draw has data of its own, around its own mean."""
    count = 2000
    batched = BatchedModel("test", case.model, Call((Y,), {}), draws_of(case.shapes, 3))
    (name,) = case.shapes
    values = {name: torch.tensor([1.0, -1.0, 0.5])[: math.prod(case.shapes[name])].reshape(case.shapes[name])}
    mean = values["a"][GROUP] if name == "a" else values["loc"].expand(6)
    scale = 0.5 if name == "a" else 1.0
    values = {name: values[name].expand(count, *case.shapes[name])}
    found = batched.read(
        values,
        lambda trace: {"y": trace.nodes["y"]["value"]},
        {"y": (6,)},
        model=poutine.uncondition(case.model),
    )["y"]
    assert found.shape == (count, 6)
    assert len(found[:, 0].unique()) > 0.99 * count
    assert ((found.mean(0) - mean).abs() < 4.5 * scale / math.sqrt(count)).all()
    assert ((found.std(0) / scale - 1.0).abs() < 4.5 / math.sqrt(2 * count)).all()
    # Neither rows nor data share noise.
    correlation = torch.corrcoef(found.T) - torch.eye(6)
    assert correlation.abs().max() < 4.5 / math.sqrt(count)


# Enumeration


@pytest.mark.parametrize("by_index", [False, True], ids=["plate", "vmap"])
def test_enumerated_sites_are_summed_out(by_index: bool) -> None:
    @config_enumerate
    def model(y: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Bernoulli(0.3)).long()
            mean = locs[which] if by_index else torch.where(which == 1, locs[..., 1], locs[..., 0])
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    batched = BatchedModel("test", model, Call((Y,), {}), draws_of({"locs": (2,)}, 3))
    assert batched.enumerated == ("which",)
    assert batched.is_vectorized and batched.is_mapped == by_index
    values = {"locs": torch.randn(COUNT, 2, requires_grad=True)}
    nodes = sample_nodes(batched(values))
    assert all(name == "locs" or name.startswith(ENUMERATED) for name in nodes)
    parts = dist.Normal(values["locs"].unsqueeze(1), 0.5).log_prob(Y.unsqueeze(-1)) + torch.tensor([0.7, 0.3]).log()
    expected = parts.logsumexp(-1).sum(-1) + dist.Normal(0.0, 1.0).log_prob(values["locs"]).sum(-1)
    found = total(batched, values)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value.sum(), values["locs"])[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_what_cannot_be_summed_out_is_refused() -> None:
    def one_after_the_other() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
        pyro.sample("a", dist.Normal(z, 1.0))

    @config_enumerate
    def scaled() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(a + z, 1.0), obs=torch.zeros(5))

    for model, message in (
        (one_after_the_other, "enumerated in parallel, but 'z'"),
        (scaled, "no scaled or subsampled"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            BatchedModel("test", model, Call((), {}), draws_of({"a": ()}, 3))


# Coincidences


def test_as_many_draws_as_groups_are_no_coincidence() -> None:
    """In an outer plate, ``effects[group]`` takes draws for groups; with three of both, none is missing."""
    group = torch.arange(3)

    def model() -> None:
        with pyro.plate("groups", 3):
            effects = pyro.sample("effects", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(effects[group], 1.0), obs=torch.zeros(3))

    batched = BatchedModel("test", model, Call((), {}), draws_of({"effects": (3,)}, 3))
    assert batched.is_mapped
    values = {"effects": torch.randn(7, 3)}
    torch.testing.assert_close(total(batched, values), 2 * dist.Normal(0.0, 1.0).log_prob(values["effects"]).sum(-1))


def test_values_that_no_density_depends_on() -> None:
    """In an outer plate, the sum would be that of all draws."""

    def model() -> None:
        with pyro.plate("parts", 4):
            part = pyro.sample("part", dist.Normal(0.0, 1.0))
        pyro.deterministic("total", part.sum())

    batched = BatchedModel("test", model, Call((), {}), draws_of({"part": (4,)}, 3))
    values = {"part": torch.randn(7, 4)}

    def read() -> Tensor:
        return batched.read(values, lambda trace: {"total": trace.nodes["total"]["value"]}, {"total": ()})["total"]

    assert not torch.allclose(read(), values["part"].sum(-1))
    batched.verify(values, lambda trace: {"total": trace.nodes["total"]["value"]}, {"total": ()})
    assert batched.is_mapped and batched.is_vectorized
    torch.testing.assert_close(read(), values["part"].sum(-1))


def test_only_what_is_written_to_is_copied_for_each_draw() -> None:
    """Python may read the number of missing values off a copy that is not written to."""

    def model(y: Tensor) -> None:
        data = with_missing(y).clone()
        filled = data * 1.0
        a = pyro.sample("a", dist.Normal(torch.zeros(int(data.isnan().sum())), 1.0).mask(False).to_event(1))
        for place, value in zip(data.isnan().nonzero()[:, 0].tolist(), a, strict=True):
            filled[place] += torch.nan_to_num(-data[place]) + value  # adds to what is not a number: stays so
            filled[place] = value
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 0.5), obs=filled)

    batched = BatchedModel("test", model, Call((Y,), {}), draws_of({"a": (3,)}, 3))
    assert batched._run == batched._by_vmap_in_place
    values = draws_of({"a": (3,)})
    expected = [run_at(model, {"a": row}, Y)["y"]["log_prob"].sum() for row in values["a"]]
    torch.testing.assert_close(batched(values).nodes["y"]["log_prob"].sum(-1), torch.stack(expected))
