# SPDX-License-Identifier: Apache-2.0
"""L2. Distributions of base noise, each with the score of its density."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

__all__ = [
    "CenteredStudentT",
    "DiagonalNormalMixture",
    "StandardNormal",
    "StratifiedNormal",
    "WideNormal",
    "base_score",
]

# Largest exponent in the velocities of mixture weights; float32 ends at 88.
MAX_EXPONENT = 60.0


class StandardNormal(dist.Normal):  # type: ignore[misc]
    """A normal that is known to be standard, so that its score costs nothing."""

    is_standard_normal: ClassVar[bool] = True

    def score(self, value: Tensor) -> Tensor:
        """Gradient of the log density in the value, elementwise."""
        return -value

    def stratified(self) -> StratifiedNormal:
        """The same distribution with stratified draws."""
        return StratifiedNormal(self.loc, self.scale, validate_args=False)

    def widened(self) -> WideNormal:
        """The same distribution, with draws of which half have heavy tails."""
        return WideNormal(self.loc, self.scale, validate_args=False)


class StratifiedNormal(StandardNormal):
    r"""A standard normal with stratified draws: of n along the first dimension, there is one in each n-th of the mass.

    A Latin hypercube: :math:`\epsilon_{ij} = \Phi^{-1}((\pi_j(i) + u_{ij}) / n)` with a random order :math:`\pi_j` for
    each coordinate. Each draw by itself is standard normal. The mean of a function over the draws has at most
    n / (n - 1) times the variance that it has over independent ones, and none of the part that is a sum of functions of
    single coordinates, as n grows.

    References:
        Stein. Large Sample Properties of Simulations Using Latin Hypercube Sampling. Technometrics 1987.
        Owen. Monte Carlo Variance of Scrambled Net Quadrature. SIAM Journal on Numerical Analysis 1997, for the bound.
    """

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        if len(shape) < 2 or shape[0] < 2:
            return super().rsample(sample_shape)
        with torch.no_grad():
            order = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).argsort(0)
            level = (order + torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)) / shape[0]
            rounding = torch.finfo(level.dtype).eps
            return torch.special.ndtri(level.clamp(rounding, 1.0 - rounding))


class WideNormal(StandardNormal):
    r"""A standard normal with draws from a wider distribution than its own, for importance weights.

    Along the first dimension, every second draw is normal. The others are Student-t with two degrees of freedom, which
    all their coordinates share: :math:`r = (\mathcal N + t_2) / 2`. No weight by r is more than twice that by the
    normal, and where the normal hardly draws it is far less: a defensive mixture, with deterministic shares.

    Attributes:
        log_ratio: :math:`\log r - \log \mathcal N` of the last draws, ``(S,)``.

    References:
        Hesterberg. Weighted average importance sampling and defensive mixture distributions. Technometrics 37(2), 1995.
        Owen, Zhou. Safe and effective importance sampling. JASA 95(449), 2000, section 4, for deterministic shares.
    """

    log_ratio: Tensor

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        eps = super().rsample(sample_shape)
        count = len(eps)
        rows = eps.reshape(count, -1)
        chi_square = -2.0 * torch.rand(count, 1, dtype=eps.dtype, device=eps.device).clamp_min(1e-6).log()
        is_wide = torch.arange(count, device=eps.device).remainder(2).bool().unsqueeze(-1)
        rows = torch.where(is_wide, rows * (2.0 / chi_square.clamp_min(1e-6)).sqrt(), rows)
        square, dim = rows.square().sum(-1), rows.shape[-1]
        log_normal = -0.5 * square - 0.5 * dim * math.log(2.0 * math.pi)
        log_t = (
            math.lgamma(1.0 + 0.5 * dim)
            - 0.5 * dim * math.log(2.0 * math.pi)
            - (1.0 + 0.5 * dim) * torch.log1p(0.5 * square)
        )
        self.log_ratio = torch.logaddexp(log_normal, log_t) - math.log(2.0) - log_normal
        return rows.reshape(eps.shape)


class CenteredStudentT(dist.StudentT):  # type: ignore[misc]
    """A Student-t with location 0 and scale 1."""

    def score(self, value: Tensor) -> Tensor:
        """Gradient of the log density in the value, elementwise."""
        return -(self.df + 1.0) * value / (self.df + value.square())


class DiagonalNormalMixture(dist.TorchDistribution):  # type: ignore[misc]
    r"""A mixture of normals with diagonal covariances, whose draws have path derivatives.

    A draw ``z`` moves with the parameters as mass does: :math:`\partial z / \partial \theta = v` for a velocity with
    :math:`\partial_\theta q + \nabla_z \cdot (q v) = 0`. With :math:`r_k(z)` the share of component k in the density,
    those of location and scale are :math:`r_k` and :math:`r_k (z - \mu_k) / \sigma_k`. Mass that a weight takes from
    component k for j moves from one to the other coordinate by coordinate, in a field whose divergence telescopes:

    .. math::
        q v_{jk, i} = -\prod_{l < i} N_{kl}(z_l) \, [\Phi_{ji}(z_i) - \Phi_{ki}(z_i)] \prod_{l > i} N_{jl}(z_l).

    Unlike ``pyro.distributions.MixtureOfDiagNormals``, it supports one dimension, coinciding components, and, since it
    works with log densities, many dimensions.

    Warning:
        If components are far apart, hardly any draw is between them, where the velocity of a weight is large: most
        gradients of weights are almost zero, and rare ones large. Weights must be initialized well, as
        ``AutoFlowGuide.warm_start`` does, and ``fit`` after each cycle.

    Shape:
        - event shape: ``(D,)``.

    Args:
        locs: ``(K, D)``.
        scales: ``(K, D)``, > 0.
        logits: Logarithms of the weights up to a constant, ``(K,)``.
        batch_shape: Shape of a batch of independent, identical distributions.

    References:
        [1] Jankowiak, Obermeyer. Pathwise Derivatives Beyond the Reparameterization Trick. ICML 2018.
            arXiv:1806.01851, eq. (8), for velocities.
        [2] Jankowiak, Karaletsos. Pathwise Derivatives for Multivariate Distributions. AISTATS 2019.
            arXiv:1806.01856, section 5, for those of mixtures.
    """

    has_rsample = True
    support = constraints.real_vector
    arg_constraints = {  # noqa: RUF012
        "locs": constraints.real,
        "scales": constraints.positive,
        "logits": constraints.real,
    }

    def __init__(
        self, locs: Tensor, scales: Tensor, logits: Tensor, batch_shape: tuple[int, ...] | torch.Size = ()
    ) -> None:
        self.locs = locs
        self.scales = scales
        self.logits = logits
        super().__init__(torch.Size(batch_shape), locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> DiagonalNormalMixture:
        return DiagonalNormalMixture(self.locs, self.scales, self.logits, batch_shape)

    @property
    def mean(self) -> Tensor:
        """``batch_shape + (D,)``."""
        return (self.logits.softmax(-1) @ self.locs).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Of each coordinate, ``batch_shape + (D,)``."""
        second = self.logits.softmax(-1) @ (self.scales.square() + self.locs.square())
        return (second - self.mean.square()).expand(self.batch_shape + self.event_shape)

    def _standard(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """A value in the coordinates of each component, and the log densities of these, both ``(..., K, D)``."""
        standard = (value.unsqueeze(-2) - self.locs) / self.scales
        return standard, -0.5 * standard.square() - self.scales.log() - 0.5 * math.log(2.0 * math.pi)

    def _joint(self, value: Tensor) -> Tensor:
        """Log density of value and component, ``(..., K)``."""
        return self.logits.log_softmax(-1) + self._standard(value)[1].sum(-1)

    def shares(self, value: Tensor) -> Tensor:
        """Share of each component in the density, ``(..., K)``."""
        return self._joint(value).softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(...)``."""
        return self._joint(value).logsumexp(-1).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def score(self, value: Tensor) -> Tensor:
        """Gradient of the log density in the value, ``(..., D)``."""
        standard, _ = self._standard(value)
        return -(self.shares(value).unsqueeze(-1) * standard / self.scales).sum(-2)

    def pick(self, noise: Tensor, which: Tensor) -> Tensor:
        """Draws of given components, ``(..., D)``, from standard normal noise and indices, ``(...)``."""
        return self.locs[which] + self.scales[which] * noise

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        # Detached rather than under no_grad, which torch.jit.trace does not record.
        locs, scales, logits = (p.detach() for p in (self.locs, self.scales, self.logits))
        fixed = DiagonalNormalMixture(locs, scales, logits, self.batch_shape)
        shape = self._extended_shape(sample_shape)
        rows = torch.multinomial(fixed.logits.softmax(-1), shape[:-1].numel(), replacement=True)
        noise = torch.randn(shape, dtype=self.locs.dtype, device=self.locs.device)
        value = fixed.pick(noise, rows.reshape(shape[:-1]))
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in (self.locs, self.scales, self.logits))):
            return value
        share = fixed.shares(value)
        in_scales = share.unsqueeze(-1) * fixed._standard(value)[0]
        in_logits = fixed._weight_velocity(value)
        # Zeros whose derivative is one: the value is the draw, and its derivatives are the velocities.
        locs, scales, logits = self.locs - locs, self.scales - scales, self.logits - logits
        return value + share @ locs + (in_scales * scales + in_logits * logits.unsqueeze(-1)).sum(-2)

    def _weight_velocity(self, value: Tensor) -> Tensor:
        """Derivatives of a draw in the logits, ``(..., K, D)``."""
        standard, log_density = self._standard(value)
        weights = self.logits.softmax(-1)
        total = (self.logits.log_softmax(-1) + log_density.sum(-1)).logsumexp(-1)[..., None, None, None]
        before = log_density.cumsum(-1) - log_density  # (..., K, D), over coordinates below
        after = log_density.sum(-1, keepdim=True) - log_density - before
        exponent = before.unsqueeze(-3) + after.unsqueeze(-2) - total  # (..., j, k, D)
        below = torch.special.ndtr(standard)
        passed = below.unsqueeze(-2) - below.unsqueeze(-3)
        field = -exponent.clamp(max=MAX_EXPONENT).exp() * passed
        return weights.unsqueeze(-1) * (weights.unsqueeze(-1) * field).sum(-2)


def base_score(base_dist: Any, eps: Tensor) -> Tensor:
    """Gradient of the base's log density at ``eps``, detached. Costs nothing for the standard normal."""
    inner = base_dist.base_dist if isinstance(base_dist, dist.Independent) else base_dist
    eps = eps.detach()
    if hasattr(inner, "score"):
        score: Tensor = inner.score(eps).detach()
        return score
    with torch.enable_grad():
        leaf = eps.requires_grad_()
        return torch.autograd.grad(base_dist.log_prob(leaf).sum(), leaf)[0]
