# SPDX-License-Identifier: Apache-2.0
"""L3. Warm starts: several cheap Gaussians, the best of which by ELBO becomes the guide's start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.sites import SiteTable

__all__ = ["SCORE_DRAWS", "Gaussian", "LogJoint", "antithetic", "best_gaussian", "elbo_of", "fit_on_fixed_draws"]

# L-BFGS paths: from the start itself and from around it, looked at after this many iterations each.
NUM_PATHS = 3
PATH_SPREAD = 0.7
LOOKS = (0, 1, 2, 3, 5, 8, 12, 18, 26, 40)
ISOTROPIC_SCALES = (0.1, 0.5)
# Above this dimension Hessians cost more than they give: one backward pass a coordinate.
HESSIAN_DIM = 200
# Smallest curvature, in units of the unconstrained latents.
MIN_CURVATURE = 0.01
# Fixed antithetic draws and iterations of deterministic fits.
FIXED_DRAWS = 32
FIXED_ITERATIONS = (150, 150)
# Draws by which candidates are compared.
SCORE_DRAWS = 128
# What the line search of L-BFGS is told where the model has no density.
FORBIDDEN = 1e15


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A candidate :math:`N(m, L L^T)` in unconstrained space.

    Attributes:
        loc: ``m``, ``(D,)``.
        factor: ``L``, lower triangular with a positive diagonal, ``(D, D)``.
        elbo: Estimate of its ELBO.
        origin: Where it comes from, in words.
    """

    loc: Tensor
    factor: Tensor
    elbo: float
    origin: str


