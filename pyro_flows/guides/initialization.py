# SPDX-License-Identifier: Apache-2.0
"""L5. Where a guide starts by default."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_flows.transforms.representable import unconstrained_limits

__all__ = ["init_to_prior_median"]

# A prior whose central half is longer than this in unconstrained space, a factor of 20,000 for a positive site, says
# nothing about where the site is.
VAGUE = 10.0
PROBABILITIES = (0.25, 0.5, 0.75)
# Draws by which quartiles are known where there is no quantile function; the quartiles' places among them, in order.
DRAWS, PLACES = 15, (3, 7, 11)


def init_to_prior_median(site: dict[str, Any]) -> Tensor:
    """Start at the prior's exact median where its quantile function is known, else at the median of 15 draws.

    Pyro takes 15 draws always, whose median's noise is a third of the prior's standard deviation. In a hierarchy that
    scatters members around their parent, which the guide must first unlearn.

    Where a prior of a bounded site says nothing about it, as ``Gamma(0.001, 0.001)``, whose median is below the
    smallest number, and where it has no median in one dimension, this starts where ``AutoNormal`` does: at zero in
    unconstrained space.

    Args:
        site: A site of a Pyro trace.

    Returns:
        A value on the site's support.
    """
    fn = site["fn"]
    while hasattr(fn, "base_dist") and hasattr(fn, "reinterpreted_batch_ndims"):
        fn = fn.base_dist  # to_event() only says how dimensions are counted
    if fn.event_shape:
        feasible: Tensor = init_to_feasible(site)
        return feasible
    to_support = biject_to(fn.support)
    low, median, high = _quartiles(fn)
    usable = median.isfinite() & fn.support.check(median)
    if fn.support is not constraints.real:
        # Quartiles that are no numbers in floating point come out as its smallest or largest, all alike.
        unconstrained = to_support.inv(median)
        is_number = unconstrained == unconstrained.clamp(*unconstrained_limits(median.dtype))
        usable &= is_number & ((to_support.inv(high) - to_support.inv(low)).abs() < VAGUE)
    value = torch.where(usable, median, to_support(torch.zeros_like(median))).detach()
    value._pyro_custom_init = False  # type: ignore[attr-defined]  # as Pyro marks its own
    return value


def _quartiles(fn: Any) -> Tensor:
    """``(3, *batch_shape)``."""
    try:
        return torch.stack([fn.icdf(torch.tensor(p)).expand(fn.batch_shape) for p in PROBABILITIES])
    except (NotImplementedError, ValueError, AttributeError):
        draws = fn.sample((DRAWS,))
        return draws.sort(0).values[list(PLACES)]
