# SPDX-License-Identifier: Apache-2.0
"""L1. Pyro's ELBOs without conversions of tensors to Python numbers, so that they can be recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

__all__ = ["tensor_loss"]


class _Unread:
    """A tensor whose ``item()`` returns a detached tensor and that claims to be free of NaN; so do sums with it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def item(self) -> _Unread:
        return _Unread(self.tensor.detach())

    def __add__(self, other: Any) -> _Unread:
        return _Unread(self.tensor + _plain(other))

    def __sub__(self, other: Any) -> _Unread:
        return _Unread(self.tensor - _plain(other))

    def __rsub__(self, other: Any) -> _Unread:
        return _Unread(other - self.tensor)

    def __truediv__(self, other: Any) -> _Unread:
        return _Unread(self.tensor / other)

    def __neg__(self) -> _Unread:
        return _Unread(-self.tensor)

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.isnan, torch.isinf):
            return torch.zeros((), dtype=torch.bool)
        return cls(func(*map(_plain, args), **(kwargs or {})))  # a tensor plus one of these


def _plain(value: Any) -> Any:
    return value.tensor if isinstance(value, _Unread) else value


def tensor_loss(elbo: ELBO) -> Callable[..., Tensor]:
    """The ``differentiable_loss`` of one of Pyro's ELBOs without Python numbers in it, so that it can be recorded.

    Pyro's ELBOs convert log densities of sites to numbers, for the loss's value and to check for NaN. Here they get
    log densities that remain tensors.

    Args:
        elbo: An ELBO with a ``differentiable_loss`` that sums over ``_get_traces``, as Pyro's do.

    Returns:
        A function of a model, a guide and their arguments.
    """
    recordable: Any = copy.copy(elbo)

    def get_traces(*args: Any) -> Iterator[Any]:
        for traces in elbo._get_traces(*args):  # type: ignore[attr-defined]
            for trace in traces:
                for node in trace.nodes.values():
                    if torch.is_tensor(node.get("log_prob_sum")):
                        node["log_prob_sum"] = _Unread(node["log_prob_sum"])
            yield traces

    recordable._get_traces = get_traces

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = _plain(recordable.differentiable_loss(*args, **kwargs))
        return value

    return loss
