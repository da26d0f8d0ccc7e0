# SPDX-License-Identifier: Apache-2.0
"""Householder reflections."""

from __future__ import annotations

import pyro.distributions.transforms as T
import torch

from pyro_flows.transforms import Householder
from tests.common import jacobian, randomize_parameters


def test_identity_start_where_pyro_has_random_reflections() -> None:
    x = torch.randn(20, 5)
    assert (T.householder(5)(x) - x).abs().mean() > 0.3
    torch.testing.assert_close(Householder(5, num_reflections=6).forward_and_ladj(x)[0], x, atol=1e-5, rtol=0.0)


def test_is_pyros_map_and_orthogonal() -> None:
    ours, pyros = Householder(5, num_reflections=4).double(), T.householder(5, 4).double()
    randomize_parameters(ours, 1.0)
    with torch.no_grad():
        pyros.u_unnormed.copy_(ours.directions.value)
    x = torch.randn(7, 5, dtype=torch.float64)
    y, ladj = ours.forward_and_ladj(x)
    torch.testing.assert_close(y, pyros(x))
    assert torch.equal(ladj, torch.zeros(7, dtype=torch.float64))
    matrix = jacobian(ours, x[0])
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones((), dtype=torch.float64))  # a rotation


def test_each_context_has_its_own_rotation() -> None:
    transform = Householder(4, 2, num_reflections=2)
    randomize_parameters(transform, 1.0)
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    y, _ = transform.forward_and_ladj(x, context)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[1], transform.forward_and_ladj(x[1], context[1])[0])
    torch.testing.assert_close(transform.inverse_and_ladj(y, context)[0], x, atol=1e-5, rtol=1e-5)
