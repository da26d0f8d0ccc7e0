# SPDX-License-Identifier: Apache-2.0
"""A guide's draws as ArviZ's data, in whichever line of ArviZ is installed."""

from __future__ import annotations

import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn

from pyro_flows import AutoFlowGuide, to_inference_data
from pyro_flows.diagnostics import pareto_smooth

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GROUPS = {
    "posterior",
    "sample_stats",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "observed_data",
    "constant_data",
}


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("schools", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("shift", theta - mu)
        with poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)
    pyro.deterministic("log_weights", weights.log())
    pyro.factor("nothing", -0.0 * mu)


@pytest.fixture
def arviz():
    pytest.importorskip("matplotlib").use("Agg")
    return pytest.importorskip("arviz")


@pytest.fixture
def idata(arviz):
    return to_inference_data(schools, AutoFlowGuide(schools), (SIGMA, Y), num_samples=500, seed=0)


def groups(idata):
    """Names of the groups in either container."""
    return set(idata.groups() if callable(idata.groups) else (name.strip("/") for name in idata.groups if name != "/"))


def test_groups_dims_and_coords(idata):
    assert groups(idata) == GROUPS
    dims = {name: variable.dims[2:] for name, variable in idata["posterior"].data_vars.items()}
    assert dims == {
        "mu": (),
        "tau": (),
        "weights": ("weights_dim_0",),
        "theta": ("schools",),
        "shift": ("schools",),
        "log_weights": ("log_weights_dim_0",),
    }
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for variable in idata[group].data_vars.values():
            assert variable.dims[:2] == ("chain", "draw") and variable.shape[:2] == (1, 500)
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "schools")
    assert idata["observed_data"]["y"].dims == ("schools",)
    assert list(idata["posterior"].coords["schools"].values) == list(range(8))
    assert list(idata["constant_data"].data_vars) == ["sigma"]  # what is observed is no constant


def test_values_are_those_of_the_model(idata):
    posterior = {name: torch.tensor(variable.values[0]) for name, variable in idata["posterior"].data_vars.items()}
    torch.testing.assert_close(posterior["shift"], posterior["theta"] - posterior["mu"].unsqueeze(-1))
    torch.testing.assert_close(posterior["log_weights"], posterior["weights"].log())
    likelihood = dist.Normal(posterior["theta"], SIGMA).log_prob(Y)  # of one datum: not scaled
    torch.testing.assert_close(torch.tensor(idata["log_likelihood"]["y"].values[0]), likelihood)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, Y)
    residual = torch.tensor(idata["posterior_predictive"]["y"].values[0]) - posterior["theta"]
    z = residual / SIGMA  # 500 x 8 draws of N(0, 1)
    assert z.mean().abs() < 4 / 4000**0.5
    assert (z.std() - 1).abs() < 4 / 8000**0.5


