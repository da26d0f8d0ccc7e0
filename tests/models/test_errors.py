# SPDX-License-Identifier: Apache-2.0
"""Errors are the model's own; what is wrong about data, plates or a pair of model and guide is said with the remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_value
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, diagnose, fit
from pyro_flows.export import to_inference_data
from pyro_flows.training.batches import Batches
from pyro_flows.training.objective import Objective

N = 20
X = torch.linspace(-1.0, 1.0, N)
Y = 2.0 * X + torch.linspace(0.5, -0.5, N).sin()

few = partial(fit, num_steps=5, num_particles=4, progress=False, seed=0, compile=False)
# Whatever runs a model.
USES: dict[str, Callable[[Any, Any, tuple[Any, ...]], Any]] = {
    "fit": few,
    "diagnose": partial(diagnose, num_samples=100, progress=False),
    "warm_start": lambda model, guide, args: guide.warm_start(*args),
    "export": partial(to_inference_data, num_samples=10),
}
each_use = pytest.mark.parametrize("use", USES.values(), ids=USES)
# Those that take any guide.
PAIRS = {name: use for name, use in USES.items() if name != "warm_start"}
each_pair = pytest.mark.parametrize("use", PAIRS.values(), ids=PAIRS)


@pytest.fixture(autouse=True)
def _needs_arviz(request: pytest.FixtureRequest) -> None:
    if "export" in request.node.name:
        pytest.importorskip("arviz")


def regression(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


# Exceptions of the model


def likelihood(wrong: Callable[[Tensor], Any]) -> Callable[..., None]:
    """The regression, with a line that raises an exception."""

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        wrong(b)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    return model


def fails(error: Exception) -> Callable[[Tensor], Any]:
    def line(b: Tensor) -> None:
        raise error

    return line


def asserts(b: Tensor) -> None:
    assert b.dim() == 3, "three dimensions"


EXCEPTIONS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "KeyError": (lambda b: {}["sigma"], KeyError, "sigma"),
    "TypeError": (lambda b: len(3), TypeError, "has no len"),  # type: ignore[arg-type]
    "RuntimeError": (lambda b: torch.eye(3) @ torch.ones(2), RuntimeError, "size mismatch"),
    "AssertionError": (asserts, AssertionError, "three dimensions"),
    "ValueError": (fails(ValueError("own words")), ValueError, "own words"),
    "NotImplementedError": (fails(NotImplementedError("own words")), NotImplementedError, "own words"),
    "LinAlgError": (lambda b: torch.linalg.cholesky(-torch.eye(2)), RuntimeError, "not positive-definite"),
}


@each_use
@pytest.mark.parametrize(("line", "kind", "words"), EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_exceptions_of_the_model_are_its_own(
    use: Callable[..., Any], line: Callable[[Tensor], Any], kind: type[Exception], words: str
) -> None:
    model = likelihood(line)
    with pytest.raises(kind, match=words) as caught:
        use(model, AutoFlowGuide(model), (X, Y))
    assert "init_loc_fn" not in str(caught.value)


@each_pair
@pytest.mark.parametrize(("line", "kind", "words"), EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_exceptions_of_the_model_with_a_guide_that_is_ready(
    use: Callable[..., Any], line: Callable[[Tensor], Any], kind: type[Exception], words: str
) -> None:
    broken = False

    def model(x: Tensor, y: Tensor) -> None:
        likelihood(line if broken else lambda b: None)(x, y)

    guide = AutoNormal(model)
    guide(X, Y)
    broken = True
    with pytest.raises(kind, match=words) as caught:
        use(model, guide, (X, Y))
    assert "init_loc_fn" not in str(caught.value)


@each_pair
def test_exceptions_of_an_encoder_are_its_own(use: Callable[..., Any]) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoFlowGuide(model, amortize={"data": torch.nn.Linear(3, 2)})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        use(model, guide, (Y,))


def test_exceptions_that_come_with_a_later_mini_batch() -> None:
    loader = [(X, Y), (X[:3], Y)]
    with pytest.raises((RuntimeError, ValueError), match="must match the size of tensor"):
        few(regression, AutoFlowGuide(regression), loader)


# A start without density


def penalized(x: Tensor, y: Tensor, penalty: float) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", penalty + 0.0 * b)
    pyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("make", [AutoFlowGuide, AutoNormal])
@pytest.mark.parametrize(("penalty", "shown"), [(-math.inf, "-inf"), (math.nan, "nan")])
def test_the_site_without_a_density_is_named(make: Callable[..., Any], penalty: float, shown: str) -> None:
    words = rf"site 'penalty' is {shown}\. Start where.*init_loc_fn"
    # Pyro itself refuses NaN where it validates.
    with pyro.validation_enabled(False), pytest.raises(RuntimeError, match=words) as caught:
        fit(penalized, make(penalized), (X, Y, penalty), num_steps=20, progress=False, compile=False)
    assert "'y'" not in str(caught.value)


def test_a_gradient_that_is_not_finite_is_no_matter_of_the_start() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", (0.0 * b).sqrt())  # zero, with an infinite slope
        pyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)

    with pytest.raises(RuntimeError, match="finite loss and gradient") as caught:
        fit(model, AutoNormal(model), (X, Y), num_steps=20, progress=False, compile=False)
    assert "init_loc_fn" not in str(caught.value)


def test_a_start_elsewhere_is_the_remedy() -> None:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Exponential(0.1))
        pyro.sample("y", dist.Uniform(0.0, top), obs=y)

    y = torch.tensor(50.0)
    with pytest.raises(ValueError, match=r"'y' to be in the support of its Uniform.*init_loc_fn=init_to_value"):
        few(model, AutoFlowGuide(model), (y,))
    guide = AutoFlowGuide(model, init_loc_fn=init_to_value(values={"top": torch.tensor(60.0)}), init_scale=0.01)
    few(model, guide, (y,))


# Shapes


def forgets_the_plate(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def forgets_to_event(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b.sum() * x, 1.0), obs=y)


SLIPS = {
    "column": (regression, Y.unsqueeze(-1), "y"),
    "plate": (forgets_the_plate, Y, "y"),
    "to_event": (forgets_to_event, Y, "b"),
}


@each_use
@pytest.mark.parametrize(("model", "y", "site"), SLIPS.values(), ids=SLIPS)
def test_slips_of_shapes_are_refused_as_svi_refuses_them(
    use: Callable[..., Any], model: Callable[..., None], y: Tensor, site: str
) -> None:
    words = f'at site "{site}", invalid log_prob shape'
    with pytest.raises(ValueError, match=words):
        SVI(model, AutoNormal(model), Adam({"lr": 0.01}), Trace_ELBO()).step(X, y)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=words) as caught:
        use(model, AutoFlowGuide(model), (X, y))
    assert "Try one of the following fixes" in str(caught.value)


# Data


def counts(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Gamma(1.0 + (b * x).exp(), 1.0), obs=y)


def with_value(value: float) -> Tensor:
    return torch.where(torch.arange(N) == 7, value, Y.abs() + 0.1)


DATA = {
    "nan": (regression, math.nan, r"'y' to be finite, but got 1 of 20 values that are NaN, the first at \[7\]: nan"),
    "inf": (regression, -math.inf, r"'y' to be finite.*1 of 20 values that are infinite, the first at \[7\]: -inf"),
    "outside": (counts, -2.0, r"'y' to be in the support of its Gamma.*outside, the first at \[7\]: -2"),
}


@each_use
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize(("model", "value", "words"), DATA.values(), ids=DATA)
def test_data_without_a_density(
    use: Callable[..., Any], model: Callable[..., None], value: float, words: str, validates: bool
) -> None:
    with pyro.validation_enabled(validates), pytest.raises(ValueError, match=words):
        use(model, AutoFlowGuide(model), (X, with_value(value)))


def test_a_mask_is_the_remedy_for_missing_values() -> None:
    def masked(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=y.isfinite()):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y.nan_to_num(posinf=0.0, neginf=0.0))

    y = with_value(math.nan)
    guide = AutoFlowGuide(masked)
    few(masked, guide, (X, y))
    kept = y.isfinite()
    precision = 1.0 + X[kept].square().sum()
    expected = float((X[kept] * y[kept]).sum() / precision)
    assert guide.median(X, y)["b"].item() == pytest.approx(expected, abs=0.05 * float(precision.rsqrt()))


def test_missing_values_that_have_no_density_in_the_model_are_fine() -> None:
    def masked(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b * x, 1.0, validate_args=False).mask(y.isfinite()), obs=y)

    diagnose(masked, AutoFlowGuide(masked), (X, with_value(math.nan)), num_samples=100, search=False)


@pytest.mark.parametrize("use", [PAIRS["fit"], PAIRS["diagnose"]], ids=["fit", "diagnose"])
def test_a_forgotten_obs(use: Callable[..., Any]) -> None:
    def forgets(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            mean = pyro.deterministic("mean", b * x)
            pyro.sample("y", dist.Normal(mean, 1.0))

    with pytest.warns(UserWarning, match=r"no site of the model is observed.*If 'y' is data.*obs=") as caught:
        use(forgets, AutoFlowGuide(forgets), (X, Y))
    assert len([one for one in caught if "is observed" in str(one.message)]) == 1


@pytest.mark.parametrize("use", [PAIRS["fit"], PAIRS["diagnose"]], ids=["fit", "diagnose"])
@pytest.mark.parametrize("with_factor", [True, False])
def test_a_model_without_data_is_fine(use: Callable[..., Any], with_factor: bool) -> None:
    def prior(scale: Any) -> None:
        x = pyro.sample("x", dist.Normal(0.0, scale))
        if with_factor:
            pyro.factor("data", -x.square())

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is observed")
        use(prior, AutoFlowGuide(prior), (torch.tensor(2.0) if with_factor else 2.0,))


# Model and guide


@each_pair
@pytest.mark.parametrize("make", [AutoFlowGuide, AutoNormal, AutoDiagonalNormal])
def test_model_and_guide_swapped(use: Callable[..., Any], make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"expected model to be a model, but got a guide.*Write the model first"):
        use(make(regression), regression, (X, Y))


def slopes(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(b[0] * x + b[1], 1.0).to_event(1), obs=y)


def renamed(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


OTHERS = {
    "sites": (renamed, r"whose latent sites are 'b', but the guide draws 'slope'.*AutoFlowGuide\(model\)"),
    "shapes": (slopes, r"guide's site 'b' to have shape \(\), as the model's, but got \(2,\).*AutoFlowGuide\(model\)"),
}


@each_pair
@pytest.mark.parametrize("make", [AutoFlowGuide, AutoNormal])
@pytest.mark.parametrize(("other", "words"), OTHERS.values(), ids=OTHERS)
def test_the_guide_of_another_model(
    use: Callable[..., Any], make: Callable[..., Any], other: Callable[..., None], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        use(regression, make(other), (X, Y))


def test_latents_that_the_guide_leaves_out_come_from_the_prior() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        regression(x, y)

    part = AutoFlowGuide(poutine.block(model, hide=["a"]))
    with pytest.warns(UserWarning, match="the guide does not draw 'a', which the model draws from the prior"):
        few(model, part, (X, Y))


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@each_use
@pytest.mark.parametrize("structure", ["joint", "plates"])
@pytest.mark.parametrize("size", [N - 5, N + 5])
def test_data_of_another_size_than_at_set_up(use: Callable[..., Any], structure: str, size: int) -> None:
    guide = AutoFlowGuide(schools, structure=structure).setup(Y)
    words = rf"the guide's (plate|site) '(schools|theta)' to have shape \({size},\), as the model's, but got \(20,\)"
    with pytest.raises(ValueError, match=words):
        use(schools, guide, (torch.zeros(size),))


# One draw of many


def may_fail(clamps: bool) -> Callable[..., None]:
    """A normal mean, and a matrix that is not positive definite at 1 % of its posterior."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        diagonal = torch.ones(2) * torch.where(z > 2.33, 1.0 if clamps else -1.0, 1.0)
        factor = torch.linalg.cholesky(diagonal.diag())
        pyro.sample("y", dist.MultivariateNormal(mu * torch.ones(2), scale_tril=factor), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("make", [AutoFlowGuide, AutoNormal])
def test_a_draw_that_the_model_refuses_costs_itself_only(make: Callable[..., Any], compile: bool) -> None:
    y = torch.tensor([1.0, 2.0])
    results = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fit: (takes eager steps|runs its graph)")
        for clamps in (True, False):
            pyro.clear_param_store()
            model = may_fail(clamps)
            guide = make(model)
            fitted = fit(model, guide, (y,), num_steps=150, progress=False, seed=0, compile=compile)
            results.append((fitted, guide.median(y)["mu"].item()))
    (twin, expected), (fitted, mean) = results
    assert not fitted.obstacle
    # The guide is the posterior from the start, so that some gradients, which are rounding, are skipped: a Poisson
    # count, against two thirds of the steps, if one refused draw of 128 cost a step.
    assert fitted.skipped <= twin.skipped + 3 * (2 * twin.skipped + 1) ** 0.5
    # 1 % of the mass is left out, which is worth 0.01 nats.
    assert fitted.elbo == pytest.approx(twin.elbo, abs=0.03 + 3 * (fitted.elbo_se + twin.elbo_se))
    assert mean == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [True, False], ids=["at_once", "one_by_one"])
