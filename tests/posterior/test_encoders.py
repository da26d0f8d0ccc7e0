# SPDX-License-Identifier: Apache-2.0
"""Amortized plates: q(z | x) from an encoder."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide

DATA = torch.linspace(-2.0, 2.0, 40).unsqueeze(-1) * torch.tensor([1.0, 0.5])


def model(x: Tensor) -> None:
    """z ~ N(0, I) in the plane, x = z + noise of sd 1/2: the posterior is N(0.8 x, 0.2 I)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def with_global(x: Tensor, size: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size):
        batch = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(loc.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=batch)


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 6)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        return self.layer(x).tanh()


class Subsampled(Features):
    """Takes its rows itself."""

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        return super().forward(pyro.subsample(x, event_dim=1))


def train(guide: Any, *args: Any, steps: int = 3, which: Any = model, lr: float = 0.01, particles: int = 1) -> None:
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    svi = SVI(which, guide, Adam({"lr": lr}), elbo)
    assert all(math.isfinite(svi.step(*args)) for _ in range(steps))


@pytest.mark.slow
def test_starts_at_a_gaussian_encoder_of_the_priors_scale() -> None:
    """log q(z|x) is quadratic in z at first, with sds near the prior's 1 and means that differ between items."""
    guide = AutoFlowGuide(model, amortize={"data": Features()}).setup(DATA)
    z = guide.sample_posterior(40_000, DATA)["z"]
    assert (z.std(0).log().abs() < 0.7).all()
    assert z.mean(0).std(0).min() > 2 / 40_000**0.5  # items that are alike: 1 / 40_000**0.5
    grid = torch.linspace(-2.0, 2.0, 5).reshape(5, 1, 1).expand(5, *DATA.shape)
    density = guide.log_prob({"z": grid}, DATA)
    assert density.diff(n=3).abs().max() < 1e-4 * density.abs().max()


@pytest.mark.slow
def test_posterior_of_data_never_seen() -> None:
    """Trained on batches of several sizes; the posterior of new points in between is N(0.8 x, 0.2 I)."""
    guide = AutoFlowGuide(model, amortize={"data": Features()})
    optim = pyro.optim.CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "T_max": 800})
    svi = SVI(model, guide, optim, Trace_ELBO())
    for step in range(800):
        svi.step(DATA[torch.randperm(40)[: 20 if step % 5 else 7]])
        optim.step()
    new = DATA[5:35] + 0.03
    z = guide.sample_posterior(2000, new)["z"]
    assert z.shape == (2000, 30, 2)
    assert (z.mean(0) - 0.8 * new).abs().median() < 0.1 * 0.2**0.5
    assert (z.std(0) / 0.2**0.5).log().abs().median() < 0.1
    exact = dist.Normal(0.8 * new, 0.2**0.5).log_prob(z).sum((-1, -2))
    assert ((exact - guide.log_prob({"z": z}, new)) / 30).mean().abs() < 0.1  # KL per item, both ways to read it
    torch.testing.assert_close(guide.median(new)["z"], z.median(0).values, atol=0.06, rtol=0.0)


@pytest.mark.parametrize("flow", ["auto", "diagonal_normal", "iaf"])
@pytest.mark.parametrize("encoder", [Features, Subsampled])
def test_plate_that_subsamples_inside_the_model(encoder: type[nn.Module], flow: str) -> None:
    guide = AutoFlowGuide(with_global, flow, amortize={"data": encoder()})
    train(guide, DATA, 10, which=with_global)
    train(guide, DATA, 10, which=with_global, particles=3)
    trace = poutine.trace(guide).get_trace(DATA, 10)
    assert trace.nodes["z"]["value"].shape == (10, 2)
    assert guide.sample_posterior(3, DATA)["z"].shape == (3, 40, 2)


def test_create_plates_and_a_batch_from_outside() -> None:
    def whole(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", 40, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    layer = Features()
    guide = AutoFlowGuide(
        whole,
        amortize={"data": lambda x, index: layer(x)},
        create_plates=lambda x, index: pyro.plate("data", 40, subsample=index),
    )
    for index in (torch.arange(8), torch.tensor([39, 3])):
        train(guide, DATA[index], index, which=whole)
    assert guide.sample_posterior(3, DATA[:4], torch.arange(4))["z"].shape == (3, 4, 2)


def test_encoder_is_trained_saved_and_moved_with_the_guide() -> None:
    encoder = Features()
    before = encoder.layer.weight.detach().clone()
    guide = AutoFlowGuide(model, amortize={"data": encoder})
    train(guide, DATA)
    assert not torch.equal(encoder.layer.weight, before)
    assert any("encoders" in name for name in pyro.get_param_store())
    fresh = AutoFlowGuide(model, amortize={"data": Features()}).setup(DATA)
    fresh.load_state_dict(guide.state_dict())
    twin = copy.deepcopy(guide)
    for other in (fresh, twin):
        torch.testing.assert_close(other.median(DATA)["z"], guide.median(DATA)["z"])
    assert {p.dtype for p in guide.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    guide = AutoFlowGuide(model, amortize={"data": Features()}).setup(DATA)
    draws = Predictive(model, guide=guide, num_samples=4, parallel=parallel)(DATA[:5])
    assert draws["z"].shape == (4, 5, 2)


def test_errors_name_the_plate() -> None:
    with pytest.raises(
        TypeError, match=r"an encoder for the amortized plate 'data', but got None.*amortize=\{\"data\""
    ):
        AutoFlowGuide(model, amortize={"data": None})
    with pytest.raises(TypeError, match="amortize="):
        AutoFlowGuide(model, amortize=Features())
    with pytest.raises(ValueError, match=r"encoder of plate 'data' to return.*\(batch, context_dim\), but got shape"):
        AutoFlowGuide(model, amortize={"data": lambda x: x.sum(-1)})(DATA)
    with pytest.raises(ValueError, match=r"'typo' to hold latent sites.*'data'"):
        AutoFlowGuide(model, amortize={"typo": Features()})(DATA)
    guide = AutoFlowGuide(with_global, amortize={"data": lambda x, size: x[:3]})
    with pytest.raises(ValueError, match=r"plate 'data' to return a row for each of the 10 items.*create_plates"):
        guide(DATA, 10)
    guide = AutoFlowGuide(model, amortize={"data": Features()}).setup(DATA)
    with pytest.raises(ValueError, match=r"the model's arguments, since plate 'data' is amortized"):
        guide.median()


def test_a_plate_without_an_encoder_inside_an_amortized_one_has_all_of_its_items() -> None:
    """Summaries had one item for all, and densities refused the right shape."""

    def model(x: Tensor) -> None:
        with pyro.plate("series", len(x), dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("times", 3, dim=-1):
                value = pyro.sample("value", dist.Normal(level, 1.0))
                pyro.sample("x", dist.Normal(value, 1.0), obs=x)

    x = torch.randn(6, 3)
    guide = AutoFlowGuide(model, amortize={"series": nn.Linear(3, 2)}, structure="plates").setup(x)
    draws = guide.sample_posterior(5, x)
    assert draws["level"].shape == (5, 6, 1) and draws["value"].shape == (5, 6, 3)
    assert guide.median(x)["value"].shape == (6, 3)
    assert draws["value"].std(-1).min() > 0  # each its own
    trace = pyro.poutine.trace(guide).get_trace(x)
    one = {name: trace.nodes[name]["value"] for name in ("level", "value")}
    torch.testing.assert_close(guide.log_prob(one, x), trace.log_prob_sum())
