# SPDX-License-Identifier: Apache-2.0
"""The site table: order, shapes, packing, Jacobians and quantiles, for every support that ``biject_to`` knows."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows.models.sites import SiteTable, decreasing, quantiles


def of_sites(table: SiteTable, draws: Tensor, levels: Tensor) -> dict[str, Tensor]:
    """Quantiles of packed draws, on the supports."""
    return table.unpack(quantiles(draws, levels, decreasing(table.sites)))


# Support, and shape of one value.
SUPPORTS = {
    "real": (constraints.real, ()),
    "real_vector": (constraints.real_vector, (3,)),
    "positive": (constraints.positive, ()),
    "nonnegative": (constraints.nonnegative, ()),
    "greater_than": (constraints.greater_than(2.0), ()),
    "greater_than_eq": (constraints.greater_than_eq(-1.0), ()),
    "less_than": (constraints.less_than(-1.0), ()),
    "interval": (constraints.interval(-1.0, 3.0), ()),
    "half_open_interval": (constraints.half_open_interval(-1.0, 3.0), ()),
    "unit_interval": (constraints.unit_interval, ()),
    "simplex": (constraints.simplex, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "corr_matrix": (constraints.corr_matrix, (3, 3)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "positive_ordered_vector": (constraints.positive_ordered_vector, (3,)),
    "softplus_positive": (constraints.softplus_positive, ()),
    "independent_positive": (constraints.independent(constraints.positive, 1), (3,)),
    "independent_interval": (constraints.independent(constraints.interval(0.0, 2.0), 2), (2, 3)),
}
# Their coordinates depend on one another, so that quantiles of the values need not be a value.
JOINT = (
    constraints.simplex,
    constraints.corr_cholesky,
    constraints.corr_matrix,
    constraints.ordered_vector,
    constraints.positive_ordered_vector,
)
CASES = [pytest.param(*case, id=name) for name, case in SUPPORTS.items()]


def start(support: constraints.Constraint, shape: tuple[int, ...], batch: tuple[int, ...] = ()) -> Tensor:
    """A random value of that support."""
    transform = biject_to(support)
    return transform(torch.randn(transform.inverse_shape(torch.Size(batch + shape))))


def table_of(support: constraints.Constraint, shape: tuple[int, ...]) -> tuple[SiteTable, dict[str, Tensor]]:
    """A table with that support alone, and in a plate between two normals; and the values of its trace."""
    values = {"alone": start(support, shape), "plated": start(support, shape, (2,))}
    prior = dist.ImproperUniform(support, (), torch.Size(shape))

    def model() -> None:
        pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("alone", prior)
        with pyro.plate("plate", 2):
            pyro.sample("plated", prior)
        pyro.sample("last", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    values |= {"first": torch.randn(()), "last": torch.randn(2)}
    trace = poutine.trace(poutine.condition(model, values)).get_trace()
    for node in trace.nodes.values():
        node["is_observed"] = False
    for name in [name for name, node in trace.nodes.items() if node["type"] != "sample" or name == "plate"]:
        trace.remove_node(name)
    return SiteTable.from_trace(trace), values


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_order_and_shapes(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    table, values = table_of(support, shape)
    assert [site.name for site in table] == ["first", "alone", "plated", "last"]
    assert table.latent_dim == sum(site.size for site in table) == len(table.init_loc)
    assert [site.start for site in table] == torch.tensor([0, *(site.size for site in table)]).cumsum(0)[:-1].tolist()
    assert table["plated"].shape == values["plated"].shape
    assert table["plated"].size == 2 * table["alone"].size
    assert [frame.name for frame in table["plated"].frames] == ["plate"]
    assert table["last"].is_real
    assert table["alone"].is_real == (support is constraints.real or support is constraints.real_vector)


@pytest.mark.parametrize("batch_shape", [(), (5,), (4, 3)], ids=str)
@pytest.mark.parametrize(("support", "shape"), CASES)
def test_pack_inverts_unpack(
    support: constraints.Constraint, shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> None:
    table, _ = table_of(support, shape)
    packed = torch.randn(*batch_shape, table.latent_dim)
    values = table.unpack(packed)
    for site in table:
        assert values[site.name].shape == batch_shape + site.shape
    assert support.check(values["alone"]).all()
    assert support.check(values["plated"]).all()
    again, ladj = table.pack(values)
    assert ladj.shape == batch_shape
    torch.testing.assert_close(again, packed, atol=1e-3, rtol=1e-3)  # float32, through exp and log


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_split_gives_what_unpack_gives(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    table, _ = table_of(support, shape)
    packed = torch.randn(5, table.latent_dim)
    values = table.unpack(packed)
    for site, unconstrained in table.split(packed.unsqueeze(-2)):  # As in a plate of 5 outside the model's one.
        value, ladj = site.constrain(unconstrained)
        if site.name == "plated":
            assert value.shape == (5, *site.shape)
            assert site.is_real or ladj.shape == value.shape[: value.dim() - site.event_dim]
        torch.testing.assert_close(value.reshape(values[site.name].shape), values[site.name])


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_jacobian_is_that_of_autograd(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    table, _ = table_of(support, shape)
    site = table["alone"]
    unconstrained = torch.randn(site.unconstrained_shape, dtype=torch.double)
    _, ladj = site.constrain(unconstrained)
    total = torch.as_tensor(ladj).sum()
    free = independent_coordinates(site.shape) if site.size != site.shape.numel() else slice(None)
    jacobian = torch.autograd.functional.jacobian(lambda x: site.to_support(x).reshape(-1)[free], unconstrained)
    expected = torch.linalg.slogdet(jacobian.reshape(site.size, site.size)).logabsdet
    torch.testing.assert_close(total.double(), -expected, atol=1e-6, rtol=1e-6)


def independent_coordinates(shape: torch.Size) -> Tensor:
    """Indices of the coordinates of a simplex or a correlation matrix that determine the others."""
    if len(shape) == 1:
        return torch.arange(shape[0] - 1)
    return torch.ones(shape).tril(-1).reshape(-1).nonzero().squeeze(-1)


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_quantiles_of_elementwise_supports_are_those_of_the_values(
    support: constraints.Constraint, shape: tuple[int, ...]
) -> None:
    table, _ = table_of(support, shape)
    draws = torch.randn(1001, table.latent_dim)  # 0.1, 0.5 and 0.9 are order statistics: no interpolation.
    levels = torch.tensor([0.1, 0.5, 0.9])
    found = of_sites(table, draws, levels)
    values = table.unpack(draws)
    for site in table:
        assert found[site.name].shape == (3, *site.shape)
        if support not in JOINT or site.name in ("first", "last"):
            torch.testing.assert_close(found[site.name], values[site.name].quantile(levels, 0), atol=1e-4, rtol=1e-4)


def test_quantiles_at_both_ends_and_of_one_draw() -> None:
    table, _ = table_of(constraints.positive, ())
    draws = torch.randn(7, table.latent_dim)
    ends = of_sites(table, draws, torch.tensor([0.0, 1.0]))["first"]
    torch.testing.assert_close(ends, torch.stack([draws[:, 0].min(), draws[:, 0].max()]))
    torch.testing.assert_close(of_sites(table, draws[:1], torch.tensor([0.3]))["first"], draws[:1, 0])


def test_each_site_keeps_its_dtype() -> None:
    def model() -> None:
        pyro.sample("single", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("double", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))

    trace = poutine.trace(model).get_trace()
    for name in ("_INPUT", "_RETURN"):
        trace.remove_node(name)
    table = SiteTable.from_trace(trace)
    assert table.init_loc.dtype == torch.double
    values = table.unpack(torch.randn(3, 2, dtype=torch.double))
    assert (values["single"].dtype, values["double"].dtype) == (torch.float, torch.double)
    assert [part.dtype for _, part in table.split(torch.randn(2, dtype=torch.double))] == [torch.float, torch.double]
    assert table.pack(values)[0].dtype == torch.double


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("last"), r"missing are \['last'\]"),
        (lambda v: v.update(other=torch.zeros(())), r"unknown are \['other'\]"),
        (lambda v: v.update(last=torch.zeros(5)), r"'last' to have shape batch_shape \+ \(2,\), but got \(5,\)"),
        (lambda v: v.update(last=torch.zeros(3, 2)), r"'last' to have the batch shape \(\) .* but got \(3,\)"),
    ],
    ids=["missing", "unknown", "shape", "batch_shape"],
)
def test_pack_says_what_is_wrong(change: object, words: str) -> None:
    table, values = table_of(constraints.positive, ())
    values = {name: values[name] for name in ("first", "alone", "plated", "last")}
    change(values)  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        table.pack(values)


def test_unknown_name() -> None:
    table, _ = table_of(constraints.real, ())
    with pytest.raises(KeyError, match="nobody"):
        table["nobody"]
