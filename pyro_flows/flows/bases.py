# SPDX-License-Identifier: Apache-2.0
"""L2. Base distributions of a flow, as data for a recipe and as a module with parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_flows._checks import NamedOptions, shown
from pyro_flows.flows.fields import check_fields, integer, positive
from pyro_flows.flows.noise import CenteredStudentT, DiagonalNormalMixture, StandardNormal

__all__ = [
    "Base",
    "BaseSpec",
    "Mixture",
    "MixtureBase",
    "StudentT",
    "StudentTBase",
    "base_of_shapes",
    "resolve_base",
    "spread_components",
]

# Degrees of freedom stay above this, so that the noise has a mean.
MIN_DF = 1.0
# Adam moves each parameter by the learning rate at a step. Logarithms of degrees of freedom are stored in this unit, as
# log-scales of the head are, so that tails converge before the layers in between have learned to imitate them.
LOG_DF_RATE = 5.0
# Components of a mixture are initialized about this far from the origin: identical ones would stay identical.
SPREAD = 0.2


class Base(nn.Module):
    """Standard normal base, and the interface of all bases.

    Args:
        input_dim: Length D of the noise.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.input_dim = input_dim

    @property
    def num_components(self) -> int:
        """Number of components of a mixture; 1 for other bases."""
        return 1

    @property
    def weights(self) -> Tensor:
        """Weights of the components, ``(K,)``."""
        return torch.ones(1)

    def set_weights(self, weights: Tensor) -> None:
        """Set the weights of the components, ``(K,)``, > 0; nothing for a single one."""

    def shares(self, noise: Tensor) -> Tensor:
        """Share of each component in the density at ``(..., D)``, ``(..., K)``."""
        return torch.ones_like(noise[..., :1])

    def forward(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution, of event shape ``(D,)``, with the dtype and device of a tensor."""
        zeros = like.new_zeros(self.input_dim)
        # Constants: validating them at every step would cost more than sampling.
        return StandardNormal(zeros, torch.ones_like(zeros), validate_args=False).to_event(1)

    @torch.no_grad()
    def sample(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws with the shape, dtype and device of a tensor, ``(..., D)``.

        Args:
            like: The tensor.
            generator: Source of randomness; None means the global one. With a generator the second half of the draws
                mirrors the first, as far as the base is symmetric (antithetic draws).
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
        return CenteredStudentT(self.df, validate_args=False).to_event(1)

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

    @property
    def num_components(self) -> int:
        return len(self.logits)

    @torch.no_grad()
    def set(self, locs: Tensor, scales: Tensor, weights: Tensor) -> None:
        """Set the components: ``(K, D)``, ``(K, D)`` and ``(K,)``."""
        self.locs.copy_(locs)
        self.log_scales.copy_(scales.log())
        self.set_weights(weights)

    @property
    def weights(self) -> Tensor:
        return self.logits.detach().softmax(-1)

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        self.logits.copy_(weights.log())

    @torch.no_grad()
    def shares(self, noise: Tensor) -> Tensor:
        return DiagonalNormalMixture(self.locs, self.log_scales.exp(), self.logits).shares(noise)

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
class BaseSpec(NamedOptions):
    """Recipe of a base distribution; plain data, like :class:`~pyro_flows.flows.FlowSpec`."""

    # Whether the flow that items of a plate share may have this base.
    suits_items: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, input_dim: int) -> Base:
        """Make the base with fresh parameters."""
        return Base(input_dim)


@dataclass(frozen=True, kw_only=True)
class StudentT(BaseSpec):
    r"""Student-t noise, with trained degrees of freedom for each coordinate: polynomial tails.

    Location 0 and scale 1, not variance 1: near the origin the density hardly changes with the degrees of freedom, so
    tails adapt while the head keeps fitting the body. Degrees of freedom stay above 1; above about 100 the density is
    practically normal.

    Args:
        df: Initial degrees of freedom, > 1. With the default the initial ELBO on a normal posterior is 0.023 nats per
            coordinate below the Gaussian's (0.002 with 30); from much larger values tails are learned slowly.

    References:
        Liang, Mahoney, Hodgkinson. Fat-Tailed Variational Inference with Anisotropic Tail Adaptive Flows. ICML 2022.
        arXiv:2205.07918, section 3.
    """

    df: float = positive(10.0, low=MIN_DF)

    def build(self, input_dim: int) -> Base:
        return StudentTBase(input_dim, float(self.df))


@dataclass(frozen=True, kw_only=True)
class Mixture(BaseSpec):
    """A mixture of diagonal normals with trained locations, scales and weights: several modes.

    A flow is continuous, so from a unimodal base it can make two modes only with a bridge of mass between them.
    Initialized near a standard normal; ``AutoFlowGuide.warm_start``, which ``fit`` calls, places components on the
    modes that it finds; the family ``"auto"`` then takes such a base by itself. Without a warm start all components
    find the same mode, since the ELBO is mode-seeking.

    Args:
        num_components: Number of components, >= 2. More components than modes do no harm: the excess ones share a mode.
    """

    suits_items: ClassVar[bool] = False

    num_components: int = integer(4, low=2)

    def build(self, input_dim: int) -> Base:
        return MixtureBase(input_dim, self.num_components)


_BASES = {"normal": BaseSpec(), "student_t": StudentT(), "mixture": Mixture()}


def resolve_base(owner: str, base: str | BaseSpec) -> BaseSpec:
    """Convert a name or a recipe to a recipe.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(base, BaseSpec):
        return base
    if not isinstance(base, str) or base not in _BASES:
        raise ValueError(
            f"{owner}: expected base to be one of {', '.join(map(repr, _BASES))}, or flows.StudentT(...) or "
            f"flows.Mixture(...), but got {shown(base)}."
        )
    return _BASES[base]


def base_of_shapes(input_dim: int, shapes: Mapping[str, Sequence[int]]) -> Base:
    """The base whose parameters have these names and shapes."""
    if "logits" in shapes:
        return MixtureBase(input_dim, shapes["logits"][0])
    return StudentT().build(input_dim) if "log_df" in shapes else Base(input_dim)


def spread_components(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and scales, ``(count, D)``, of ``count`` equal components that together approximate a standard normal.

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
    """Standard normal noise of a tensor's shape; with a generator, symmetric along the first dimension and, for each
    coordinate, the quantiles of a normal in random order."""
    if generator is None:
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    shape = (len(like) // 2, *like.shape[1:])
    signed = 2.0 * torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) - 1.0
    # Contiguous along what is sorted: else most of the time is spent on fetching.
    place = signed.abs().movedim(0, -1).contiguous().argsort(-1).argsort(-1).movedim(-1, 0)
    half = torch.special.ndtri(0.5 + (place.to(like.dtype) + 0.5) / (2 * max(1, len(place)))).copysign(signed)
    return torch.cat([half, -half, torch.zeros_like(like[: len(like) % 2])])


def _paired(rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws with the second half equal to the first, if there is a generator, to go with antithetic noise."""
    if generator is None:
        return rows
    half = len(rows) // 2
    return torch.cat([rows[:half], rows[:half], rows[2 * half :]])
