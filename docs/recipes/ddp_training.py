# SPDX-License-Identifier: Apache-2.0
"""A guide trained by torch's DistributedDataParallel: ``torchrun --nproc-per-node=2 train.py``.

Before the guide is made, write ``pyro.settings.set(module_local_params=True)``: parameters then belong to modules,
where torch finds them, and not to Pyro's global store.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from pyro.infer import Trace_ELBO
from torch.nn.parallel import DistributedDataParallel


def train(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Iterable[Any],
    *,
    num_epochs: int,
    learning_rate: float = 1e-2,
) -> list[float]:
    """Train a guide on this process's mini-batches; returns its losses.

    Every process needs as many mini-batches, as a ``DistributedSampler`` gives.
    """
    elbo = Trace_ELBO()(model, guide)
    elbo(*next(iter(batches)))  # parameters exist after a first run only
    ddp = DistributedDataParallel(elbo)  # broadcasts the first process's parameters
    guide.step_limit.forget()  # which was no step, to be shortened
    torch.manual_seed(torch.initial_seed() + dist.get_rank())  # noise of its own
    optimizer = torch.optim.Adam(ddp.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    losses = []
    for epoch in range(num_epochs):
        if hasattr(getattr(batches, "sampler", None), "set_epoch"):
            batches.sampler.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            loss = ddp(*batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
