# SPDX-License-Identifier: Apache-2.0
"""Warm starts above a few hundred dimensions: the correlated directions are found, kept and of use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide, flows
from pyro_flows.models.log_joint import LogJoint
from pyro_flows.posterior import joint
from pyro_flows.posterior.joint import JOINT
from pyro_flows.starts.gaussian import best_gaussian
from pyro_flows.starts.low_rank import krylov_eigenpairs
from pyro_flows.transforms import LowRankAffine, LowRankPreconditioner

Model = Callable[..., Any]


@pytest.fixture(autouse=True)
def _few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above 2000 dimensions, where a full covariance would take too long."""
    monkeypatch.setattr(joint, "JOINT", replace(JOINT, max_plain_full_rank_dim=300))


def common_factors(dim: int, *, unlike: bool = True, size: float = 3.0) -> Model:
    """A Gaussian posterior with evidence 1: three factors behind all coordinates, and noise of their own."""
    generator = torch.Generator().manual_seed(0)
    loading = size * torch.randn(dim, 3, generator=generator)
    own = torch.randn(dim, generator=generator).mul(0.5 if unlike else 0.0).exp()
    mean = torch.randn(dim, generator=generator)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("target", dist.LowRankMultivariateNormal(mean, loading, own).log_prob(z))

    return model


