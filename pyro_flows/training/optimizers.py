# SPDX-License-Identifier: Apache-2.0
"""L7. The optimizers of a run: Adam, or one that the user chooses, and lazy Adam for parameters with sparse gradients;
their moments as data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_flows.training.state import Moments

__all__ = ["MakeOptimizer", "Optimizers", "adam", "described", "peak_rate", "resolve_optimizer"]

# From parameters to their optimizer.
MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
# From a parameter and a tensor that belongs to it.
Change = Callable[[Tensor, Tensor], Tensor]


def _unchanged(parameter: Tensor, value: Tensor) -> Tensor:
    return value


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


def described(make: MakeOptimizer | None) -> str:
    """Name and options of the optimizer that a function makes, by which a resumed run is compared; None makes Adam."""
    if make is None:
        return "Adam"
    made = _made(make)
    options = ", ".join(f"{name}={value}" for name, value in sorted(made.defaults.items()))
    return f"{type(made).__name__}({options})"


def peak_rate(make: MakeOptimizer) -> float:
    """The learning rate of an optimizer that a function makes.

    Raises:
        TypeError: If it makes none.
    """
    made = _made(make)
    rate = float(made.param_groups[0].get("lr", math.nan))
    if not rate > 0:
        raise ValueError(f"fit: expected an optimizer with a learning rate > 0, but got {rate}.")
    return rate


def _made(make: MakeOptimizer) -> torch.optim.Optimizer:
    """The optimizer of an example."""
    try:
        made = make([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError) as error:  # of a function that takes others, or of an option that torch refuses
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"fit: expected optim to make an optimizer of a list of parameters, but it raises {error!r}. Write "
            "optim=functools.partial(torch.optim.AdamW, lr=0.01)."
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"fit: expected optim to make a torch.optim.Optimizer, but got a {type(made).__name__}.")
    return made


class Optimizers:
    """The optimizers of all parameters, without moments at first.

    Args:
        parameters: All parameters.
        tables: Those among them with sparse gradients: a step updates the rows of its mini-batch only.
        make: Makes the optimizer of all others.
        betas: Betas of Adam for the tables.
        table_eps: Adam's eps for the tables, > 0.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        tables: Sequence[Tensor],
        make: MakeOptimizer,
        betas: tuple[float, float],
        table_eps: float,
    ) -> None:
        sparse = {id(table) for table in tables}
        tables = [p for p in parameters if id(p) in sparse]
        dense = [p for p in parameters if id(p) not in sparse]
        self._members: list[torch.optim.Optimizer] = []
        if dense:
            self._members.append(make(dense))
        if tables:
            self._members.append(torch.optim.SparseAdam(tables, betas=betas, eps=table_eps))

    def step(self, rate: float) -> None:
        """Take a step at a learning rate."""
        for optimizer in self._members:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def moments(self, change: Change = _unchanged) -> Moments:
        """A copy of all moments, changed by a function of their parameter and each tensor among them."""
        return [
            [_changed(optimizer.state[p], p, change) if p in optimizer.state else None for p in _parameters(optimizer)]
            for optimizer in self._members
        ]

    def load(self, moments: Moments, change: Change = _unchanged) -> None:
        """Invert :meth:`moments`; those of other parameters are left out."""
        for optimizer, each in zip(self._members, moments):
            parameters = _parameters(optimizer)
            if len(parameters) == len(each):
                for parameter, values in zip(parameters, each, strict=True):
                    if values is not None:
                        optimizer.state[parameter] = _changed(values, parameter, change)

    def join(self, leaves: Sequence[Tensor], before: Optimizers) -> None:
        """Take over the moments of leaves of which the only parameter is made, from their optimizers; with none, the
        next steps would be as long as the first ones of a cycle, but without a warmup of the learning rate."""
        states: dict[Tensor, dict[str, Any]] = {}
        for optimizer in before._members:
            states.update(optimizer.state)
        if not states:
            return
        part, example = next(iter(states.items()))
        joined: dict[str, Any] = {}
        for name, value in example.items():
            values = {p: state[name] for p, state in states.items()}
            if name == "step":
                joined[name] = copy.deepcopy(max(values.values(), key=float))
            elif torch.is_tensor(value) and value.shape == part.shape:
                joined[name] = torch.cat([values.get(p, torch.zeros_like(p)).reshape(-1) for p in leaves])
            else:
                joined[name] = value
        (vector,) = _parameters(self._members[0])
        self._members[0].state[vector] = joined


def _changed(values: dict[str, Any], parameter: Tensor, change: Change) -> dict[str, Any]:
    """A copy of a parameter's moments, in which tensors are changed."""
    changed = {name: change(parameter, value) if torch.is_tensor(value) else value for name, value in values.items()}
    return copy.deepcopy(changed)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
