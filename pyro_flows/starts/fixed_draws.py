# SPDX-License-Identifier: Apache-2.0
"""L4. Maximization of the ELBO of a transport map on fixed draws of noise (sample average approximation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from pyro_flows.compiled.replay import Replay
from pyro_flows.models.log_joint import Target, in_parts
from pyro_flows.models.traces import mean_of_kept

__all__ = ["FIXED_DRAWS", "antithetic", "elbo_of", "entropy", "fit_on_fixed_draws", "minimize", "scored"]


@dataclass(frozen=True)
class FixedDrawsSettings:
    """Settings of the maximization of an ELBO on fixed draws.

    Attributes:
        num_draws: Number of antithetic draws.
        min_draws: Number of draws that a fit has, however expensive they are.
        num_iterations: Iterations of a run of L-BFGS.
        num_rounds: Number of runs, each of which starts with an empty curvature history.
        forbidden: Loss in nats that the line search receives where the model has no density.
    """

    num_draws: int = 64
    min_draws: int = 32
    num_iterations: int = 150
    num_rounds: int = 2
    forbidden: float = 1e15


FIXED_DRAWS = FixedDrawsSettings()


class Candidate(Protocol):
    """A Gaussian in unconstrained space, a dataclass.

    Attributes:
        elbo: Estimate of its ELBO.
        log_weight_variance: Variance of its log weights.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def elbo(self) -> float: ...

    @property
    def log_weight_variance(self) -> float: ...

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of :meth:`push`, in float64."""

    def push(self, noise: Tensor) -> Tensor:
        """Map standard normal noise, ``(S, D)``, to draws."""


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


def scored(log_joint: Target, found: Sequence[AnyCandidate], count: int, like: Tensor) -> list[AnyCandidate]:
    """Candidates with their ELBO and variance of log weights, from ``count`` draws of each.

    Args:
        log_joint: The target.
        found: One or more candidates.
        count: Number of draws, even.
        like: A tensor of shape ``(D,)``, with the dtype and device of the draws.
    """
    noise = antithetic(count, like)
    draws = torch.cat([gaussian.push(noise) for gaussian in found])  # (candidates * count, D)
    energy = in_parts(log_joint, draws).double().reshape(len(found), count)
    elbos = mean_of_kept(energy) + torch.stack([gaussian.log_det for gaussian in found]) + entropy(noise)
    weights = energy + 0.5 * noise.double().square().sum(-1)
    variances = mean_of_kept((weights - mean_of_kept(weights).unsqueeze(-1)).square())
    elbos = torch.where(elbos.isfinite(), elbos, -torch.inf)
    return [
        replace(gaussian, elbo=elbo, log_weight_variance=variance)
        for gaussian, elbo, variance in zip(found, elbos.tolist(), variances.tolist(), strict=True)
    ]


def fit_on_fixed_draws(
    log_joint: Target,
    push: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: list[Tensor],
    like: Tensor,
    count: int = FIXED_DRAWS.num_draws,
    rounds: int = FIXED_DRAWS.num_rounds,
) -> bool:
    """Maximize the ELBO of a transport map on a few fixed draws, in place.

    Args:
        log_joint: The target.
        push: Noise, ``(S, D)``, to draws and the log-determinant of each.
        parameters: The map's parameters, leaf tensors.
        like: A tensor of shape ``(D,)``, with the dtype and device of the draws.
        count: Number of draws, even; a more flexible map needs more draws in order not to overfit them. Fewer
            are taken where they are expensive.
        rounds: Number of runs of L-BFGS, each of which starts with an empty curvature history.

    Returns:
        Whether all parameters are finite.
    """
    affordable = log_joint.affordable(count, FIXED_DRAWS.num_iterations)
    noise = antithetic(max(min(count, FIXED_DRAWS.min_draws), affordable), like)

    @torch.enable_grad()
    def loss_and_gradients() -> list[Tensor]:
        draws, ladj = push(noise)
        loss = -mean_of_kept(log_joint(draws) + ladj)
        return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]

    evaluate = Replay(loss_and_gradients)
    for _ in range(rounds):
        minimize(evaluate, parameters, FIXED_DRAWS.num_iterations)
        if not all(parameter.isfinite().all() for parameter in parameters):
            return False
    return True


@torch.no_grad()
def elbo_of(log_joint: Target, push: Callable[[Tensor], tuple[Tensor, Tensor]], noise: Tensor) -> float:
    """ELBO of a transport map of standard normal noise, ``(S, D)``; minus infinity where the model has no density."""
    draws, ladj = push(noise)
    elbo = mean_of_kept((log_joint(draws) + ladj).double()).item() + entropy(noise)
    return elbo if math.isfinite(elbo) else -math.inf


def antithetic(count: int, like: Tensor) -> Tensor:
    """Standard normal draws, half of which mirror the other half, ``(count, D)``.

    Their second moments are exactly those of a standard normal, in all directions where ``count`` allows it, so that
    ELBOs of Gaussians are exact for Gaussian targets: selecting the best of many noisy estimates would favor chance.
    """
    half = torch.randn(count // 2, len(like), dtype=torch.float64, device=like.device)
    if len(half) > len(like):
        factor = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half]).to(like.dtype)


def entropy(noise: Tensor) -> float:
    """Entropy estimate of standard normal noise, ``(S, D)``, in nats."""
    return 0.5 * noise.shape[-1] * math.log(2 * math.pi * math.e)


def minimize(loss_and_gradients: Callable[[], Sequence[Tensor]], parameters: list[Tensor], count: int) -> None:
    """Run ``count`` iterations of L-BFGS, whose line search backtracks where the model has no density."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=count, max_eval=2 * count + 5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, *gradients = loss_and_gradients()
        is_finite = bool(loss.isfinite())
        for p, gradient in zip(parameters, gradients, strict=True):
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0) if is_finite else torch.zeros_like(p)
            p.grad = gradient.contiguous()  # a factor by columns is not
        return loss if is_finite else loss.new_tensor(FIXED_DRAWS.forbidden)

    optimizer.step(closure)  # type: ignore[arg-type]
