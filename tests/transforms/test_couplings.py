# SPDX-License-Identifier: Apache-2.0
"""Affine and spline couplings, next to Pyro's."""

from __future__ import annotations

import pyro.distributions.transforms as T
import pytest
import torch

from pyro_flows.transforms import AffineCouplings, Spline, SplineCouplings
from tests.common import jacobian, randomize_parameters

COUPLINGS = (AffineCouplings, SplineCouplings)


def test_pyros_splines_start_far_from_the_identity_and_ours_at_it() -> None:
    x = torch.randn(200, 6)
    for pyros in (T.spline(6), T.spline_coupling(6)):
        y = pyros(x)
        assert (y - x).abs().mean() > 0.1
    for ours in (Spline(6), SplineCouplings(6), AffineCouplings(6)):
        y, ladj = ours.forward_and_ladj(x)
        torch.testing.assert_close(y, x, atol=2e-6, rtol=0.0)
        torch.testing.assert_close(ladj, torch.zeros(200), atol=1e-5, rtol=0.0)


def test_pyros_couplings_condition_on_one_half_and_ours_on_all() -> None:
    """Row i of the Jacobian: what coordinate i depends on."""
    x = torch.randn(6)
    for pyros in (T.affine_coupling(6), T.spline_coupling(6)):
        matrix = torch.autograd.functional.jacobian(pyros, x)
        off_diagonal = matrix - torch.diag(matrix.diagonal())
        assert torch.equal(off_diagonal[:3], torch.zeros(3, 6))  # the first half depends on nothing but itself
        assert (off_diagonal[3:].abs().sum(-1) > 0).all()
    affine = T.affine_coupling(6)
    assert torch.equal(affine(x)[:3], x[:3])  # and Pyro's affine coupling leaves it where it is
    for coupling in COUPLINGS:
        ours = coupling(6, num_transforms=2)
        randomize_parameters(ours)
        matrix = jacobian(ours, x)
        off_diagonal = matrix - torch.diag(matrix.diagonal())
        assert (off_diagonal.abs().sum(-1) > 0).all()
        assert ((ours(x) - x).abs() > 0).all()


def test_float32_inverse_where_pyros_is_not_finite() -> None:
    """Random weights, float32: Pyro's inverse is not finite for some draws; ours is finite and accurate."""
    x = torch.randn(20_000, 6)
    pyros, ours = T.spline_coupling(6), SplineCouplings(6, num_transforms=2)
    with torch.no_grad():
        for parameter in pyros.parameters():
            parameter.add_(torch.randn_like(parameter))
        assert not pyros._inverse(pyros(x).clone()).isfinite().all()

        randomize_parameters(ours, 2.0)
        y, _ = ours.forward_and_ladj(x)
        back, inverse_ladj = ours.inverse_and_ladj(y)
        again, _ = ours.forward_and_ladj(back)
    assert (y - x).abs().mean() > 0.05  # not near the identity
    assert back.isfinite().all() and inverse_ladj.isfinite().all()
    torch.testing.assert_close(again, y, atol=1e-3, rtol=1e-3)
    assert (back - x).abs().median() < 1e-5


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_orders_are_saved(coupling: type[AffineCouplings] | type[SplineCouplings]) -> None:
    first, second = coupling(8), coupling(8)
    randomize_parameters(first)
    x = torch.randn(3, 8)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_log_scales_are_bounded_by_the_value_that_is_differentiated() -> None:
    """A coupling's log-scale stays within its bound, and its gradient is that of the bounded value."""
    transform = AffineCouplings(2, num_transforms=1, hidden_dims=(4,), log_scale_bound=0.5).double()
    with torch.no_grad():
        transform.packed()[-1].fill_(1e3)  # the bias of the last layer
    x = torch.randn(2, dtype=torch.float64)
    _, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(ladj, torch.full((), 0.5, dtype=torch.float64))
    ladj.backward()
    assert transform.packed.flat.grad is not None
    assert transform.packed.flat.grad.abs().max() < 1e-6


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_speed_of_the_output_does_not_grow_with_the_width(
    coupling: type[AffineCouplings] | type[SplineCouplings],
) -> None:
    """An Adam step moves every output weight by the same; the move of the map does not grow with the width."""
    moves = []
    for width in (16, 1024):
        torch.manual_seed(0)
        transform = coupling(4, num_transforms=2, hidden_dims=(width,))
        x = torch.randn(500, 4)
        with torch.no_grad():
            *_, weight, _ = transform.packed()
            weight.add_(0.01 * torch.randn_like(weight).sign())
            moves.append(float((transform(x) - x).abs().mean()))
    assert moves[1] < 1.5 * moves[0]


@pytest.mark.parametrize("dim, num_parts", [(2, 3), (3, 3), (4, 3), (13, 2), (13, 3), (13, 5)])
def test_a_round_of_couplings_moves_every_coordinate(dim: int, num_parts: int) -> None:
    transform = AffineCouplings(dim, num_transforms=min(num_parts, dim), num_parts=num_parts)
    randomize_parameters(transform)
    x = torch.randn(5, dim)
    assert (transform(x) != x).all()
