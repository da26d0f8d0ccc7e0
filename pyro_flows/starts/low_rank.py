# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts above a few hundred dimensions: a mean-field Gaussian with a few correlated directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.models.log_joint import Target, in_parts
from pyro_flows.starts.fixed_draws import antithetic, elbo_of, fit_on_fixed_draws
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian, triangular

__all__ = ["LowRankGaussian", "best_low_rank", "embedded", "krylov_eigenpairs"]


@dataclass(frozen=True)
class LowRankSettings:
    """Settings of the search for correlated directions.

    Attributes:
        num_rounds: Largest number of rounds, each of which finds directions and fits location and scales.
        min_gain: Gain in nats below which a round is the last.
        num_draws: Draws over which curvature is averaged.
        num_blocks: Blocks of Hessian-vector products per round.
        block_size: Products in a block.
        negligible_gap: Half the variance of log weights, which approximates the gap, in nats, below which no directions
            are sought.
        negligible_gain: Gain in nats below which a direction is omitted.
        min_stretch: Smallest standard deviation along a direction, relative to the mean-field Gaussian's.
        max_stretch: Largest standard deviation along a direction, relative to the mean-field Gaussian's.
        min_z_score: Standard errors by which the ELBO must be higher than the mean-field Gaussian's.
        jitter: Noise that keeps a block of vectors at full rank, relative to its length.
    """

    num_rounds: int = 4
    min_gain: float = 0.1
    num_draws: int = 64
    num_blocks: int = 25
    block_size: int = 4
    negligible_gap: float = 0.05
    negligible_gain: float = 1e-3
    min_stretch: float = 1e-2
    max_stretch: float = 1e3
    min_z_score: float = 2.0
    jitter: float = 1e-9


SETTINGS = LowRankSettings()


@dataclass(frozen=True, eq=False)
class LowRankGaussian:
    r""":math:`m + d \odot (I + U \, \mathrm{diag}(s - 1) U^\top) x` for standard normal ``x``.

    Attributes:
        loc: ``m``, ``(D,)``.
        scale: ``d``, ``(D,)``.
        directions: ``U``, ``(D, R)``, orthonormal.
        stretch: ``s``, ``(R,)``.
        elbo: Estimate of its ELBO.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretch: Tensor
    elbo: float = -math.inf

    @property
    def marginal_scale(self) -> Tensor:
        """Standard deviations, ``(D,)``."""
        return self.scale * (1.0 + self.directions.square() @ (self.stretch.square() - 1.0)).sqrt()

    def mix(self, noise: Tensor) -> Tensor:
        """``(I + U diag(s - 1) U^T) x``, ``(..., D)``."""
        return noise + ((noise @ self.directions) * (self.stretch - 1.0)) @ self.directions.mT

    def dense(self) -> Gaussian:
        """The same with a triangular factor, ``(D, D)``."""
        factor = self.scale.unsqueeze(-1) * self.mix(torch.eye(len(self.loc)).to(self.loc))
        return Gaussian(self.loc, triangular(factor.double()).to(self.loc), self.elbo)

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Map standard normal noise, ``(S, D)``, to draws; returns these and the log-determinant."""
        return self.loc + self.scale * self.mix(noise), self.scale.log().sum() + self.stretch.log().sum()


def embedded(gaussian: Gaussian, rows: Tensor, dim: int) -> LowRankGaussian:
    """A Gaussian of some coordinates, with independent standard normal ones beside them, ``(dim,)`` in all."""
    factor = gaussian.factor if gaussian.factor.dim() == 2 else gaussian.factor.diag()
    directions, stretch, _ = torch.linalg.svd(factor.double())
    like = gaussian.loc
    return LowRankGaussian(
        like.new_zeros(dim).index_copy(0, rows, like),
        like.new_ones(dim),
        like.new_zeros(dim, len(rows)).index_copy(0, rows, directions.to(like)),
        stretch.to(like),
        gaussian.elbo,
    )


@torch.no_grad()
def best_low_rank(log_joint: Target, begin: Gaussian, rank: int) -> LowRankGaussian | None:
    r"""A Gaussian with a few correlated directions whose ELBO is clearly above that of a mean-field one, or None.

    With ``d`` the scales of the Gaussian so far and ``H`` the Hessian of the log joint, averaged over its draws, the
    best precision is :math:`-H` (Price's theorem). Eigenvectors of :math:`-d H d` with the eigenvalues ``l`` furthest
    from 1, by the gain :math:`(l - 1 - \log l) / 2`, are the directions, and :math:`s = l^{-1/2}`; then location,
    scales and ``s`` are fitted on fixed draws. This is repeated, since the best scales depend on the directions.

    Args:
        log_joint: The target.
        begin: The mean-field Gaussian.
        rank: Number of directions, at most.

    References:
        Opper, Archambeau. The variational Gaussian approximation revisited. Neural Computation 2009.
        Musco, Musco. Randomized block Krylov methods. NeurIPS 2015. arXiv:1504.05477.
    """
    if begin.log_weight_variance / 2 < SETTINGS.negligible_gap:
        return None
    mean_field = LowRankGaussian(
        begin.loc, begin.factor, begin.loc.new_zeros(len(begin.loc), 0), begin.loc.new_zeros(0)
    )
    noise = antithetic(GAUSSIAN.num_elbo_draws, begin.loc)
    best = replace(mean_field, elbo=elbo_of(log_joint, mean_field.push, noise))
    for _ in range(SETTINGS.num_rounds if log_joint.is_vectorized else 1):
        stretched = _stretch(log_joint, best, rank)
        if stretched is None:
            break
        found = [replace(g, elbo=elbo_of(log_joint, g.push, noise)) for g in (stretched, _fit(log_joint, stretched))]
        was, best = best.elbo, max([best, *found], key=lambda gaussian: gaussian.elbo)
        if not best.elbo > was + SETTINGS.min_gain:
            break
    if len(best.stretch) == 0:
        return None
    noise = antithetic(GAUSSIAN.num_elbo_draws, begin.loc)  # new draws: selection is biased by the others
    gain = _log_weights(log_joint, best, noise) - _log_weights(log_joint, mean_field, noise)
    pairs = gain.reshape(2, -1).mean(0)
    if not pairs.mean() > SETTINGS.min_z_score * pairs.std() / len(pairs) ** 0.5:
        return None
    return replace(best, elbo=elbo_of(log_joint, best.push, noise))


