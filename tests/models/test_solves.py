# SPDX-License-Identifier: Apache-2.0
"""Triangular systems with one matrix for all draws: values and derivatives of ``torch.vmap``, without its copies."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.solves import SharedSolves
from pyro_flows.models.traces import Call

DIM = 5


def factor(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(DIM, DIM, dtype=torch.double, generator=generator).tril() + 3.0 * torch.eye(DIM).double()


FACTOR, OTHER = factor(0), factor(1)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "one matrix": lambda x: torch.linalg.solve_triangular(FACTOR, x.unsqueeze(-1), upper=False),
    "one matrix, upper": lambda x: torch.linalg.solve_triangular(FACTOR.mT, x.unsqueeze(-1), upper=True),
    "a matrix for each draw": lambda x: torch.linalg.solve_triangular(
        FACTOR + x.outer(x).tril(), x.unsqueeze(-1), upper=False
    ),
    "the same right-hand side": lambda x: torch.linalg.solve_triangular(
        FACTOR + x.outer(x).tril(), torch.ones(DIM, 2).double(), upper=False
    ),
    "a batch of matrices": lambda x: torch.linalg.solve_triangular(
        torch.stack([FACTOR, OTHER]), x.unsqueeze(-1), upper=False
    ),
    "a normal": lambda x: dist.MultivariateNormal(torch.ones(DIM).double(), scale_tril=FACTOR).log_prob(x),
    "a normal whose covariance follows draws": lambda x: dist.MultivariateNormal(
        x, covariance_matrix=FACTOR @ FACTOR.mT + x.outer(x), validate_args=False
    ).log_prob(2.0 * x),
}


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_hessians(name: str) -> None:
    f = CASES[name]
    x = torch.randn(4, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))

    def total(row: Tensor) -> Tensor:
        return f(row).sin().sum()

    def found(row: Tensor) -> Tensor:
        with SharedSolves():
            return total(row)

    with torch.no_grad():
        assert torch.allclose(torch.vmap(found)(x), torch.stack([total(row) for row in x]))
    z = x.clone().requires_grad_()
    with SharedSolves():
        (gradient,) = torch.autograd.grad(torch.vmap(total)(z).sum(), z, create_graph=True)
    expected = torch.stack([torch.autograd.functional.jacobian(total, row) for row in x])
    assert torch.allclose(gradient, expected)
    units = torch.eye(DIM).double().unsqueeze(1).expand(-1, 4, -1)
    (rows,) = torch.autograd.grad(gradient, z, units, is_grads_batched=True)
    hessians = torch.stack([torch.autograd.functional.hessian(total, row) for row in x])
    assert torch.allclose(rows.movedim(0, -1), hessians)


def test_draws_do_not_copy_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that does not broadcast, with a normal of fixed covariance: one system for all draws."""
    seen = []
    solve = torch.linalg.solve_triangular

    def watched(matrix: Tensor, right: Tensor, *, upper: bool) -> Tensor:
        seen.append((tuple(matrix.shape), tuple(right.shape)))
        return solve(matrix, right, upper=upper)

    def model() -> None:
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(DIM).double(), scale_tril=FACTOR))
        pyro.sample("y", dist.Normal(torch.stack([z[0], z[1]]), 1.0).to_event(1), obs=torch.zeros(2).double())

    values = {"z": torch.randn(7, DIM).double()}
    batched = BatchedModel("test", model, Call((), {}), {"z": values["z"][:3]})
    assert batched.is_mapped
    monkeypatch.setattr("pyro_flows.models.solves.torch.linalg.solve_triangular", watched)
    log_prob = batched(values).nodes["z"]["log_prob"].reshape(-1)
    expected = dist.MultivariateNormal(torch.zeros(DIM).double(), scale_tril=FACTOR).log_prob(values["z"])
    assert torch.allclose(log_prob, expected)
    assert seen and all(matrix[-2:] == (DIM, DIM) and len(matrix) < 4 and matrix[0] != 7 for matrix, _ in seen)
