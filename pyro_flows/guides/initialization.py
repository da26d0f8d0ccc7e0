# SPDX-License-Identifier: Apache-2.0
"""L3. Where a guide starts by default."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

__all__ = ["init_to_prior_median"]


def init_to_prior_median(site: dict[str, Any]) -> Tensor:
    """Start at the prior's exact median where its quantile function is known, else as Pyro's ``init_to_median``.

    Pyro takes the median of 15 draws, whose noise is a third of the prior's standard deviation. In a hierarchy that
    scatters members around their parent, which the guide must first unlearn.

    Args:
        site: A site of a Pyro trace.

    Returns:
        A value on the site's support.
    """
    fn = site["fn"]
    while hasattr(fn, "base_dist") and hasattr(fn, "reinterpreted_batch_ndims"):
        fn = fn.base_dist  # to_event() only says how dimensions are counted
    if not fn.event_shape:
        try:
            value: Tensor = fn.icdf(torch.tensor(0.5)).expand(fn.batch_shape)
            if bool(fn.support.check(value).all()) and bool(value.isfinite().all()):
                value = value.detach().clone()
                value._pyro_custom_init = False  # type: ignore[attr-defined]  # as Pyro marks its own
                return value
        except (NotImplementedError, ValueError, AttributeError):
            pass
    fallback: Tensor = init_to_median(site)
    return fallback