class LogJoint:
    """log p(x, z) as a function of packed unconstrained draws, all of them in one run of the model where that works.

    Tries draws as an outer batch dimension first, as vectorised particles do, and ``torch.vmap`` next, for models that
    are not written for outer dimensions; whichever agrees with one run a draw is used, and one run a draw if neither
    does.

    Args:
        model: The model.
        table: Its latent sites.
        args: Its arguments.
        kwargs: Likewise.
        max_plate_nesting: Number of batch dimensions that the model uses.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        table: SiteTable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        max_plate_nesting: int,
    ) -> None:
        self.model = model
        self.table = table
        self.args = args
        self.kwargs = kwargs
        self.nesting = max_plate_nesting
        self._run = self._choose()

    def __call__(self, draws: Tensor) -> Tensor:
        """``(S, D)`` to ``(S,)``; differentiable.

        Raises:
            ValueError: Where Pyro's validation is on and a distribution of the model refuses its parameters.
        """
        return self._run(draws)

    @torch.no_grad()
    def _choose(self) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator(self.table.init_loc.device).manual_seed(0)
        shape = (3, len(self.table.init_loc))
        noise = torch.randn(shape, generator=generator, dtype=self.table.init_loc.dtype, device=generator.device)
        draws = self.table.init_loc + 0.1 * noise
        expected = self._one_by_one(draws)
        for run in (self._side_by_side, self._by_vmap):
            try:
                found = run(draws)
            except (ValueError, RuntimeError, IndexError):
                continue
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
                return run
        return self._one_by_one

    def _side_by_side(self, draws: Tensor) -> Tensor:
        count = len(draws)
        lead = draws.reshape(count, *(1,) * self.nesting, draws.shape[-1])
        return torch.stack([_sum_draws(part, count, self.nesting) for part in self._parts(lead)]).sum(0)

    def _one(self, draw: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in self._parts(draw)]).sum()

    def _one_by_one(self, draws: Tensor) -> Tensor:
        return torch.stack([self._one(draw) for draw in draws])

    def _by_vmap(self, draws: Tensor) -> Tensor:
        with pyro.validation_enabled(False):  # checks branch on values, which vmap cannot; infinities tell as much
            result: Tensor = torch.vmap(self._one, randomness="different")(draws)
        return result

    def _parts(self, packed: Tensor) -> list[Tensor]:
        """Terms of the log density in unconstrained space."""
        values, parts = {}, []
        for site, part in self.table.split(packed):
            values[site.name], log_density = site.constrain(part)
            parts.append(-torch.as_tensor(log_density, dtype=packed.dtype, device=packed.device))
        with poutine.block(), poutine.trace() as tape:
            poutine.condition(self.model, data=values)(*self.args, **self.kwargs)
        tape.trace.compute_log_prob()
        for name, node in tape.trace.nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            if not node["is_observed"]:
                raise RuntimeError(f"LogJoint: expected a model whose latents are all given, but '{name}' is not.")
            parts.append(node["log_prob"].to(packed.dtype))
        return parts


def _sum_draws(log_prob: Tensor, count: int, nesting: int) -> Tensor:
    """Sum over all dimensions but that of the draws."""
    if log_prob.dim() > nesting and log_prob.shape[-1 - nesting] == count:
        return log_prob.reshape(count, -1).sum(-1)
    return log_prob.sum().expand(count)  # nothing that was drawn is in it


def best_gaussian(log_joint: LogJoint, start: Tensor, init_scale: float, *, correlated: bool) -> Gaussian:
    r"""The best of several Gaussians by ELBO.

    - the guide's own start, :math:`N(z_0, s^2 I)`;
    - along three L-BFGS paths on the log joint, Gaussians with the local Hessian, and isotropic ones: the mode of a
      centred hierarchy is at a scale of zero, where a Laplace approximation is worthless, but an early iterate is fine;
    - the best mean-field normal on fixed draws, from the start and from the best of the above.

    Args:
        log_joint: The target.
        start: :math:`z_0`, ``(D,)``.
        init_scale: :math:`s`.
        correlated: Whether the guide can hold a correlated Gaussian; if not, Hessians give their diagonals.

    Raises:
        RuntimeError: If no candidate has a finite ELBO.

    References:
        Zhang, Carpenter, Gelman, Vehtari. Pathfinder. JMLR 2022. arXiv:2108.03782, for ELBO-chosen path iterates.
        Giordano, Ingram, Broderick. Black Box Variational Inference with a Deterministic Objective. JMLR 2024.
        arXiv:2304.05527, for mean-field fits on fixed draws.
    """
    noise = antithetic(SCORE_DRAWS, start)
    found: list[Gaussian] = []

    def consider(loc: Tensor, factor: Tensor, origin: str) -> None:
        if loc.isfinite().all() and factor.isfinite().all():
            ladj = factor.diagonal().log().sum()
            elbo = elbo_of(log_joint, lambda noise: (loc + noise @ factor.mT, ladj), noise)
            found.append(Gaussian(loc, factor, elbo, origin))

    identity = torch.eye(len(start), dtype=start.dtype, device=start.device)
    consider(start, init_scale * identity, "the guide's own start")
    for path in range(NUM_PATHS):
        begin = start if path == 0 else start + PATH_SPREAD * torch.randn_like(start)
        for step, loc in _path(log_joint, begin):
            for scale in ISOTROPIC_SCALES:
                consider(loc, scale * identity, f"isotropic, scale {scale}, L-BFGS iterate {step}")
            factor = _hessian_factor(log_joint, loc, correlated=correlated)
            if factor is not None:
                consider(loc, factor, f"local Hessian at L-BFGS iterate {step}")
    begins = [(start, init_scale * identity, "the start")]
    best = max(found, key=lambda gaussian: gaussian.elbo)
    begins.append((best.loc, best.factor, "the best of the L-BFGS paths"))
    for loc, factor, origin in begins:
        fitted = _mean_field(log_joint, loc, factor)
        if fitted is not None:
            fitted_loc, fitted_scale = fitted
            consider(fitted_loc, torch.diag(fitted_scale), f"mean-field normal on fixed draws, from {origin}")
            hessian = _hessian_factor(log_joint, fitted_loc, correlated=correlated)
            if hessian is not None:
                consider(fitted_loc, hessian, f"local Hessian at the mean-field normal from {origin}")
    best = max(found, key=lambda gaussian: gaussian.elbo)
    if best.elbo == -math.inf:
        raise RuntimeError(
            "warm_start: expected a start with a finite ELBO, but none of the candidates has one. "
            "Pass an init_loc_fn that gives values where the model has a finite density."
        )
    return best


def antithetic(count: int, like: Tensor) -> Tensor:
    """Standard normal draws, half of which mirror the other half, ``(count, D)``.

    Their second moments are those of a standard normal, in all directions where that can be, so that ELBOs of
    Gaussians are exact for Gaussian targets: the best of many noisy ones would be the luckiest.
    """
    half = torch.randn(count // 2, len(like), dtype=torch.float64, device=like.device)
    if len(half) > len(like):
        factor = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half]).to(like.dtype)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[int], None]:
    """L-BFGS that goes on where it stopped, whose line search steps back from where the model has no density."""
    optimizer = torch.optim.LBFGS(parameters, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        try:
            loss = objective()
        except ValueError:
            loss = parameters[0].new_tensor(math.inf)
        if not loss.isfinite():
            loss = torch.stack([p.sum() * 0.0 for p in parameters]).sum() + FORBIDDEN
        loss.backward()  # type: ignore[no-untyped-call]
        for p in parameters:
            assert p.grad is not None
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        return loss

    def run(count: int) -> None:
        optimizer.param_groups[0]["max_iter"] = count
        optimizer.param_groups[0]["max_eval"] = 2 * count + 5
        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]

    return run


def _path(log_joint: LogJoint, start: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Iterates of L-BFGS on the negative log joint."""
    z = start.detach().clone().requires_grad_()
    run = _minimise(lambda: -log_joint(z.unsqueeze(0)).sum(), [z])
    before = 0
    for look in LOOKS:
        if look > before:
            previous = z.detach().clone()
            run(look - before)
            if not z.isfinite().all() or torch.equal(previous, z.detach()):
                return
        before = look
        yield look, z.detach().clone()


