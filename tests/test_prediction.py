# SPDX-License-Identifier: Apache-2.0
"""Predictions for new rows, new groups and new data, against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn

from pyro_flows import AutoFlowGuide, predict, prior_predictive
from pyro_flows.models.alignment import Trained
from pyro_flows.models.predictor import PredictionSettings, Predictor
from pyro_flows.models.traces import Call

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])


def regression(x, y=None):
    """Not written for outer dimensions; no density depends on the total."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("total", w.sum())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def groups(num_groups, group, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", num_groups):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("data", len(group)):
        pyro.sample("y", dist.Normal(theta[group], 0.1), obs=y)


GROUP = torch.tensor([0, 1, 2, 3, 0, 1])
VALUES = {"mu": 1.0, "tau": 0.5, "theta": [-20.0, -10.0, 10.0, 20.0]}


def guide_of(model, values, *args, scale=0.01, make=AutoFlowGuide):
    """A guide that is narrow around given values."""
    start = init_to_value(values={name: torch.tensor(value) for name, value in values.items()})
    options = {} if make is AutoDelta else {"init_scale": scale}
    guide = make(model, init_loc_fn=start, **options)
    guide(*args)
    return guide


@pytest.fixture
def group_guide():
    return guide_of(groups, VALUES, 4, GROUP, torch.zeros(6))


@pytest.mark.parametrize("make", [AutoFlowGuide, AutoNormal])
def test_new_rows(make):
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3), scale=0.3, make=make)
    new = torch.tensor([[2.0, 1.0], [0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    drawn = predict(regression, guide, (new,), num_samples=4000, seed=0)
    assert set(drawn) == {"total", "y"}
    assert drawn["y"].shape == (4000, 4) and drawn["total"].shape == (4000,)
    sd = (0.09 * new.square().sum(-1) + 0.25).sqrt()
    z = (drawn["y"].mean(0) - new @ torch.tensor([1.0, -1.0])) / sd * math.sqrt(4000)
    assert z.abs().max() < 4
    assert ((drawn["y"].std(0) / sd - 1).abs() < 4 / math.sqrt(8000)).all()


def test_sites_of_a_draw_belong_together():
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3), scale=0.3)
    drawn = predict(regression, guide, (X,), num_samples=50, sites=["w", "total"])
    assert list(drawn) == ["w", "total"]
    torch.testing.assert_close(drawn["total"], drawn["w"].sum(-1))


def test_seed_and_chunks():
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3))
    before = torch.get_rng_state()
    one, two = (predict(regression, guide, (X,), num_samples=30, seed=3)["y"] for _ in range(2))
    assert torch.equal(one, two) and torch.equal(before, torch.get_rng_state())
    few = PredictionSettings(max_chunk=7)
    drawn = predict(regression, guide, (X,), num_samples=30, sites=["w", "total"], settings=few)
    torch.testing.assert_close(drawn["total"], drawn["w"].sum(-1))


def test_files_hold_the_same_draws(tmp_path):
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3))
    in_memory = predict(regression, guide, (X,), num_samples=40, seed=1)
    in_files = predict(regression, guide, (X,), num_samples=40, seed=1, path=tmp_path / "draws")
    assert sorted(file.name for file in (tmp_path / "draws").iterdir()) == ["total.npy", "y.npy"]
    for name, value in in_memory.items():
        assert torch.equal(in_files[name], value)
        assert np.array_equal(np.load(tmp_path / "draws" / f"{name}.npy"), value)


def test_what_does_not_fit_in_memory_goes_to_files():
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3))
    with pytest.raises(MemoryError, match=r"4000 draws take .* site 'y', each of shape \(3,\).*path='predictions'"):
        predict(regression, guide, (X,), num_samples=4000, settings=PredictionSettings(max_bytes=2**15))


def test_items_of_the_training_keep_their_latents(group_guide):
    drawn = predict(groups, group_guide, (4, torch.tensor([3, 0])), num_samples=500, seed=0)
    assert list(drawn) == ["y"]
    torch.testing.assert_close(drawn["y"].mean(0), torch.tensor([20.0, -20.0]), atol=0.02, rtol=0.0)


def test_a_plate_of_another_size_has_new_items(group_guide):
    args = (5, torch.arange(5))
    with pytest.warns(UserWarning, match=r"'groups' has 5 items, and had 4 .*items=\{'groups': 'new'\}"):
        drawn = predict(groups, group_guide, args, num_samples=4000, seed=0)
    assert set(drawn) == {"theta", "y"}
    assert drawn["theta"].shape == (4000, 5)
    sd = 0.5  # tau, up to the guide's scale of 0.01
    assert ((drawn["theta"].mean(0) - 1.0).abs() < 4 * sd / math.sqrt(4000) + 0.01).all()
    assert ((drawn["theta"].std(0) / sd - 1).abs() < 4 / math.sqrt(8000) + 0.01).all()
    assert (drawn["y"] - drawn["theta"]).std() == pytest.approx(0.1, rel=0.03)
    again = predict(groups, group_guide, args, num_samples=4000, seed=0, items={"groups": "new"})  # does not warn
    assert torch.equal(again["y"], drawn["y"])


