# SPDX-License-Identifier: Apache-2.0
"""L2. Base distributions: the noise that a flow starts from, as data for a recipe and as a module with parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_flows._checks import check_int, check_positive

__all__ = [
    "Base",
    "BaseSpec",
    "DiagonalNormalMixture",
    "Mixture",
    "MixtureBase",
    "StandardNormal",
    "StratifiedNormal",
    "StudentT",
    "StudentTBase",
    "base_score",
    "resolve_base",
    "spread_components",
]

# Degrees of freedom stay above this, so that the noise has a mean.
MIN_DF = 1.0
# Adam moves each parameter by the learning rate at a step. Logarithms of degrees of freedom are stored in this unit, as
# log-scales of the head are, so that tails settle before the layers between have bent themselves into a likeness.
LOG_DF_RATE = 5.0
# Components of a mixture start about this far from the origin: alike ones would stay alike.
SPREAD = 0.2
# Largest exponent in the velocities of mixture weights; float32 ends at 88.
MAX_EXPONENT = 60.0


class StandardNormal(dist.Normal):  # type: ignore[misc]
    """A normal that is known to be standard, which makes its score free."""

    def score(self, value: Tensor) -> Tensor:
        """Gradient of the log density in the value, elementwise."""
        return -value


class StratifiedNormal(StandardNormal):
    r"""A standard normal whose draws fill the line evenly: of n along the first dimension, each n-th has one.

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


class _CenteredStudentT(dist.StudentT):  # type: ignore[misc]
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

    Differs from ``pyro.distributions.MixtureOfDiagNormals`` in that it has one dimension too, components that
    coincide, and, since all densities are logarithms, many dimensions.

    Warning:
        Where components are far apart, hardly any draw is where the mass of a weight moves: most gradients of weights
        are next to nothing, and rare ones large. They have to be right before, as ``AutoFlowGuide.warm_start`` makes
        them.

    Shape:
        - event shape: ``(D,)``.

    Args:
        locs: ``(K, D)``.
        scales: ``(K, D)``, > 0.
        logits: Logarithms of the weights up to a constant, ``(K,)``.
        batch_shape: Shape of a batch of independent ones that are all alike.

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

    def log_prob(self, value: Tensor) -> Tensor:
        """``(...)``."""
        return self._joint(value).logsumexp(-1).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def score(self, value: Tensor) -> Tensor:
        """Gradient of the log density in the value, ``(..., D)``."""
        standard, _ = self._standard(value)
        return -(self._joint(value).softmax(-1).unsqueeze(-1) * standard / self.scales).sum(-2)

    def pick(self, noise: Tensor, which: Tensor) -> Tensor:
        """Draws of given components, ``(..., D)``, from standard normal noise and indices, ``(...)``."""
        return self.locs[which] + self.scales[which] * noise

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        # Detached rather than under no_grad, which torch.jit.trace does not take down.
        locs, scales, logits = (p.detach() for p in (self.locs, self.scales, self.logits))
        fixed = DiagonalNormalMixture(locs, scales, logits, self.batch_shape)
        shape = self._extended_shape(sample_shape)
        rows = torch.multinomial(fixed.logits.softmax(-1), shape[:-1].numel(), replacement=True)
        noise = torch.randn(shape, dtype=self.locs.dtype, device=self.locs.device)
        value = fixed.pick(noise, rows.reshape(shape[:-1]))
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in (self.locs, self.scales, self.logits))):
            return value
        share = fixed._joint(value).softmax(-1)
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
    """Gradient of the base's log density at ``eps``, detached. Free of charge for the normal."""
    inner = base_dist.base_dist if isinstance(base_dist, dist.Independent) else base_dist
    eps = eps.detach()
    if hasattr(inner, "score"):
        score: Tensor = inner.score(eps).detach()
        return score
    with torch.enable_grad():
        leaf = eps.requires_grad_()
        return torch.autograd.grad(base_dist.log_prob(leaf).sum(), leaf)[0]


class Base(nn.Module):
    """Standard normal noise; and what every base can do.

    Args:
        input_dim: Length D of the noise.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.input_dim = input_dim

    def forward(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution, event shape ``(D,)``, of the dtype and on the device of a tensor."""
        zeros = like.new_zeros(self.input_dim)
        # Constants of ours: checking them at every step would cost more than drawing.
        return StandardNormal(zeros, torch.ones_like(zeros), validate_args=False).to_event(1)

    @torch.no_grad()
    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the shape, the dtype and the device of a tensor, ``(..., D)``.

        Args:
            like: The tensor.
            generator: Where the randomness comes from; None is the global one. With a generator the second half of the
                draws mirrors the first, as far as the base is symmetric.
        """
        return _normal(like, generator)


class StudentTBase(Base):
    """Student-t noise, independent coordinates; see :class:`StudentT`."""

    def __init__(self, input_dim: int, df: float) -> None:
        super().__init__(input_dim)
        self.log_df = nn.Parameter(torch.full((input_dim,), math.log(df - MIN_DF) / LOG_DF_RATE))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, ``(D,)``."""
        return MIN_DF + (LOG_DF_RATE * self.log_df).exp()

    def forward(self, like: Tensor) -> dist.TorchDistribution:
        return _CenteredStudentT(self.df, validate_args=False).to_event(1)

    @torch.no_grad()
    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        half_df = 0.5 * self.df.expand(like.shape)
        gamma = torch._standard_gamma(half_df.contiguous(), generator=generator)
        return _normal(like, generator) * torch.rsqrt(_paired(gamma, generator) / half_df)