def _hessian_factor(log_joint: LogJoint, loc: Tensor, *, correlated: bool) -> Tensor | None:
    """Cholesky factor of the inverse of minus the Hessian, made positive definite."""
    if len(loc) > HESSIAN_DIM:
        return None
    try:
        with torch.enable_grad():
            hessian = torch.autograd.functional.hessian(lambda z: log_joint(z.unsqueeze(0)).sum(), loc)
    except (ValueError, RuntimeError):  # no density, or no second derivative
        return None
    assert torch.is_tensor(hessian)
    if not hessian.isfinite().all():
        return None
    if not correlated:
        return torch.diag(hessian.diagonal().abs().clamp_min(MIN_CURVATURE).rsqrt())
    values, vectors = torch.linalg.eigh(hessian.double())
    covariance = (vectors / values.abs().clamp_min(MIN_CURVATURE)) @ vectors.mT
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor.to(loc) if info == 0 else None


def _mean_field(log_joint: LogJoint, loc: Tensor, factor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Location and scale of the mean-field normal that maximises the ELBO on fixed draws; None if that fails."""
    loc = loc.detach().clone().requires_grad_()
    # The conditional scales: a mean-field normal is no wider than those.
    conditional = torch.cholesky_inverse(factor.double()).diagonal().rsqrt()
    log_scale = conditional.log().to(loc).requires_grad_()
    parameters = [loc, log_scale]
    if not fit_on_fixed_draws(
        log_joint, lambda noise: (loc + log_scale.exp() * noise, log_scale.sum()), parameters, loc
    ):
        return None
    return loc.detach().clone(), log_scale.detach().exp()


def fit_on_fixed_draws(
    log_joint: LogJoint,
    push: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: list[Tensor],
    like: Tensor,
    count: int = FIXED_DRAWS,
) -> bool:
    """Maximise the ELBO of a transport map on a few fixed draws, in place.

    Args:
        log_joint: The target.
        push: Noise, ``(S, D)``, to draws and the log-determinant of each.
        parameters: Leaves of the map.
        like: A tensor of shape ``(D,)``, dtype and device of the draws.
        count: Number of draws, even; the more a map can do, the more it takes to hold it to the posterior.

    Returns:
        Whether all parameters are finite.
    """
    noise = antithetic(count, like)

    def loss() -> Tensor:
        draws, ladj = push(noise)
        return -(log_joint(draws) + ladj).mean()

    for iterations in FIXED_ITERATIONS:
        _minimise(loss, parameters)(iterations)  # afresh each time: the second run forgets the curvature of the way
        if not all(parameter.isfinite().all() for parameter in parameters):
            return False
    return True


@torch.no_grad()
def elbo_of(log_joint: LogJoint, push: Callable[[Tensor], tuple[Tensor, Tensor]], noise: Tensor) -> float:
    """ELBO of a transport map of standard normal noise, ``(S, D)``; minus infinity where the model has no density."""
    try:
        draws, ladj = push(noise)
        energy = (log_joint(draws) + ladj).double().mean()
    except ValueError:
        return -math.inf
    elbo = energy.item() + 0.5 * noise.shape[-1] * math.log(2 * math.pi * math.e)
    return elbo if math.isfinite(elbo) else -math.inf