@pytest.mark.parametrize("make", [AutoFlowGuide, AutoNormal])
def test_items_that_are_named(make):
    guide = guide_of(groups, VALUES, 4, GROUP, torch.zeros(6), make=make)
    args = (3, torch.tensor([0, 1, 2]))
    drawn = predict(groups, guide, args, num_samples=2000, items={"groups": [3, -1, 0]}, seed=0)
    means, sds = drawn["theta"].mean(0), drawn["theta"].std(0)
    torch.testing.assert_close(means, torch.tensor([20.0, 1.0, -20.0]), atol=0.05, rtol=0.0)
    torch.testing.assert_close(sds, torch.tensor([0.01, 0.5, 0.01]), atol=0.005, rtol=0.07)
    torch.testing.assert_close(drawn["y"], drawn["theta"], atol=0.5, rtol=0.0)


@pytest.mark.parametrize("items", ["new", [-1, 1]])
def test_items_without_globals(items):
    def model(n, y=None):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(3.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    guide = guide_of(model, {"z": [0.0, 10.0, 0.0]}, 3, torch.zeros(3))
    drawn = predict(model, guide, (2,), num_samples=1000, items={"data": items}, seed=0)
    mean, sd = (3.0, 1.0) if items == "new" else (10.0, 0.01)
    assert drawn["z"][:, 0].mean() == pytest.approx(3.0, abs=4 / 1000**0.5)
    assert drawn["z"][:, 1].mean() == pytest.approx(mean, abs=4 * sd / 1000**0.5)
    torch.testing.assert_close(drawn["y"], drawn["z"], atol=0.5, rtol=0.0)


def test_models_with_factors_share_runs():
    def model(n, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("curved", -loc.square())
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(loc, 0.1), obs=y)

    guide = guide_of(model, {"loc": 0.0}, 3, torch.zeros(3))
    draws = guide.sample_posterior(3)
    predictor = Predictor("test", model, Call((2,), {}), draws, Trained({}, {}), None, PredictionSettings())
    assert predictor.like.keys() == {"y"} and predictor(draws)["y"].shape == (3, 2)
    assert predictor._model.is_vectorized


@pytest.mark.parametrize("wrong", [[0, 1], [0, 1, 4], [0.0, 1.0, 2.0], "old"])
def test_items_that_do_not_fit(group_guide, wrong):
    with pytest.raises(ValueError, match=r"items\['groups'\] to be 'new', or 3 indices of training items in \[0, 3\]"):
        predict(groups, group_guide, (3, torch.arange(3)), items={"groups": wrong})
    with pytest.raises(ValueError, match=r"plates of the model, 'data', 'groups', but got 'group'"):
        predict(groups, group_guide, (3, torch.arange(3)), items={"groups": "new", "group": "new"})


def test_indices_of_a_plate_name_its_items():
    def model(index, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", 4, subsample=index):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.1), obs=y)

    plates = lambda index, y=None: pyro.plate("groups", 4, subsample=index)  # noqa: E731
    for make in (AutoFlowGuide, AutoNormal):
        start = init_to_value(values={"mu": torch.tensor(0.0), "theta": torch.tensor([1.0, 2.0, 3.0, 4.0])})
        guide = make(model, init_loc_fn=start, init_scale=0.01, create_plates=plates)
        guide(torch.arange(4), torch.zeros(4))
        drawn = predict(model, guide, (torch.tensor([2, 0]),), num_samples=300, seed=0)
        torch.testing.assert_close(drawn["y"].mean(0), torch.tensor([3.0, 1.0]), atol=0.05, rtol=0.0)


def test_encoders_run_on_new_data():
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, y=None):
            return self.scale * x.unsqueeze(-1)

    guide = AutoFlowGuide(model, amortize={"data": Encoder()})
    guide(torch.zeros(3), torch.zeros(3))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    x = torch.tensor([4.0, 3.0, 0.5, 1.0, 2.0])
    drawn = predict(model, guide, (x,), num_samples=3000, sites=["z", "y"], seed=0)
    expected = guide.sample_posterior(3000, x)["z"]
    error = (expected.var(0) / 3000 + drawn["z"].var(0) / 3000).sqrt()
    assert ((drawn["z"].mean(0) - expected.mean(0)).abs() < 4 * error).all()
    assert drawn["z"].mean(0).std() > 4 * error.max()  # it does depend on the data
    assert (drawn["y"] - drawn["z"]).std() == pytest.approx(0.1, rel=0.03)


def test_guides_without_a_density_or_a_class():
    point = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3), make=AutoDelta)
    assert predict(regression, point, (X,), num_samples=10)["y"].shape == (10, 3)

    def guide(x, y=None):
        loc = pyro.param("loc", torch.tensor([1.0, -1.0]))
        if float(loc[0]) > 0:
            pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))

    drawn = predict(regression, guide, (X,), num_samples=200, sites=["w", "y"])
    assert (drawn["y"] - drawn["w"] @ X.T).std() == pytest.approx(0.5, rel=0.15)


