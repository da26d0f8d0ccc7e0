# SPDX-License-Identifier: Apache-2.0
"""L1. Adam's arithmetic as a part of a recorded step, with the optimizer's own state and options."""

from __future__ import annotations

import math
from typing import Any

import pyro.optim.clipped_adam
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_flows.compiled import tracer

__all__ = ["AdamRule", "append_step", "limited_step"]


class AdamRule:
    """The step of a torch or Pyro Adam on one parameter, as a function that can be recorded.

    Moments, step count and learning rate stay where the optimizer keeps them, so that schedulers, ``get_state`` and an
    ordinary ``optimizer.step`` still work; only the arithmetic is moved into the graph of the gradient.

    Args:
        optimizer: An optimizer for which :meth:`applies_to` is true.

    References:
        Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015. arXiv:1412.6980, algorithm 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._group = optimizer.param_groups[0]
        self._state = optimizer.state[self._group["params"][0]]
        if torch.is_tensor(self._state["step"]):  # on the default device, where torch has made it
            self._state["step"] = self._state["step"].cpu()
        self._clips = isinstance(optimizer, pyro.optim.clipped_adam.ClippedAdam)
        self.options = self._options()
        self._next = self.rates(0.0, 0.0)
        self._next_rates = self._next.numpy()  # shares memory

    @staticmethod
    def applies_to(optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer can be recorded: torch's ``Adam`` or Pyro's ``ClippedAdam`` without rarely used options,
        after its first step, of one parameter."""
        if type(optimizer) not in (torch.optim.Adam, pyro.optim.clipped_adam.ClippedAdam):
            return False
        (group,) = optimizer.param_groups
        unusual = ("amsgrad", "maximize", "weight_decay", "centered_variance", "differentiable", "capturable", "fused")
        return not any(group.get(name) for name in unusual) and not torch.is_tensor(group["lr"])

    def _options(self) -> tuple[Any, ...]:
        return self._group["betas"], self._group["eps"], self._group.get("clip_norm")

    @property
    def is_current(self) -> bool:
        """Whether the options that are constants of :meth:`update` have not changed."""
        return self.options == self._options()

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Running averages of the gradient and of its square, ``(N,)`` each."""
        return self._state["exp_avg"], self._state["exp_avg_sq"]

    def next_rates(self) -> Tensor:
        """Count a step; returns its bias-corrected learning rate, and the bias correction of the second moment's root,
        ``(2,)``, on the CPU, in memory that the next call overwrites."""
        group, state = self._group, self._state
        count = state["step"]
        if torch.is_tensor(count):  # by NumPy: torch's overhead for one number exceeds many a kernel's time
            count = count.numpy()
            count += 1
        else:
            count = state["step"] = count + 1
        first, second = (1.0 - beta ** float(count) for beta in group["betas"])
        if self._clips:
            group["lr"] *= group["lrd"]
            self._next_rates[:] = group["lr"] * math.sqrt(second) / first, 1.0
        else:
            self._next_rates[:] = group["lr"] / first, math.sqrt(second)
        return self._next

    def coming_rates(self, count: int) -> Tensor:
        """Count so many steps; returns the :meth:`next_rates` of each, and zeros, so that rows begin at multiples of
        16 bytes, as compiled kernels expect, ``(count, 4)``, on the CPU."""
        rows = torch.zeros((count, 4), dtype=self._next.dtype, device="cpu")
        for row in rows.numpy():
            self.next_rates()
            row[:2] = self._next_rates
        return rows

    def rates(self, rate: float, root: float) -> Tensor:
        """A learning rate and a bias correction in the form of :meth:`next_rates`."""
        return torch.tensor((rate, root), dtype=self._state["exp_avg"].dtype, device="cpu")

    def update(
        self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, per_limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new parameter and moments; can be recorded.

        Args:
            parameter: Parameter, ``(N,)``.
            gradient: Gradient, ``(N,)``; entries that are not finite count as zero, since moments would retain them.
            first: First moment, from :attr:`moments`, ``(N,)``.
            second: Second moment, from :attr:`moments`, ``(N,)``.
            rates: Learning rate and bias correction, from :meth:`next_rates`, ``(2,)``.
            per_limit: Inverse step limits, ``(N,)``; see :func:`limited_step`.
        """
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        (beta1, beta2), eps, bound = self.options
        rate, root = rates.unbind(0)
        if bound is not None:
            gradient = gradient.clamp(-bound, bound)
        first = torch.lerp(first, gradient, 1.0 - beta1)
        second = beta2 * second + (1.0 - beta2) * gradient * gradient
        step = -rate * first / (second.sqrt() / root + eps)
        return parameter + limited_step(step, per_limit), first, second


def limited_step(step: Tensor, per_limit: Tensor) -> Tensor:
    """Shorten the limited entries of a step, all by one factor, so that none is longer than its limit.

    Args:
        step: Step, ``(N,)``.
        per_limit: One over the limit of each entry, ``(N,)``; zero where there is no limit.
    """
    excess = (step.abs() * per_limit).amax().clamp_min(1.0)
    return torch.where(per_limit > 0.0, step / excess, step)


def append_step(graph: GraphModule, rule: AdamRule, vector: Tensor) -> None:
    """Append the optimizer's step to a graph: an in-place update of its parameter by the gradient."""
    nodes = graph.graph
    values = [*(torch.zeros_like(vector) for _ in range(4)), rule.rates(1.0, 1.0), torch.zeros_like(vector)]
    step = tracer.trace_operations(rule.update, values).graph
    flat = next(iter(nodes.nodes))
    output = next(node for node in nodes.nodes if node.op == "output")
    state: list[Node] = []
    for name in ("per_limit", "rates", "second_moment", "first_moment"):
        with nodes.inserting_after(flat):
            state.insert(0, nodes.placeholder(name))
    given = [flat, output.args[0][1], *state]
    places = [node for node in step.graph.nodes if node.op == "placeholder"]
    with nodes.inserting_before(output):
        moved: Any = nodes.graph_copy(step.graph, dict(zip(places, given, strict=True)))
        for old, new in zip([flat, *state[:2]], moved, strict=True):
            nodes.call_function(torch.ops.aten.copy_.default, (old, new))
    nodes.lint()
    graph.recompile()
