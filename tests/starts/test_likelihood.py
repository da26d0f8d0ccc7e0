# SPDX-License-Identifier: Apache-2.0
"""Likelihood factors of heads, from derivatives of the log joint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.importance.weights import log_weights
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts import likelihood
from pyro_flows.starts.likelihood import fit_likelihood, seen_coordinates
from pyro_flows.transforms import FullPrecisionHead, LinearMixedHead


def shrunk(x: Tensor, y: Tensor) -> None:
    """A horseshoe regression: only the noise scales its likelihood."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("columns", x.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        weights = pyro.sample("weights", dist.Normal(0.0, local * tau))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x * weights).sum(-1), noise), obs=y)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, 0] + 0.5 * torch.randn(30, generator=torch.Generator().manual_seed(1))


def test_partners_share_a_term(data: tuple[Tensor, Tensor]) -> None:
    guide = AutoFlowGuide(shrunk).warm_start(*data)
    layout = guide.posterior.joint.layout
    log_joint = LogJoint(shrunk, layout, data, {})
    point = torch.zeros(layout.latent_dim)
    assert log_joint.partners({"weights"}, point) == {"weights", "noise"}
    assert log_joint.partners({"local"}, point) == {"local", "tau", "weights"}
    assert log_joint.partners({"weights", "noise"}, point) == {"weights", "noise"}
    assert log_joint.partners(set(), point) == set()


def test_only_what_scales_the_likelihood_is_moved(data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50,000 rows, Hessians at points where local scales were moved took a fifth of a warm start."""
    guide = AutoFlowGuide(shrunk).warm_start(*data)
    layout, head = guide.posterior.joint.layout, guide.posterior.joint.flow.head
    assert isinstance(head, LinearMixedHead)
    log_joint = LogJoint(shrunk, layout, data, {})
    count = []
    evaluate = likelihood.gradient_and_hessian

    def counted(target: Any, points: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        count.append(len(points))
        return evaluate(target, points, **options)

    monkeypatch.setattr(likelihood, "gradient_and_hessian", counted)
    center = torch.zeros(layout.latent_dim)
    seen = seen_coordinates(log_joint, head, center)
    assert fit_likelihood(log_joint, head, center, torch.ones_like(center), seen)
    assert sum(count) == 1 + 2  # at the center, and above and below it in the noise
    names = [name for name, where in layout.slices.items() for _ in range(where.stop - where.start)]
    tilts = dict(zip([names[index] for index in head.order[: head.count_free]], head.own_tilt.tolist(), strict=True))
    # The precision of a normal likelihood is exp(-2 log noise): its logarithm changes by -2, so that the tilt is 1.
    assert tilts["noise"] == pytest.approx(1.0, abs=1e-3)
    assert tilts["tau"] == tilts["local"] == 0.0


PLACES = torch.linspace(-1.0, 1.0, 12)


def process(likelihood: Callable[[Tensor], dist.TorchDistribution], y: Tensor) -> None:
    """A Gaussian process with an unknown amplitude."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    covariance = scale**2 * (-(PLACES.unsqueeze(-1) - PLACES).square() / 0.1).exp() + 1e-3 * torch.eye(len(PLACES))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(PLACES)), covariance))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", likelihood(f), obs=y)


@pytest.mark.parametrize(
    ("likelihood", "is_skewed"),
    [(lambda f: dist.Poisson(f.exp()), True), (lambda f: dist.Normal(f, 0.5), False)],
    ids=["counts", "normal"],
)
def test_a_skewed_likelihood(likelihood: Callable[[Tensor], dist.TorchDistribution], is_skewed: bool) -> None:
    """Half the variance of log weights of counts was 0.06 to 0.08 with a Gaussian factor."""
    y = torch.tensor([0.0, 1.0, 0.0, 2.0, 4.0, 3.0, 1.0, 0.0, 0.0, 1.0, 0.0, 3.0])
    guide = AutoFlowGuide(process).warm_start(likelihood, y)
    head = guide.posterior.joint.flow.head
    assert isinstance(head, FullPrecisionHead)
    assert head.is_skewed is is_skewed
    assert log_weights(process, guide, 4000, (likelihood, y))[0].var() / 2 < 0.04