def test_log_weights_are_of_these_draws(arviz):
    guide = AutoFlowGuide(schools)
    idata = to_inference_data(schools, guide, (SIGMA, Y), num_samples=400, seed=1)
    stats = idata["sample_stats"]
    values = {site: torch.tensor(idata["posterior"][site].values[0]) for site in ("mu", "tau", "weights", "theta")}
    log_q = guide.log_prob(values, SIGMA, Y).detach()
    np.testing.assert_allclose(stats["log_q"].values[0], log_q, atol=1e-3)
    log_p = dist.Normal(0.0, 5.0).log_prob(values["mu"]) + dist.HalfCauchy(5.0).log_prob(values["tau"])
    log_p += dist.Dirichlet(torch.ones(3)).log_prob(values["weights"])
    log_p += dist.Normal(values["mu"].unsqueeze(-1), values["tau"].unsqueeze(-1)).log_prob(values["theta"]).sum(-1)
    log_p += 2 * dist.Normal(values["theta"], SIGMA).log_prob(Y).sum(-1)
    np.testing.assert_allclose(stats["lp"].values[0], log_p, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"], atol=1e-9)
    assert stats["khat"].dims == ("chain",)
    weights = np.exp(stats["log_weight"] - stats["log_weight"].max())
    mean = float(idata["posterior"]["mu"].weighted(weights).mean())
    expected = (torch.tensor(stats["log_weight"].values[0]).softmax(0) * values["mu"]).sum()
    assert mean == pytest.approx(expected.item(), rel=1e-4)


def test_khat_is_that_of_the_log_weights(idata):
    stats = idata["sample_stats"]
    log_weights = torch.tensor(stats["log_weight"].values[0])
    assert stats["khat"].item() == pytest.approx(pareto_smooth(log_weights).khat)


def test_arviz_works_on_it(arviz, idata):
    flow, plain = AutoFlowGuide(schools), AutoNormal(schools)
    flow_data, plain_data = (to_inference_data(schools, g, (SIGMA, Y), num_samples=300) for g in (flow, plain))
    summary = arviz.summary(flow_data, kind="stats")
    assert {"mu", "theta[3]", "weights[2]"} <= set(summary.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's, about the tails of these guides
        loo = arviz.loo(flow_data)
        table = arviz.compare({"flow": flow_data, "plain": plain_data})
        arviz.plot_pair(flow_data, var_names=["mu", "tau"])
    assert loo.n_data_points == 8
    assert set(table.index) == {"flow", "plain"}


def test_two_guides_make_two_chains(arviz, idata):
    if not hasattr(arviz, "concat"):
        pytest.skip("ArviZ 1.x leaves concatenation to xarray")
    assert arviz.concat(idata, idata, dim="chain").posterior.sizes["chain"] == 2


def test_coords_and_dims_of_the_user(arviz):
    names = [f"school {i}" for i in range(8)]
    idata = to_inference_data(
        schools,
        AutoFlowGuide(schools),
        kwargs={"sigma": SIGMA, "y": Y},
        num_samples=10,
        coords={"schools": names, "part": ["a", "b", "c"]},
        dims={"weights": ["part"], "sigma": ["schools"]},
    )
    assert idata["posterior"]["weights"].dims == ("chain", "draw", "part")
    assert list(idata["posterior"].coords["schools"].values) == names
    assert float(idata["constant_data"]["sigma"].sel(schools="school 2")) == 16.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {"schools": ["A"]}}, "8 labels, but got 1"),
        ({"coords": {"school": ["A"]}}, "'schools'"),
        ({"dims": {"nope": ["A"]}}, "'theta'"),
        ({"dims": {"theta": ["A", "B"]}}, "list of 1 names"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_what_does_not_fit_is_refused(arviz, options, message):
    with pytest.raises(ValueError, match=message):
        to_inference_data(schools, AutoFlowGuide(schools), (SIGMA, Y), **{"num_samples": 5, **options})


def test_groups_can_be_left_out(arviz):
    idata = to_inference_data(
        schools, AutoFlowGuide(schools), (SIGMA, Y), num_samples=5, posterior_predictive=False, log_likelihood=False
    )
    assert groups(idata) == GROUPS - {"posterior_predictive", "log_likelihood"}


def test_seed(arviz):
    guide = AutoFlowGuide(schools).setup(SIGMA, Y)
    before = torch.get_rng_state()
    one, two = (to_inference_data(schools, guide, (SIGMA, Y), num_samples=20, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for group in GROUPS:
        for name, variable in one[group].data_vars.items():
            np.testing.assert_array_equal(variable.values, two[group][name].values)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_guides_of_pyro(arviz, make):
    guide = make(schools)
    guide(SIGMA, Y)
    idata = to_inference_data(schools, guide, (SIGMA, Y), num_samples=50)
    assert groups(idata) == GROUPS
    assert idata["posterior"]["theta"].shape == (1, 50, 8)


def test_a_model_that_is_not_written_for_outer_dimensions(arviz):
    x = torch.randn(6, 2)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    y = torch.randn(6)
    idata = to_inference_data(model, AutoFlowGuide(model), (x, y), num_samples=30)
    w = torch.tensor(idata["posterior"]["w"].values[0])
    expected = dist.Normal(w @ x.T, 1.0).log_prob(y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values[0], expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_broadcasts_wrongly_runs_draw_by_draw(arviz):
    """Under an outer plate ``total`` would add up all draws, without an error."""

    def model(y):
        with pyro.plate("parts", 3):
            part = pyro.sample("part", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(part.sum(), 1.0), obs=y)

    idata = to_inference_data(model, AutoFlowGuide(model), (torch.tensor(0.5),), num_samples=30)
    total = torch.tensor(idata["posterior"]["part"].values[0]).sum(-1)
    expected = dist.Normal(total, 1.0).log_prob(torch.tensor(0.5))
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values[0], expected, rtol=1e-4, atol=1e-5)


def test_amortized_guides_have_weights_by_item(arviz):
    decoder = nn.Linear(2, 9)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    x = torch.bernoulli(torch.full((5, 9), 0.5))
    guide = AutoFlowGuide(model, amortize={"data": nn.Linear(9, 4)})
    idata = to_inference_data(model, guide, (x,), num_samples=60)
    assert idata["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_1")
    assert idata["posterior_predictive"]["x"].shape == (1, 60, 5, 9)
    assert idata["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    stats = idata["sample_stats"]
    assert stats["log_weight"].dims == ("chain", "draw", "data") and stats["khat"].dims == ("chain", "data")
    np.testing.assert_allclose(stats["log_weight"].sum("data"), stats["lp"] - stats["log_q"], atol=1e-6)
    assert "constant_data" not in groups(idata)


def test_nested_plates_and_events(arviz):
    def model(y):
        corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
        with pyro.plate("rows", 4, dim=-2):
            row = pyro.sample("row", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=corr))
                pyro.sample("y", dist.Normal(z.sum(-1) + row, 1.0), obs=y)

    idata = to_inference_data(model, AutoFlowGuide(model), (torch.randn(4, 3).double(),), num_samples=10)
    posterior = idata["posterior"]
    assert posterior["corr"].dims[2:] == ("corr_dim_0", "corr_dim_1")
    assert posterior["row"].dims[2:] == ("rows", "row_dim_1")
    assert posterior["z"].dims[2:] == ("rows", "columns", "z_dim_2")
    assert idata["log_likelihood"]["y"].dims[2:] == ("rows", "columns")
    assert idata["observed_data"]["y"].dtype == np.float64


def test_indices_of_a_plate_are_its_coordinates(arviz):
    order = torch.tensor([2, 0, 1])

    def model(y, index):
        with pyro.plate("items", 3, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    args = (torch.arange(3.0), order)
    with pytest.raises(ValueError, match=r"'items'.*\[2 0 1\].*\[0 1 2\].*create_plates"):
        to_inference_data(model, AutoNormal(model), args, num_samples=10)
    guide = AutoNormal(model, create_plates=lambda y, index: pyro.plate("items", 3, subsample=index))
    idata = to_inference_data(model, guide, args, num_samples=10)
    assert float(idata["observed_data"]["y"].sel(items=2)) == 2.0
    assert list(idata["posterior"].coords["items"].values) == [2, 0, 1]


@pytest.mark.parametrize("kind", ["data", "groups", "AutoNormal"])
def test_plates_that_draw_mini_batches_have_all_items(arviz, kind):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(y), subsample_size=2) as index:
            theta = mu if kind == "data" else pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

    plates = None if kind == "data" else lambda y: pyro.plate("items", len(y), subsample_size=2)
    guide = (AutoNormal if kind == "AutoNormal" else AutoFlowGuide)(model, create_plates=plates)
    guide(Y)
    idata = to_inference_data(model, guide, (Y,), num_samples=40)
    posterior = {name: torch.tensor(variable.values[0]) for name, variable in idata["posterior"].data_vars.items()}
    theta = posterior["mu"].unsqueeze(-1) if kind == "data" else posterior["theta"]
    assert theta.shape == (40, 1 if kind == "data" else 8)
    expected = dist.Normal(theta, 1.0).log_prob(Y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)
    log_p = expected.sum(-1) + dist.Normal(0.0, 1.0).log_prob(posterior["mu"])
    if kind != "data":
        log_p += dist.Normal(posterior["mu"].unsqueeze(-1), 1.0).log_prob(theta).sum(-1)
    np.testing.assert_allclose(idata["sample_stats"]["lp"].values[0], log_p, rtol=1e-4, atol=1e-2)
    trace = poutine.trace(model).get_trace(Y)
    assert len(trace.nodes["items"]["value"]) == 2  # and mini-batches in training as before


def test_items_that_the_arguments_choose_have_to_be_all(arviz):
    def model(y, index):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(y), subsample=index):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(NotImplementedError, match="arguments choose some items of plate 'items'"):
        to_inference_data(model, AutoNormal(model), (Y, torch.arange(3)), num_samples=10)


def test_enumerated_sites(arviz):
    @config_enumerate
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(y)):
            side = pyro.sample("side", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(torch.where(side == 1, loc + 5, loc - 5), 1.0), obs=y)

    guide = AutoFlowGuide(model)
    with pytest.raises(NotImplementedError, match="log_likelihood=False"):
        to_inference_data(model, guide, (Y,), num_samples=10)
    idata = to_inference_data(model, guide, (Y,), num_samples=200, log_likelihood=False)
    assert list(idata["posterior"].data_vars) == ["loc"]
    assert 0.4 < float((idata["posterior_predictive"]["y"] > idata["posterior"]["loc"]).mean()) < 0.6


def test_draws_split_into_chains(arviz):
    guide = AutoFlowGuide(schools).setup(SIGMA, Y)
    one, four = (
        to_inference_data(schools, guide, (SIGMA, Y), num_samples=200, num_chains=count, seed=0) for count in (1, 4)
    )
    for group in ("posterior", "log_likelihood", "log_prior", "posterior_predictive"):
        for name, variable in four[group].data_vars.items():
            assert variable.shape[:2] == (4, 50)
            np.testing.assert_array_equal(variable.values.reshape(1, 200, *variable.shape[2:]), one[group][name])
    stats = four["sample_stats"]
    assert stats["lp"].shape == (4, 50)
    np.testing.assert_array_equal(stats["khat"], np.repeat(one["sample_stats"]["khat"], 4))
    assert (arviz.summary(four)["r_hat"].astype(float) < 1.1).all()
    with pytest.raises(ValueError, match=r"200 draws do not split into 3\. Take num_samples=198"):
        to_inference_data(schools, guide, (SIGMA, Y), num_samples=200, num_chains=3)


def test_log_prior_is_that_of_each_latent(idata):
    posterior = {name: torch.tensor(variable.values[0]) for name, variable in idata["posterior"].data_vars.items()}
    prior = idata["log_prior"]
    assert set(prior.data_vars) == {"mu", "tau", "weights", "theta"}
    expected = {
        "mu": dist.Normal(0.0, 5.0).log_prob(posterior["mu"]),
        "tau": dist.HalfCauchy(5.0).log_prob(posterior["tau"]),
        "weights": dist.Dirichlet(torch.ones(3)).log_prob(posterior["weights"]),
        "theta": dist.Normal(posterior["mu"][:, None], posterior["tau"][:, None]).log_prob(posterior["theta"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(prior[name].values[0], value, rtol=1e-4, atol=1e-4)


def test_prior_groups(arviz):
    guide = AutoFlowGuide(schools).setup(SIGMA, Y)
    idata = to_inference_data(schools, guide, (SIGMA, Y), num_samples=10, num_prior_samples=2000, seed=0)
    assert groups(idata) == GROUPS | {"prior", "prior_predictive"}
    prior = idata["prior"]
    assert set(prior.data_vars) == {"mu", "tau", "weights", "theta", "shift", "log_weights"}
    assert prior["theta"].dims == ("chain", "draw", "schools")
    assert float(prior["mu"].std()) == pytest.approx(5.0, rel=4 / 4000**0.5)
    np.testing.assert_allclose(prior["shift"], prior["theta"] - prior["mu"], rtol=1e-3, atol=1e-3)
    residual = (idata["prior_predictive"]["y"] - prior["theta"]) / SIGMA.numpy()
    assert float(residual.std()) == pytest.approx(1.0, rel=4 / 32000**0.5)


@pytest.mark.parametrize("new", [(SIGMA[:3],), {"sigma": SIGMA[:3]}])
def test_predictions(arviz, new):
    guide = AutoFlowGuide(schools).setup(SIGMA, Y)
    options = {"num_samples": 20, "dims": {"sigma": ["schools"]}, "coords": {"schools": list("ABCDEFGH")}}
    with pytest.warns(UserWarning, match="'schools' has 3 items, and had 8"):
        idata = to_inference_data(schools, guide, (SIGMA, Y), predictions=new, **options)
    assert groups(idata) == GROUPS | {"predictions", "predictions_constant_data"}
    drawn = idata["predictions"]
    assert drawn["y"].dims == ("chain", "draw", "schools") and drawn["y"].shape == (1, 20, 3)
    assert list(drawn.coords["schools"].values) == [0, 1, 2]  # the labels are those of the eight
    assert list(idata["posterior"].coords["schools"].values) == list("ABCDEFGH")
    assert idata["predictions_constant_data"]["sigma"].dims == ("schools",)


def test_deterministic_sums_are_of_each_draw(arviz):
    """In an outer plate, the sum would be that of all draws, and no density would tell."""

    def model(y):
        with pyro.plate("parts", len(y)):
            part = pyro.sample("part", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(part, 1.0), obs=y)
        pyro.deterministic("total", part.sum())

    posterior = to_inference_data(model, AutoFlowGuide(model), (Y,), num_samples=30)["posterior"]
    np.testing.assert_allclose(posterior["total"], posterior["part"].sum("parts"), rtol=1e-4, atol=1e-4)


def test_new_data_may_depend_on_deterministic_sites(arviz):
    """Pyro's own ``uncondition`` gives such a site another shape in a plate."""

    def model(y):
        with pyro.plate("parts", len(y)):
            part = pyro.sample("part", dist.Normal(0.0, 1.0))
            twice = pyro.deterministic("twice", 2 * part)
            pyro.sample("y", dist.Normal(twice, 0.1), obs=y)

    idata = to_inference_data(model, AutoFlowGuide(model), (Y,), num_samples=300)
    residual = idata["posterior_predictive"]["y"] - idata["posterior"]["twice"]
    assert float(residual.std()) == pytest.approx(0.1, rel=4 / 4800**0.5)


def test_leave_one_out_of_an_approximate_posterior(arviz):
    if not hasattr(arviz, "loo_approximate_posterior"):
        pytest.skip("since ArviZ 1.0")

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.5])
    start = init_to_value(values={"loc": torch.tensor(1.4)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.6)  # the posterior is N(1.5, 0.45)
    idata = to_inference_data(model, guide, (y,), num_samples=20_000, seed=0)
    stats = idata["sample_stats"]
    loo = arviz.loo_approximate_posterior(idata, stats["lp"], stats["log_q"])
    expected = 0.0
    for left_out in range(5):
        rest = torch.cat([y[:left_out], y[left_out + 1 :]])
        precision = 4 + 0.01
        predictive = dist.Normal(rest.sum() / precision, (1 + 1 / precision) ** 0.5)
        expected += predictive.log_prob(y[left_out]).item()
    assert loo.elpd == pytest.approx(expected, abs=0.1)


def test_arviz_base_is_enough(monkeypatch):
    pytest.importorskip("xarray")
    monkeypatch.setitem(sys.modules, "arviz", None)
    monkeypatch.setitem(sys.modules, "arviz_base", types.ModuleType("arviz_base"))
    tree = to_inference_data(schools, AutoFlowGuide(schools), (SIGMA, Y), num_samples=10)
    assert type(tree).__name__ == "DataTree"
    assert groups(tree) == GROUPS


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-flows\[arviz\]"'):
        to_inference_data(schools, AutoFlowGuide(schools), (SIGMA, Y))
