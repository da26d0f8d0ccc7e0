# SPDX-License-Identifier: Apache-2.0
"""L1. Products of two Gaussians, by coordinate: a prior and a site approximation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.transforms.networks import inverse_powerprop

__all__ = ["INIT_SHARE", "init_share", "pool", "unpool"]

# Largest initial share of the precision of a known prior, so that the head is initialized to the requested Gaussian.
INIT_SHARE = 1e-3
# Smallest share of the Gaussian that is pooled with a prior.
MIN_SHARE = 1e-2


def pool(loc: Tensor, log_scale: Tensor, site_loc: Tensor, site_log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Location and log-scale of the product of two Gaussians, and the second one's weight in the location."""
    weight = torch.sigmoid(2.0 * (log_scale - site_log_scale))
    mean = torch.lerp(loc.expand_as(weight), site_loc.expand_as(weight), weight)
    return mean, -0.5 * torch.logaddexp(-2.0 * log_scale, -2.0 * site_log_scale), weight


def unpool(loc: Tensor, scale: Tensor, other_loc: Tensor, other_log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Location and log-scale of the Gaussian that gives ``N(loc, scale^2)`` when pooled with another.

    If the other one is already as narrow, the result is a very wide one that still gives the location.
    """
    share = torch.exp(2.0 * (scale.log() - other_log_scale))  # the other one's, of the precision
    rest = (1.0 - share).clamp_min(MIN_SHARE)
    return loc + share / rest * (loc - other_loc), scale.log() - 0.5 * rest.log()


def init_share(scale: Tensor, prior_log_scale: Tensor, max_share: float = INIT_SHARE) -> Tensor:
    """Raw logarithm of a prior's factor: 1, unless its share of the precision ``scale^-2`` would be too large."""
    return inverse_powerprop((math.log(max_share) + 2.0 * (prior_log_scale - scale.log())).clamp(max=0.0))