class MixtureBase(Base):
    """A mixture of diagonal normals; see :class:`Mixture`."""

    def __init__(self, input_dim: int, num_components: int) -> None:
        super().__init__(input_dim)
        locs, scales = spread_components(num_components, torch.zeros(input_dim))
        self.locs = nn.Parameter(locs)
        self.log_scales = nn.Parameter(scales.log())
        self.logits = nn.Parameter(torch.zeros(num_components))

    @torch.no_grad()
    def set(self, locs: Tensor, scales: Tensor, weights: Tensor) -> None:
        """Set the components: ``(K, D)``, ``(K, D)`` and ``(K,)``."""
        self.locs.copy_(locs)
        self.log_scales.copy_(scales.log())
        self.logits.copy_(weights.log())

    def forward(self, like: Tensor) -> dist.TorchDistribution:
        return DiagonalNormalMixture(self.locs, self.log_scales.exp(), self.logits)

    @torch.no_grad()
    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        lead = like.shape[:-1]
        weights = self.logits.softmax(-1)
        which = torch.multinomial(weights, lead.numel(), replacement=True, generator=generator).reshape(lead)
        mixture = DiagonalNormalMixture(self.locs, self.log_scales.exp(), self.logits)
        return mixture.pick(_normal(like, generator), _paired(which, generator))


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """Recipe of a base distribution; data, as a :class:`~pyro_flows.flows.FlowSpec` is."""

    def build(self, input_dim: int) -> Base:
        """Make the base with fresh parameters."""
        return Base(input_dim)


@dataclass(frozen=True, kw_only=True)
class StudentT(BaseSpec):
    r"""Student-t noise, with trained degrees of freedom for each coordinate: polynomial tails.

    Location 0 and scale 1, not variance 1: near the origin the density hardly changes with the degrees of freedom, so
    tails adapt while the head holds the body. They stay above 1; the largest that are worth telling from a normal are
    about 100.

    Args:
        df: Degrees of freedom at the start, > 1. With the default the first ELBO on a normal posterior is 0.023 nats a
            coordinate below the Gaussian's (0.002 with 30); from much larger ones tails are learned slowly.

    References:
        Liang, Mahoney, Hodgkinson. Fat-Tailed Variational Inference with Anisotropic Tail Adaptive Flows. ICML 2022.
        arXiv:2205.07918, section 3.
    """

    df: float = 10.0

    def __post_init__(self) -> None:
        check_positive("StudentT", "df", self.df, MIN_DF)

    def build(self, input_dim: int) -> Base:
        return StudentTBase(input_dim, float(self.df))


@dataclass(frozen=True, kw_only=True)
class Mixture(BaseSpec):
    """A mixture of diagonal normals with trained locations, scales and weights: several modes.

    A flow is continuous, and from one mode it can make two only with a bridge of mass between them. Starts near one
    standard normal; ``AutoFlowGuide.warm_start``, which ``fit`` calls, puts components on the modes that it finds.
    Without that all components find the same mode, as every guide does that is trained by an ELBO.

    Args:
        num_components: Number of components, >= 2. More than there are modes do no harm: those left over share one.
    """

    num_components: int = 4

    def __post_init__(self) -> None:
        check_int("Mixture", "num_components", self.num_components, 2)

    def build(self, input_dim: int) -> Base:
        return MixtureBase(input_dim, self.num_components)


_BASES = {"normal": BaseSpec(), "student_t": StudentT(), "mixture": Mixture()}


def resolve_base(owner: str, base: str | BaseSpec) -> BaseSpec:
    """A name or a recipe as a recipe.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(base, BaseSpec):
        return base
    if not isinstance(base, str) or base not in _BASES:
        raise ValueError(
            f"{owner}: expected base to be one of {', '.join(map(repr, _BASES))}, or flows.StudentT(...) or "
            f"flows.Mixture(...), but got {base!r}."
        )
    return _BASES[base]


def spread_components(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and scales of so many equal components, ``(count, D)``, that make about one standard normal.

    Mean and variances are exact, correlations within 0.04.
    """
    if count == 1:
        return torch.zeros_like(like).unsqueeze(0), torch.ones_like(like).unsqueeze(0)
    locs = torch.randn(count, len(like), dtype=like.dtype, device=like.device)
    locs = locs - locs.mean(0)
    spread = SPREAD / math.sqrt(len(like))
    locs = spread * locs / locs.square().mean(0).sqrt()
    return locs, torch.full_like(locs, math.sqrt(1.0 - spread**2))


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of a tensor's shape; with a generator, along the first dimension symmetric and, coordinate
    by coordinate, the quantiles of a normal in random order."""
    if generator is None:
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    shape = (len(like) // 2, *like.shape[1:])
    signed = 2.0 * torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) - 1.0
    # Contiguous along what is sorted: else most of the time is spent on fetching.
    place = signed.abs().movedim(0, -1).contiguous().argsort(-1).argsort(-1).movedim(-1, 0)
    half = torch.special.ndtri(0.5 + (place.to(like.dtype) + 0.5) / (2 * max(1, len(place)))).copysign(signed)
    return torch.cat([half, -half, torch.zeros_like(like[: len(like) % 2])])


def _paired(rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws with the second half like the first, if there is a generator: what mirrored noise goes with."""
    if generator is None:
        return rows
    half = len(rows) // 2
    return torch.cat([rows[:half], rows[:half], rows[2 * half :]])
