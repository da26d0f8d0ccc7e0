# SPDX-License-Identifier: Apache-2.0
"""The gradients that come back to draws: nothing absurd passes, the mean stays, and noise goes where it can."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyro_flows import AutoFlowGuide, flows
from pyro_flows.flows import Flow
from pyro_flows.flows.gradient_filter import FILTER, GradientFilter
from tests.common import randomize_parameters, trained

Target = Callable[[Tensor], Tensor]


def gaussian(z: Tensor) -> Tensor:
    """A standard normal's log density up to a constant."""
    return -0.5 * z.square()


def heavy_tails(z: Tensor) -> Tensor:
    return dist.StudentT(2.0, 0.0, 0.3).log_prob(z)


def passed(gradient_filter: GradientFilter, gradient: Tensor) -> Tensor:
    """What is left of a gradient without a score, ``(..., D)``."""
    value = torch.zeros_like(gradient).requires_grad_()
    draw = value * 1.0
    gradient_filter.clip(draw)
    return torch.autograd.grad(draw, value, gradient)[0]


def gradients(
    gradient_filter: GradientFilter | None, parameters: Tensor, eps: Tensor, target: Target, factor: float = 1.0
) -> Tensor:
    """Path gradient of ``factor * KL`` in location and scale of N(loc, scale^2), from draws ``(..., D)``."""
    parameters = parameters.clone().requires_grad_()
    loc, scale = parameters
    value = loc + scale * eps
    score = (-eps / scale).detach()
    log_q = dist.Normal(loc, scale).log_prob(value).sum(-1)
    draw = value
    if gradient_filter is not None:
        draw = gradient_filter.watch(value, score, log_q, value.new_zeros(0), value.new_zeros(0))
    leaf = draw.detach().requires_grad_()
    count = eps.numel() // eps.shape[-1]
    (pull,) = torch.autograd.grad(target(leaf).sum(), leaf)
    return torch.autograd.grad(draw, parameters, factor * (score - pull) / count)[0]


def runs(
    gradient_filter: GradientFilter | None, loc: float, scale: float, target: Target, num: int, shape: tuple[int, ...]
) -> Tensor:
    """Gradients of many steps at the same parameters, ``(num, 2)``."""
    parameters = torch.tensor([loc, scale], dtype=torch.double)
    noise = torch.randn(num, *shape, dtype=torch.double)
    return torch.stack([gradients(gradient_filter, parameters, eps, target) for eps in noise])


def fresh(dim: int = 1, dtype: torch.dtype = torch.double) -> GradientFilter:
    return GradientFilter(dim).to(dtype)


# Clipping


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 2), (4, 3, 2)], ids=str)
def test_no_number_becomes_zero_and_is_counted(bad: float, shape: tuple[int, ...]) -> None:
    gradient_filter = fresh(2)
    value = torch.arange(float(math.prod(shape))).double().reshape(shape).requires_grad_()
    gradient = torch.ones(shape, dtype=torch.double)
    gradient.view(-1, 2)[-1, 0] = bad
    for _ in range(2):
        draw = value * 1.0
        gradient_filter.clip(draw)
        (found,) = torch.autograd.grad(draw, value, gradient)
        assert torch.equal(found, torch.where(gradient.isfinite(), gradient, 0.0))
    assert gradient_filter.num_refused == 2
    assert gradient_filter.refused_draw is not None
    # The first draw with such a gradient.
    rows = value.detach().reshape(-1, 2)
    first = (~gradient.reshape(-1, 2).isfinite()).any(-1).nonzero()[0, 0]
    assert torch.equal(gradient_filter.refused_draw, rows[first])
    assert not gradient_filter.refused_draw.requires_grad


def test_finite_gradients_are_not_counted() -> None:
    gradient_filter = fresh()
    passed(gradient_filter, torch.ones(5, 1, dtype=torch.double))
    assert gradient_filter.num_refused == 0
    assert gradient_filter.refused_draw is None
    assert gradient_filter.is_fresh


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_what_is_out_of_proportion_is_clipped(unit: float) -> None:
    gradient_filter = fresh(2)
    ordinary = torch.randn(200, 2, dtype=torch.double) * torch.tensor([1.0, 50.0]) * unit
    for gradient in ordinary:
        assert torch.equal(passed(gradient_filter, gradient), gradient)
    usual = gradient_filter.square.sqrt()
    # Running, so known to a fifth or so; each coordinate by itself.
    torch.testing.assert_close(usual, ordinary.square().mean(0).sqrt(), rtol=0.5, atol=0.0)
    absurd = torch.tensor([1e20, -1e20], dtype=torch.double) * unit
    torch.testing.assert_close(passed(gradient_filter, absurd), FILTER.largest * usual * absurd.sign())
    large = 0.9 * FILTER.largest * gradient_filter.square.sqrt()
    assert torch.equal(passed(gradient_filter, large), large)
    one_of_two = torch.stack([absurd[0], 10.0 * usual[1]])
    assert passed(gradient_filter, one_of_two)[1] == one_of_two[1]


