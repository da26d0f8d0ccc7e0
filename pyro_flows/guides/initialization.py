# SPDX-License-Identifier: Apache-2.0
"""L5. The default initialization of a guide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_flows._checks import check_mapping, checked
from pyro_flows.transforms.representable import unconstrained_limits

__all__ = ["init_to_prior_median"]


@dataclass(frozen=True)
class MedianSettings:
    """Constants of initialization at the prior's median.

    Attributes:
        probabilities: Probabilities of the quartiles.
        max_central_half: Distance of the quartiles in unconstrained space above which a prior is uninformative: a
            factor of 20,000 for a positive site.
        num_draws: Number of draws for the quartiles of priors without a quantile function, of the form 4 n - 1.
    """

    probabilities: tuple[float, float, float] = (0.25, 0.5, 0.75)
    max_central_half: float = 10.0
    num_draws: int = 15

    @property
    def places(self) -> list[int]:
        """Indices of the quartiles among the sorted draws."""
        return [round(p * (self.num_draws + 1)) - 1 for p in self.probabilities]


MEDIAN = MedianSettings()


@checked(site=check_mapping)
def init_to_prior_median(site: dict[str, Any]) -> Tensor:
    """Initialize at the prior's exact median where its quantile function is known, else at the median of 15 draws.

    Pyro always takes the median of 15 draws, whose standard error is a third of the prior's standard deviation. In a
    hierarchy, that scatters the members of a group around their parent, which the guide must first unlearn.

    Three kinds of sites are initialized at zero in unconstrained space: bounded sites with an uninformative prior, such
    as ``Gamma(0.001, 0.001)``, whose median is below the smallest floating-point number; sites with a multivariate
    prior; and sites with an improper prior, which ``AutoNormal`` does not initialize.

    Args:
        site: A site of a Pyro trace.

    Returns:
        A value on the site's support.
    """
    fn = site["fn"]
    while hasattr(fn, "base_dist") and hasattr(fn, "reinterpreted_batch_ndims"):
        fn = fn.base_dist  # to_event() does not change quantiles
    if isinstance(fn, dist.ImproperUniform):
        to_support = biject_to(fn.support)
        start: Tensor = to_support(torch.zeros(to_support.inverse_shape(fn.shape())))
        start._pyro_custom_init = False  # type: ignore[attr-defined]  # as Pyro marks its own
        return start
    if fn.event_shape:
        feasible: Tensor = init_to_feasible(site)
        return feasible
    to_support = biject_to(fn.support)
    low, median, high = _quartiles(fn)
    usable = median.isfinite() & fn.support.check(median)
    if fn.support is not constraints.real:
        # Quartiles outside the range of floating point are all clamped to its smallest or largest number.
        unconstrained = to_support.inv(median)
        is_number = unconstrained == unconstrained.clamp(*unconstrained_limits(median.dtype))
        usable &= is_number & ((to_support.inv(high) - to_support.inv(low)).abs() < MEDIAN.max_central_half)
    value = torch.where(usable, median, to_support(torch.zeros_like(median))).detach()
    value._pyro_custom_init = False  # type: ignore[attr-defined]
    return value


def _quartiles(fn: Any) -> Tensor:
    """Quartiles of a prior, ``(3, *batch_shape)``."""
    try:
        return torch.stack([fn.icdf(torch.tensor(p)).expand(fn.batch_shape) for p in MEDIAN.probabilities])
    except (NotImplementedError, ValueError, AttributeError):
        draws = fn.sample((MEDIAN.num_draws,))
        return draws.sort(0).values[MEDIAN.places]
