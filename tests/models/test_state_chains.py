# SPDX-License-Identifier: Apache-2.0
"""Chains of states: what is read off a model, against the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows.models.latents import trace_latents
from pyro_flows.models.layout import Layout
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.sites import read_sites
from pyro_flows.models.state_chains import STATE_CHAINS, ReadStateChain, read_state_chain

T = 8
COUNTS = torch.tensor([1.0, 3.0, 2.0, 0.0, 4.0, 6.0, 2.0, 1.0])


def read(model: Callable[..., object]) -> tuple[Layout, ReadStateChain | None]:
    layout = Layout(read_sites(trace_latents(model, (), {})))
    return layout, read_state_chain(RunRecorder(model, (), {}, layout))


def noise(count: int = T) -> Tensor:
    z: Tensor = pyro.sample("z", dist.Normal(0.0, 1.0).expand([count]).to_event(1))
    return z


def autoregression() -> None:
    """Counts on an autoregression that starts from its own distribution, by a loop."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = noise()
    h = scale * z[0] / (1 - phi**2).sqrt()
    path = [h]
    for t in range(1, T):
        h = phi * h + scale * z[t]
        path.append(h)
    pyro.sample("y", dist.Poisson((mean + torch.stack(path)).exp()).to_event(1), obs=COUNTS)


def day_by_day() -> None:
    """The same with an observation in the loop, and innovations in a plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("days", T):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    h = mean
    for t in pyro.markov(range(T)):
        h = mean + phi * (h - mean) + scale * z[t]
        pyro.sample(f"y_{t}", dist.Poisson(h.exp()), obs=COUNTS[t])


def walk() -> None:
    """A random walk by a cumulative sum, with a drift."""
    drift = pyro.sample("drift", dist.Normal(0.0, 0.1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    path = level + (drift + scale * noise()).cumsum(-1)
    pyro.sample("y", dist.Poisson(path.exp()).to_event(1), obs=COUNTS)


def scaled() -> None:
    """Scales and drifts of shape (1,), and scales of their own."""
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(1)).to_event(1))
    drift = pyro.sample("drift", dist.Normal(torch.zeros(1), 0.1).to_event(1))
    path = (drift + scale * noise() * torch.linspace(0.5, 1.0, T)).cumsum(-1)
    pyro.sample("y", dist.Poisson(path.exp()).to_event(1), obs=COUNTS)


def with_gaps() -> None:
    """Days without data, and an effect of a column."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    x, path = torch.zeros(()), []
    for entry in noise():
        x = 0.9 * x + scale * entry
        path.append(x)
    eta = torch.stack(path) + effect * torch.arange(float(T))
    seen = torch.arange(T) % 3 != 1
    with pyro.plate("days", int(seen.sum())):
        pyro.sample("y", dist.Poisson(eta[seen].exp()), obs=COUNTS[seen])


def sites() -> None:
    """The states are sites, which go back to their mean."""
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    mean = pyro.sample("mean", dist.Gamma(2.0, 1.0))
    h = mean
    for t in pyro.markov(range(T)):
        h = pyro.sample(f"h_{t}", dist.Normal(mean + phi * (h - mean), scale * (1.0 + t)))
        pyro.sample(f"y_{t}", dist.Poisson(h.exp()), obs=COUNTS[t])


