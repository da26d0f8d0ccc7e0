# SPDX-License-Identifier: Apache-2.0
"""L2. A user's own transforms as a family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyro_flows._checks import check_callable
from pyro_flows.flows.base import FlowSpec
from pyro_flows.transforms import FlowTransform, adapt

__all__ = ["CustomFlow"]


def _check_maker(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a function of one argument."""
    check_callable(owner, name, value)
    try:
        inspect.signature(value).bind(1)
    except ValueError:  # no signature, as of some built-in callables
        return
    except TypeError:
        raise TypeError(
            f"{owner}: expected {name} to take input_dim, and nothing else, but got {name}{inspect.signature(value)}. "
            "Write flow=lambda input_dim: T.planar(input_dim)."
        ) from None


@dataclass(frozen=True, kw_only=True)
class CustomFlow(FlowSpec):
    """Family of user-defined transforms, made by a function as for ``AutoNormalizingFlow``, with an affine head.

    If any part is not one of this library's, ordinary gradients are used: path gradients need a score through every
    part. The context, if any, is passed to this library's parts and the head; foreign transforms ignore it.

    Args:
        function: Takes ``input_dim`` and returns a Pyro or torch transform, a composition, one of this library's
            transforms, or a list of them, base side first.

    Raises:
        TypeError: If ``function`` is not callable; in :meth:`~pyro_flows.flows.FlowSpec.build`, if it does not return
            transforms.
        ValueError: In :meth:`~pyro_flows.flows.FlowSpec.build`, if a transform has the wrong dimension, or its density
            is known to be wrong.

    Example:
        >>> import pyro.distributions.transforms as T
        >>> from pyro_flows import flows
        >>> spec = flows.CustomFlow(function=lambda input_dim: [T.planar(input_dim), T.radial(input_dim)])
        >>> spec.build(3)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    # Capabilities are known only once the transforms are built; see `has_inverse` of the flow's transform.
    has_inverse: ClassVar[bool] = False
    identity_start: ClassVar[bool] = False

    function: Callable[[int], Any] = field(metadata={"check": _check_maker})

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return adapt(self.function(input_dim), input_dim, context_dim)
