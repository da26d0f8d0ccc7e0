# SPDX-License-Identifier: Apache-2.0
"""L3. The pace of a guide's nonlinear layers, whatever the user's optimizer and rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_flows._recording import is_recording
from pyro_flows.flows import Flow
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.transforms import FixedParameter
from pyro_flows.transforms.base import is_jit_tracing

__all__ = ["StepLimit"]


@dataclass(frozen=True)
class StepSettings:
    """How fast nonlinear layers move.

    Attributes:
        largest_step: How far an entry of a parameter may move in a step. Layers start as the identity, and their
            sums of H terms are scaled down by the root of H at least, so that a step bends a draw by a few
            thousandths of its scale.
    """

    largest_step: float = 2e-3


STEPS = StepSettings()


class StepLimit:
    """A trust region around where parameters were at the draw before.

    ``AutoNormal`` trains at rates of 0.01 to 0.1. A flow does not: thousands of weights that all follow the noise of
    one draw bend its tails until a rare draw ends the run. Steps of what ``AutoNormal`` has too, location and scale of
    the head, are the user's. Steps of everything else are shortened, all by one factor, so that no entry moves by more
    than 0.002: their directions remain the optimizer's, and a low rate is not touched.

    A guide sees no optimizer. What moved between two of its draws, the first of which got a gradient, was a step.

    Args:
        module: Holds the flows, each with a trained head.
        filters: What their gradients pass through.

    Attributes:
        parameters: Those whose steps are limited.
        largest_step: How far an entry of them may move in a step.
    """

    def __init__(self, module: nn.Module, filters: Sequence[GradientFilter]) -> None:
        self.parameters: list[Tensor] = list(_limited(module))
        self.largest_step = STEPS.largest_step
        self._filters = filters
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def apply(self) -> None:
        """Shorten the step since :meth:`mark`, if there was one."""
        if _is_traced() or not any(part.is_fresh for part in self._filters):
            return
        before = self._before
        if before is None:
            self.forget()
            return
        steps = torch._foreach_sub(self.parameters, before)
        # The infinity norm of torch takes twenty times as long.
        ends = [end for step in steps for end in torch.aminmax(step)]
        longest = torch.stack(ends).abs().max().item()
        if longest == 0.0:
            return  # the step is still to come
        self.forget()
        # A parameter that is not finite stays for the user to see.
        if longest > self.largest_step:
            torch._foreach_add_(before, steps, alpha=self.largest_step / longest)
            torch._foreach_copy_(self.parameters, before)

    def forget(self) -> None:
        """What moved was no step: parameters were loaded, or set."""
        self._before = None
        for part in self._filters:
            part.is_fresh = False

    def mark(self) -> None:
        """A draw is about to be made that may get a gradient."""
        if self.parameters and torch.is_grad_enabled() and not _is_traced():
            self._before = [parameter.detach().clone() for parameter in self.parameters]


def _is_traced() -> bool:
    """Whether operations are taken down, to be repeated without this code."""
    return is_recording() or is_jit_tracing()


def _limited(module: nn.Module) -> Iterator[nn.Parameter]:
    """All that moves in a flow, but for the Gaussian of its head, and the share of the prior in that."""
    for flow in module.modules():
        if isinstance(flow, Flow):
            own = set(flow.head.gaussian_parameters())
            for parameter in flow.parameters():
                if parameter not in own and not isinstance(parameter, FixedParameter) and parameter.numel():
                    yield parameter
