# SPDX-License-Identifier: Apache-2.0
"""L7. The ELBO and its two terms, from the draws of a guide that the model does not refuse."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.models.traces import mean_of_kept

__all__ = ["Elbo", "estimate_elbo"]


class Elbo(NamedTuple):
    """Estimate of the ELBO and its terms in nats; ``mean == expected_log_likelihood - kl_to_prior``.

    Attributes:
        mean: The ELBO; minus infinity if the model has no density at a draw, or refuses too many.
        error: Its standard error.
        expected_log_likelihood: E log p(x | z).
        kl_to_prior: KL(q || p(z)).
        by_item: Contribution of each item, ``(N,)``.
        num_refused: Number of draws that the model refuses.
    """

    mean: float
    error: float
    expected_log_likelihood: float
    kl_to_prior: float
    by_item: Tensor
    num_refused: int


def estimate_elbo(
    log_likelihood: Tensor, log_ratio: Tensor, log_weights: Tensor, group_sizes: list[int] | None = None
) -> Elbo:
    r"""The ELBO of the guide, or of its restriction to the draws that the model does not refuse.

    Where a share r of the draws is refused, the restricted guide has the density :math:`q(z) / (1 - r)`. So its ELBO is
    the mean log weight of the draws that are kept plus :math:`\log(1 - r)`, a lower bound of the evidence like any
    other ELBO.

    Args:
        log_likelihood: log p(x | z) of S draws, ``(S,)``; NaN where the model refuses the draw.
        log_ratio: log q(z) - log p(z), ``(S,)``; NaN where the model refuses the draw.
        log_weights: log p(x, z) - log q(z) by item, ``(S, N)``.
        group_sizes: Numbers of consecutive draws that share a mini-batch; None if all draws are independent.
    """
    refused = log_likelihood.isnan() | log_ratio.isnan()
    num_refused = int(refused.sum())
    expected = mean_of_kept(torch.where(refused, math.nan, log_likelihood)).item()
    kl = log_ratio[~refused].mean().item()
    log_share = 0.0
    if math.isnan(expected):  # more draws are refused than may be omitted
        expected = -math.inf
    else:
        log_share = math.log1p(-num_refused / len(refused))
    elbo = expected - (kl - log_share)
    totals = torch.where(refused, math.nan, log_weights.sum(-1))
    groups = totals if group_sizes is None else torch.stack([part.nanmean() for part in totals.split(group_sizes)])
    groups = groups[~groups.isnan()]
    by_item = (log_weights[~refused] if math.isfinite(elbo) else log_weights).mean(0)
    return Elbo(
        mean=elbo if math.isfinite(elbo) else -math.inf,
        error=groups.std().item() / math.sqrt(len(groups)) if len(groups) > 1 else math.nan,
        expected_log_likelihood=expected,
        kl_to_prior=kl - log_share,
        by_item=by_item + log_share / len(by_item),
        num_refused=num_refused,
    )
