# SPDX-License-Identifier: Apache-2.0
"""L5. The distribution of a guide's sample statements: a point mass, with the log density of the draw."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["DensityDelta"]


class DensityDelta(dist.Delta):  # type: ignore[misc]
    """Pyro's ``Delta``, but with its log density included in Kullback-Leibler divergences.

    ``TraceMeanField_ELBO`` takes the divergence of every pair of sites. Pyro's divergence for a ``Delta`` leaves out
    its log density, and so the Jacobian of the map to the support: with Pyro's own autoguides that loss is wrong by
    this term, and is no bound.
    """


@register_kl(DensityDelta, dist.Distribution)  # type: ignore[untyped-decorator]
def _divergence(p: DensityDelta, q: dist.Distribution) -> Tensor:
    log_ratio: Tensor = p.log_density - q.log_prob(p.v)
    return log_ratio
