# SPDX-License-Identifier: Apache-2.0
"""L1. What a step costs by the operations it consists of: unlike a time, the same in every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OperationCounter", "StepCost"]

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default}


@dataclass(frozen=True)
class StepCost:
    """Operations of a step.

    Attributes:
        operations: Their number, views included.
        elements: Number of elements of their results, matrix products left out.
        products: Number of multiplications in matrix products.
    """

    operations: int = 0
    elements: int = 0
    products: int = 0


class OperationCounter(TorchDispatchMode):
    """Counts the operations within this context, gradients included; they run as they would without it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = StepCost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        cost, elements, products = self.cost, 0, 0
        if not func.is_view:
            parts = found if isinstance(found, (list, tuple)) else (found,)
            elements = sum(part.numel() for part in parts if isinstance(part, Tensor))
            if func in PRODUCTS:
                elements, products = 0, elements * args[-2].shape[-1]
        self.cost = StepCost(cost.operations + 1, cost.elements + elements, cost.products + products)
        return found
