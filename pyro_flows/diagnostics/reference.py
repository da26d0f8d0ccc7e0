# SPDX-License-Identifier: Apache-2.0
"""L7. Importance sampling that does not need the guide's density: a wide mixture around its draws and what a search found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.diagnostics.evidence import Evidence, estimate_evidence
from pyro_flows.diagnostics.search import Regions
from pyro_flows.diagnostics.sites import SiteTally
from pyro_flows.importance.psis import khat_threshold
from pyro_flows.importance.weights import Draws, ImportanceSampler

__all__ = ["Reference", "ReferenceSettings", "sample_reference"]


@dataclass(frozen=True)
class ReferenceSettings:
    """Settings of the reference.

    Attributes:
        num_draws: Number of draws of the reference.
        num_kernels: Number of draws of the guide that kernels are put around, so that the mixture has the guide's shape.
        shares: Shares of the kernels, the wide component, and the regions.
        widening: Factor from the guide's standard deviations to those of the wide component.
        df: Degrees of freedom of the Student t components, whose tails are to be heavier than the posterior's.
        clip: Draws of the guide are clipped at this many (robust) standard deviations, for their covariance.
        max_dim: Largest dimension of an item; above, weights of such a mixture degenerate.
        max_coordinates: Largest number of dimensions of all items together.
    """

    num_draws: int = 2000
    num_kernels: int = 200
    shares: tuple[float, float, float] = (0.4, 0.4, 0.2)
    widening: float = 1.5
    df: float = 3.0
    clip: float = 4.0
    max_dim: int = 12
    max_coordinates: int = 50


class Reference(NamedTuple):
    """Estimates by weighted draws of the reference.

    Attributes:
        evidence: Log evidence, its error and reliability, by item.
        khat_threshold: Largest k-hat at which they are reliable.
        tally: Moments of the sites.
    """

    evidence: Evidence
    khat_threshold: float
    tally: SiteTally

    def is_reliable(self, min_ess: float) -> bool:
        """Whether the weights of all items have a light tail and a sufficient effective sample size."""
        return bool((self.evidence.khat < self.khat_threshold).all() and (self.evidence.ess > min_ess).all())


@torch.no_grad()
def sample_reference(
    sampler: ImportanceSampler, regions: Regions | None, settings: ReferenceSettings = ReferenceSettings()
) -> Reference | None:
    """Draw from a mixture of Student t distributions: kernels around draws of the guide, a wide one around all of them,
    and one at each region; None if there are too many dimensions.

    Weights of the guide's own draws say nothing about where the guide does not draw: the other half of a support, a
    tail. These draws go there, and they are weighted by a density that is known everywhere.
    """
    structure = sampler.structure
    dim, num_items = structure.item_dim, structure.num_items
    too_many = dim > settings.max_dim or dim * num_items > settings.max_coordinates
    if structure.subsampled or not structure.is_continuous or too_many:
        return None
    packed = structure.pack(sampler.draw(settings.num_draws // 2).values)
    mixture = _Mixture(packed.double(), regions, settings)
    draws = mixture.draw(settings.num_draws).to(packed)
    log_joint = torch.cat([sampler.log_joint(part) for part in draws.split(sampler.chunk)])
    log_weights = (log_joint - mixture.log_prob(draws.double())).cpu()
    values, _ = structure.unpack(draws)
    tally = SiteTally(structure)
    tally.add(Draws(values, log_weights, {}, torch.zeros_like(log_weights)), log_weights)
    return Reference(estimate_evidence(log_weights), khat_threshold(settings.num_draws), tally)


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
        regions: Regions with posterior mass, if there are any.
        settings: Shape of the mixture.
    """

    def __init__(self, packed: Tensor, regions: Regions | None, settings: ReferenceSettings) -> None:
        self._df = settings.df
        count, _, dim = packed.shape
        quantiles = torch.tensor([0.159, 0.5, 0.841], dtype=packed.dtype, device=packed.device)
        low, middle, high = packed.quantile(quantiles, 0)
        scale = (0.5 * (high - low)).clamp_min(1e-12)
        standard = ((packed - middle) / scale).clamp(-settings.clip, settings.clip).movedim(0, 1)  # (N, S, d)
        correlation = standard.mT @ standard / count + 1e-6 * torch.eye(dim).to(packed)
        factor = scale.unsqueeze(-1) * torch.linalg.cholesky(correlation)
        bandwidth = settings.num_kernels ** (-1.0 / (dim + 4))  # Silverman's rule
        kernels, wide, rest = settings.shares
        self._groups = [
            _Group(packed[: settings.num_kernels], bandwidth * factor, kernels),
            _Group(middle.unsqueeze(0), settings.widening * factor, wide),
        ]
        for center, own in () if regions is None else zip(regions.centers, regions.factors, strict=True):
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
