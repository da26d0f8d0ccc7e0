# SPDX-License-Identifier: Apache-2.0
"""L7. The log evidence from importance weights, its error and reliability, and the mass that the guide lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.importance.psis import pareto_smooth

__all__ = ["Evidence", "LostMass", "LostMassSettings", "estimate_evidence", "lost_mass"]


@dataclass(frozen=True)
class LostMassSettings:
    """When a mode counts as lost.

    Attributes:
        min_share: Share of all mass that was found below which a region is not reported, unless it changes a moment.
        max_change: Change of a mean, in standard deviations, or of a standard deviation, relative, by the mass of a
            region that is not reported: a hundredth of the mass, ten standard deviations away, changes them by 10 and
            40 %.
        max_drawn: A mode is lost, rather than underrepresented, if the guide's probability of the region is less than
            this fraction of the region's share of the mass.
        min_z_score: Standard errors by which the two estimates of a region's mass must differ; high, since there are up
            to six regions for each item, and false alarms must be rare.
    """

    min_share: float = 0.05
    max_change: float = 0.15
    max_drawn: float = 0.2
    min_z_score: float = 4.0


class Evidence(NamedTuple):
    r"""Estimates from importance weights for N items, each ``(N,)``.

    Attributes:
        log_evidence: log of the mean weight.
        error: Its standard error, by the delta method :math:`\mathrm{sd}(w) / (\bar w \sqrt S)`.
        ess: Effective sample size, :math:`(\sum w)^2 / \sum w^2`.
        khat: Shape of the tail of the weights.
        lost: Share of the posterior mass in regions where the guide hardly draws, as far as a search found them.
        missing: Share of the posterior mass that the guide's weights do not account for, where it is significant.
    """

    log_evidence: Tensor
    error: Tensor
    ess: Tensor
    khat: Tensor
    lost: Tensor
    missing: Tensor

    @classmethod
    def unknown(cls, num_items: int) -> Evidence:
        """All NaN, where weights have the noise of mini-batches."""
        return cls(*torch.full((6, num_items), math.nan, dtype=torch.double, device="cpu"))


def estimate_evidence(log_weights: Tensor) -> Evidence:
    """Estimate the log evidence from log weights, ``(S, N)``."""
    count = len(log_weights)
    log_mean = log_weights.logsumexp(0) - math.log(count)
    relative = (log_weights - log_mean).exp()
    error = relative.std(0) / math.sqrt(count)
    ess = count / relative.square().mean(0)
    khat = log_mean.new_tensor([pareto_smooth(column).khat for column in log_weights.unbind(1)], dtype=torch.double)
    none = torch.zeros_like(log_mean)
    return Evidence(log_mean, error, ess, khat, none, none)


class LostMass(NamedTuple):
    """Posterior mass of K regions that the guide's weights do not account for.

    Attributes:
        share: Share of all mass that was found, ``(K, N)``; 0 where the guide draws enough, even if its weights are
            inaccurate.
        log_evidence: Log evidence including that mass, ``(N,)``.
        error: Its standard error, ``(N,)``.
    """

    share: Tensor
    log_evidence: Tensor
    error: Tensor


def lost_mass(
    log_mass: Tensor,
    error: Tensor,
    where: Tensor,
    log_weights: Tensor,
    distance: Tensor,
    settings: LostMassSettings = LostMassSettings(),
) -> LostMass:
    """Compare each region's mass with its estimate by the guide's own draws.

    Args:
        log_mass: log mass of K regions, measured without the guide, ``(K, N)``.
        error: Its standard error, ``(K, N)``.
        where: Index of the region of each draw, ``(S, N)``; K for none.
        log_weights: The draws' log weights, ``(S, N)``.
        distance: Largest distance of a coordinate of each region's center from the mean of the draws, in their standard
            deviations, ``(K, N)``.
        settings: When a mode counts as lost.
    """
    count = len(log_weights)
    # What could not be significant is no measurement: where float32 rounds a density to nonsense, far out in a tail, a
    # single draw may have more mass than all others, and their weights would vanish beside it.
    log_mass = torch.where(settings.min_z_score * error < 1.0, log_mass, -torch.inf)
    top = torch.maximum(log_weights.max(0).values, log_mass.max(0).values)
    weights = (log_weights - top).exp()
    inside = where == torch.arange(len(log_mass), device=where.device)[:, None, None]  # (K, S, N)
    mass = (log_mass - top).exp()
    by_guide = (weights * inside).mean(1)
    own_error = mass * error.nan_to_num(0.0)
    # A region without draws of the guide has no estimate of variance either, so only the measured mass is used.
    variance = torch.maximum((weights * inside).var(1), (weights.mean(0) + mass) * mass) / count
    excess = mass - by_guide
    significant = excess > settings.min_z_score * (own_error.square() + variance).sqrt()
    found = weights.mean(0) + (excess * significant).sum(0)
    share = excess / found
    drawn = inside.double().mean(1)
    change = torch.maximum(share * distance, (1.0 + share * (1.0 - share) * distance.square()).sqrt() - 1.0)
    matters = (share > settings.min_share) | (change > settings.max_change)
    lost = significant & matters & (drawn < settings.max_drawn * share)
    error_found = (weights.var(0) / count + (own_error * significant).square().sum(0)).sqrt()
    return LostMass(share * lost, top + found.log(), error_found / found)
