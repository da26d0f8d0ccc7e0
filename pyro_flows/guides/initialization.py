# SPDX-License-Identifier: Apache-2.0
"""L5. Where a guide starts by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_flows.transforms.representable import unconstrained_limits

__all__ = ["init_to_prior_median"]


@dataclass(frozen=True)
class MedianSettings:
    """What a prior says about where a site is.

    Attributes:
        probabilities: Of the quartiles.
        max_central_half: Distance of quartiles in unconstrained space beyond which a prior says nothing: a factor of
            20,000 for a positive site.
        num_draws: Draws by which quartiles are known where there is no quantile function, 4 n - 1 of them.
    """

    probabilities: tuple[float, float, float] = (0.25, 0.5, 0.75)
    max_central_half: float = 10.0
    num_draws: int = 15

    @property
    def places(self) -> list[int]:
        """Of the quartiles among the draws in order."""
        return [round(p * (self.num_draws + 1)) - 1 for p in self.probabilities]


MEDIAN = MedianSettings()


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
        usable &= is_number & ((to_support.inv(high) - to_support.inv(low)).abs() < MEDIAN.max_central_half)
    value = torch.where(usable, median, to_support(torch.zeros_like(median))).detach()
    value._pyro_custom_init = False  # type: ignore[attr-defined]  # as Pyro marks its own
    return value


def _quartiles(fn: Any) -> Tensor:
    """``(3, *batch_shape)``."""
    try:
        return torch.stack([fn.icdf(torch.tensor(p)).expand(fn.batch_shape) for p in MEDIAN.probabilities])
    except (NotImplementedError, ValueError, AttributeError):
        draws = fn.sample((MEDIAN.num_draws,))
        return draws.sort(0).values[MEDIAN.places]
