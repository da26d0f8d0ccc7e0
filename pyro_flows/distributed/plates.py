# SPDX-License-Identifier: Apache-2.0
"""L3. Mini-batches that plates draw themselves, from the items of one process only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_flows._checks import check_callable, check_text, checked
from pyro_flows.distributed.processes import Processes

__all__ = ["PlateShare", "disjoint_subsamples"]


class PlateShare(Messenger):
    """A handler under which a plate draws its mini-batches from one of several consecutive shares of its items.

    The mean over the shares of the model's log density is an unbiased estimate of that of all items: shares that are
    longer by one item weigh more, in proportion.

    Args:
        plate: Name of the plate.
        share: Number of the share, in ``[0, num_shares)``.
        num_shares: Number of shares, >= 1.

    Raises:
        ValueError: In a run, if the share has fewer items than a mini-batch.
    """

    def __init__(self, plate: str, share: int, num_shares: int) -> None:
        super().__init__()
        self.plate, self.share, self.num_shares = plate, share, num_shares

    def items(self, size: int) -> range:
        """Items of the share, of so many."""
        return range(size * self.share // self.num_shares, size * (self.share + 1) // self.num_shares)

    def items_of(self, plate: str, size: int) -> range:
        """Items of any plate that are in the share, of so many."""
        return self.items(size) if plate == self.plate else range(size)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["name"] == self.plate and msg["value"] is None:
                fn = msg["fn"]
                items = self.items(fn.size)
                if len(items) < fn.subsample_size:
                    raise ValueError(
                        f"pyro_flows.distributed: expected plate '{self.plate}' to have enough items for disjoint "
                        f"mini-batches, but {self.num_shares} of {fn.subsample_size} are more than its {fn.size}. "
                        f"Write a subsample_size of {fn.size // self.num_shares} at most: it is that of one process."
                    )
                msg["value"] = torch.randperm(len(items), device=fn.device)[: fn.subsample_size] + items.start
            return
        for frame in msg["cond_indep_stack"]:
            size = frame.full_size
            if frame.name == self.plate and size is not None and size % self.num_shares:
                msg["scale"] = msg["scale"] * (len(self.items(size)) * self.num_shares / size)


@checked(program=check_callable, plate=check_text)
def disjoint_subsamples(program: Callable[..., Any], plate: str) -> Callable[..., Any]:
    """A model or a guide whose plate draws its mini-batches from the items of this process only.

    For ``SVI`` with :class:`DistributedOptim`; :func:`~pyro_flows.fit` does it itself. Process r of n has the r-th n-th
    of the items. Wrap both the model and a guide that creates the plate.

    Args:
        program: The model or the guide.
        plate: Name of a plate with a ``subsample_size``, which is that of one process.

    Raises:
        ValueError: In a run, if a process has fewer items than a mini-batch.

    Example:
        >>> import pyro, torch
        >>> from pyro_flows.distributed import disjoint_subsamples
        >>> def model():
        ...     with pyro.plate("data", 4, subsample_size=2) as index:
        ...         return index
        >>> len(disjoint_subsamples(model, "data")())
        2
    """
    processes = Processes.of_group("disjoint_subsamples")
    return PlateShare(plate, processes.rank, processes.size)(program)  # type: ignore[no-any-return]
