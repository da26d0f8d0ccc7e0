# SPDX-License-Identifier: Apache-2.0
"""Planar and radial maps: Pyro's maps, with an inverse and an identity start."""

from __future__ import annotations

import copy

import pyro.distributions.transforms as T
import pytest
import torch
from torch import Tensor

from pyro_flows.transforms import FlowTransform, Planar, Radial, Sylvester
from pyro_flows.transforms.bisection import solve_tanh
from tests.common import jacobian, randomize_parameters

WITH_SOLVED_INVERSE = (Planar, Radial, Sylvester)


def test_planar_is_pyros_map() -> None:
    ours, pyros = Planar(4), T.planar(4)
    randomize_parameters(ours)
    with torch.no_grad():
        for target, value in zip((pyros.bias, pyros.u, pyros.w), ours.bias_u_w.value.split([1, 4, 4]), strict=True):
            target.copy_(value)
    x = torch.randn(5, 4)
    y, ladj = ours.forward_and_ladj(x)
    torch.testing.assert_close(y, pyros(x))
    torch.testing.assert_close(ladj, pyros.log_abs_det_jacobian(x, pyros(x)))


def test_radial_is_pyros_map() -> None:
    ours, pyros = Radial(4), T.radial(4)
    randomize_parameters(ours)
    with torch.no_grad():
        values = ours.center_alpha_beta.value.split([4, 1, 1])
        for target, value in zip((pyros.x0, pyros.alpha_prime, pyros.beta_prime), values, strict=True):
            target.copy_(value)
    x = torch.randn(5, 4)
    y, ladj = ours.forward_and_ladj(x)
    torch.testing.assert_close(y, pyros(x))
    torch.testing.assert_close(ladj, pyros.log_abs_det_jacobian(x, pyros(x)))


@pytest.mark.parametrize(("ours", "pyros"), [(Planar, T.planar), (Radial, T.radial)], ids=("planar", "radial"))
def test_pyro_does_not_start_at_the_identity_nor_invert(ours: type[FlowTransform], pyros: object) -> None:
    """The pin: Pyro's starts elsewhere and has no inverse, and a deep copy after a call fails."""
    x = torch.randn(5, 3)
    transform = pyros(3)  # type: ignore[operator]
    y = transform(x)
    assert (y - x).abs().max() > 1e-3
    with pytest.raises(KeyError):
        transform.inv(y.clone())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(transform)

    transform = ours(3)
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, x, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(ladj, torch.zeros(5), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(transform.inv(y.clone()), x, atol=1e-6, rtol=0.0)
    copy.deepcopy(transform)


@pytest.mark.parametrize("transform_class", WITH_SOLVED_INVERSE)
@pytest.mark.parametrize("context_dim", (0, 2))
@pytest.mark.parametrize("input_dim", (1, 4))
def test_gradients_of_the_inverse(transform_class: type[FlowTransform], context_dim: int, input_dim: int) -> None:
    """Against the inverse function theorem: dx/dy = J^-1 and dx/dtheta = -J^-1 dy/dtheta."""
    transform = transform_class(input_dim, context_dim).double()
    randomize_parameters(transform, 0.5)
    inputs: list[Tensor] = list(transform.parameters())
    context = torch.randn(context_dim, dtype=torch.float64).requires_grad_() if context_dim else None
    if context is not None:
        inputs.append(context)
    x = torch.randn(input_dim, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x, context)
    value = y.detach().requires_grad_()
    back, inverse_ladj = transform.inverse_and_ladj(value, context)
    torch.testing.assert_close(back, x, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(inverse_ladj, -ladj, atol=1e-11, rtol=1e-11)

    weight = torch.randn_like(x)
    found = torch.autograd.grad((weight * back).sum(), [value, *inputs], retain_graph=True)
    solved = torch.linalg.solve(jacobian(transform, x, context).mT, weight)
    torch.testing.assert_close(found[0], solved, atol=1e-9, rtol=1e-9)
    expected = torch.autograd.grad(-(y * solved).sum(), inputs)
    for got, wanted in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)
    # The log-determinant's: differentiate -ladj(x(y, theta), theta) with x from the inverse.
    found = torch.autograd.grad(inverse_ladj, [value, *inputs], retain_graph=True)
    expected = torch.autograd.grad(-transform.forward_and_ladj(back, context)[1], [value, *inputs])
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("transform_class", WITH_SOLVED_INVERSE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("far", (1.0, 100.0))
def test_inverse_is_as_precise_as_the_dtype(
    transform_class: type[FlowTransform], dtype: torch.dtype, far: float
) -> None:
    transform = transform_class(6).to(dtype)
    randomize_parameters(transform, 0.5)
    x = far * torch.randn(50, 6, dtype=dtype)
    with torch.no_grad():
        y, _ = transform.forward_and_ladj(x)
        again, _ = transform.forward_and_ladj(transform.inverse_and_ladj(y)[0])
    assert (again - y).abs().max() < 40.0 * torch.finfo(dtype).eps * y.abs().max()


def test_solve_tanh() -> None:
    """Roots to the precision of the dtype, for both signs and close to the limit of monotonicity."""
    outer = torch.tensor([0.0, 3.0, -0.999, 50.0, 0.5], dtype=torch.float64)
    inner = torch.tensor([1.0, 1.0, 1.0, 0.5, -1.9], dtype=torch.float64)
    shift = torch.tensor([0.0, 0.3, -0.2, 4.0, 1.0], dtype=torch.float64)
    target = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64).unsqueeze(-1)
    root = solve_tanh(target, outer, inner, shift)
    assert root.shape == (33, 5)
    value = root + outer * torch.tanh(inner * root + shift)
    torch.testing.assert_close(value, target.expand(33, 5), atol=1e-13, rtol=0.0)


def test_radial_at_its_center() -> None:
    """The center stays where it is, with finite values and gradients."""
    transform = Radial(3)
    with torch.no_grad():
        transform.center_alpha_beta.value[-1] += 1.0
    center = transform.center_alpha_beta.value[:3].detach().clone().requires_grad_()
    y, ladj, score = transform.forward_with_score(center, torch.ones(3))
    torch.testing.assert_close(y, center)
    (y.sum() + ladj).backward()
    assert transform.center_alpha_beta.value.grad is not None
    assert transform.center_alpha_beta.value.grad.isfinite().all()
    assert score.isfinite().all()
    assert transform.inverse_and_ladj(y.detach())[0].isfinite().all()
