# SPDX-License-Identifier: Apache-2.0
"""The Sylvester map, and Pyro's, whose density is not one."""

from __future__ import annotations

import pyro.distributions.transforms as T
import pytest
import torch

from pyro_flows.transforms import Sylvester
from tests.common import jacobian, randomize_parameters


def test_pyros_log_determinant_is_wrong_and_ours_right() -> None:
    """At weights of sd 1, in float64: Pyro's is off by more than 0.1 nat on average, ours by rounding."""
    errors_pyro, errors_ours = [], []
    for _ in range(10):
        x = torch.randn(4, dtype=torch.float64)
        pyros = T.sylvester(4, 2).double()
        ours = Sylvester(4, num_ortho=4).double()
        with torch.no_grad():
            for parameter in [*pyros.parameters(), *ours.parameters()]:
                parameter.normal_()
        y = pyros(x)
        claimed = pyros.log_abs_det_jacobian(x, y)
        true = torch.linalg.slogdet(torch.autograd.functional.jacobian(pyros, x)).logabsdet
        errors_pyro.append(float((claimed - true).detach().abs()))
        true = torch.linalg.slogdet(jacobian(ours, x)).logabsdet
        errors_ours.append(float((ours.forward_and_ladj(x)[1] - true).detach().abs()))
    assert sum(errors_pyro) / 10 > 0.1
    assert max(errors_ours) < 1e-10


@pytest.mark.parametrize(("input_dim", "num_ortho"), [(1, 8), (2, 1), (3, 3), (6, 2), (6, 5), (6, 6)])
def test_columns_are_orthonormal_and_the_formula_holds(input_dim: int, num_ortho: int) -> None:
    transform = Sylvester(input_dim, num_ortho=num_ortho).double()
    randomize_parameters(transform, 0.7)
    q, r, s, b = transform._matrices(None)
    size = min(num_ortho, input_dim)
    torch.testing.assert_close(q.mT @ q, torch.eye(size, dtype=torch.float64))
    for matrix in (r, s):
        assert torch.equal(matrix, matrix.triu())
        assert matrix.diagonal().abs().max() < 1.0
    x = torch.randn(input_dim, dtype=torch.float64)
    torch.testing.assert_close(transform(x), x + q @ r @ torch.tanh(s @ q.mT @ x + b))


def test_reflections_make_the_columns() -> None:
    """The closed form of the product of reflections against the product, one by one."""
    transform = Sylvester(5, num_ortho=3).double()
    q = transform._matrices(None)[0]
    product = torch.eye(5, dtype=torch.float64)
    for u in transform.u_r_s_b.value[: 3 * 5].detach().reshape(3, 5):
        product = product @ (torch.eye(5, dtype=torch.float64) - 2.0 * torch.outer(u, u) / u.dot(u))
    torch.testing.assert_close(q, product[:, :3])


def test_starts_at_the_identity() -> None:
    x = torch.randn(9, 4)
    y, ladj = Sylvester(4).forward_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(9))