def test_counts_stay_integers():
    def model(n, y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("y", dist.Categorical(logits=rate * torch.arange(3.0)), obs=y)

    guide = AutoFlowGuide(model)
    guide(4, torch.tensor([0, 1, 2, 2]))
    drawn = predict(model, guide, (2,), num_samples=100)
    assert drawn["y"].dtype == torch.long and drawn["y"].shape == (100, 2)


def test_a_guide_has_to_be_trained():
    for guide in (AutoFlowGuide(regression), AutoNormal(regression)):
        with pytest.raises(RuntimeError, match=r"predict: expected a trained guide.*fit\(model, guide, args\)"):
            predict(regression, guide, (X,))


def test_data_that_are_passed_cannot_be_predicted():
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3))
    y = torch.zeros(3)
    with pytest.raises(ValueError, match=r"site 'y' is observed\. Write the model as `def model\(x, y=None\)`"):
        predict(regression, guide, (X, y))
    drawn = predict(regression, guide, (X, y), num_samples=50, sites="y")["y"]
    assert drawn.shape == (50, 3) and (drawn.std(0) > 0).all()
    assert predict(regression, guide, (X, y), sites="total", num_samples=5)["total"].shape == (5,)
    with pytest.raises(ValueError, match=r"expected sites of the model, 'w', 'total', 'y', but got 'z'"):
        predict(regression, guide, (X,), sites=["z"])


def test_a_guide_of_all_sites_leaves_nothing_to_predict():
    guide = guide_of(groups, {"mu": 1.0, "tau": 0.5}, 4, GROUP)  # set up without data
    with pytest.raises(ValueError, match="draws all of its sites, 'mu', 'tau', 'theta', 'y'"):
        predict(groups, guide, (4, GROUP))


def test_only_plates_may_change_their_size():
    guide = guide_of(regression, {"w": [1.0, -1.0]}, X, torch.zeros(3))

    def wider(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1))

    with pytest.raises(
        ValueError, match=r"site 'w' to have shape \(2,\).* but the model with these arguments has \(3,\)"
    ):
        predict(wider, guide, (torch.ones(4, 3),))
    with pytest.raises(ValueError, match=r"unobserved sites are 'z', but the guide draws .*'w'"):
        predict(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide)


def test_plates_that_draw_mini_batches_have_all_items():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(x[index] @ w, 0.5), obs=None if y is None else y[index])

    guide = guide_of(model, {"w": [1.0, -1.0]}, X, torch.zeros(3))
    drawn = predict(model, guide, (X,), num_samples=2000, seed=0)["y"]
    torch.testing.assert_close(drawn.mean(0), X @ torch.tensor([1.0, -1.0]), atol=4 * 0.5 / 2000**0.5 + 0.01, rtol=0.0)
    assert prior_predictive(model, (X,), num_samples=5)["y"].shape == (5, 3)


def test_enumerated_sites():
    @config_enumerate
    def mixture(n, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            side = pyro.sample("side", dist.Bernoulli(0.25))
            pyro.sample("y", dist.Normal(torch.where(side == 1, loc + 5, loc - 5), 1.0), obs=y)

    guide = guide_of(mixture, {"loc": 0.0}, 3, torch.tensor([5.0, -5.0, 5.0]))
    drawn = predict(mixture, guide, (4,), num_samples=1000, seed=0)
    assert set(drawn) == {"side", "y"}
    share = (drawn["y"] > 0).double().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)

    @config_enumerate
    def switch(n, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        side = pyro.sample("side", dist.Bernoulli(0.25))
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(loc + side, 1.0), obs=y)

    guide = guide_of(switch, {"loc": 0.0}, 3, torch.zeros(3))
    with pytest.raises(NotImplementedError, match=r"'side' is in no plate.*infer_discrete"):
        predict(switch, guide, (4,))


def test_prior():
    drawn = prior_predictive(regression, (X,), num_samples=4000, seed=0)
    assert list(drawn) == ["w", "total", "y"]
    torch.testing.assert_close(drawn["total"], drawn["w"].sum(-1))
    sd = (X.square().sum(-1) + 0.25).sqrt()
    assert ((drawn["y"].std(0) / sd - 1).abs() < 4 / math.sqrt(8000)).all()
    drawn = prior_predictive(groups, (4, GROUP), num_samples=200, sites=["theta", "y"])
    torch.testing.assert_close(drawn["y"], drawn["theta"][:, GROUP], atol=0.6, rtol=0.0)
    with pytest.raises(ValueError, match=r"prior_predictive.*site 'y' is observed"):
        prior_predictive(regression, (X, torch.zeros(3)))
    with pytest.raises(ValueError, match="expected a model with latent sites"):
        prior_predictive(poutine.condition(regression, {"w": torch.zeros(2)}), (X, torch.zeros(3)))
