# SPDX-License-Identifier: Apache-2.0
"""L7. Result of :func:`~pyro_flows.diagnose`: estimates with standard errors, a verdict, and how both print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_flows.diagnostics.modes import LostMode
from pyro_flows.diagnostics.sites import SiteSummary

__all__ = [
    "NOT_KNOWN",
    "RESAMPLE",
    "SEARCH_ELSEWHERE",
    "TRAIN",
    "TRUST",
    "USE_NUTS",
    "Diagnosis",
    "Items",
]

TRUST = "trust it"
RESAMPLE = "use importance_resample"
TRAIN = "train longer"
USE_NUTS = "use NUTS"
SEARCH_ELSEWHERE = "start elsewhere"
NOT_KNOWN = "not known"


@dataclass(frozen=True, eq=False)
class Items:
    """Diagnostics of each item, where every site is in one plate; each ``(N,)``.

    Attributes:
        plate: Name of the plate.
        elbo: ELBO of each item, in nats.
        log_evidence: log p(x_n) by importance sampling, in nats.
        log_evidence_se: Its standard error.
        gap: KL(q || posterior) of each item, in nats.
        khat: Tail shape of each item's weights.
        ess: Effective sample size, in [1, S].
    """

    plate: str
    elbo: Tensor
    log_evidence: Tensor
    log_evidence_se: Tensor
    gap: Tensor
    khat: Tensor
    ess: Tensor


@dataclass(frozen=True, eq=False)
class Diagnosis:
    r"""Accuracy of a guide, estimated from S draws; prints as a report. Log densities are in nats.

    ``elbo == expected_log_likelihood - kl_to_prior``, and ``gap`` estimates :math:`KL(q \| p(z | x))`.

    Attributes:
        elbo: :math:`E_q[\log p(x, z) - \log q(z)]`.
        elbo_se: Its standard error.
        expected_log_likelihood: :math:`E_q \log p(x | z)`, the reconstruction. Latents whose prior depends on an
            enumerated site count here.
        kl_to_prior: :math:`KL(q \| p(z))`.
        log_evidence: log p(x) by importance sampling, mass that the guide misses included, as far as it was found. NaN
            where plates are subsampled.
        log_evidence_se: Its standard error; too small where k-hat is above the threshold.
        gap: ``log_evidence - elbo``.
        khat: Tail shape of the importance weights; over many items its 95 % quantile.
        khat_threshold: Largest k-hat at which weights of S draws are reliable.
        ess: Effective sample size of the draws; over many items its 5 % quantile.
        verdict: In words: "trust it", "use importance_resample", "train longer", "use NUTS", "start elsewhere" or
            "not known".
        reason: Reason for the verdict, in a sentence.
        advice: Recommended next step.
        log_weights: ``(S,)`` in float64; ``(S, N)`` where they factorize over N items.
        sites: Site name -> :class:`SiteSummary`.
        items: Item by item, where every site is in one plate; else None.
        lost: Modes that the guide lost, largest first; of the item that lost most, where there are items.
        obstacle: Reason, with the line, that draws cannot share a run of the model; empty if they can.
        num_refused: Number of draws that the model refuses: it raises (a failed Cholesky factorization) or its log
            density is NaN. Up to a tenth of all draws are excluded from the ELBO and its terms, which are then those of
            the guide restricted to the other draws; with more the ELBO is minus infinity. Their weights are zero.
        dtype: Precision of the draws; log densities of the model are computed in it, and summed in float64.
        rounding: What float32 is the reason for, such as refused draws or a large k-hat, and what to do; empty if
            nothing is.
    """

    max_lines: ClassVar[int] = 12  # of the printed table of sites

    elbo: float
    elbo_se: float
    expected_log_likelihood: float
    kl_to_prior: float
    log_evidence: float
    log_evidence_se: float
    gap: float
    khat: float
    khat_threshold: float
    ess: float
    verdict: str
    reason: str
    advice: str
    log_weights: Tensor
    sites: Mapping[str, SiteSummary]
    items: Items | None
    lost: tuple[LostMode, ...]
    obstacle: str = ""
    num_refused: int = 0
    dtype: torch.dtype | None = None
    rounding: str = ""

    @property
    def trustworthy(self) -> bool:
        """Whether draws of the guide can stand for draws of the posterior."""
        return self.verdict == TRUST

    @property
    def num_samples(self) -> int:
        """Number of draws S."""
        return len(self.log_weights)

    def __repr__(self) -> str:
        return f"Diagnosis(elbo={self.elbo:.4g}, gap={self.gap:.2g}, khat={self.khat:.2f}, verdict={self.verdict!r})"

    def __str__(self) -> str:
        lines = [
            f"{self.verdict[0].upper()}{self.verdict[1:]}: {self.reason}",
            f"ELBO          {self.elbo:>12.3f} +/- {self.elbo_se:.3f} nats = expected log likelihood "
            f"{self.expected_log_likelihood:.3f} - KL to prior {self.kl_to_prior:.3f}",
        ]
        if self.verdict != NOT_KNOWN:
            quantile = " (95 % of items)" if self.items is not None else ""
            lines += [
                f"log evidence  {self.log_evidence:>12.3f} +/- {self.log_evidence_se:.3f}",
                f"gap           {self.gap:>12.3f}",
                f"k-hat         {self.khat:>12.2f} (limit {self.khat_threshold:.2f}){quantile}",
                f"ESS           {self.ess:>12.0f} of {self.num_samples} draws",
            ]
        if self.items is not None:
            lines.append(_items_line(self.items, self.khat_threshold))
        if self.verdict != NOT_KNOWN:
            lines += _site_lines(list(self.sites.values()), self.max_lines)
        if self.num_refused:
            lines.append(
                f"The model refused {self.num_refused} of {self.num_samples} draws (it raised, or its log density was "
                "NaN), which weigh nothing" + (" and are left out of the ELBO" if math.isfinite(self.elbo) else "")
            )
        if self.obstacle:
            lines.append(f"Draws were run one by one, since {self.obstacle}")
        if self.rounding:
            lines.append(self.rounding)
        return "\n".join([*lines, f"Next: {self.advice}"])


def _items_line(items: Items, threshold: float) -> str:
    gaps = items.gap.quantile(items.gap.new_tensor([0.05, 0.5, 0.95]))
    above = int((items.khat > threshold).sum())
    return (
        f"by item of '{items.plate}': gap 5 % {gaps[0]:.3f}, median {gaps[1]:.3f}, 95 % {gaps[2]:.3f}; k-hat above the "
        f"limit for {above} of {len(items.gap)}"
    )


def _site_lines(sites: list[SiteSummary], max_lines: int) -> list[str]:
    """One line for each site; the worst ones first if there are too many."""
    if len(sites) > max_lines:
        sites = sorted(sites, key=lambda site: site.shift + abs(math.log(max(site.sd_ratio, 1e-30))), reverse=True)
    width = max(len(site.name) for site in sites[:max_lines]) if sites else 0
    lines = [f"{'site':<{width}}  E log prior  shift of mean, sds  sd / weighted sd"]
    for site in sites[:max_lines]:
        lines.append(f"{site.name:<{width}}  {site.log_prior:>11.3f}  {site.shift:>18.2f}  {site.sd_ratio:>16.2f}")
    return lines + ([f"... and {len(sites) - max_lines} more sites"] if len(sites) > max_lines else [])
