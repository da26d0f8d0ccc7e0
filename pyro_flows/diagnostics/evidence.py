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
    """When mass that the guide does not account for is lost.

    Attributes:
        min_share: Share of all mass that was found below which a region is not reported.
        max_drawn: A mode is lost, rather than too thin, where the guide draws less than this part of what belongs
            there.
        min_z_score: Standard errors by which the two estimates of a region's mass must differ; there are up to six
            regions for each item, and a good guide must not be accused.
    """

    min_share: float = 0.05
    max_drawn: float = 0.2
    min_z_score: float = 4.0


class Evidence(NamedTuple):
    r"""What importance weights say of N items, each ``(N,)``.

    Attributes:
        log_evidence: log of the mean weight.
        error: Its standard error, by the delta method :math:`\mathrm{sd}(w) / (\bar w \sqrt S)`.
        ess: Effective sample size, :math:`(\sum w)^2 / \sum w^2`.
        khat: Shape of the tail of the weights.
        lost: Share of the posterior mass in regions where the guide hardly draws, as far as a search found them.
    """

    log_evidence: Tensor
    error: Tensor
    ess: Tensor
    khat: Tensor
    lost: Tensor

    @classmethod
    def unknown(cls, num_items: int) -> Evidence:
        """Nothing but NaN, where weights carry the noise of mini-batches."""
        return cls(*torch.full((5, num_items), math.nan, dtype=torch.double))


def estimate_evidence(log_weights: Tensor) -> Evidence:
    """From ``(S, N)`` log weights."""
    count = len(log_weights)
    log_mean = log_weights.logsumexp(0) - math.log(count)
    relative = (log_weights - log_mean).exp()
    error = relative.std(0) / math.sqrt(count)
    ess = count / relative.square().mean(0)
    khat = torch.tensor([pareto_smooth(column).khat for column in log_weights.unbind(1)], dtype=torch.double)
    return Evidence(log_mean, error, ess, khat, torch.zeros_like(log_mean))


class LostMass(NamedTuple):
    """Posterior mass of K regions that the guide's weights do not account for.

    Attributes:
        share: Of all mass that was found, ``(K, N)``; 0 where the guide draws enough, though its weights may be off.
        log_evidence: Log evidence with that mass, ``(N,)``.
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
    settings: LostMassSettings = LostMassSettings(),
) -> LostMass:
    """Compare each region's mass with what the guide's own draws say of it.

    Args:
        log_mass: log mass of K regions, measured without the guide, ``(K, N)``.
        error: Its standard error, ``(K, N)``.
        where: Which of them each draw is in, ``(S, N)``; K for none.
        log_weights: The draws' weights, ``(S, N)``.
        settings: When mass is lost.
    """
    count = len(log_weights)
    top = torch.maximum(log_weights.max(0).values, log_mass.max(0).values)
    weights = (log_weights - top).exp()
    inside = where == torch.arange(len(log_mass), device=where.device)[:, None, None]  # (K, S, N)
    mass = (log_mass - top).exp()
    by_guide = (weights * inside).mean(1)
    own_error = mass * error.nan_to_num(0.0)
    # Where the guide has no draws its estimate has no variance either; weights of the posterior are all the evidence.
    variance = torch.maximum((weights * inside).var(1), (weights.mean(0) + mass) * mass) / count
    excess = mass - by_guide
    significant = excess > settings.min_z_score * (own_error.square() + variance).sqrt()
    found = weights.mean(0) + (excess * significant).sum(0)
    share = excess / found
    drawn = inside.double().mean(1)
    lost = significant & (share > settings.min_share) & (drawn < settings.max_drawn * share)
    error_found = (weights.var(0) / count + (own_error * significant).square().sum(0)).sqrt()
    return LostMass(share * lost, top + found.log(), error_found / found)
