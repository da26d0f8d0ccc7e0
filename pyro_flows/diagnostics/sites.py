# SPDX-License-Identifier: Apache-2.0
"""L7. Summaries of single sites, which show the latents that the guide approximates badly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.diagnostics.moments import Moments
from pyro_flows.importance.weights import Draws
from pyro_flows.models.sites import Site
from pyro_flows.models.structure import Structure

__all__ = ["SiteSummary", "SiteTally"]


@dataclass(frozen=True, eq=False)
class SiteSummary:
    r"""Moments of one latent site under the guide and under its importance weights.

    Attributes:
        name: Name of the site.
        log_prior: :math:`E_q \log p(\text{site} \mid \text{those before it})`, in nats. NaN if it depends on an
            enumerated site.
        mean: Mean of the guide's draws, of the site's shape.
        sd: Standard deviation of the guide's draws.
        weighted_mean: Mean by importance weights, an estimate of the posterior mean if k-hat is good.
        weighted_sd: Standard deviation by importance weights.
        shift: Largest difference of means over coordinates, in weighted standard deviations and in unconstrained space.
        sd_ratio: Ratio of the guide's standard deviation to the weighted one, of the coordinate where it is farthest
            from 1, in unconstrained space.
        max_shift: Upper limit of the error of a mean in standard deviations: two standard errors above the estimate, at
            the coordinate where it is largest, of the site or in unconstrained space.
        max_log_sd: The same for the error of a log standard deviation.
    """

    name: str
    log_prior: float
    mean: Tensor
    sd: Tensor
    weighted_mean: Tensor
    weighted_sd: Tensor
    shift: float
    sd_ratio: float
    max_shift: float
    max_log_sd: float

    @property
    def shape(self) -> torch.Size:
        """Shape of the site."""
        return self.mean.shape


class _SiteSums:
    """Running sums of one site."""

    def __init__(self, latent: Site, item_axis: int | None) -> None:
        self.latent = latent
        self.item_axis = item_axis
        self.log_prior = 0.0
        self.count = 0
        self.values = Moments()
        self.unconstrained = Moments()

    def add(self, values: Tensor, log_prior: Tensor | None, log_weights: Tensor) -> None:
        log_prior = torch.full_like(log_weights, torch.nan) if log_prior is None else log_prior
        kept = ~log_prior.isnan().any(-1)
        self.count += int(kept.sum())
        self.log_prior += log_prior[kept].sum().item()
        for moments, array in ((self.values, values), (self.unconstrained, self.latent.to_support.inv(values))):
            shape = [len(values)] + [1] * (array.dim() - 1)
            if self.item_axis is not None:
                shape[1 + self.item_axis] = -1
            moments.add(array, log_weights.reshape(shape))

    def summary(self, reference: _SiteSums | None, z_score: float) -> SiteSummary:
        mean, sd = self.values.plain
        weighted_mean, weighted_sd = (self if reference is None else reference).values.weighted
        errors = [
            moments.errors() if against is None else moments.errors_against(against)
            for moments, against in (
                (self.unconstrained, reference and reference.unconstrained),
                (self.values, reference and reference.values),
            )
        ]
        log_ratio = errors[0].log_sd.flatten()
        return SiteSummary(
            name=self.latent.name,
            log_prior=self.log_prior / self.count if self.count else math.nan,
            mean=mean.cpu(),
            sd=sd.cpu(),
            weighted_mean=weighted_mean.cpu(),
            weighted_sd=weighted_sd.cpu(),
            shift=errors[0].shift.abs().max().item(),
            sd_ratio=log_ratio[log_ratio.abs().argmax()].exp().item(),
            max_shift=max((e.shift.abs() + z_score * e.shift_se).max().item() for e in errors),
            max_log_sd=max((e.log_sd.abs() + z_score * e.log_sd_se).max().item() for e in errors),
        )


class SiteTally:
    """Accumulates draws chunk by chunk, for a summary of each site."""

    def __init__(self, structure: Structure) -> None:
        self._sites = [
            _SiteSums(latent, structure.item_axis(latent)) for latent in structure.latents if latent.shape.numel()
        ]

    def add(self, draws: Draws, log_weights: Tensor) -> None:
        """Add one chunk; ``log_weights`` are ``(S, N)``."""
        for site in self._sites:
            name = site.latent.name
            site.add(draws.values[name], draws.log_priors.get(name), log_weights)

    def summaries(self, reference: SiteTally | None = None, z_score: float = 2.0) -> Mapping[str, SiteSummary]:
        """Site name -> summary, in the model's order.

        Args:
            reference: Weighted draws of another distribution, where the draws' own weights are unreliable.
            z_score: Standard errors between an estimated error and its upper limit.
        """
        others = [None] * len(self._sites) if reference is None else reference._sites
        return {s.latent.name: s.summary(other, z_score) for s, other in zip(self._sites, others, strict=True)}