def test_an_absurd_gradient_does_not_open_the_gate_for_the_next() -> None:
    gradient_filter = fresh()
    for _ in range(20):
        passed(gradient_filter, torch.ones(1, dtype=torch.double))
    first, second = (passed(gradient_filter, torch.full((1,), 1e30, dtype=torch.double)).item() for _ in range(2))
    assert first == pytest.approx(FILTER.largest)
    assert second <= FILTER.largest * math.sqrt(1.0 + 0.03 * FILTER.largest**2)


def test_the_first_gradient_is_of_any_size() -> None:
    gradient = torch.tensor([1e12, 1e-12], dtype=torch.double)
    assert torch.equal(passed(fresh(2), gradient), gradient)


@pytest.mark.parametrize("gradient", [1e25, 1e-22, 0.0])
def test_single_precision_squares_may_overflow_and_underflow(gradient: float) -> None:
    gradient_filter = fresh(dtype=torch.float32)
    for _ in range(3):
        assert passed(gradient_filter, torch.tensor([gradient])).item() == pytest.approx(gradient)
    assert passed(gradient_filter, torch.tensor([1.0])).isfinite()
    assert passed(gradient_filter, torch.tensor([1.0])).isfinite()


# The control variate


def test_without_a_control_variate_the_gradient_is_the_path_gradient() -> None:
    gradient_filter = fresh()
    gradient_filter.largest_multiple = 0.0
    pyro.set_rng_seed(0)
    expected = runs(None, 0.3, 0.5, heavy_tails, 20, (4, 1))
    pyro.set_rng_seed(0)
    found = runs(gradient_filter, 0.3, 0.5, heavy_tails, 20, (4, 1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "scale", "shape"),
    [(gaussian, 0.3, (1,)), (heavy_tails, 0.5, (1,)), (heavy_tails, 0.5, (4, 1))],
    ids=["gaussian", "heavy_tails", "heavy_tails_in_fours"],
)
def test_the_mean_is_kept(target: Target, scale: float, shape: tuple[int, ...]) -> None:
    """The multiple must not know of the draw that it weighs."""
    num, settled = 2500, 100
    gradient_filter = fresh()
    pyro.set_rng_seed(1)
    filtered = runs(gradient_filter, 0.3, scale, target, num, shape)[settled:]
    pyro.set_rng_seed(1)
    plain = runs(None, 0.3, scale, target, num, shape)[settled:]
    difference = filtered - plain  # the same noise on both sides: what remains is c times the score term
    error = difference.std(0) / len(difference) ** 0.5
    assert (error > 0.0).all()
    assert (difference.mean(0).abs() < 4.5 * error).all()


def test_hardly_any_noise_where_q_is_narrow() -> None:
    """The posterior N(0, 1), q = N(0.3, 0.1^2)."""
    pyro.set_rng_seed(2)
    filtered = runs(fresh(), 0.3, 0.1, gaussian, 300, (1,))
    pyro.set_rng_seed(2)
    plain = runs(None, 0.3, 0.1, gaussian, 300, (1,))
    # 99 % of the path gradient's noise is the score's; the mean is 0.3 and 0.1 - 10.
    assert (filtered[50:].std(0) < 0.05 * plain[50:].std(0)).all()
    # From the second step on, while the regression has few draws.
    assert (filtered[1:20].std(0) < 0.5 * plain[1:20].std(0)).all()


@pytest.mark.parametrize("shape", [(1,), (4, 1)], ids=["one", "four"])
def test_no_noise_at_the_posterior(shape: tuple[int, ...]) -> None:
    found = runs(fresh(), 0.0, 1.0, gaussian, 50, shape)
    assert found.abs().max() < 1e-12
    # And soon after q came there from elsewhere, where the multiple was one.
    gradient_filter = fresh()
    runs(gradient_filter, 0.3, 0.1, gaussian, 200, shape)
    before = runs(gradient_filter, 0.0, 1.0, gaussian, 20, shape).std(0)
    runs(gradient_filter, 0.0, 1.0, gaussian, 600, shape)
    after = runs(gradient_filter, 0.0, 1.0, gaussian, 20, shape).std(0)
    assert (after < 0.02 * before).all()


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e6])
def test_a_scaled_loss_has_the_scaled_gradient(factor: float) -> None:
    found = []
    for times in (1.0, factor):
        pyro.set_rng_seed(3)
        gradient_filter = fresh()
        gradient_filter.largest_multiple = math.inf
        parameters = torch.tensor([0.3, 0.2], dtype=torch.double)
        noise = torch.randn(60, 2, 1, dtype=torch.double)
        steps = [gradients(gradient_filter, parameters, eps, heavy_tails, times) / times for eps in noise]
        steps.append(passed(gradient_filter, torch.full((1,), 1e30, dtype=torch.double)) / times)
        found.append(torch.cat(steps))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_multiple_is_bounded() -> None:
    """The weight of the entropy: more than all of the score term would be another loss's."""
    pyro.set_rng_seed(4)
    gradient_filter = fresh()
    gradient_filter.largest_multiple = 0.5
    half = runs(gradient_filter, 0.0, 0.1, gaussian, 200, (1,))[5:].std(0)
    pyro.set_rng_seed(4)
    plain = runs(None, 0.0, 0.1, gaussian, 200, (1,))[5:].std(0)
    # In the location, where the score term is minus the path's: u - c s with u = 0.99 s.
    assert half[0] == pytest.approx(float(plain[0]) * 0.49 / 0.99, rel=1e-6)


