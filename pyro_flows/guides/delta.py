# SPDX-License-Identifier: Apache-2.0
"""L5. The distribution of a guide's sample statements: a point mass, with the log density of the draw."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["DensityDelta"]

NO_SHAPE = torch.Size()


class DensityDelta(dist.Delta):  # type: ignore[misc]
    """Pyro's ``Delta``, but with its log density included in Kullback-Leibler divergences.

    ``TraceMeanField_ELBO`` takes the divergence of every pair of sites. Pyro's divergence for a ``Delta`` leaves out
    its log density, and so the Jacobian of the map to the support: with Pyro's own autoguides that loss is wrong by
    this term, and is no bound.

    The draw is the point itself, whose log density is known; to compare the two, as Pyro does, takes five operations
    for each site and step. With validation, which refuses a draw that is NaN, they are compared.
    """

    def rsample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        value: Tensor = super().rsample(sample_shape) if sample_shape else self.v
        return value

    def log_prob(self, x: Tensor) -> Tensor:
        is_known = x is self.v and not self._validate_args
        log_density: Tensor = self.log_density if is_known else super().log_prob(x)
        return log_density


@register_kl(DensityDelta, dist.Distribution)  # type: ignore[untyped-decorator]
def _divergence(p: DensityDelta, q: dist.Distribution) -> Tensor:
    log_ratio: Tensor = p.log_density - q.log_prob(p.v)
    return log_ratio
