# SPDX-License-Identifier: Apache-2.0
"""Effects that a model writes as location plus scale times a standard normal latent, whichever way it does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.posterior.joint import JointBlock
from pyro_flows.transforms import DiagonalPrecisionHead, FullPrecisionHead, NonCentering

GROUP = torch.arange(24) % 6
X = torch.arange(24 * 6.0).sin().reshape(24, 6)
Y = 2.0 + torch.arange(24.0).cos()


def effects(*, centered: bool = False) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    with pyro.plate("groups", 6):
        theta = pyro.sample("z", dist.Normal(mu, tau) if centered else dist.Normal(0.0, 1.0))
    theta = theta if centered else mu + tau * theta
    with pyro.plate("rows", 24):
        pyro.sample("y", dist.Normal(theta[..., GROUP], 0.7), obs=Y)


def by_event() -> None:
    """Without a plate, with a variance, and data that also have an intercept."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    variance = pyro.sample("variance", dist.InverseGamma(2.0, 1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(intercept + X @ (variance.sqrt() * z), 0.7).to_event(1), obs=Y)


def sparse() -> None:
    """A scale for all, and one for each."""
    scale = pyro.sample("scale", dist.Gamma(0.5, 0.5))
    with pyro.plate("columns", 6):
        scales = pyro.sample("scales", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 24):
        pyro.sample("y", dist.Bernoulli(logits=X @ (scale * scales * z)), obs=(Y > 2.0).float())


@poutine.reparam(config={"z": LocScaleReparam(0.0)})
def reparametrized() -> None:
    effects(centered=True)


def matrix() -> None:
    """Two effects of each group, with scales of their own, and a scale of the noise."""
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", 6):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    effect = (tau * z)[GROUP]
    with pyro.plate("rows", 24):
        pyro.sample("y", dist.Normal(effect[..., 0] + effect[..., 1] * X[:, 0], sigma), obs=Y)


def block_of(model: Callable[[], None]) -> JointBlock:
    return AutoFlowGuide(model).setup().posterior.only_block


def slopes(block: JointBlock, name: str) -> Tensor:
    """Slopes of the location and the log-scale of an effect's first coordinate in each coordinate."""
    outermost = list(block.flow.transform)[-1]
    assert isinstance(outermost, NonCentering)
    row = outermost.rows.tolist().index(block.layout.slices[name].start)
    return outermost.slope.unflatten(0, (2, -1))[:, row]


@pytest.mark.parametrize(
    ("model", "head", "z", "loc", "log_scale"),
    [
        (effects, DiagonalPrecisionHead, "z", {"mu": 1.0}, {"tau": 1.0}),
        (by_event, FullPrecisionHead, "z", {}, {"variance": 0.5}),
        (sparse, FullPrecisionHead, "z", {}, {"scale": 1.0, "scales": 1.0}),
        (reparametrized, DiagonalPrecisionHead, "z_decentered", {"mu": 1.0}, {"tau": 1.0}),
        (matrix, FullPrecisionHead, "z", {}, {"tau": 1.0}),
    ],
)
def test_effects_are_found(
    model: Callable[[], None], head: type, z: str, loc: dict[str, float], log_scale: dict[str, float]
) -> None:
    block = block_of(model)
    assert type(block.flow.head) is head
    expected = torch.zeros(2, block.layout.latent_dim)
    for row, parents in zip(expected, (loc, log_scale), strict=True):
        for name, weight in parents.items():
            row[block.layout.slices[name].start] = weight
    torch.testing.assert_close(slopes(block, z), expected, rtol=0.0, atol=1e-3)


def scale_that_the_noise_has() -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    pyro.sample("y", dist.Normal((tau * z)[GROUP], tau).to_event(1), obs=Y)


def about_one() -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    z = pyro.sample("z", dist.Normal(torch.ones(6), 1.0).to_event(1))
    pyro.sample("y", dist.Normal((tau * z)[GROUP], 1.0).to_event(1), obs=Y)


def of_unknown_width() -> None:
    """The scale of z is another latent's."""
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    width = pyro.sample("width", dist.HalfCauchy(2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(6), width).to_event(1))
    pyro.sample("y", dist.Normal((tau * z)[GROUP], 1.0).to_event(1), obs=Y)


def regression() -> None:
    """Weights without a latent scale."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(X @ z, sigma).to_event(1), obs=Y)


def without_data() -> None:
    pyro.sample("tau", dist.HalfCauchy(2.0))
    pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))


def many_correlated() -> None:
    """More than a head with a matrix is for."""
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(90), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(tau * z.cumsum(0)[:24], 1.0).to_event(1), obs=Y)


@pytest.mark.parametrize(
    "model", [scale_that_the_noise_has, about_one, of_unknown_width, regression, without_data, many_correlated]
)
def test_where_there_are_none(model: Callable[[], None]) -> None:
    block = block_of(model)
    assert block.inner_layout is block.layout
    assert not any(isinstance(part, NonCentering) for part in block.flow.transform)


def test_effects_have_the_log_joint_of_the_centered_model() -> None:
    """The same latents in another form, so the same density of the same vectors."""
    inner = block_of(effects).inner_layout
    centered = block_of(lambda: effects(centered=True)).layout
    assert inner.names == centered.names
    draws = torch.randn(7, centered.latent_dim)
    one = LogJoint(effects, inner, (), {})
    other = LogJoint(lambda: effects(centered=True), centered, (), {})
    torch.testing.assert_close(one(draws), other(draws), rtol=1e-5, atol=1e-4)
    values, log_det = inner.unpack(draws)
    packed, inverse_log_det = inner.pack(values)
    torch.testing.assert_close(packed, draws, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init_scale", [0.05, 0.1])
def test_it_begins_at_a_narrow_normal_about_the_initial_values(init_scale: float) -> None:
    guide = AutoFlowGuide(effects, init_scale=init_scale).setup()
    pyro.set_rng_seed(0)
    draws = guide.sample_posterior(4000)
    z = draws["z"]
    begin = guide.posterior.only_block.layout.init_loc[-6:]
    # Its share of the prior, and the width of location and scale, add a little.
    assert (z.mean(0) - begin).abs().max() < 5 * init_scale / math.sqrt(4000) + 0.3 * init_scale
    assert init_scale * 0.8 < z.std(0).max() < init_scale * 2.0
