# SPDX-License-Identifier: Apache-2.0
"""L3. :class:`DistributedOptim`: any optimizer of Pyro, by the mean gradient of all processes."""

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
    ``torch.distributed.init_process_group``. Parameters have to begin the same: with the same seed in all processes, or
    after :func:`broadcast_parameters`. Noise differs from the second step on: where torch's generators are all in the
    same state at the first step, those of all processes but the first get a seed of their own. Data are the user's to
    divide, or :func:`disjoint_subsamples`'s. If a gradient is not finite in one process, no process takes the step.
    Without a group, it is the optimizer itself.

    Args:
        optim: The optimizer; parameters get its options.

    Raises:
        TypeError: If ``optim`` is not one of ``pyro.optim``'s optimizers.
        RuntimeError: At a step, if parameters differ between processes at their first one, or another process has
            ended.

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

    @property
    def is_first(self) -> bool:
        """Whether this is the process that shows progress and writes files."""
        return self._processes.is_first

    def mean(self, value: float) -> float:
        """The mean of a number over all processes, such as the loss of a step; NaN if it is that on one of them."""
        return math.fsum(self._processes.gather(value)) / self._processes.size

    def _begin(self, params: list[Tensor]) -> None:
        """Check that new parameters are the same in all processes; before the first step, give each its own noise."""
        processes = self._processes
        if processes.size == 1 or not params:
            return
        values = [p.detach().cpu() for p in params]
        first = processes.broadcast(values)
        same = len(first) == len(values) and all(map(torch.equal, first, values))
        if not all(processes.gather(same)):
            raise RuntimeError(
                "DistributedOptim: expected parameters that begin the same in all processes, but they differ. Write "
                "pyro_flows.distributed.broadcast_parameters(model, guide, *args) before the first step, or set the "
                "same seed in all processes."
            )
        if self.optim_objs:
            return
        states = processes.gather(torch.random.get_rng_state())
        if processes.rank and all(torch.equal(state, states[0]) for state in states):
            torch.manual_seed(torch.initial_seed() + processes.rank)
