# SPDX-License-Identifier: Apache-2.0
"""The layout of latent sites: order, shapes, packing, Jacobians and quantiles, for every support that ``biject_to``
knows; without plates, and by item of some plates."""

from __future__ import annotations

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout, partition
from pyro_flows.models.sites import read_sites


def of_sites(layout: Layout, draws: Tensor, levels: Tensor) -> dict[str, Tensor]:
    """Quantiles of packed draws, on the supports."""
    return layout.unpack(layout.quantiles(draws, levels))[0]


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


def joint_of(support: constraints.Constraint, shape: tuple[int, ...]) -> tuple[Layout, dict[str, Tensor]]:
    """A layout with that support alone, and in a plate between two normals; and the values of its trace."""
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
    return Layout(read_sites(trace)), values


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_order_and_shapes(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    layout, values = joint_of(support, shape)
    assert [site.name for site in layout] == ["first", "alone", "plated", "last"]
    assert layout.latent_dim == sum(layout.sizes) == len(layout.init_loc)
    starts = torch.tensor([0, *layout.sizes]).cumsum(0)[:-1].tolist()
    assert [where.start for where in layout.slices.values()] == starts
    assert list(layout.slices) == list(layout.names)
    assert layout["plated"].shape == values["plated"].shape
    _, alone, plated, _ = layout.sizes
    assert plated == 2 * alone
    assert [frame.name for frame in layout["plated"].frames] == ["plate"]
    assert layout["last"].is_real
    assert layout["alone"].is_real == (support is constraints.real or support is constraints.real_vector)


@pytest.mark.parametrize("batch_shape", [(), (5,), (4, 3)], ids=str)
@pytest.mark.parametrize(("support", "shape"), CASES)
def test_pack_inverts_unpack(
    support: constraints.Constraint, shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> None:
    layout, _ = joint_of(support, shape)
    packed = torch.randn(*batch_shape, layout.latent_dim)
    values, log_det = layout.unpack(packed)
    for site in layout:
        assert values[site.name].shape == batch_shape + site.shape
    assert support.check(values["alone"]).all()
    assert support.check(values["plated"]).all()
    again, ladj = layout.pack(values)
    assert ladj.shape == log_det.shape == batch_shape
    torch.testing.assert_close(ladj, -log_det, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again, packed, atol=1e-3, rtol=1e-3)  # float32, through exp and log


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_split_gives_what_unpack_gives(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    layout, _ = joint_of(support, shape)
    packed = torch.randn(5, layout.latent_dim)
    values, _ = layout.unpack(packed)
    for site, unconstrained in layout.split(packed.unsqueeze(-2)):  # As in a plate of 5 outside the model's one.
        value, ladj = site.constrain(unconstrained)
        if site.name == "plated":
            assert value.shape == (5, *site.shape)
            assert site.is_real or ladj.shape == value.shape[: value.dim() - site.event_dim]
        torch.testing.assert_close(value.reshape(values[site.name].shape), values[site.name])


@pytest.mark.parametrize(("support", "shape"), CASES)
def test_jacobian_is_that_of_autograd(support: constraints.Constraint, shape: tuple[int, ...]) -> None:
    layout, _ = joint_of(support, shape)
    site = layout["alone"]
    unconstrained = torch.randn(site.unconstrained_shape, dtype=torch.double)
    _, ladj = site.constrain(unconstrained)
    total = torch.as_tensor(ladj).sum()
    size = site.unconstrained_shape.numel()
    free = independent_coordinates(site.shape) if size != site.shape.numel() else slice(None)
    jacobian = torch.autograd.functional.jacobian(lambda x: site.to_support(x).reshape(-1)[free], unconstrained)
    expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
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
    layout, _ = joint_of(support, shape)
    draws = torch.randn(1001, layout.latent_dim)  # 0.1, 0.5 and 0.9 are order statistics: no interpolation.
    levels = torch.tensor([0.1, 0.5, 0.9])
    found = of_sites(layout, draws, levels)
    values, _ = layout.unpack(draws)
    for site in layout:
        assert found[site.name].shape == (3, *site.shape)
        if support not in JOINT or site.name in ("first", "last"):
            torch.testing.assert_close(found[site.name], values[site.name].quantile(levels, 0), atol=1e-4, rtol=1e-4)


def test_quantiles_at_both_ends_and_of_one_draw() -> None:
    layout, _ = joint_of(constraints.positive, ())
    draws = torch.randn(7, layout.latent_dim)
    ends = of_sites(layout, draws, torch.tensor([0.0, 1.0]))["first"]
    torch.testing.assert_close(ends, torch.stack([draws[:, 0].min(), draws[:, 0].max()]))
    torch.testing.assert_close(of_sites(layout, draws[:1], torch.tensor([0.3]))["first"], draws[:1, 0])


def test_each_site_keeps_its_dtype() -> None:
    def model() -> None:
        pyro.sample("single", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("double", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))

    trace = poutine.trace(model).get_trace()
    for name in ("_INPUT", "_RETURN"):
        trace.remove_node(name)
    layout = Layout(read_sites(trace))
    assert layout.init_loc.dtype == torch.double
    values, _ = layout.unpack(torch.randn(3, 2, dtype=torch.double))
    assert (values["single"].dtype, values["double"].dtype) == (torch.float, torch.double)
    assert [part.dtype for _, part in layout.split(torch.randn(2, dtype=torch.double))] == [torch.float, torch.double]
    assert layout.pack(values)[0].dtype == torch.double


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
    layout, values = joint_of(constraints.positive, ())
    values = {name: values[name] for name in ("first", "alone", "plated", "last")}
    change(values)  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        layout.pack(values)


def test_unknown_name() -> None:
    layout, _ = joint_of(constraints.real, ())
    with pytest.raises(KeyError, match="nobody"):
        layout["nobody"]


# By item of some plates


def hierarchy(size: int | None = None) -> None:
    """Users and items, with latents for each and for every pair, and a plate between them that is never local."""
    pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    users = pyro.plate("users", 5, dim=-3, subsample_size=size)
    items = pyro.plate("items", 4, dim=-1, subsample_size=size and size + 1)
    with pyro.plate("traits", 2, dim=-2):
        pyro.sample("trait", dist.Normal(0.0, 1.0))
    with users:
        pyro.sample("user", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("traits", 2, dim=-2):
            pyro.sample("user_trait", dist.Gamma(2.0, 1.0))
    with items:
        pyro.sample("item", dist.Dirichlet(torch.ones(3)))
    with users, items:
        pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("traits", 2, dim=-2):
            pyro.sample("pair_trait", dist.Dirichlet(torch.ones(3)))


GROUPS = {
    (): {"tau": 1, "trait": 2},
    ("users",): {"user": 2, "user_trait": 2},
    ("items",): {"item": 2},
    ("users", "items"): {"pair": 2, "pair_trait": 4},
}


def by_item(size: int | None = None) -> tuple[list[Layout], dict[str, Tensor]]:
    """The layouts of that model, and random values of its sites."""
    trace = trace_latents(hierarchy, (size,), {})
    layouts = partition(read_sites(trace), ("users", "items"))
    return layouts, {name: node["fn"].sample() for name, node in trace.iter_stochastic_nodes()}


@pytest.mark.parametrize("size", [None, 2], ids=["full", "mini-batch"])
def test_sites_are_grouped_by_their_local_plates(size: int | None) -> None:
    layouts, _ = by_item(size)
    assert {layout.plate_names: dict(zip(layout.names, layout.sizes)) for layout in layouts} == GROUPS
    ranks = [(layout.plate_names, layout.rank, layout.num_items) for layout in layouts]
    assert ranks == [((), 0, 1), (("users",), 3, 5), (("items",), 1, 4), (("users", "items"), 3, 20)]
    users, items = (5, 4) if size is None else (2, 3)
    leads = [tuple(layout.init_loc.shape[:-1]) for layout in layouts]
    assert leads == [(), (users, 1, 1), (items,), (users, 1, items)]


@pytest.mark.parametrize("size", [None, 2], ids=["full", "mini-batch"])
@pytest.mark.parametrize("batch_shape", [(), (3,), (3, 2)], ids=str)
def test_pack_inverts_unpack_and_split_by_item(size: int | None, batch_shape: tuple[int, ...]) -> None:
    """Layouts of the full plates take mini-batches too: the sizes of plates are those of the values."""
    full, _ = by_item()
    layouts, values = by_item(size)
    for layout in (*full, *layouts):
        own = {name: values[name].expand(batch_shape + values[name].shape) for name in layout.names}
        packed, ladj = layout.pack(own)
        lead = layouts[[other.plate_names for other in layouts].index(layout.plate_names)].init_loc.shape[:-1]
        assert packed.shape == batch_shape + lead + (layout.latent_dim,)
        again, log_det = layout.unpack(packed)
        assert ladj.shape == log_det.shape == batch_shape + lead
        torch.testing.assert_close(ladj, -log_det, atol=1e-4, rtol=1e-4)
        for site, part in layout.split(packed, len(batch_shape)):
            assert part.shape[part.dim() - len(site.unconstrained_event_shape) :] == site.unconstrained_event_shape
            torch.testing.assert_close(site.to_support(part), own[site.name], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(again[site.name], own[site.name], atol=1e-4, rtol=1e-4)
        wide, wide_ladj = layout.pack(own, rank=4)
        fill = (1,) * (4 - layout.rank)
        assert torch.equal(wide, packed.reshape(batch_shape + fill + lead + (layout.latent_dim,)))
        assert torch.equal(wide_ladj, ladj.reshape(batch_shape + fill + lead))


@pytest.mark.parametrize("size", [None, 2], ids=["full", "mini-batch"])
def test_particles_broadcast_from_the_left(size: int | None) -> None:
    layouts, values = by_item(size)
    for layout in layouts:
        own = {name: torch.stack([values[name], values[name].flip(0)]) for name in layout.names}
        particles, _ = layout.pack(own, rank=3)  # (2, *lead), as of a plate in dimension -4
        for site, part in layout.split(particles):
            fill = (1,) * (3 - site.batch_rank)
            expected = own[site.name].reshape(2, *fill, *own[site.name].shape[1:])
            torch.testing.assert_close(site.to_support(part), expected, atol=1e-4, rtol=1e-4)


def test_without_plates_it_is_the_joint_case() -> None:
    """One vector with all sites, each as it is flattened; its log-determinant is the sum over all items."""
    layouts, values = by_item()
    sites = [site for layout in layouts for site in layout]
    joint = Layout(sites)
    (same,) = partition(sites, ())
    assert (joint.plates, joint.rank, joint.num_items, joint.names) == ((), 0, 1, same.names)
    packed, ladj = joint.pack(values)
    assert torch.equal(packed, torch.cat([site.to_support.inv(values[site.name]).reshape(-1) for site in sites]))
    assert all(torch.equal(a, b) for a, b in zip(same.pack(values), (packed, ladj), strict=True))
    assert torch.equal(joint.init_loc, torch.cat([site.init_loc.reshape(-1) for site in sites]))
    parts = [layout.pack({name: values[name] for name in layout.names})[1].sum() for layout in layouts]
    torch.testing.assert_close(ladj, torch.stack(parts).sum())


def test_items_have_rows_in_the_order_of_the_plates() -> None:
    layouts, _ = by_item()
    pairs = layouts[-1]
    indices = {"users": torch.tensor([4, 0]), "items": torch.tensor([1, 3, 2])}
    assert torch.equal(pairs.flat_index(indices), torch.tensor([[[17, 19, 18]], [[1, 3, 2]]]))
    assert torch.equal(layouts[0].flat_index({}), torch.tensor(0))
    assert pairs.place(torch.zeros(2, 7), "users").shape == (2, 1, 1, 7)
    assert pairs.place(torch.zeros(3, 7), "items").shape == (3, 7)


def test_sizes_may_differ_along_the_plates_only() -> None:
    layouts, values = by_item(2)
    pairs = {name: values[name] for name in layouts[-1].names}
    with pytest.raises(ValueError, match=r"'pair' to have shape .* with any size along users and items, but got"):
        layouts[-1].pack({**pairs, "pair": torch.zeros(2, 2, 3, 2)})


# Coordinates of the same items in a joint vector


def rows(order: str, fixed: bool) -> None:
    """Sites in two plates, which are entered in one order and in the other, in the same dimensions or in others."""
    for name, entered in {"first": "ab", "second": order}.items():
        sizes = {"a": (3, -1), "b": (2, -2)}
        with ExitStack() as stack:
            for plate in entered:
                size, dim = sizes[plate]
                stack.enter_context(pyro.plate(plate, size, dim=dim if fixed else None))
            pyro.sample(name, dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.mark.parametrize("fixed", [True, False], ids=["same dimensions", "other dimensions"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_items_of_plates_in_any_order(order: str, fixed: bool) -> None:
    layout = Layout(read_sites(trace_latents(rows, (order, fixed), {})))
    number = 10 * torch.arange(2.0).unsqueeze(-1) + torch.arange(3.0)  # of an item: b, then a
    second = number if fixed or order == "ab" else number.mT
    values = {"first": number, "second": second}
    packed = layout.pack_unconstrained({name: v.unsqueeze(-1).expand(*v.shape, 2) for name, v in values.items()})
    (items,) = layout.items()
    assert torch.equal(packed[items], number.reshape(-1, 1).expand(-1, 4))


def test_items_of_a_plate_beside_a_dimension_without_one() -> None:
    def model() -> None:
        with pyro.plate("columns", 3):
            pyro.sample("two", dist.Normal(torch.zeros(2, 3), 1.0))
            pyro.sample("one", dist.Normal(0.0, 1.0))

    layout = Layout(read_sites(trace_latents(model, (), {})))
    number = torch.arange(3.0)
    packed = layout.pack_unconstrained({"two": number.expand(2, 3), "one": number})
    (items,) = layout.items()
    assert torch.equal(packed[items], number.unsqueeze(-1).expand(3, 3))