# In flows and guides


@pytest.mark.parametrize("name", ["diagonal_normal", "auto", "realnvp"])
def test_draws_of_a_flow_keep_their_values_and_their_density(name: str) -> None:
    flow = flows.get(name).build(3).double()
    randomize_parameters(flow)
    drawn = []
    for gradient_filter in (None, fresh(3)):
        pyro.set_rng_seed(5)
        distribution = flow(gradient_filter=gradient_filter)
        value = distribution.rsample((4,))
        drawn.append((value, distribution.log_prob(value), distribution.score_parts(value).log_prob))
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["full_rank_normal", "auto"])
def test_a_flow_of_any_shape_without_the_multiple(name: str, sample_shape: tuple[int, ...]) -> None:
    flow = flows.get(name).build(3).double()
    randomize_parameters(flow)
    gradient_filter = fresh(3)
    gradient_filter.largest_multiple = 0.0
    found = []
    for part in (None, gradient_filter):
        pyro.set_rng_seed(6)
        value = flow(gradient_filter=part).rsample(torch.Size(sample_shape))
        loss = value.square().sum() + value.sin().sum()
        found.append(torch.autograd.grad(loss, trained(flow), allow_unused=True))
    for one, other in zip(*found, strict=True):
        # An entry of zeros for None: the density depends on all.
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-9, atol=1e-9)


def conjugate(data: Tensor) -> None:
    """The posterior is N(0, 1) in each of three coordinates."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.double), 2.0**0.5).to_event(1))
    pyro.sample("y", dist.Normal(z, 2.0**0.5).to_event(1), obs=data)


def in_plates(data: Tensor) -> None:
    """The posterior of each item is N(0, 1); no globals."""
    with pyro.plate("items", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.double), 2.0**0.5))
        pyro.sample("y", dist.Normal(z, 2.0**0.5), obs=data)


CASES = {"joint": (conjugate, "joint"), "local": (in_plates, "plates")}


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize(("model", "structure"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("flow", ["diagonal_normal", "auto"])
def test_guides_have_it(
    monkeypatch: pytest.MonkeyPatch, flow: str, model: Callable[..., None], structure: str, num_particles: int
) -> None:
    """Location and scale of the head get hardly any noise, where q is narrow and the posterior Gaussian."""
    data = torch.zeros(3, dtype=torch.double)
    start = init_to_value(values={"z": torch.full((3,), 0.3, dtype=torch.double)})
    guide = AutoFlowGuide(model, flow, init_loc_fn=start, init_scale=0.1, structure=structure).setup(data)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    (gradient_filter,) = guide.posterior.filters
    (head,) = (part.head for part in guide.posterior.modules() if isinstance(part, Flow))
    (raw,) = head.raw.parameters()

    def spread() -> Tensor:
        rows = []
        for _ in range(40):
            guide.zero_grad()
            elbo.loss_and_grads(model, guide, data)
            assert raw.grad is not None
            rows.append(raw.grad.reshape(-1).clone())
        return torch.stack(rows[20:]).std(0).mean()

    small = spread()
    with monkeypatch.context() as patch:
        patch.setattr(gradient_filter, "_multiple", lambda gradient, score: gradient.new_zeros(()))
        assert small < 0.1 * spread()


def test_a_subsampled_plate_weighs_the_entropy_of_its_items() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 30, subsample_size=6):
            pyro.sample("z", dist.Normal(mu, 1.0))

    guide = AutoFlowGuide(model).setup()
    guide()
    (block,) = guide.posterior.blocks()
    assert block.gradient_filter.largest_multiple == pytest.approx(5.0)
    assert guide.posterior.joint.gradient_filter.largest_multiple == 1.0


@pytest.mark.parametrize("structure", ["joint", "plates"])
def test_it_is_not_saved(structure: str) -> None:
    data = torch.zeros(3, dtype=torch.double)
    guide = AutoFlowGuide(in_plates, structure=structure).setup(data)
    Trace_ELBO().loss_and_grads(in_plates, guide, data)
    (gradient_filter,) = guide.posterior.filters
    assert gradient_filter.count > 0.0
    assert (gradient_filter.square > 0.0).all()
    assert gradient_filter.square.dtype == torch.double
    names = {name for name, _ in gradient_filter.named_buffers()}
    assert not any(name.rpartition(".")[2] in names for name in guide.state_dict())
    AutoFlowGuide(in_plates, structure=structure).setup(data).load_state_dict(guide.state_dict())


def test_no_gradient_no_filter() -> None:
    data = torch.zeros(3, dtype=torch.double)
    guide = AutoFlowGuide(conjugate).setup(data)
    with torch.no_grad():
        guide(data)
    guide.sample_posterior(5, data)
    guide.median(data)
    (gradient_filter,) = guide.posterior.filters
    assert gradient_filter.count == 0.0
    assert not gradient_filter.is_fresh
