# SPDX-License-Identifier: Apache-2.0
"""What is special about the autoregressive maps, each of Pyro's defects next to what holds here. The general properties
are in test_contract.py and flows/test_conformance.py."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from torch import Tensor

import pyro_flows.transforms as T
from pyro_flows import AutoFlowGuide, flows
from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.transforms.autoregressive import AutoregressiveTransform
from pyro_flows.transforms.spline import RationalQuadratic

MAPS: dict[str, type[AutoregressiveTransform]] = {
    "affine": T.AffineAutoregressive,
    "spline": T.SplineAutoregressive,
    "neural": T.NeuralAutoregressive,
    "block": T.BlockAutoregressive,
}
FAMILIES = ("iaf", "maf", "spline_autoregressive", "block_autoregressive", "neural_autoregressive")


def randomize(module: torch.nn.Module, sd: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(sd * torch.randn_like(parameter))


def jacobian(transform: T.FlowTransform, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda v: transform.forward_and_ladj(v)[0], x)


@pytest.mark.parametrize("kind", MAPS)
def test_jacobian_is_lower_triangular(kind: str) -> None:
    transform = MAPS[kind](6)
    randomize(transform)
    found = jacobian(transform, torch.randn(6))
    assert (found.triu(1) == 0).all()
    assert (found.diagonal() > 0).all()
    assert (found.tril(-1) != 0).sum() == 15  # Every coordinate follows all those before it.


@pytest.mark.parametrize("kind", ["affine", "spline", "neural"])
def test_order(kind: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    transform = MAPS[kind](4, order=order)  # type: ignore[call-arg]
    randomize(transform)
    found = jacobian(transform, torch.randn(4))[order][:, order]
    assert (found.triu(1) == 0).all()
    assert (found.tril(-1) != 0).sum() == 6


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3]], ids=str)
def test_wrong_order_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="AffineAutoregressive: expected order to hold 0 to 2"):
        T.AffineAutoregressive(3, order=order)
    with pytest.raises(ValueError, match="Permutation: expected permutation to hold 0 to 2"):
        T.Permutation(3, permutation=order)


@pytest.mark.parametrize(
    "kind, tolerance", [("affine", 1e-6), ("spline", 1e-5), ("neural", 0.02), ("block", 1.0)], ids=str
)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("input_dim", [1, 5])
def test_start(kind: str, tolerance: float, input_dim: int, context_dim: int) -> None:
    x = 2.0 * torch.randn(50, input_dim)
    context = torch.randn(50, context_dim) if context_dim else None
    y, ladj = MAPS[kind](input_dim, context_dim).forward_and_ladj(x, context)
    torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)
    assert ladj.abs().max() < 1e-4 + tolerance * input_dim


# Affine


def test_affine_inverse_in_float64() -> None:
    theirs = pyro_transforms.affine_autoregressive(4).double()
    value = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):
        dist.TransformedDistribution(dist.Normal(value.new_zeros(4), 1.0).to_event(1), [theirs]).log_prob(value)

    ours = T.AffineAutoregressive(4).double()
    randomize(ours)
    x, ladj = ours.inverse_and_ladj(value)
    assert x.dtype == ladj.dtype == torch.float64
    back, back_ladj = ours.forward_and_ladj(x)
    torch.testing.assert_close(back, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-12, atol=1e-12)


def test_affine_log_scale_has_the_gradient_of_its_value() -> None:
    theirs = pyro_transforms.affine_autoregressive(2)
    bias = theirs.arn.layers[-1].bias
    with torch.no_grad():
        bias.fill_(20.0)  # Far beyond the clamp at 3.
    x = torch.zeros(2)
    y = theirs(x)
    (gradient,) = torch.autograd.grad(theirs.log_abs_det_jacobian(x, y), bias)
    assert gradient.abs().sum() > 1.0  # The value does not move, and yet:

    ours = T.AffineAutoregressive(2)
    bias = ours.network.layers[-1].bias
    with torch.no_grad():
        bias.fill_(2.0)

    def ladj(values: Tensor) -> Tensor:
        with torch.no_grad():
            bias.copy_(values)
        return ours.forward_and_ladj(torch.zeros(2))[1]

    start = bias.detach().clone()
    (gradient,) = torch.autograd.grad(ladj(start), bias)
    step = 1e-2 * torch.eye(4)
    numeric = torch.stack([(ladj(start + s) - ladj(start - s)) / 2e-2 for s in step])
    torch.testing.assert_close(gradient, numeric, rtol=1e-2, atol=1e-4)
    assert ladj(torch.full((4,), 1e4)) <= 2 * ours.log_scale_bound


def test_affine_contains_full_rank_gaussians() -> None:
    transform = T.AffineAutoregressive(3)
    with torch.no_grad():
        transform.network.skip.weight.normal_()
        transform.network.skip.weight[1::2] = 0.0  # Rows are (shift, log-scale) of each coordinate.
    jacobians = [jacobian(transform, torch.randn(3)) for _ in range(2)]
    torch.testing.assert_close(*jacobians)
    assert (jacobians[0].tril(-1) != 0).sum() == 3


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_inverse_in_many_dimensions(kind: str) -> None:
    transform = MAPS[kind](50, 2).double()
    randomize(transform)
    x, context = torch.randn(20, 50, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x, context)
    back, back_ladj = transform.inverse_and_ladj(y, context)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-8, atol=1e-8)


def test_inverse_survives_overflow_on_the_way() -> None:
    # Coordinates that the iteration has not reached yet go to infinity; they must not touch those it has.
    transform = T.AffineAutoregressive(20)
    randomize(transform, 0.1)
    with torch.no_grad():
        transform.network.skip.weight[::2] = 1e4
        transform.network.layers[-1].bias.zero_()
    y = torch.zeros(20)
    y[0] = 1.0
    x, ladj = transform.inverse_and_ladj(y)
    assert x.isfinite().all()
    assert ladj.isfinite().all()


@pytest.mark.parametrize("kind", MAPS)
def test_score_in_many_dimensions(kind: str) -> None:
    transform = MAPS[kind](50).double()
    randomize(transform)
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    y, ladj, score = transform.forward_with_score(x, -x.detach(), None)
    (gradient,) = torch.autograd.grad(ladj.sum(), x, retain_graph=True)
    (back,) = torch.autograd.grad(y, x, score)
    torch.testing.assert_close(back, -x.detach() - gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MAPS)
def test_recorded_score_is_the_same_by_one_pass(kind: str) -> None:
    """Passes of a fixed number, one after another, were a graph of twice the size, of up to 32 dimensions."""
    order = {} if kind == "block" else {"order": torch.randperm(40)}
    transform = MAPS[kind](40, **order).double()
    randomize(transform)
    x = torch.randn(3, 40, dtype=torch.float64)

    def score_of(x: Tensor) -> Tensor:
        return transform.forward_with_score(x.requires_grad_(), -x.detach(), None)[2]

    graph, captured, _ = trace_operations(lambda x: [score_of(x)], [x])
    torch.testing.assert_close(graph(x, *captured)[0], score_of(x), rtol=1e-9, atol=1e-9)
    assert sum(node.target is torch.ops.aten.linalg_solve_triangular.default for node in graph.graph.nodes) == 1


def test_a_jacobian_that_is_too_large_is_not_recorded() -> None:
    transform = T.AffineAutoregressive(129)
    with pytest.raises(NotImplementedError, match=r"129 dimensions.*path_gradient=False"):
        trace_operations(
            lambda x: transform.forward_with_score(x.requires_grad_(), -x.detach(), None), [torch.randn(2, 129)]
        )


# Spline


def test_spline_is_rational_quadratic() -> None:
    with pytest.raises(ValueError, match="unpack"):
        pyro_transforms.spline_autoregressive(2, order="quadratic")(torch.randn(3, 2))
    transform = T.SplineAutoregressive(2, count_bins=4, bound=3.0)
    randomize(transform, 1.0)
    x = torch.tensor([-50.0, -49.0, 0.3, 49.0, 50.0])
    first = transform.forward_and_ladj(torch.stack([x, torch.zeros_like(x)], -1))[0][:, 0].tolist()
    assert first[2] != pytest.approx(0.3, abs=1e-3)
    assert first[1] - first[0] == pytest.approx(first[4] - first[3], rel=1e-3)  # One slope outside the box.


def test_spline_keeps_the_moments_of_noise() -> None:
    """Mean 0 and variance 1 by its own quadrature, whose error shows against the exact integral: 0.1 and 20 %.

    A spline pinned at -1 and 1 (as it was) has a standard deviation of 100 where its middle is squeezed.
    """
    noise = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20_000) + 0.5) / 20_000)
    squeezed = torch.zeros(23, 1)
    squeezed[8:16, 0] = torch.tensor([3.0, 3.0, 3.0, -3.0, -3.0, 3.0, 3.0, 3.0])  # heights of the 8 bins
    for raw in (torch.zeros(23, 1), squeezed, *(0.5 * torch.randn(20, 23, 1))):
        y = RationalQuadratic(raw, 5.0)(noise.unsqueeze(-1))[0]
        assert y.mean().abs() < 0.1
        assert 0.8 < y.std() < 1.2


# Block


def test_block_is_onto() -> None:
    x = torch.tensor([[-1e6], [1e6]])
    assert pyro_transforms.block_autoregressive(1)(x).abs().max() < 100.0  # No value beyond has any density.

    transform = T.BlockAutoregressive(1)
    randomize(transform)
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(ladj, torch.zeros(2))


def test_block_ladj_far_out() -> None:
    transform = T.BlockAutoregressive(3)
    randomize(transform)
    x = torch.tensor([0.0, 30.0, -1e5], requires_grad=True)
    y, ladj = transform.forward_and_ladj(x)
    (y.sum() + ladj).backward()
    assert ladj.isfinite()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in transform.parameters())


# Neural


def test_neural_ladj_is_not_stale() -> None:
    theirs = pyro_transforms.neural_autoregressive(3)
    x, other = torch.randn(5, 3), torch.randn(5, 3)
    y = theirs(x)
    right = theirs.log_abs_det_jacobian(x, y).detach()
    theirs(other)
    assert not torch.allclose(theirs.log_abs_det_jacobian(x, y), right)

    ours = T.NeuralAutoregressive(3)
    randomize(ours)
    y = ours(x)
    right = ours.log_abs_det_jacobian(x, y).detach()
    ours(other)
    assert torch.equal(ours.log_abs_det_jacobian(x, y), right)
    bound = ours.condition(None)
    y = bound(x)
    bound(other)
    assert torch.equal(bound.log_abs_det_jacobian(x, y), right)


def test_neural_tails_are_straight() -> None:
    x = torch.tensor([[-1e3], [-50.0], [50.0], [1e3]])
    theirs = pyro_transforms.neural_autoregressive(2)(x.expand(4, 2))[:, 0]
    assert theirs[2] == theirs[3]  # The sigmoid has saturated.

    transform = T.NeuralAutoregressive(1)
    randomize(transform)
    y, ladj = transform.forward_and_ladj(x)
    assert (y.diff(dim=0) > 0).all()
    slopes = (y[1::2] - y[::2]) / 950.0
    torch.testing.assert_close(slopes.squeeze(-1).log(), ladj[[0, 3]], rtol=1e-3, atol=1e-3)


# Permutation and inverse


def test_permutation_is_saved() -> None:
    theirs = torch.nn.ModuleList(pyro_transforms.ComposeTransformModule([pyro_transforms.permute(5)]))
    assert not theirs.state_dict()

    ours, fresh = T.Permutation(30), T.Permutation(30)
    assert "permutation" in ours.state_dict()
    x = torch.randn(2, 30)
    assert not torch.equal(ours(x), fresh(x))
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), fresh(x))
    assert torch.equal(ours.inverse_and_ladj(ours(x))[0], x)


def test_inverse_turns_round() -> None:
    inner = T.AffineAutoregressive(4)
    randomize(inner)
    x = torch.randn(3, 4)
    turned = T.Inverse(inner)
    torch.testing.assert_close(turned.inverse_and_ladj(x), inner.forward_and_ladj(x))
    torch.testing.assert_close(turned.forward_and_ladj(x), inner.inverse_and_ladj(x))
    with pytest.raises(NotImplementedError, match="NeuralAutoregressive"):
        T.Inverse(T.NeuralAutoregressive(4))


# Families


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_registered(name: str) -> None:
    spec = flows.get(name)
    assert spec.min_dim == (2 if name in ("iaf", "maf") else 1)
    assert spec.one_pass_sampling == (name != "maf")
    assert spec.has_inverse == (name not in ("block_autoregressive", "neural_autoregressive"))
    flow = flows.get(name, num_transforms=3).build(4, context_dim=2)
    value, log_prob = flow(torch.randn(7, 2)).rsample_and_log_prob((5,))
    assert value.shape == (5, 7, 4)
    assert log_prob.shape == (5, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_refuse_no_layers(name: str) -> None:
    with pytest.raises(ValueError, match="num_transforms"):
        flows.get(name, num_transforms=0)
    widths = "hidden_factors" if name == "block_autoregressive" else "hidden_dims"
    with pytest.raises(ValueError, match=f"expected {widths} to have at least one entry"):
        flows.get(name, **{widths: ()})


@pytest.mark.parametrize("name", ["iaf", "maf"])
def test_affine_families_need_two_dimensions(name: str) -> None:
    with pytest.raises(ValueError, match="expected input_dim >= 2, but got 1"):
        flows.get(name).build(1)


@pytest.mark.parametrize("name", ["iaf", "spline_autoregressive"])
def test_path_gradient_vanishes_at_the_optimum(name: str) -> None:
    flow = flows.get(name).build(5).double()
    randomize(flow, 0.1)
    target = copy.deepcopy(flow).requires_grad_(False)
    q = flow()
    z = q.rsample((4,))
    # Not the mean over draws: every single draw's gradient is zero.
    (q.score_parts(z).entropy_term - target(path_gradient=False).log_prob(z)).sum().backward()
    for key, parameter in flow.named_parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0.0, atol=1e-8, msg=key)


def test_maf_is_a_density_in_a_model() -> None:
    flow = flows.get("maf").build(3)
    randomize(flow)

    def model(data: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(data)):
            pyro.sample("x", flow(), obs=data)

    data = torch.randn(20, 3)
    log_prob = pyro.poutine.trace(model).get_trace(data).log_prob_sum()
    log_prob.backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
    z, log_q = flow().rsample_and_log_prob((100,))
    torch.testing.assert_close(flow().log_prob(z.clone()), log_q, rtol=1e-3, atol=1e-3)


def test_guide_refuses_maf() -> None:
    with pytest.raises(NotImplementedError, match='Use "iaf"'):
        AutoFlowGuide(lambda: None, flow="maf")
