# SPDX-License-Identifier: Apache-2.0
"""L1. Parameters that a warm start sets and training does not change."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["FixedParameter", "ReadsFixed", "look_again"]


class FixedParameter(nn.Parameter):
    """A parameter that a warm start sets and training does not change.

    It is a parameter, not a buffer, so that it is kept in Pyro's parameter store. It never gets a gradient: a map uses
    it as ``self.name.detach()``.

    Args:
        data: Initial value, of any shape.
        requires_grad: As for any parameter; SVI only collects those that require gradients.

    Example:
        >>> import torch
        >>> from pyro_flows.transforms import FixedParameter
        >>> module = torch.nn.Module()
        >>> module.scale = FixedParameter(torch.ones(3))
        >>> [name for name, p in module.named_parameters() if isinstance(p, FixedParameter)]
        ['scale']
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedParameter:
        if id(self) not in memo:
            memo[id(self)] = FixedParameter(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        found: FixedParameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (self.data, self.requires_grad)


class ReadsFixed(nn.Module):
    """Base of modules with Python state that follows their fixed parameters, as which branch a map takes."""

    # Its attributes; a recorded step is recorded again where one changes.
    python_state: ClassVar[tuple[str, ...]] = ()

    def look(self) -> None:
        """Read the fixed parameters again, after they were set elsewhere."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.look()


def look_again(module: nn.Module) -> None:
    """Have all parts of a module read their fixed parameters again, after values were copied into these."""
    for part in module.modules():
        if isinstance(part, ReadsFixed):
            part.look()


def _restored(data: Tensor, requires_grad: bool) -> FixedParameter:
    """Rebuild a pickled parameter; torch would make it a plain one."""
    return FixedParameter(data, requires_grad)
