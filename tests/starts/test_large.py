# SPDX-License-Identifier: Apache-2.0
"""Warm starts of full rank above a few hundred dimensions, by Newton's method on the ELBO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.starts import gaussian
from pyro_flows.transforms import FullRankPreconditioner
from tests.starts.test_low_rank import common_factors, elbo, log_joint_of

DIM = 240


def chain() -> Callable[..., Any]:
    """A field under counts, as a Cox process has, whose neighbors are correlated all along it."""
    where = torch.arange(float(DIM))
    covariance = (-(where.unsqueeze(-1) - where).abs() / 10.0).exp()
    factor = torch.linalg.cholesky(covariance.double()).float()
    counts = torch.poisson((factor @ torch.randn(DIM)).exp())

    def model() -> None:
        field = pyro.sample("field", dist.MultivariateNormal(torch.zeros(DIM), scale_tril=factor))
        with pyro.plate("cells", DIM):
            pyro.sample("counts", dist.Poisson(field.exp()), obs=counts)

    return model


def matrix(guide: AutoFlowGuide) -> Tensor:
    preconditioner = guide.posterior.only_block.flow.preconditioner
    assert isinstance(preconditioner, FullRankPreconditioner)
    return preconditioner.factor.detach()


def test_a_field_under_counts() -> None:
    """From a model that does not broadcast."""
    pyro.set_rng_seed(0)
    model = chain()
    guide = AutoFlowGuide(model).warm_start()
    flat = AutoFlowGuide(model, "diagonal_normal").warm_start()
    assert elbo(guide) > elbo(flat) + 20.0
    assert matrix(guide).tril(-1).abs().max() > 0.01
    # At the best Gaussian the gradient of the log joint has a mean of zero (Opper and Archambeau 2009).
    noise = torch.randn(4000, DIM)
    draws = guide.posterior.only_block.flow.transform.forward_and_ladj(noise)[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_joint_of(guide)(draws).sum(), draws)
    slope = gradient @ matrix(guide)
    error = slope.std(0) / len(slope) ** 0.5
    assert (slope.mean(0).abs() < 5.0 * error + 0.1).all()


def test_without_hessians_a_few_directions_are_kept(monkeypatch: Any) -> None:
    """Where a Newton iteration is out of reach, the best low-rank covariance is written out."""
    monkeypatch.setattr(gaussian, "_max_newton_dim", lambda log_joint: 200)
    guide = AutoFlowGuide(common_factors(DIM)).warm_start()
    assert elbo(guide) > -0.1
    assert matrix(guide).tril(-1).abs().max() > 0.1
