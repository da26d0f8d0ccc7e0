# SPDX-License-Identifier: Apache-2.0
"""L7. Importance sampling that does not need the guide's density: a wide mixture around its draws and found regions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.diagnostics.evidence import Evidence, estimate_evidence
from pyro_flows.diagnostics.modes import Modes
from pyro_flows.diagnostics.search import Regions
from pyro_flows.diagnostics.shape import robust_shape
from pyro_flows.diagnostics.sites import SiteSummary, SiteTally
from pyro_flows.importance.psis import khat_threshold
from pyro_flows.importance.weights import Draws, ImportanceSampler

__all__ = ["Reference", "ReferenceSettings", "sample_reference"]


@dataclass(frozen=True)
class ReferenceSettings:
    """Settings of the reference.

    Attributes:
        num_draws: Number of draws of the reference, and again until they are enough.
        enough_ess: Effective number of draws that are enough: a standard error of a mean of 0.03 standard deviations,
            well below those that matter.
        max_draws: Largest number of draws.
        max_values: Largest number of draws times values of a run of the model, if there are more than ``num_draws``.
        num_kernels: Number of draws of the guide that kernels are put around, of all items together; so the mixture has
            the guide's shape.
        shares: Shares of the kernels, the wide component, and the regions.
        widening: Factor from the guide's standard deviations to those of the wide component.
        df: Degrees of freedom of the Student t components, whose tails are to be heavier than the posterior's.
        max_dim: Largest dimension of an item; above, weights of such a mixture degenerate.
        max_coordinates: Largest number of dimensions of all items together.
        min_ess: Smallest effective number of draws of a reliable estimate: a standard error of a tenth.
        min_z_score: Standard errors by which two estimates of the evidence must differ, so that false alarms are rare.
        max_khat_of_variance: Largest k-hat at which the guide's own weights have a variance, and so standard errors.
    """

    num_draws: int = 2000
    enough_ess: float = 1000.0
    max_draws: int = 20_000
    max_values: int = 2**26
    num_kernels: int = 200
    shares: tuple[float, float, float] = (0.4, 0.4, 0.2)
    widening: float = 1.5
    df: float = 3.0
    max_dim: int = 12
    max_coordinates: int = 24
    min_ess: float = 100.0
    min_z_score: float = 4.0
    max_khat_of_variance: float = 0.5


class Reference(NamedTuple):
    """Estimates by weighted draws of the reference.

    Attributes:
        evidence: Log evidence and its error, by item.
        reliable: Items whose weights have a light tail and a sufficient effective sample size, ``(N,)``.
        tally: Moments of the sites.
        settings: When estimates are used.
    """

    evidence: Evidence
    reliable: Tensor
    tally: SiteTally
    settings: ReferenceSettings

    @property
    def is_reliable(self) -> bool:
        """Whether all items are."""
        return bool(self.reliable.all())

    def correct(self, own: Evidence, max_khat: float, *, is_noise: bool) -> Evidence:
        """Take the reference's evidence of items where the guide's weights have a heavy tail or miss mass.

        Args:
            own: Estimates by the guide's weights.
            max_khat: Largest k-hat at which these are reliable.
            is_noise: Whether their k-hat is that of noise, so that they are reliable whatever it is.
        """
        missed = self.evidence.log_evidence - own.log_evidence
        noise = self.settings.min_z_score * torch.hypot(self.evidence.error, own.error)
        misses = self.reliable & (missed > noise)
        taken = misses | (self.reliable & (own.khat > max_khat) & (not is_noise))
        return own._replace(
            log_evidence=torch.where(taken, self.evidence.log_evidence, own.log_evidence),
            error=torch.where(taken, self.evidence.error, own.error),
            missing=torch.where(misses, 1.0 - (1.0 - own.missing) * (-missed).exp(), own.missing),
        )

    def summaries(self, tally: SiteTally, own: Evidence, *, is_noise: bool) -> Mapping[str, SiteSummary]:
        """Summaries of sites by the guide's weights, if these have a variance, and by the reference, if it is reliable.

        Args:
            tally: Moments of the guide's draws, plain and weighted.
            own: Estimates by the guide's weights.
            is_noise: Whether their k-hat is that of noise, so that they have a variance whatever it is.
        """
        if not self.is_reliable:
            return tally.summaries()
        heavy = own.khat >= self.settings.max_khat_of_variance
        return tally.summaries(self.tally, by_reference=bool(heavy.any()) and not is_noise)


@torch.no_grad()
def sample_reference(
    sampler: ImportanceSampler,
    drawn: Draws,
    regions: Regions,
    settings: ReferenceSettings = ReferenceSettings(),
    like: SiteTally | None = None,
    modes: Modes | None = None,
) -> Reference | None:
    """Draw from a mixture of Student t distributions: kernels around draws of the guide, a wide one around all of them,
    and one at each region; None if there are too many dimensions.

    Weights of the guide's own draws say nothing about where the guide does not draw: the other half of a support, a
    tail. These draws go there, and they are weighted by a density that is known everywhere.

    Args:
        sampler: Sampler of the model and the guide.
        drawn: Draws of the guide.
        regions: Regions with posterior mass.
        settings: Settings of the reference.
        like: Moments of the guide's draws, which those of the reference are compared with.
        modes: The posterior's modes, so that kernels are as wide as one is; None for one.
    """
    structure = sampler.structure
    dim, num_items = structure.item_dim, structure.num_items
    if dim > settings.max_dim or dim * num_items > settings.max_coordinates:
        return None
    packed = structure.pack(drawn.values)
    mixture = _Mixture(packed.double(), regions, settings, modes)
    tally = SiteTally(structure, like)
    count = max(settings.num_draws, min(settings.max_draws, settings.max_values // max(structure.elements, 1)))
    log_weights = torch.empty(0, num_items, dtype=torch.double)
    while True:
        draws = mixture.draw(settings.num_draws).to(packed)
        weights = (sampler.log_joint_in_parts(draws) - mixture.log_prob(draws.double())).cpu()
        values, _ = structure.unpack(draws)
        tally.add(Draws(values, weights, {}, torch.zeros_like(weights)), weights)
        log_weights = torch.cat([log_weights, weights])
        evidence = estimate_evidence(log_weights)
        if len(log_weights) + len(weights) > count or (evidence.ess >= settings.enough_ess).all():
            break
    reliable = (evidence.khat <= khat_threshold(len(log_weights))) & (evidence.ess >= settings.min_ess)
    return Reference(evidence, reliable, tally, settings)


class _Group(NamedTuple):
    """J components of N items that share their scale matrices.

    Attributes:
        centers: ``(J, N, d)``.
        factor: Cholesky factors of the scale matrices, ``(N, d, d)``.
        share: Probability of the group.
    """

    centers: Tensor
    factor: Tensor
    share: float


class _Mixture:
    """A mixture of Student t distributions.

    Args:
        packed: Draws of the guide, ``(S, N, d)``.
        regions: Regions with posterior mass.
        settings: Shape of the mixture.
        modes: The posterior's modes; None for one.
    """

    def __init__(self, packed: Tensor, regions: Regions, settings: ReferenceSettings, modes: Modes | None) -> None:
        self._df = settings.df
        dim = packed.shape[-1]
        middle, _, factor = robust_shape(packed)
        _, _, within = robust_shape(packed if modes is None else modes.within(packed))
        num_kernels = max(settings.num_kernels // packed.shape[1], 1)
        bandwidth = num_kernels ** (-1.0 / (dim + 4))  # Silverman's rule
        kernels, wide, rest = settings.shares
        self._groups = [
            _Group(packed[:num_kernels], bandwidth * within, kernels),
            _Group(middle.unsqueeze(0), settings.widening * factor, wide),
        ]
        for center, own in zip(regions.centers, regions.factors, strict=True):
            self._groups.append(_Group(center.unsqueeze(0), own, rest / len(regions.centers)))
        self._shares = torch.tensor([group.share for group in self._groups], dtype=torch.double)
        self._shares /= self._shares.sum()

    def draw(self, count: int) -> Tensor:
        """About ``count`` draws, ``(S, N, d)``, in fixed numbers by group."""
        numbers = torch.diff((self._shares.cumsum(0) * count).round().long(), prepend=torch.zeros(1).long())
        parts = []
        for group, number in zip(self._groups, numbers.tolist(), strict=True):
            centers = group.centers[torch.randint(len(group.centers), (number,))]
            chi2 = torch.distributions.Chi2(torch.tensor(self._df)).sample((number, centers.shape[1], 1))
            noise = torch.randn(centers.shape) * (self._df / chi2).sqrt()
            parts.append(centers + (group.factor @ noise.to(centers).unsqueeze(-1)).squeeze(-1))
        return torch.cat(parts)

    def log_prob(self, draws: Tensor) -> Tensor:
        """``(S, N, d)`` to ``(S, N)``."""
        dim, half = draws.shape[-1], 0.5 * (self._df + draws.shape[-1])
        constant = math.lgamma(half) - math.lgamma(0.5 * self._df) - 0.5 * dim * math.log(self._df * math.pi)
        terms = []
        for group, share in zip(self._groups, self._shares, strict=True):
            points, centers = (
                torch.linalg.solve_triangular(group.factor, x.movedim(0, -1), upper=False).mT  # (N, S or J, d)
                for x in (draws, group.centers)
            )
            squared = torch.cdist(points, centers).square()
            log_det = group.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_density = -half * torch.log1p(squared / self._df).movedim(0, 1)  # (S, N, J)
            log_mean = log_density.logsumexp(-1) - math.log(len(group.centers))
            terms.append(share.log().to(log_mean) + constant - log_det + log_mean)
        return torch.stack(terms).logsumexp(0)
