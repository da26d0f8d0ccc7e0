# SPDX-License-Identifier: Apache-2.0
"""L7. The optimizer of a run: Adam, or one that the user chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

__all__ = ["MakeOptimizer", "adam", "carry_over", "peak_rate", "resolve_optimizer"]

# From parameters to their optimizer.
MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def adam(betas: tuple[float, float]) -> MakeOptimizer:
    """The default. With fewer steps of memory than Adam's own default, the first gradients, which are the largest by
    far, do not affect thousands of steps."""
    return partial(torch.optim.Adam, betas=betas, fused=True)  # type: ignore[arg-type]


def resolve_optimizer(optim: Any) -> MakeOptimizer:
    """A function that makes the user's optimizer.

    Args:
        optim: An optimizer of ``pyro.optim``, or a function or class that makes a ``torch.optim.Optimizer`` of
            parameters, such as ``torch.optim.AdamW``.

    Raises:
        TypeError: If it is neither.
    """
    remedy = (
        'Write optim=pyro.optim.AdamW({"lr": 0.01}), or optim=functools.partial(torch.optim.AdamW, lr=0.01), which fit '
        "calls with the parameters."
    )
    if isinstance(optim, PyroLRScheduler):
        raise TypeError(f"fit: expected an optimizer without a schedule, since fit has its own, but got one. {remedy}")
    if isinstance(optim, PyroOptim):
        if not isinstance(optim.pt_optim_args, Mapping):
            raise TypeError(f"fit: expected one set of options for all parameters, but got a function. {remedy}")
        return partial(optim.pt_optim_constructor, **optim.pt_optim_args)
    if isinstance(optim, torch.optim.Optimizer) or not callable(optim):
        raise TypeError(
            f"fit: expected an optimizer that is made of the guide's parameters, but got a {type(optim).__name__}. "
            f"{remedy}"
        )
    return optim


def peak_rate(make: MakeOptimizer) -> float:
    """The learning rate of an optimizer that a function makes.

    Raises:
        TypeError: If it makes none.
    """
    made = make([torch.zeros(1, requires_grad=True)])
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"fit: expected optim to make a torch.optim.Optimizer, but got a {type(made).__name__}.")
    rate = float(made.param_groups[0].get("lr", math.nan))
    if not rate > 0:
        raise ValueError(f"fit: expected an optimizer with a learning rate > 0, but got {rate}.")
    return rate


def carry_over(before: Sequence[torch.optim.Optimizer], leaves: Sequence[Tensor], vector: Tensor, to: Any) -> None:
    """Give an optimizer of one vector the state that the optimizers of its parts have; with a fresh one the next steps
    would be as long as the first ones of a cycle, but without a warmup of the learning rate.

    Args:
        before: Optimizers of the parts.
        leaves: The parts, in the order in which they make up the vector.
        vector: The vector.
        to: The optimizer of the vector.
    """
    states: dict[Tensor, dict[str, Any]] = {}
    for optimizer in before:
        states.update(optimizer.state)
    if not states:
        return
    part, example = next(iter(states.items()))
    carried: dict[str, Any] = {}
    for name, value in example.items():
        values = {p: state[name] for p, state in states.items()}
        if name == "step":
            carried[name] = max(values.values(), key=float)
            carried[name] = carried[name].clone() if torch.is_tensor(carried[name]) else carried[name]
        elif torch.is_tensor(value) and value.shape == part.shape:
            carried[name] = torch.cat([values.get(p, torch.zeros_like(p)).reshape(-1) for p in leaves])
        else:
            carried[name] = value
    to.state[vector] = carried
