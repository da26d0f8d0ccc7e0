# SPDX-License-Identifier: Apache-2.0
"""L7. Summaries of single sites, which show the latents that the guide approximates badly."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.diagnostics.moments import MomentErrors, Moments, MomentState
from pyro_flows.diagnostics.shape import robust_shape
from pyro_flows.importance.weights import Draws
from pyro_flows.models.draws import GuideSampler
from pyro_flows.models.sites import Site
from pyro_flows.models.structure import Structure

__all__ = ["SiteSettings", "SiteState", "SiteSummary", "SiteTally"]


@dataclass(frozen=True)
class SiteSettings:
    """Limits of the errors of sites.

    Attributes:
        z_score: Standard errors between an estimated error and its upper limit: of guides with one error at the limit,
            one in 40 is accepted.
        max_log_sd_se: Largest standard error of the log standard deviation of draws at which the moments of a
            coordinate are compared: beyond, its tails are so heavy that a standard deviation is no summary of it, and
            those of its bulk take its place.
        num_more: Number of further draws of the guide, without densities, where its tails are too heavy for that by the
            first draws, but the posterior's are not: one far draw may decide.
        max_more_values: Largest number of values of these, if that is less.
    """

    z_score: float = 2.0
    max_log_sd_se: float = 0.05
    num_more: int = 100_000
    max_more_values: int = 2**26


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
            the coordinate where it is largest. Where tails are too heavy, it is that of
            :math:`\operatorname{asinh}((z - m) / s)`, with the median m and half of the central 68 % interval, s, of
            the guide's draws z.
        max_sd_error: The same for the relative error of a standard deviation.
        has_sd: Whether the draws determine a standard deviation of every coordinate. If not, tails are too heavy for
            one, and quantiles have to summarize the site.
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
    has_sd: bool

    @property
    def shape(self) -> torch.Size:
        """Shape of the site."""
        return self.mean.shape


class _Bulk:
    """A monotone map that has moments whatever the tails, as it grows with the logarithm: asinh((z - m) / s).

    Args:
        draws: Draws ``(S, *shape)``, whose medians are m, and half of whose central 68 % intervals are s.
    """

    def __init__(self, draws: Tensor) -> None:
        flat = draws.double().reshape(len(draws), -1, 1)
        middle, scale, _ = robust_shape(flat)
        self._middle, scale = middle.reshape(draws.shape[1:]), scale.reshape(draws.shape[1:])
        self._scale = torch.where(scale > torch.finfo(draws.dtype).tiny, scale, 1.0)  # a single draw has no scale

    def to(self, device: torch.device | str) -> _Bulk:
        """A copy on another device."""
        found = copy.copy(self)
        found._middle, found._scale = self._middle.to(device), self._scale.to(device)
        return found

    def __call__(self, values: Tensor) -> Tensor:
        return ((values.double() - self._middle) / self._scale).asinh()


class _Origin(NamedTuple):
    """What sums of a site begin with, on the CPU; those with the same one can be merged.

    Attributes:
        bulk: Map of its bulk.
        values: Center of its values.
        unconstrained: That of unconstrained values.
        of_bulk: That of values of the map.
    """

    bulk: _Bulk
    values: Tensor
    unconstrained: Tensor
    of_bulk: Tensor


class _SiteSums:
    """Running sums of one site.

    Args:
        latent: The site.
        item_axis: Its axis of items; None if there is none.
        bulk: Map of its bulk; None takes that of the first draws.
    """

    def __init__(self, latent: Site, item_axis: int | None, bulk: _Bulk | None = None) -> None:
        self.latent = latent
        self.item_axis = item_axis
        self.bulk = bulk
        self.log_prior = 0.0
        self.count = 0
        self.values = Moments()
        self.unconstrained = Moments()
        self.of_bulk = Moments()
        self.more: Moments | None = None

    @property
    def all_moments(self) -> tuple[Moments, Moments, Moments]:
        return self.values, self.unconstrained, self.of_bulk

    def origin(self, values: Tensor) -> _Origin:
        """What sums of these draws, and of others, are to begin with."""
        bulk = _Bulk(values)
        kinds = values, self.latent.to_support.inv(values), bulk(values)
        return _Origin(bulk.to("cpu"), *(each.double().median(0).values.cpu() for each in kinds))

    def begin(self, origin: _Origin, device: torch.device) -> None:
        self.bulk = origin.bulk.to(device)
        self.values, self.unconstrained, self.of_bulk = (Moments(center) for center in origin[1:])

    def add(self, values: Tensor, log_prior: Tensor | None, log_weights: Tensor) -> None:
        log_prior = torch.full_like(log_weights, torch.nan) if log_prior is None else log_prior
        kept = ~log_prior.isnan().any(-1)
        self.count += int(kept.sum())
        self.log_prior += log_prior[kept].sum().item()
        self.bulk = self.bulk or _Bulk(values)
        self._add(self.values, values, log_weights)
        self._add(self.unconstrained, self.latent.to_support.inv(values), log_weights)
        self._add(self.of_bulk, self.bulk(values), log_weights)

    def heavier(self, settings: SiteSettings) -> Tensor:
        """Where the draws determine no standard deviation, but the weighted draws do."""
        limit = settings.max_log_sd_se
        return ~self.values.has_sd(limit) & self.values.has_sd(limit, weighted=True)

    def add_more(self, values: Tensor) -> None:
        """Add further draws of the guide, without densities."""
        self.more = self.more or Moments()
        self.more.add(values, torch.zeros(len(values), *(1,) * (values.dim() - 1), dtype=torch.double))

    def _add(self, moments: Moments, values: Tensor, log_weights: Tensor) -> None:
        shape = [len(values)] + [1] * (values.dim() - 1)  # a matrix may be a vector in unconstrained space
        if self.item_axis is not None:
            shape[1 + self.item_axis] = -1
        moments.add(values, log_weights.reshape(shape))

    def summary(self, reference: _SiteSums | None, settings: SiteSettings, *, by_reference: bool) -> SiteSummary:
        mean, sd = self.values.plain
        weighted_mean, weighted_sd = (reference if reference and by_reference else self).values.weighted
        has_sd = self.values.has_sd(settings.max_log_sd_se)
        of_values, of_bulk = (
            _upper_limits(draws, other, settings, by_reference=by_reference)
            for draws, other in (
                (self.values, None if reference is None else reference.values),
                (self.of_bulk, None if reference is None else reference.of_bulk),
            )
        )
        if self.more is not None:
            heavier = self.heavier(settings)
            posterior = reference.values if reference is not None and by_reference else self.values
            of_values = torch.where(heavier, _limits(self.more.errors_against(posterior), settings), of_values)
            has_sd = has_sd | (heavier & self.more.has_sd(settings.max_log_sd_se))
        max_shift, max_sd_error = torch.where(has_sd, of_values, of_bulk).reshape(2, -1).amax(1).tolist()
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
            max_shift=max_shift,
            max_sd_error=max_sd_error,
            has_sd=bool(has_sd.all()),
        )


def _upper_limits(draws: Moments, reference: Moments | None, settings: SiteSettings, *, by_reference: bool) -> Tensor:
    """Upper limits of errors of means, in sds, and of standard deviations, relative; ``(2, *shape)``."""
    found = [] if by_reference else [draws.errors()]
    if reference is not None:
        found.append(draws.errors_against(reference))
    # Of two limits that hold, the lower one counts.
    return torch.stack([_limits(errors, settings) for errors in found]).amin(0)


def _limits(errors: MomentErrors, settings: SiteSettings) -> Tensor:
    return torch.stack(
        [
            errors.shift.abs() + settings.z_score * errors.shift_se,
            errors.log_sd.expm1().abs() + settings.z_score * errors.log_sd_se,
        ]
    )


class SiteState(NamedTuple):
    """Sums of one site, on the CPU.

    Attributes:
        log_prior: Sum of its log priors.
        num_draws: Number of draws that have one.
        values: Moments of its values.
        unconstrained: Those of unconstrained values.
        of_bulk: Those of values of the map of its bulk.
    """

    log_prior: float
    num_draws: int
    values: MomentState
    unconstrained: MomentState
    of_bulk: MomentState


class SiteTally:
    """Accumulates draws chunk by chunk, for a summary of each site.

    Args:
        structure: Structure of the model and the guide.
        like: A tally of other draws with which this one is compared.
    """

    def __init__(self, structure: Structure, like: SiteTally | None = None) -> None:
        latents = [latent for latent in structure.latents if latent.shape.numel()]
        bulks = [None] * len(latents) if like is None else [site.bulk for site in like._sites]
        self._sites: list[_SiteSums] = [
            _SiteSums(latent, structure.item_axis(latent), bulk) for latent, bulk in zip(latents, bulks, strict=True)
        ]

    def add(self, draws: Draws, log_weights: Tensor) -> None:
        """Add one chunk; ``log_weights`` are ``(S, N)``."""
        for site in self._sites:
            name = site.latent.name
            site.add(draws.values[name], draws.log_priors.get(name), log_weights)

    def origin(self, draws: Draws) -> list[_Origin]:
        """What this tally and those of other processes have to begin with in order to be merged, from some draws."""
        return [site.origin(draws.values[site.latent.name]) for site in self._sites]

    def begin(self, origin: Sequence[_Origin], draws: Draws) -> None:
        """Begin with the result of :meth:`origin`, before the first draws are added, of which these are some."""
        for site, each in zip(self._sites, origin, strict=True):
            site.begin(each, draws.values[site.latent.name].device)

    def add_more(self, sampler: GuideSampler, chunk: int, settings: SiteSettings = SiteSettings()) -> None:
        """Add further draws of a guide, without densities, where its tails are heavier than the posterior's.

        Args:
            sampler: Draws from the guide.
            chunk: Largest number of draws that are taken at once.
            settings: How many, and where.
        """
        heavier = [site for site in self._sites if site.heavier(settings).any()]
        count = min(settings.num_more, settings.max_more_values // max(sampler.elements, 1))
        for number in [chunk] * (count // chunk) if heavier else ():
            values = sampler(number)
            for site in heavier:
                site.add_more(values[site.latent.name])

    @property
    def state(self) -> list[SiteState]:
        """Sums of all sites, for :meth:`merge`."""
        return [
            SiteState(site.log_prior, site.count, *(each.state for each in site.all_moments)) for site in self._sites
        ]

    def merge(self, other: Sequence[SiteState]) -> None:
        """Add the draws of another tally that began with the same origin."""
        for site, found in zip(self._sites, other, strict=True):
            site.log_prior += found.log_prior
            site.count += found.num_draws
            for own, moments in zip(site.all_moments, found[2:], strict=True):
                own.merge(moments)

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
