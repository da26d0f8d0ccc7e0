# SPDX-License-Identifier: Apache-2.0
"""Predictors that are affine in a standard normal latent: what is read off a model, against closed forms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout
from pyro_flows.models.linear_predictors import LINEAR_PREDICTORS, ReadLinearPredictor, read_linear_predictor
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.sites import read_sites

T = 12
X = torch.linspace(-1.0, 1.0, T)
Y = torch.tensor([0.2, 0.9, 1.4, 1.1, 0.3, -0.8, -1.2, -0.9, 0.1, 0.7, 1.5, 1.0])
RANDOM = numpy.random.default_rng(0)
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0])
Values = dict[str, Tensor]


def standard(name: str, *shape: int) -> Tensor:
    z: Tensor = pyro.sample(name, dist.Normal(0.0, 1.0).expand([*shape]).to_event(len(shape)))
    return z


def positive(name: str) -> Tensor:
    value: Tensor = pyro.sample(name, dist.LogNormal(-0.5, 0.3))
    return value


def observe(loc: Tensor) -> None:
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(loc, 0.3), obs=Y)


def layout_of(model: Callable[..., object]) -> Layout:
    return Layout(read_sites(trace_latents(model, (), {})))


def read(model: Callable[..., object]) -> tuple[Layout, ReadLinearPredictor | None]:
    layout = layout_of(model)
    return layout, read_linear_predictor(RunRecorder(model, (), {}, layout))


def volatility() -> None:
    """Stochastic volatility, by a loop."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    phi = 2 * pyro.sample("phi", dist.Beta(20.0, 1.5)) - 1
    scale = pyro.sample("scale", dist.HalfCauchy(0.2))  # whose density writes into memory
    z = standard("z", T)
    h = scale * z[0] / (1 - phi**2).sqrt()
    path = [h]
    for t in range(1, T):
        h = phi * h + scale * z[t]
        path.append(h)
    with pyro.plate("rows", T):
        pyro.sample("y", dist.Normal(0.0, ((mean + torch.stack(path)) / 2).exp()), obs=Y)


def of_volatility(values: Values) -> tuple[Tensor, Tensor]:
    phi, scale = 2 * values["phi"] - 1, values["scale"]
    lags = torch.arange(T).unsqueeze(-1) - torch.arange(T)
    slope = torch.where(lags >= 0, scale * phi ** lags.clamp(min=0), 0.0)
    slope[:, 0] /= (1 - phi**2).sqrt()
    return (values["mean"] / 2).expand(T), slope / 2


def scan() -> None:
    """An autoregression that starts from zeros like the noise, observed day by day."""
    phi, scale = pyro.sample("phi", dist.Beta(20.0, 1.5)), positive("scale")
    z = standard("z", T)
    h = torch.zeros_like(z[0])
    for t in range(T):
        h = phi * h + scale * z[t]
        pyro.sample(f"y_{t}", dist.Poisson(h.exp()), obs=Y[t].abs().round())


def of_scan(values: Values) -> tuple[Tensor, Tensor]:
    lags = torch.arange(T).unsqueeze(-1) - torch.arange(T)
    return torch.zeros(T), torch.where(lags >= 0, values["scale"] * values["phi"] ** lags.clamp(min=0), 0.0)


def walk() -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    scale = positive("scale")
    observe(level + (scale * standard("z", T)).cumsum(0))


def of_walk(values: Values) -> tuple[Tensor, Tensor]:
    return values["level"].expand(T), values["scale"] * torch.ones(T, T).tril()


def kernel(length: Tensor) -> Tensor:
    squares = (X.unsqueeze(-1) - X).square()
    return (-squares / (2 * length**2)).exp() + 1e-3 * torch.eye(T)


def process() -> None:
    """A non-centered Gaussian process with classes as data."""
    length = positive("length")
    amplitude = positive("amplitude")
    f = amplitude * (torch.linalg.cholesky(kernel(length)) @ standard("z", T))
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=(Y > 0).float())


def of_process(values: Values) -> tuple[Tensor, Tensor]:
    return torch.zeros(T), values["amplitude"] * torch.linalg.cholesky(kernel(values["length"]))


