# SPDX-License-Identifier: Apache-2.0
"""L3. The mean over all processes of the gradients of a step, and of a few numbers, in one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.distributed.processes import Processes

__all__ = ["mean_gradient"]


@torch.no_grad()
def mean_gradient(
    processes: Processes,
    parameters: Sequence[Tensor],
    numbers: Sequence[float] = (),
    *,
    tables: Sequence[Tensor] = (),
    own: Sequence[Tensor] = (),
    count: int | None = None,
) -> list[float]:
    """Replace the gradients of parameters by their means over all parts of a step, in one all-reduce.

    A parameter without a gradient in some parts has zero there; one that has none in any keeps none. Gradients with
    sparse rows are summed by rows.

    Args:
        processes: The processes, which call this together, with parameters of the same shapes.
        parameters: Parameters; the gradient of each is the sum over the parts of this process.
        numbers: Sums of numbers over the parts of this process.
        tables: Those of the parameters whose gradients have sparse rows.
        own: Those of them of which this process holds other rows than the others; of these, nothing is sent.
        count: Number of parts on all processes; None means one on each.

    Returns:
        The means of the numbers, the same on all processes.
    """
    count = count or processes.size
    known, kept = {id(p) for p in tables}, {id(p) for p in own}
    for p in tables:
        rows = _no_rows(p) if p.grad is None else p.grad
        p.grad = (rows.coalesce() if id(p) in kept else processes.sum_sparse(rows)) / count
    dense = [p for p in parameters if id(p) not in known]
    if processes.size == 1:
        for p in dense:
            if p.grad is not None:
                p.grad = p.grad / count
        return [number / count for number in numbers]
    dtype, device = torch.float32, torch.device("cpu")
    for p in dense:
        dtype, device = torch.promote_types(dtype, p.dtype), p.device
    present = torch.tensor([p.grad is not None for p in dense], dtype=dtype, device=device)
    # As pairs whose sum is the number, so that float32 loses no digits of a loss.
    high = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    low = (torch.tensor(numbers, dtype=torch.float64) - high.double()).nan_to_num(0.0, 0.0, 0.0).to(dtype)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in dense]
    flat = (part.reshape(-1).to(device, dtype) for part in parts)
    total = processes.sum(torch.cat([*flat, present, high.to(device), low.to(device)]))
    sizes = [p.numel() for p in dense]
    *found, present, high, low = total.split([*sizes, len(dense), len(numbers), len(numbers)])
    for p, gradient, holders in zip(dense, found, present.tolist(), strict=True):
        p.grad = (gradient / count).view_as(p).to(p.device, p.dtype) if holders else None
    return ((high.double() + low.double()) / count).tolist()  # type: ignore[no-any-return]


def _no_rows(parameter: Tensor) -> Tensor:
    """A sparse gradient without any rows."""
    rows = torch.zeros(1, 0, dtype=torch.long, device=parameter.device)
    values = parameter.new_zeros(0, *parameter.shape[1:])
    return torch.sparse_coo_tensor(rows, values, parameter.shape, check_invariants=False)
