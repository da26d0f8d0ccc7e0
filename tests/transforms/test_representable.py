# SPDX-License-Identifier: Apache-2.0
"""Values on a support stay numbers however far a draw is, and their density is that of the map that made them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows.transforms.representable import Representable, unconstrained_limits

LIMIT = 3.0
# Support, and unconstrained length of a value.
SUPPORTS = {
    "positive": (constraints.positive, ()),
    "greater_than": (constraints.greater_than(2.0), ()),
    "less_than": (constraints.less_than(-1.0), ()),
    "interval": (constraints.interval(-1.0, 3.0), ()),
    "softplus_positive": (constraints.softplus_positive, ()),
    "simplex": (constraints.simplex, (2,)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "positive_ordered_vector": (constraints.positive_ordered_vector, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3,)),
    "independent_positive": (constraints.independent(constraints.positive, 1), (3,)),
}
each_support = pytest.mark.parametrize(("support", "shape"), SUPPORTS.values(), ids=SUPPORTS)
# Not all of one point's coordinates are on one side of the limit.
POINTS = (-4.5, 0.3, 3.5, -2.0)


def point(shape: tuple[int, ...], first: int = 0) -> Tensor:
    count = math.prod(shape)
    values = [POINTS[(first + i) % len(POINTS)] for i in range(count)]
    return torch.tensor(values, dtype=torch.double).reshape(shape)


def free_coordinates(support: Any, value: Tensor) -> Tensor:
    """As many coordinates of a value as it has degrees of freedom, which the density of its kind is taken in."""
    if support is constraints.simplex:
        return value[..., :-1]
    if support is constraints.corr_cholesky:
        row, column = torch.tril_indices(value.shape[-1], value.shape[-1], -1)
        return value[..., row, column]
    return value


def log_density_ratio(transform: Representable, support: Any, x: Tensor) -> Tensor:
    """``log|det dy / dx|`` by autograd."""

    def push(flat: Tensor) -> Tensor:
        return free_coordinates(support, transform(flat.reshape(x.shape))).reshape(-1)

    jacobian = torch.autograd.functional.jacobian(push, x.reshape(-1))
    return torch.linalg.slogdet(jacobian).logabsdet


@each_support
@pytest.mark.parametrize("first", range(len(POINTS)))
def test_log_det_is_autograds(support: Any, shape: tuple[int, ...], first: int) -> None:
    transform = Representable(biject_to(support), (-LIMIT, LIMIT))
    x = point(shape, first)
    found = transform.log_abs_det_jacobian(x, transform(x)).sum()
    torch.testing.assert_close(found, log_density_ratio(transform, support, x), atol=1e-9, rtol=1e-9)


@each_support
@pytest.mark.parametrize("first", range(len(POINTS)))
def test_inverse(support: Any, shape: tuple[int, ...], first: int) -> None:
    transform = Representable(biject_to(support), (-LIMIT, LIMIT))
    x = point(shape, first)
    y = transform(x)
    assert support.check(y).all()
    torch.testing.assert_close(transform.inv(y), x, atol=1e-7, rtol=1e-7)
    assert transform.forward_shape(x.shape) == y.shape
    assert transform.inverse_shape(y.shape) == x.shape


@each_support
def test_nothing_changes_below_the_limit(support: Any, shape: tuple[int, ...]) -> None:
    base = biject_to(support)
    transform = Representable(base, (-LIMIT, LIMIT))
    x = point(shape) * (0.99 * LIMIT / 4.5)
    assert torch.equal(transform(x), base(x))
    assert torch.equal(transform.log_abs_det_jacobian(x, base(x)), base.log_abs_det_jacobian(x, base(x)))
    assert torch.equal(transform.inv(base(x)), base.inv(base(x)))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_smooth_at_the_limit(sign: float) -> None:
    transform = Representable(biject_to(constraints.positive), (-LIMIT, LIMIT))
    x = torch.tensor([LIMIT - 1e-6, LIMIT + 1e-6], dtype=torch.double) * sign
    y = transform(x).log()
    torch.testing.assert_close(y, x, atol=1e-11, rtol=0.0)
    # Both sides in one batch: the slope is one on either.
    ladj = transform.log_abs_det_jacobian(x, transform(x)) - y
    torch.testing.assert_close(ladj, torch.zeros(2, dtype=torch.double), atol=2e-6, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", [-1e5, -500.0, -100.0, 100.0, 500.0, 1e5])
def test_far_values_can_be_squared_and_divided_by(dtype: torch.dtype, x: float) -> None:
    limit = unconstrained_limits(dtype)
    transform = Representable(biject_to(constraints.positive), limit)
    unconstrained = torch.tensor(x, dtype=dtype, requires_grad=True)
    y = transform(unconstrained)
    ladj = transform.log_abs_det_jacobian(unconstrained, y)
    for made in (y, y.square(), y.reciprocal(), y.square().reciprocal(), ladj):
        assert made.isfinite()
        assert made is ladj or made > 0.0
    assert torch.autograd.grad(ladj, unconstrained)[0].isfinite()
    torch.testing.assert_close(transform.inv(y.detach()), unconstrained.detach(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", [-1e6, -500.0, 500.0, 1e6])
@each_support
def test_far_values_are_finite_with_finite_densities(
    support: Any, shape: tuple[int, ...], x: float, dtype: torch.dtype
) -> None:
    if support is constraints.positive_ordered_vector and x > 0.0:
        pytest.skip("the exponential of an exponential, which the limit of one does not bound")
    transform = Representable(biject_to(support), unconstrained_limits(dtype))
    unconstrained = torch.full(shape, x, dtype=dtype, requires_grad=True)
    y = transform(unconstrained)
    ladj = transform.log_abs_det_jacobian(unconstrained, y).sum()
    assert y.isfinite().all()
    assert ladj.isfinite()
    (gradient,) = torch.autograd.grad(ladj + y.sum(), unconstrained)
    assert gradient.isfinite().all()


def test_order_is_kept() -> None:
    x = torch.linspace(-8.0, 8.0, 400, dtype=torch.double)
    assert (Representable(biject_to(constraints.positive), (-LIMIT, LIMIT))(x).diff() > 0.0).all()
    decreasing = Representable(biject_to(constraints.less_than(1.0)), (-LIMIT, LIMIT))
    assert (decreasing(x).diff() < 0.0).all()
    assert decreasing.sign == -1
    assert decreasing.domain is constraints.real


def test_nan_stays_nan() -> None:
    """What is no number must not look like one."""
    transform = Representable(biject_to(constraints.positive), (-LIMIT, LIMIT))
    assert transform(torch.tensor(math.nan)).isnan()
