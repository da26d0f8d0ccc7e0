# SPDX-License-Identifier: Apache-2.0
"""L2. Conversion of the ``flow`` argument to a :class:`FlowSpec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributions.transforms import Transform

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.custom import CustomFlow
from pyro_flows.flows.registry import get

__all__ = ["FlowLike", "resolve"]

FlowLike = str | FlowSpec | Callable[[int], Any]


def resolve(flow: FlowLike) -> FlowSpec:
    """Convert a name, a spec, or a function of ``input_dim`` to a spec.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the name is unknown.
    """
    if isinstance(flow, str):
        return get(flow)
    if isinstance(flow, FlowSpec):
        return flow
    if isinstance(flow, type) and issubclass(flow, FlowSpec):
        raise TypeError(
            f"AutoFlowGuide: expected flow to be a FlowSpec, but got the class {flow.__name__}. "
            f"Write flow={flow.__name__}()."
        )
    if callable(flow) and not isinstance(flow, Transform):
        return CustomFlow(function=flow)
    raise TypeError(
        f"AutoFlowGuide: expected flow to be a name, a FlowSpec or a function of input_dim, but got {flow!r}. "
        "Wrap transforms in a function that builds them: flow=lambda input_dim: T.planar(input_dim)."
    )