def sites_after_others() -> None:
    """A level and a slope before them are no states, though they have normal priors too."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    h = pyro.sample("h_0", dist.Normal(level, 1.0))
    for t in range(T):
        if t:
            h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h + slope, scale))
        pyro.sample(f"y_{t}", dist.Poisson((h + level).exp()), obs=COUNTS[t])


NAMES = {sites: [f"h_{t}" for t in range(T)], sites_after_others: [f"h_{t}" for t in range(T)]}


@pytest.mark.parametrize("model", [autoregression, day_by_day, walk, scaled, with_gaps, sites, sites_after_others])
def test_states_and_what_follows_them_are_the_models(model: Callable[[], None]) -> None:
    """The log joint by the chain is the one of a run of the model, far from where it was recorded; and after a copy."""
    layout, found = read(model)
    names = NAMES.get(model, ["z"])
    assert found is not None
    chain = found.chain
    assert chain.is_centered == (model in NAMES)
    assert chain.rows == slice(layout.slices[names[0]].start, layout.slices[names[-1]].stop)
    points = torch.randn(4, layout.latent_dim, generator=torch.Generator().manual_seed(0))
    for again in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        offset, lag, scale = again.chain.read(points)
        own = points[:, chain.rows]
        states: list[Tensor] = []
        expected = torch.zeros(4)
        for t in range(T):
            loc = offset[:, t] + (lag[:, t] * states[-1] if states else 0.0)
            states.append(own[:, t] if chain.is_centered else loc + scale[:, t] * own[:, t])
            expected += dist.Normal(loc, scale[:, t].abs()).log_prob(states[-1]) if chain.is_centered else 0.0
        values = again.likelihood(points, torch.stack(states, -1)) + expected
        for point, value in zip(points, values, strict=True):
            scored = RunRecorder(model, (), {}, layout).scored(point.split(layout.sizes))
            total = sum(node["log_prob"].sum() for name, node in scored.items() if name != "z")
            torch.testing.assert_close(value, torch.as_tensor(total), rtol=1e-4, atol=1e-3)


def test_coefficients_are_differentiable() -> None:
    layout, found = read(autoregression)
    assert found is not None
    point = torch.zeros(layout.latent_dim, requires_grad=True)
    _, lag, scale = found.chain.read(point)
    assert lag.shape == scale.shape == (T,)
    (slope,) = torch.autograd.grad(lag[3], point, retain_graph=True)
    assert slope[layout.slices["phi"]].item() == pytest.approx(0.25)  # of a sigmoid at zero
    assert slope[found.chain.rows].abs().max() == 0.0


def of_another_prior() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.StudentT(4.0, torch.zeros(T), 1.0).to_event(1))
    pyro.sample("y", dist.Poisson((scale * z).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def of_two_orders() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Poisson((scale * noise()).cumsum(-1).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def that_reads_a_value() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = noise()
    sign = 1.0 if z[0].item() > 0 else -1.0
    pyro.sample("y", dist.Poisson((sign * scale * z).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def of_a_parameter() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weight = pyro.param("weight", torch.tensor(0.5))
    pyro.sample("y", dist.Poisson((weight * scale * noise()).cumsum(-1).exp()).to_event(1), obs=COUNTS)


def that_is_seen_itself() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = noise()
    pyro.sample("y", dist.Poisson((scale * z).cumsum(-1).exp()).to_event(1), obs=COUNTS)
    pyro.sample("x", dist.Normal(z.square(), 1.0).to_event(1), obs=COUNTS)


def alone() -> None:
    pyro.sample("y", dist.Poisson(noise().cumsum(-1).exp()).to_event(1), obs=COUNTS)


def sites_of_two_orders() -> None:
    one, other = torch.zeros(()), torch.zeros(())
    phi = pyro.sample("phi", dist.Beta(8.0, 2.0))
    for t in range(T):
        one, other = pyro.sample(f"h_{t}", dist.Normal(phi * one - 0.2 * other, 1.0)), one
        pyro.sample(f"y_{t}", dist.Poisson(one.exp()), obs=COUNTS[t])


def sites_whose_scale_follows() -> None:
    h, phi = torch.zeros(()), pyro.sample("phi", dist.Beta(8.0, 2.0))
    for t in range(T):
        h = pyro.sample(f"h_{t}", dist.Normal(phi * h, h.exp()))
        pyro.sample(f"y_{t}", dist.Poisson(h.exp()), obs=COUNTS[t])


def sites_that_bend() -> None:
    h, phi = torch.zeros(()), pyro.sample("phi", dist.Beta(8.0, 2.0))
    for t in range(T):
        h = pyro.sample(f"h_{t}", dist.Normal(phi * h.sin(), 1.0))
        pyro.sample(f"y_{t}", dist.Poisson(h.exp()), obs=COUNTS[t])


def coefficients() -> None:
    """Of a regression, which do not follow each other."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weights = [pyro.sample(f"w_{k}", dist.Normal(0.0, scale)) for k in range(T)]
    pyro.sample("y", dist.Poisson(torch.stack(weights).exp()).to_event(1), obs=COUNTS)


@pytest.mark.parametrize(
    "model",
    [
        of_another_prior,
        of_two_orders,
        that_reads_a_value,
        of_a_parameter,
        that_is_seen_itself,
        alone,
        sites_of_two_orders,
        sites_whose_scale_follows,
        sites_that_bend,
        coefficients,
    ],
)
def test_others_have_no_chain(model: Callable[[], None]) -> None:
    assert read(model)[1] is None


def test_few_other_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_flows.models.state_chains.STATE_CHAINS", type(STATE_CHAINS)(max_others=2))
    assert read(autoregression)[1] is None


def switching() -> None:
    """Which states are seen depends on a value, so that another run computes something else."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    path = (scale * noise()).cumsum(-1)
    with torch.no_grad():
        sign = torch.where(torch.rand(()) > 0.5, 1.0, -1.0)
    pyro.sample("y", dist.Poisson((sign * path).exp()).to_event(1), obs=COUNTS)


def test_random_models_have_none() -> None:
    assert read(switching)[1] is None