def _log_weights(log_joint: Target, gaussian: LowRankGaussian, noise: Tensor) -> Tensor:
    """Log weights up to a constant that is the same for all Gaussians, ``(S,)``."""
    draws, ladj = gaussian.push(noise)
    return in_parts(log_joint, draws).double() + ladj.double()


def _stretch(log_joint: Target, gaussian: LowRankGaussian, rank: int) -> LowRankGaussian | None:
    """The Gaussian with directions from the average curvature in units of its scales; None if there are none."""
    product = _scaled_precision(log_joint, gaussian)
    if product is None:
        return None
    values, vectors = krylov_eigenpairs(product, len(gaussian.loc), gaussian.loc.device)
    if not values.isfinite().all():
        return None
    values = values.abs().clamp(SETTINGS.max_stretch**-2, SETTINGS.min_stretch**-2)
    gain = 0.5 * (values - 1.0 - values.log())
    chosen = gain.argsort(descending=True)[:rank]
    chosen = chosen[gain[chosen] > SETTINGS.negligible_gain]
    if len(chosen) == 0:
        return None
    directions, stretch = vectors[:, chosen].to(gaussian.loc), values[chosen].rsqrt().to(gaussian.loc)
    return replace(gaussian, directions=directions, stretch=stretch)


def _scaled_precision(log_joint: Target, gaussian: LowRankGaussian) -> Callable[[Tensor], Tensor] | None:
    """Products of ``-d H d`` with the columns of a block, ``(D, B)``, by double backward; None if there is no ``H``."""
    products = GAUSSIAN.gradients_per_row * SETTINGS.num_blocks * SETTINGS.block_size
    draws, _ = gaussian.push(antithetic(log_joint.affordable(SETTINGS.num_draws, products), gaussian.loc))
    draws = draws[log_joint(draws).isfinite()]
    if len(draws) == 0:
        return None
    with torch.enable_grad():
        shift = torch.zeros_like(gaussian.loc, requires_grad=True)
        energy = -log_joint(draws + gaussian.scale * shift).mean()
        (gradient,) = torch.autograd.grad(energy, shift, create_graph=True)
    if not gradient.requires_grad:
        return None

    def product(block: Tensor) -> Tensor:
        columns = block.to(shift).mT.contiguous()
        try:
            rows = [torch.autograd.grad(gradient, shift, column, retain_graph=True)[0] for column in columns]
        except RuntimeError:  # some function of the model has no second derivative
            return torch.full_like(block, torch.nan)
        return torch.stack(rows, -1).to(block)

    return product


def krylov_eigenpairs(
    product: Callable[[Tensor], Tensor], dim: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate eigenpairs of a symmetric operator, at both ends of its spectrum, by block Lanczos.

    All vectors are reorthogonalized. Multiple eigenvalues are found with their multiplicity, even above the block
    size: where a block has lost its rank, small noise restores it.

    Args:
        product: The operator on the columns of ``(dim, B)``, in float64.
        dim: Dimension of the operator.
        device: Device of the vectors.

    Returns:
        Ritz values, ``(K,)``, and vectors, ``(dim, K)``, orthonormal, in float64; NaN if a product is.
    """
    basis = images = torch.zeros(dim, 0, dtype=torch.float64, device=device)
    block = torch.linalg.qr(torch.randn(dim, min(SETTINGS.block_size, dim), dtype=torch.float64, device=device)).Q
    for _ in range(min(SETTINGS.num_blocks, max(1, dim // SETTINGS.block_size))):
        image = product(block)
        if not image.isfinite().all():
            return basis.new_full((1,), torch.nan), basis.new_full((dim, 1), torch.nan)
        basis, images = torch.cat([basis, block], -1), torch.cat([images, image], -1)
        block = image + SETTINGS.jitter * image.norm() * torch.randn_like(image) / dim**0.5
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    inner = basis.mT @ images
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
    return values, basis @ vectors


def _fit(log_joint: Target, begin: LowRankGaussian) -> LowRankGaussian:
    """Fit location, scales and stretch on fixed draws, given directions; returns ``begin`` if that fails."""
    shift = torch.zeros_like(begin.loc, requires_grad=True)
    log_scale = torch.zeros_like(begin.loc, requires_grad=True)
    log_stretch = torch.zeros_like(begin.stretch, requires_grad=True)

    def moved() -> LowRankGaussian:
        loc = begin.loc + begin.scale * begin.mix(shift)
        return replace(begin, loc=loc, scale=begin.scale * log_scale.exp(), stretch=begin.stretch * log_stretch.exp())

    parameters = [shift, log_scale, log_stretch]
    if not fit_on_fixed_draws(log_joint, lambda noise: moved().push(noise), parameters, begin.loc):
        return begin
    return moved()