def correlated() -> None:
    """Intercepts and slopes of groups; Pyro's plate is to the left of the event."""
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    with pyro.plate("groups", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    effects = z @ (tau.unsqueeze(-1) * factor).T
    observe(effects[GROUPS, 0] + effects[GROUPS, 1] * X)


def of_correlated(values: Values) -> tuple[Tensor, Tensor]:
    root = values["tau"].unsqueeze(-1) * values["factor"]
    rows = torch.stack([torch.ones(T), X], -1) @ root
    return torch.zeros(T), torch.einsum("tk,tj->tjk", rows, torch.eye(4)[GROUPS]).flatten(1)


def covariates() -> None:
    """Effects whose scale follows a covariate: their groups repeat in the data."""
    a = pyro.sample("a", dist.Normal(0.0, 0.3))
    b = pyro.sample("b", dist.Normal(0.0, 0.3))
    effects = pyro.deterministic("effects", standard("z", 4) * (a + b * X[:4]).exp())
    pyro.deterministic("largest", 10.0 * effects[:2])  # the data do not see these
    observe(effects[GROUPS])


def of_covariates(values: Values) -> tuple[Tensor, Tensor]:
    return torch.zeros(4), torch.diag((values["a"] + values["b"] * X[:4]).exp())


def shrunk() -> None:
    """Regression with a horseshoe-like prior; the density standardizes the residuals, which are the predictors then."""
    tau = positive("tau")
    lam = pyro.sample("lam", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
    noise = positive("noise")
    mean = torch.stack([X, X**2, X**3], -1) @ (standard("z", 3) * lam * tau)
    pyro.sample("y", dist.StudentT(5.0, mean, noise).to_event(1), obs=Y)


def of_shrunk(values: Values) -> tuple[Tensor, Tensor]:
    slope = torch.stack([X, X**2, X**3], -1) * values["lam"] * values["tau"]
    return Y / values["noise"], -slope / values["noise"]


def nested() -> None:
    """Effects in the prior of other effects."""
    tau, sd = positive("tau"), positive("sd")
    z = standard("z", 4)
    loc = (tau * z)[torch.arange(6) % 4]
    observe(pyro.sample("x", dist.Normal(loc, sd).to_event(1)).sum() * X)


def various() -> None:
    """Operations of many kinds."""
    a, tau = pyro.sample("a", dist.Normal(0.0, 1.0)), positive("tau")
    z = standard("z", 2, 3)
    centered = tau * (z - z.mean(-1, keepdim=True))
    padded = torch.nn.functional.pad(centered, (1, 0), value=2.0).flip(0).masked_fill(torch.eye(2, 4) > 0.0, 1.5)
    both = torch.cat([padded, a.expand(1, 4)]).index_add(0, torch.tensor([0, 2]), 2.0 - padded)
    solved = torch.linalg.solve_triangular(3.0 * torch.eye(3), both, upper=False)
    observe(torch.where(X > 0.0, a, torch.einsum("ij,kj->ik", solved, torch.ones(4, 4).cumsum(0)).reshape(-1)))


def of_various(values: Values) -> tuple[Tensor, Tensor]:
    """By automatic differentiation of its own."""

    def predictor(z: Tensor) -> Tensor:
        given = {name: value.to(z) for name, value in values.items()} | {"z": z.view(2, 3)}
        trace = pyro.poutine.trace(pyro.poutine.condition(various, given)).get_trace()
        return trace.nodes["y"]["fn"].loc

    slope = torch.autograd.functional.jacobian(predictor, torch.zeros(6))
    return predictor(torch.zeros(6)), slope


def of_nested(values: Values) -> tuple[Tensor, Tensor]:
    return values["x"], -values["tau"] * torch.eye(4)[torch.arange(6) % 4]


def mini_batch_of_rows() -> None:
    """Effects seen by a random part of the data each time: the same ones, whichever rows they are seen by."""
    effects = standard("z", 4) * positive("tau")
    with pyro.plate("rows", T, subsample_size=5) as rows:
        pyro.sample("y", dist.Normal(effects[GROUPS[rows]], 0.3), obs=Y[rows])


def of_mini_batch(values: Values) -> tuple[Tensor, Tensor]:
    return torch.zeros(4), values["tau"] * torch.eye(4)


def many_rows() -> None:
    """As many rows as are too many predictors: effects are left without the terms that make them differ by row."""
    groups = torch.arange(1000) % 4
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    effects = standard("z", 4) * positive("tau")
    with pyro.plate("rows", 1000):
        pyro.sample("y", dist.Normal(effects[groups] + slope * torch.linspace(0.0, 1.0, 1000), 0.3), obs=groups)


IDIOMS = {
    "autoregression": (volatility, of_volatility, {"mean", "phi", "scale"}),
    "autoregression day by day": (scan, of_scan, {"phi", "scale"}),
    "random walk": (walk, of_walk, {"level", "scale"}),
    "Gaussian process": (process, of_process, {"length", "amplitude"}),
    "correlated effects": (correlated, of_correlated, {"factor", "tau"}),
    "covariates": (covariates, of_covariates, {"a", "b"}),
    "shrinkage": (shrunk, of_shrunk, {"lam", "tau", "noise"}),
    "in another prior": (nested, of_nested, {"tau", "x"}),
    "many operations": (various, of_various, {"a", "tau"}),
    "random rows": (mini_batch_of_rows, of_mini_batch, {"tau"}),
    "many rows": (many_rows, of_mini_batch, {"tau"}),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_offset_and_slope_are_the_models_own(idiom: str) -> None:
    model, expected, parents = IDIOMS[idiom]
    layout, found = read(model)
    assert found is not None
    assert found.rows == layout.slices["z"]
    assert {name for name, where in layout.slices.items() if found.parents[where].any()} == parents
    assert not found.parents[found.rows].any()
    points = layout.init_loc + 0.5 * torch.randn(4, layout.latent_dim)
    together = found.predictor(points)
    for index, packed in enumerate(points):
        values = {site.name: site.to_support(part) for site, part in layout.split(packed)}
        for part, alone, wanted in zip(together, found.predictor(packed), expected(values), strict=True):
            torch.testing.assert_close(part[index], wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-5)
    nested = found.predictor(points.view(2, 2, -1))
    for part, other in zip(nested, together, strict=True):
        torch.testing.assert_close(part.flatten(0, 1), other)


def centered() -> None:
    scale = positive("scale")
    observe(pyro.sample("z", dist.Normal(0.0, scale).expand([T]).to_event(1)))


def constant() -> None:
    """Nothing to follow: a Gaussian fits it as it is."""
    positive("scale")
    observe(2.0 * standard("z", T).cumsum(0))


def alone() -> None:
    observe(standard("z", T).cumsum(0))


def squared() -> None:
    scale = positive("scale")
    observe(scale * standard("z", T) ** 2)


def itself() -> None:
    """The data's scale follows another latent, but what they see of z is z."""
    scale = positive("scale")
    with pyro.plate("rows", T):
        pyro.sample("y", dist.Normal(standard("z", T), scale), obs=Y)


def in_a_mini_batch() -> None:
    scale = positive("scale")
    with pyro.plate("rows", T, subsample_size=5) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(scale * z, 0.3), obs=Y[rows])


def scaled() -> None:
    scale = positive("scale")
    with pyro.poutine.scale(scale=0.3):
        z = standard("z", T)
    observe(scale * z)


def masked() -> None:
    scale = positive("scale")
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([T]).mask(False).to_event(1))
    observe(scale * z)


def masked_by_handler() -> None:
    scale = positive("scale")
    with pyro.poutine.mask(mask=False):
        z = standard("z", T)
    observe(scale * z)


def too_many() -> None:
    scale = positive("scale")
    z = standard("z", 2)
    x = torch.randn(LINEAR_PREDICTORS.max_predictors + 1, 2)
    pyro.sample("y", dist.Normal(x @ (scale * z), 0.3).to_event(1), obs=x[:, 0])


def too_large() -> None:
    scale = positive("scale")
    z = standard("z", LINEAR_PREDICTORS.max_dim + 1)
    pyro.sample("y", dist.Normal((scale * z).sum(), 0.3), obs=torch.tensor(0.0))


def wide() -> None:
    scale = positive("scale")
    observe(scale * pyro.sample("z", dist.Normal(0.0, 2.0).expand([T]).to_event(1)))


def shifted() -> None:
    scale = positive("scale")
    observe(scale * pyro.sample("z", dist.Normal(X, 1.0).to_event(1)))


def heavy() -> None:
    scale = positive("scale")
    observe(scale * pyro.sample("z", dist.StudentT(4.0, torch.zeros(T), 1.0).to_event(1)))


def drawing() -> None:
    """Effects of which each run has others."""
    scale = positive("scale")
    observe(scale * (torch.randn(T, T) @ standard("z", T)))


def drawing_elsewhere() -> None:
    """The same, by a generator that no recording sees."""
    scale = positive("scale")
    numbers = torch.tensor(RANDOM.standard_normal((T, T)), dtype=torch.float32)
    observe(scale * (numbers @ standard("z", T)))


def learned() -> None:
    weight = pyro.param("weight", torch.tensor(1.0), constraint=dist.constraints.positive)
    observe(positive("scale") * weight * standard("z", T))


def branching() -> None:
    """Python reads a latent."""
    scale = positive("scale")
    observe((scale if scale > 0.1 else 2 * scale) * standard("z", T))


def written() -> None:
    """The path is written into memory of its own."""
    scale = positive("scale")
    z, path = standard("z", T), torch.zeros(T)
    for t in range(1, T):
        path[t] = path[t - 1] + scale * z[t]
    observe(path)


def raising() -> None:
    positive("scale")
    standard("z", T)
    raise ValueError("no data")


REFUSED = [
    *(centered, constant, alone, squared, itself, in_a_mini_batch, scaled, masked, masked_by_handler, too_many),
    *(too_large, wide, shifted, heavy, drawing, drawing_elsewhere, learned, branching, written),
]


@pytest.mark.parametrize("model", REFUSED)
def test_others_are_left_to_what_there_is_for_them(model: Callable[[], object]) -> None:
    assert read(model)[1] is None


def test_a_model_that_raises_is_left_alone() -> None:
    assert read_linear_predictor(RunRecorder(raising, (), {}, layout_of(walk))) is None


def test_a_learned_scale_of_the_data_is_no_obstacle() -> None:
    def model() -> None:
        sd = pyro.param("sd", torch.tensor(0.3), constraint=dist.constraints.positive)
        f = positive("scale") * standard("z", T).cumsum(0)
        pyro.sample("y", dist.Normal(f, sd).to_event(1), obs=Y)

    assert read(model)[1] is not None


def test_the_largest_of_several() -> None:
    def model() -> None:
        scale = positive("scale")
        observe(scale * standard("few", 4)[GROUPS] + scale * standard("many", T).cumsum(0))

    layout, found = read(model)
    assert found is not None
    assert found.rows == layout.slices["many"]
    few = layout.slices["few"]
    assert found.parents[few].all()


def test_a_slope_keeps_its_digits_beside_a_large_offset() -> None:
    """Differences of values in float32 would have none left."""

    def model() -> None:
        level = pyro.sample("level", dist.Normal(1e6, 1.0))
        observe(level + (0.01 * positive("scale") * standard("z", T)).cumsum(0))

    layout, found = read(model)
    assert found is not None
    scale = layout.init_loc[layout.slices["scale"]].exp()
    expected = 0.01 * scale * torch.ones(T, T).tril()
    torch.testing.assert_close(found.predictor(layout.init_loc)[1], expected)


@pytest.mark.parametrize("model", [volatility, process, correlated])
def test_it_is_differentiated_twice(model: Callable[[], object]) -> None:
    layout, found = read(model)
    assert found is not None
    points = (layout.init_loc + 0.3 * torch.randn(3, layout.latent_dim)).requires_grad_()

    def total(points: Tensor) -> Tensor:
        offset, slope = found.predictor(points)
        return (offset.square().sum() + slope.pow(3).sum()) / 10

    (gradient,) = torch.autograd.grad(total(points), points, create_graph=True)
    assert gradient.isfinite().all()
    assert not gradient[:, ~found.parents].any()
    direction = torch.randn_like(points) * found.parents
    (second,) = torch.autograd.grad((gradient * direction).sum(), points)
    step = 1e-2
    ahead, behind = (
        torch.autograd.grad(total(moved), moved)[0]
        for moved in (points.detach() + step * direction, points.detach() - step * direction)
        if moved.requires_grad_() is not None
    )
    error = (second - (ahead - behind) / (2 * step)).abs().max()
    assert error < 0.02 * second.abs().max()


@pytest.mark.parametrize("model", [volatility, process])
def test_it_can_be_recorded(model: Callable[[], object]) -> None:
    """As a step is: gradients are operations of the graph too."""
    layout, found = read(model)
    assert found is not None

    def loss(points: Tensor) -> list[Tensor]:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            offset, slope = found.predictor(points)
            return [*torch.autograd.grad(offset.sum() + slope.square().sum(), points), offset.detach()]

    points = layout.init_loc + 0.3 * torch.randn(2, 3, layout.latent_dim)
    graph, captured, _ = trace_operations(loss, [points[0]])
    for one, other in zip(graph(points[1], *captured), loss(points[1]), strict=True):
        torch.testing.assert_close(one, other)


def test_copies_and_pickles() -> None:
    layout, found = read(walk)
    assert found is not None
    expected = found.predictor(layout.init_loc)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert all(map(torch.equal, other.predictor(layout.init_loc), expected))


def test_data_that_it_does_not_use_are_not_kept() -> None:
    groups = torch.arange(200_000) % 4

    def model() -> None:
        effects = standard("z", 4) * positive("tau")
        pyro.sample("y", dist.Normal(effects[groups], 0.3).to_event(1), obs=groups)

    found = read(model)[1]
    assert found is not None
    assert len(pickle.dumps(found.for_head(found.parents.float()))) < 100_000


def test_another_dtype() -> None:
    layout, found = read(walk)
    assert found is not None
    for part, other in zip(found.predictor(layout.init_loc.double()), found.predictor(layout.init_loc), strict=True):
        assert part.dtype == torch.double
        torch.testing.assert_close(part.float(), other)


def test_the_random_state_stays() -> None:
    layout = layout_of(walk)
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    read_linear_predictor(RunRecorder(walk, (), {}, layout))
    assert torch.equal(torch.randn(2), expected)
