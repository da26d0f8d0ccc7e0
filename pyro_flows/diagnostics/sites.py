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

__all__ = ["SiteSettings", "SiteSummary", "SiteTally"]


@dataclass(frozen=True)
class SiteSettings:
    """Limits of the errors of sites.

    Attributes:
        z_score: Standard errors between an estimated error and its upper limit: with one of each site's errors at the
            limit, a sixth of such guides is accepted.
        max_log_sd_se: Largest standard error of a log standard deviation, plain or weighted, at which the moments of a
            coordinate are compared: beyond, its tails are so heavy that a standard deviation is no summary of it, and
            those in unconstrained space take its place.
    """

    z_score: float = 1.0
    max_log_sd_se: float = 0.05


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
        max_shift: Upper limit of the error of a mean in standard deviations: one standard error above the estimate, at
            the coordinate where it is largest; in unconstrained space where tails are too heavy.
        max_sd_error: The same for the relative error of a standard deviation.
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
    max_sd_error: float

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

    def summary(self, reference: _SiteSums | None, settings: SiteSettings, *, by_reference: bool) -> SiteSummary:
        mean, sd = self.values.plain
        weighted_mean, weighted_sd = (reference if reference and by_reference else self).values.weighted
        pairs = [(self.values, None if reference is None else reference.values)]
        if not self.values.has_sd(settings.max_log_sd_se).all():
            pairs.append((self.unconstrained, None if reference is None else reference.unconstrained))
        limits = [_upper_limits(draws, other, settings, by_reference=by_reference) for draws, other in pairs]
        own = self.unconstrained.errors()
        log_ratio = own.log_sd.flatten()
        return SiteSummary(
            name=self.latent.name,
            log_prior=self.log_prior / self.count if self.count else math.nan,
            mean=mean.cpu(),
            sd=sd.cpu(),
            weighted_mean=weighted_mean.cpu(),
            weighted_sd=weighted_sd.cpu(),
            shift=own.shift.abs().max().item(),
            sd_ratio=log_ratio[log_ratio.abs().argmax()].exp().item(),
            max_shift=max(limit[0] for limit in limits),
            max_sd_error=max(limit[1] for limit in limits),
        )


def _upper_limits(
    draws: Moments, reference: Moments | None, settings: SiteSettings, *, by_reference: bool
) -> tuple[float, float]:
    """Largest upper limits of the errors of a mean, in standard deviations, and of a standard deviation, relative."""
    found = [] if by_reference else [draws.errors()]
    if reference is not None:
        found.append(draws.errors_against(reference))
    has_sd = draws.has_sd(settings.max_log_sd_se)
    shifts = [(e.shift.abs() + settings.z_score * e.shift_se) * has_sd for e in found]
    sds = [(e.log_sd.expm1().abs() + settings.z_score * e.log_sd_se) * has_sd for e in found]
    # Of two limits that hold, the lower one counts.
    return torch.stack(shifts).amin(0).max().item(), torch.stack(sds).amin(0).max().item()


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

    def summaries(
        self,
        reference: SiteTally | None = None,
        settings: SiteSettings = SiteSettings(),
        *,
        by_reference: bool = False,
    ) -> Mapping[str, SiteSummary]:
        """Site name -> summary, in the model's order.

        Args:
            reference: Weighted draws of another distribution, if they are reliable.
            settings: Limits of errors.
            by_reference: Whether only these count, since the draws' own weights have no variance.
        """
        others = [None] * len(self._sites) if reference is None else reference._sites
        return {
            site.latent.name: site.summary(other, settings, by_reference=by_reference)
            for site, other in zip(self._sites, others, strict=True)
        }
