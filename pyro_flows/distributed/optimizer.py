# SPDX-License-Identifier: Apache-2.0
"""L1. :class:`DistributedOptim`: any optimizer of Pyro, by the mean gradient of all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_flows._checks import check_type, checked
from pyro_flows.distributed.gradients import mean_gradient
from pyro_flows.distributed.processes import Processes

__all__ = ["DistributedOptim"]


class DistributedOptim(PyroOptim):
    """An optimizer of ``pyro.optim`` that steps by the mean gradient of all processes, which stay equal.

    For ``SVI`` and :class:`~pyro_flows.CompiledSVI` in a program that ``torchrun`` starts several times, after
    ``torch.distributed.init_process_group``. Give each process a seed of its own, ``pyro.set_rng_seed(rank)``, so that
    their draws differ, and data of its own, or :func:`disjoint_subsamples`. Parameters begin as those of the first
    process; where a process began elsewhere, their first step is by the first process's gradient. If a gradient is not
    finite on one process, no process takes the step. Without a group, it is the optimizer itself.

    Args:
        optim: The optimizer; parameters get its options.

    Raises:
        TypeError: If ``optim`` is not one of ``pyro.optim``'s optimizers.
        RuntimeError: At a step, if another process has ended.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.optim import Adam
        >>> from pyro_flows.distributed import DistributedOptim
        >>> optim = DistributedOptim(Adam({"lr": 0.01}))  # SVI(model, guide, optim, Trace_ELBO())
    """

    @checked(optim=partial(check_type, kind=PyroOptim))
    def __init__(self, optim: PyroOptim) -> None:
        super().__init__(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
        self._processes = Processes.of_group("DistributedOptim")

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take a step on the parameters, which are the same on all processes."""
        name_of = pyro.get_param_store().param_name
        params = sorted(params, key=lambda p: name_of(p) or "")
        self._begin([p for p in params if p not in self.optim_objs])
        mean_gradient(self._processes, params)
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in params):
            super().__call__(params, *args, **kwargs)

    def mean(self, value: float) -> float:
        """The mean of a number over all processes, such as the loss of a step; NaN if it is that on one of them."""
        return math.fsum(self._processes.gather(value)) / self._processes.size

    @torch.no_grad()
    def _begin(self, params: list[Tensor]) -> None:
        """Set new parameters to those of the first process; where they were others, its gradient alone counts."""
        if self._processes.size == 1 or not params:
            return
        before = [p.detach().clone() for p in params]
        self._processes.share(params)
        moved = torch.stack([(p != old).any() for p, old in zip(params, before, strict=True)])
        for p, differs in zip(params, self._processes.sum(moved.long()).tolist(), strict=True):
            if differs and p.grad is not None:
                p.grad = p.grad * self._processes.size if self._processes.is_first else torch.zeros_like(p)