def effects(y: Tensor, x: Tensor, group: Tensor) -> None:
    """A regression with a shared intercept and random effects, all of it linear."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", 400):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x + effect[..., group], 0.3), obs=y)


def effects_data() -> tuple[tuple[Tensor, ...], float]:
    """Arguments, in which the covariate is not centered, and the log evidence."""
    generator = torch.Generator().manual_seed(1)
    group = torch.arange(1200) % 400
    x = 2.0 + torch.randn(1200, generator=generator)
    effect = 0.7 * torch.randn(400, generator=generator)
    y = 2.0 + 0.5 * x + effect[group] + 0.3 * torch.randn(1200, generator=generator)
    design = torch.cat([torch.ones(1200, 1), x[:, None], torch.nn.functional.one_hot(group, 400)], -1)
    scale = torch.tensor([5.0, 5.0] + [0.7] * 400)
    marginal = dist.LowRankMultivariateNormal(torch.zeros(1200), design * scale, torch.full((1200,), 0.09))
    return (y, x, group), marginal.log_prob(y).item()


def log_joint_of(guide: AutoFlowGuide, *args: Any) -> LogJoint:
    return LogJoint(guide.model, guide.posterior.only_block.layout, args, {})


@torch.no_grad()
def elbo(guide: AutoFlowGuide, *args: Any) -> float:
    draws, log_q = guide.posterior.only_block.flow().rsample_and_log_prob((1000,))
    value: float = (log_joint_of(guide, *args)(draws) - log_q).mean().item()
    return value


def mean_field_elbo(guide: AutoFlowGuide, *args: Any) -> float:
    start = guide.posterior.only_block.layout.init_loc
    return best_gaussian(log_joint_of(guide, *args), start, 0.1, correlated=False).elbo


@pytest.mark.slow
@pytest.mark.parametrize("unlike", [False, True], ids=["identity", "unlike scales"])
@pytest.mark.parametrize("flow", ["auto", "low_rank_normal"])
def test_common_factors_are_found(flow: str, unlike: bool) -> None:
    """A mean-field normal loses 11 nats."""
    guide = AutoFlowGuide(common_factors(500, unlike=unlike), flow=flow).warm_start()
    assert elbo(guide) > -0.1
    assert mean_field_elbo(guide) < -10.0
    block = guide.posterior.only_block
    holder = block.flow.preconditioner if flow == "auto" else block.flow.head
    assert isinstance(holder, LowRankPreconditioner if flow == "auto" else LowRankAffine)
    assert sum(p.numel() for p in holder.parameters()) <= 500 * (2 * JOINT.rank + 3)


@pytest.mark.slow
def test_a_regression_with_random_effects() -> None:
    data, evidence = effects_data()
    guide = AutoFlowGuide(effects, structure="joint").warm_start(*data)
    low_rank, mean_field = evidence - elbo(guide, *data), evidence - mean_field_elbo(guide, *data)
    assert low_rank < 0.1
    assert mean_field > 2.0


def test_a_posterior_without_correlations_stays_mean_field() -> None:
    scale = torch.linspace(0.1, 2.0, 400)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(400), scale).to_event(1))

    guide = AutoFlowGuide(model).warm_start()
    preconditioner = guide.posterior.only_block.flow.preconditioner
    assert isinstance(preconditioner, LowRankPreconditioner)
    assert (preconditioner.stretch == 1.0).all() and (preconditioner.scale == 1.0).all()
    assert elbo(guide) == pytest.approx(0.0, abs=0.05)
    diagonal = AutoFlowGuide(common_factors(400), flow="diagonal_normal").warm_start()
    assert diagonal.posterior.only_block.flow.preconditioner is None


def test_a_second_warm_start_leaves_nothing_of_the_first() -> None:
    guide = AutoFlowGuide(common_factors(320)).warm_start()
    guide.warm_start()
    assert elbo(guide) > -0.1


@pytest.mark.slow
@pytest.mark.parametrize("base", ["student_t", "mixture"])
def test_other_bases_start_there_too(base: str) -> None:
    """Above 200 dimensions there are no Hessians, from which a mixture would take its modes."""
    guide = AutoFlowGuide(common_factors(310), flow=flows.get("auto", base=base)).warm_start()
    assert elbo(guide) > mean_field_elbo(guide)


class Square(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2.0 * ctx.saved_tensors[0] * gradient


def test_a_model_without_second_derivatives_stays_mean_field() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(310), 1.0).to_event(1))
        pyro.factor("sum", -Square.apply(z.sum(-1)))

    guide = AutoFlowGuide(model).warm_start()
    assert math.isfinite(elbo(guide))
    preconditioner = guide.posterior.only_block.flow.preconditioner
    assert isinstance(preconditioner, LowRankPreconditioner) and (preconditioner.stretch == 1.0).all()


def test_stores_and_files_keep_it() -> None:
    model = common_factors(310)
    guide = AutoFlowGuide(model, name="kept").warm_start()
    fresh = AutoFlowGuide(model).setup()
    fresh.load_state_dict(guide.state_dict())
    assert elbo(fresh) > -0.1
    guide()  # its parameters go to the store
    saved = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(saved)
    stored = AutoFlowGuide(model, name="kept")
    stored()  # takes them from there
    assert elbo(stored) > -0.1


@pytest.mark.parametrize("spectrum", ["few values", "spread"])
def test_eigenpairs_at_both_ends(spectrum: str) -> None:
    """A block of Lanczos vectors stops short of nothing where there are few distinct eigenvalues."""
    torch.manual_seed(0)
    values = torch.ones(400, dtype=torch.float64)
    if spectrum == "spread":
        values += 0.1 * torch.rand(400)
    ends = torch.tensor([1e-4] * 6 + [5e-3, 0.1, 7.0, 7.0, 40.0], dtype=torch.float64)
    values[: len(ends)] = ends
    rotation = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64)).Q
    matrix = (rotation * values) @ rotation.mT
    found, vectors = krylov_eigenpairs(lambda block: matrix @ block, 400)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(found), dtype=torch.float64))
    torch.testing.assert_close(found[:8], ends[:8], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[-3:], ends[8:], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(matrix @ vectors[:, :8], vectors[:, :8] * found[:8], rtol=0.0, atol=1e-6)


def test_what_conditions_on_values_sees_them_in_units_of_order_one() -> None:
    torch.manual_seed(0)
    preconditioner = LowRankPreconditioner(6, 3)
    loc, scale = torch.randn(6), torch.rand(6) + 0.5
    directions = torch.linalg.qr(torch.randn(6, 2)).Q
    preconditioner.set(torch.randn(6), torch.rand(6) + 0.5, directions, torch.tensor([4.0, 0.3]))
    y = torch.randn(3, 6)
    matrix = preconditioner.forward_and_ladj(torch.eye(6))[0] - preconditioner.loc
    matrix = matrix.mT
    variance = (matrix * scale).square().sum(-1)
    expected = (y - preconditioner.loc - matrix @ loc) / (1.0 + variance).sqrt()
    torch.testing.assert_close(preconditioner.standardize(y, loc, scale), expected.detach())
