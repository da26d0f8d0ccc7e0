# SPDX-License-Identifier: Apache-2.0
"""L5. How a guide says what it drew: a point, with the density of the map that took it to its support."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["DensityDelta"]


class DensityDelta(dist.Delta):  # type: ignore[misc]
    """Pyro's ``Delta``, whose log density counts in Kullback-Leibler divergences too.

    ``TraceMeanField_ELBO`` takes these of every pair of sites. Pyro's for a ``Delta`` leaves its log density out, and
    so the Jacobian of the map to the support: the loss of Pyro's own autoguides is off by it there, and has no bound.
    """


@register_kl(DensityDelta, dist.Distribution)  # type: ignore[untyped-decorator]
def _divergence(p: DensityDelta, q: dist.Distribution) -> Tensor:
    log_ratio: Tensor = p.log_density - q.log_prob(p.v)
    return log_ratio