@pytest.mark.parametrize(
    ("where", "log_prob", "finite"),
    [(2.33, "refused", True), (2.33, "zero", False), (0.0, "refused", False)],
    ids=["refused_rarely", "zero", "refused_often"],
)
def test_estimates_leave_out_refused_draws_and_no_others(
    vectorized: bool, where: float, log_prob: str, finite: bool
) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        beyond = z.detach() > where
        if not vectorized:
            beyond = torch.tensor(bool(beyond))  # steers Python
        if log_prob == "zero":
            pyro.factor("zero", torch.where(beyond, -math.inf, 0.0))
        else:
            torch.linalg.cholesky(torch.where(beyond, -1.0, 1.0)[..., None, None])

    guide = AutoNormal(model, init_scale=1.0, init_loc_fn=init_to_value(values={"z": torch.tensor(0.0)}))
    guide()
    objective = Objective(model, guide, Batches((), None))
    assert objective.vectorized == vectorized
    estimate = objective.estimate(seed=0)
    assert math.isfinite(estimate.mean) == finite
    if finite:
        assert estimate.mean == pytest.approx(0.0, abs=0.05)
        assert math.isfinite(estimate.gain_over(estimate)[1])


# Plates that the model fills itself


GROUPS = 12
OBSERVED = torch.linspace(-3.0, 3.0, GROUPS)


