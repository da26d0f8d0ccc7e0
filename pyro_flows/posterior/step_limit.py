# SPDX-License-Identifier: Apache-2.0
"""L3. A limit on the steps of a guide's nonlinear layers, for any optimizer and learning rate of the user."""

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
from pyro_flows.transforms.networks import Packed

__all__ = ["StepLimit"]


@dataclass(frozen=True)
class StepSettings:
    """Step size of nonlinear layers.

    Attributes:
        largest_step: Largest change of an entry of a parameter in a step, in its units. Layers are initialized to the
            identity, and their sums of H terms are scaled down by at least the root of H, so that a step changes a draw
            by a few thousandths of its scale.
    """

    largest_step: float = 2e-3


STEPS = StepSettings()


class StepLimit:
    """A trust region around the parameters of the previous draw.

    ``AutoNormal`` trains at learning rates of 0.01 to 0.1. A flow does not: thousands of weights that all follow the
    noise of one draw distort its tails until a rare draw ends the run. The head's location and scale, which
    ``AutoNormal`` has too, take the optimizer's full steps. Steps of all other parameters are shortened, by one factor,
    so that no entry changes by more than 0.002 of its units, which are ones but for linear parts
    (:class:`~pyro_flows.transforms.networks.Packed`): their direction remains the optimizer's, and a low learning rate
    is not affected.

    A guide does not see the optimizer. It takes any change of parameters between two of its draws for a step, if the
    first draw got a gradient.

    Args:
        module: Module that holds the flows, each with a trained head.
        filters: Gradient filters of the flows.

    Attributes:
        parameters: Parameters whose steps are limited.
        largest_step: Largest change of an entry of these in a step, in its units, > 0.
    """

    def __init__(self, module: nn.Module, filters: Sequence[GradientFilter]) -> None:
        self.largest_step = STEPS.largest_step
        self._module = [module]  # in a list, since it holds this limit
        self._filters = filters
        self._before: list[Tensor] | None = None
        self.look_again()

    def look_again(self) -> None:
        """Find the parameters of the module, since a part of it was replaced or loaded."""
        (module,) = self._module
        self.parameters: list[Tensor] = list(_limited(module))
        packed = {id(part.flat): part for part in module.modules() if isinstance(part, Packed)}
        self._packed = [packed.get(id(parameter)) for parameter in self.parameters]
        self.forget()

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
        # Torch's infinity norm takes twenty times as long.
        in_units = (step if unit is None else step / unit for step, unit in zip(steps, self.units, strict=True))
        ends = [end for step in in_units for end in torch.aminmax(step)]
        longest = torch.stack(ends).abs().max().item()
        if longest == 0.0:
            return  # the optimizer has not stepped yet
        self.forget()
        # A parameter that is not finite is left as it is, for the user to see.
        if longest > self.largest_step:
            torch._foreach_add_(before, steps, alpha=self.largest_step / longest)
            torch._foreach_copy_(self.parameters, before)

    @property
    def units(self) -> list[Tensor | None]:
        """The units of the entries of each parameter, of its shape; None for ones."""
        return [None if packed is None else packed.unit for packed in self._packed]

    def forget(self) -> None:
        """Accept the parameters as they are, since they were loaded or set, not changed by a step."""
        self._before = None
        for part in self._filters:
            part.is_fresh = False

    def mark(self) -> None:
        """Remember the parameters, before a draw that may get a gradient."""
        if self.parameters and torch.is_grad_enabled() and not _is_traced():
            self._before = [parameter.detach().clone() for parameter in self.parameters]


def _is_traced() -> bool:
    """Whether operations are being recorded, to be replayed without this code."""
    return is_recording() or is_jit_tracing()


def _limited(module: nn.Module) -> Iterator[nn.Parameter]:
    """Trainable parameters of all flows, except those of the head's Gaussian and the prior's share in it."""
    for flow in module.modules():
        if isinstance(flow, Flow):
            own = set(flow.head.gaussian_parameters())
            for parameter in flow.parameters():
                if parameter not in own and not isinstance(parameter, FixedParameter) and parameter.numel():
                    yield parameter