def groups(idx: Tensor) -> None:
    with pyro.plate("groups", GROUPS, subsample=idx):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=OBSERVED[idx])


def test_a_plate_with_indices_of_its_own() -> None:
    batches = [(idx,) for idx in torch.arange(GROUPS).flip(0).split(5)]
    for amortize in ({}, {"groups": lambda idx: OBSERVED[idx].unsqueeze(-1)}):
        with pytest.raises(ValueError, match=r"which items.*'theta'.*'groups'.*\(5 of 12\)") as caught:
            AutoFlowGuide(groups, amortize=amortize).setup(*batches[0])
    line = str(caught.value).partition("Write ")[2].partition(", where")[0]
    names = {"AutoFlowGuide": AutoFlowGuide, "model": groups, "pyro": pyro}
    guide = eval(line, names)
    fit(groups, guide, batches, num_steps=50, progress=False, seed=0)
    shrunk = OBSERVED * 4.0 / 4.25
    torch.testing.assert_close(guide.median(batches[0][0])["theta"], shrunk, atol=0.05, rtol=0.0)


def test_a_plate_with_all_indices_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"which items"):  # they may come in this order once only
        AutoFlowGuide(groups)(torch.arange(GROUPS).flip(0))
    AutoFlowGuide(groups)(torch.arange(GROUPS))


def test_plates_whose_indices_no_latent_needs_and_those_that_draw_their_own() -> None:
    def model(idx: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", GROUPS, subsample=idx):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=OBSERVED[idx])
        with pyro.plate("drawn", GROUPS, subsample_size=5):
            pyro.sample("theta", dist.Normal(mu, 2.0))

    AutoFlowGuide(model)(torch.arange(5))


# Bounds that differ between items

LOW = torch.arange(GROUPS) * 1.0


def bounded(idx: Tensor, differ: bool = True) -> None:
    with pyro.plate("groups", GROUPS, subsample=idx):
        low = LOW[idx] if differ else torch.zeros(len(idx))
        x = pyro.sample("x", dist.Uniform(low, low + 1.0))
        pyro.sample("y", dist.Normal(x - low, 0.5), obs=torch.full((len(idx),), 0.5))


def of_groups(idx: Tensor, *args: Any) -> pyro.plate:
    return pyro.plate("groups", GROUPS, subsample=idx)


@pytest.mark.parametrize("first", [5, GROUPS], ids=["part", "all"])
def test_bounds_that_differ_between_items_are_refused_in_mini_batches(first: int) -> None:
    guide = AutoFlowGuide(bounded, create_plates=of_groups)
    with pytest.raises(
        ValueError, match=r"'x' to have the same support for all items of the plate 'groups'.*low\[idx\]"
    ):
        guide(torch.arange(first))


@pytest.mark.slow
def test_bounds_that_differ_between_items_of_a_full_plate() -> None:
    def model() -> None:
        with pyro.plate("groups", GROUPS):
            x = pyro.sample("x", dist.Uniform(LOW, LOW + 1.0))
            pyro.sample("y", dist.Normal(x - LOW, 0.5), obs=torch.full((GROUPS,), 0.5))

    for structure in ("joint", "plates"):
        guide = AutoFlowGuide(model, structure=structure)
        few(model, guide)
        torch.testing.assert_close(guide.median()["x"], LOW + 0.5, atol=0.05, rtol=0.0)


def test_bounds_that_all_items_share() -> None:
    guide = AutoFlowGuide(bounded, create_plates=of_groups)
    for idx in torch.arange(GROUPS).split(5):  # the last is shorter
        assert guide(idx, False)["x"].shape == idx.shape
    assert guide.sample_posterior(3)["x"].shape == (3, GROUPS)


def test_a_site_that_is_mapped_is_the_remedy_for_bounds() -> None:
    def model(idx: Tensor) -> None:
        with pyro.plate("groups", GROUPS, subsample=idx):
            u = pyro.sample("x", dist.Uniform(0.0, 1.0))
            x = LOW[idx] + (LOW + 1.0 - LOW)[idx] * u
            pyro.sample("y", dist.Normal(x - LOW[idx], 0.1), obs=LOW[idx] / GROUPS)

    guide = AutoFlowGuide(model, create_plates=of_groups)
    fit(model, guide, [(idx,) for idx in torch.arange(GROUPS).split(5)], num_steps=50, progress=False, seed=0)
    assert (guide.median(torch.arange(5))["x"].diff() > 0.0).all()


# Masks over latents


def partly_observed(y: Tensor, mask: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=mask)


def masked_latents(y: Tensor, mask: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_entries_without_a_density_are_refused() -> None:
    mask = torch.arange(N) < 15
    words = r"'y_unobserved' to have a density in all its entries, but 15 of 20 are masked.*'y_missing'"
    with pytest.raises(ValueError, match=words):
        AutoFlowGuide(partly_observed)(Y, mask)
    with pytest.raises(ValueError, match=r"'z' to have a density in all its entries, but 5 of 20 are masked"):
        AutoFlowGuide(masked_latents)(Y, mask)
    AutoFlowGuide(masked_latents)(Y, mask | True)


def test_a_site_of_their_own_is_the_remedy_for_missing_values() -> None:
    mask = torch.arange(N) < 15

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        with pyro.plate("missing", int((~mask).sum())):
            pyro.sample("y_missing", dist.Normal(mu, 1.0))

    guide = AutoFlowGuide(model)
    few(model, guide, (Y,))
    expected = Y[mask].sum() / 16.0
    torch.testing.assert_close(guide.median(Y)["mu"], expected, atol=0.02, rtol=0.0)
    torch.testing.assert_close(guide.median(Y)["y_missing"], expected.expand(5), atol=0.05, rtol=0.0)


def test_a_flat_prior_is_no_mask_over_entries() -> None:
    def model(y: Tensor) -> None:
        with poutine.mask(mask=False):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    AutoFlowGuide(model)(torch.tensor(0.5))
