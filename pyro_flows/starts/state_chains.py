# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts of heads that know a chain of states: Laplace's approximation with the states integrated out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_flows.models.log_joint import LogJoint, joined, log_jacobian
from pyro_flows.models.state_chains import ReadStateChain
from pyro_flows.starts.ascents import ASCENTS
from pyro_flows.starts.fixed_draws import antithetic
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian, refined
from pyro_flows.starts.lbfgs import lbfgs_paths, local_factor
from pyro_flows.starts.linear_predictors import derivatives
from pyro_flows.starts.low_rank import LowRankGaussian, embedded
from pyro_flows.transforms import ChainHead, Innovations, TridiagonalCholesky

__all__ = ["ChainTarget", "Others", "laplace_gaussian"]


@dataclass(frozen=True)
class LaplaceSettings:
    """Settings of the search for the other coordinates.

    Attributes:
        num_begins: Number of points at which ascents begin, the initial location among them.
        spread: Standard deviation of the others about it, in unconstrained space.
        num_steps: Steps of an ascent.
        tolerance: Gain in nats below which an ascent has converged.
        num_newton_steps: Newton steps to the states' mode.
        min_share: Smallest precision of a likelihood factor, relative to the prior's.
    """

    num_begins: int = 8
    spread: float = 1.0
    num_steps: int = 60
    tolerance: float = 1e-3
    num_newton_steps: int = 12
    min_share: float = 1e-4


LAPLACE = LaplaceSettings()


class _Marginal:
    r"""Laplace's approximation of the log density of the other coordinates, the states integrated out:
    :math:`\log p(x, \hat h, f) - \frac12 \log|-H|`, at the states' mode.

    References:
        Rue, Martino, Chopin. Approximate Bayesian inference for latent Gaussian models by using integrated nested
        Laplace approximations. JRSS B 2009, eq. (3).
    """

    def __init__(self, read: ReadStateChain, log_joint: LogJoint, free: Tensor) -> None:
        self._read = read
        self._table = log_joint.table
        self._free = free

    def __call__(self, free: Tensor) -> Tensor:
        """``(R, 1, F)`` to ``(R, 1)``; differentiable, once."""
        value: Tensor = _Once.apply(free.squeeze(1), self._value)  # type: ignore[no-untyped-call]
        return value.unsqueeze(1)

    def packed(self, free: Tensor) -> Tensor:
        """The other coordinates with zeros for the chain's, ``(R, D)``."""
        return free.new_zeros(len(free), self._table.latent_dim).index_copy(1, self._free, free)

    @torch.no_grad()
    def mode(self, packed: Tensor) -> Tensor:
        """The states' mode given the others, by Newton's method with steps that are made shorter where they lose."""
        prior = Innovations.of(self._read.chain, packed)
        diagonal, off = prior.precision()
        pulled = prior.transposed(prior.mean)

        def density(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, gradient, curvature = derivatives(self._read.likelihood, packed, states)
            total = value - 0.5 * (prior.forward(states) - prior.mean).square().sum(-1)
            return torch.where(total.isfinite(), total, -torch.inf), gradient, curvature

        states = TridiagonalCholesky(diagonal, off).solve(pulled)
        share = torch.ones_like(states[..., :1])
        value, gradient, curvature = density(states)
        for _ in range(LAPLACE.num_newton_steps):
            precision = torch.maximum(-curvature, LAPLACE.min_share * diagonal)
            found = TridiagonalCholesky(diagonal + precision, off).solve(pulled + precision * states + gradient)
            tried = states + share * (found - states)
            now = density(tried)
            better = (now[0] >= value - 1e-6 * value.abs()).unsqueeze(-1)
            states, gradient, curvature = (
                torch.where(better, new, old)
                for new, old in zip((tried, *now[1:]), (states, gradient, curvature), strict=True)
            )
            value = torch.where(better.squeeze(-1), now[0], value)
            share = torch.where(better, (2.0 * share).clamp_max(1.0), 0.25 * share)
        return states

    def _value(self, free: Tensor) -> Tensor:
        packed = self.packed(free)
        begin = self.mode(packed.detach())
        prior = Innovations.of(self._read.chain, packed)
        diagonal, off = prior.precision()
        # One more step has the derivatives of the mode.
        _, gradient, curvature = derivatives(self._read.likelihood, packed, begin)
        left = prior.transposed(prior.mean - prior.forward(begin)) + gradient
        precision = torch.maximum(-curvature, LAPLACE.min_share * diagonal).detach()
        states = begin + TridiagonalCholesky(diagonal.detach() + precision, off.detach()).solve(left)
        value, _, curvature = derivatives(self._read.likelihood, packed, states)
        precision = torch.maximum(-curvature, LAPLACE.min_share * diagonal)
        away = prior.forward(states) - prior.mean
        log_det = TridiagonalCholesky(diagonal + precision, off).log_det()
        total = value + prior.unit.abs().log().sum(-1) - 0.5 * (away.square().sum(-1) + log_det)
        return total.to(free) + log_jacobian(self._table, packed)


class _Once(torch.autograd.Function):
    """A function of rows with first derivatives alone."""

    @staticmethod
    def forward(ctx: Any, free: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = free.detach().requires_grad_()
            value = function(leaf)
            (gradient,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), leaf)
        ctx.save_for_backward(gradient)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_value: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return to_value.unsqueeze(-1) * gradient, None


@torch.no_grad()
def laplace_gaussian(read: ReadStateChain, log_joint: LogJoint, head: ChainHead) -> Gaussian | None:
    """The other coordinates' mode and scales, with the states' mode or its innovations; None if there is no density.

    Args:
        read: The chain, and what follows the states.
        log_joint: The target.
        head: The head.
    """
    free, own = head.order.split(head.sizes)
    init_loc = log_joint.table.init_loc
    marginal = _Marginal(read, log_joint, free)
    begins = init_loc[free] + LAPLACE.spread * torch.randn(LAPLACE.num_begins, len(free)).to(init_loc)
    begins[0] = init_loc[free]
    # A recording of Newton's steps takes longer than the few calls.
    settings = LAPLACE.num_steps, LAPLACE.tolerance, ASCENTS.patience
    paths = lbfgs_paths(marginal, begins.unsqueeze(1), *settings, replays=False)
    *_, ends = begins.unsqueeze(1), *paths
    values = marginal(ends).squeeze(1)
    best = ends[values.argmax()]  # (1, F)
    factor = local_factor(marginal, best.unsqueeze(0)).squeeze(0).squeeze(0)
    if not (values.max().isfinite() and factor.isfinite().all()):
        return None
    packed = marginal.packed(best)
    prior = Innovations.of(read.chain, packed)
    loc = packed.squeeze(0)
    states = marginal.mode(packed)
    loc[own] = (states if read.chain.is_centered else prior.of_states(states)[0]).squeeze(0).to(loc)
    scale = torch.ones_like(loc)
    scale[free] = torch.cholesky_inverse(factor).diagonal().rsqrt().to(loc)
    return Gaussian(loc, scale)


class ChainTarget:
    """The log joint of a model with a chain of states, by what was read of it: without a loop over the states.

    Args:
        read: The chain, and what follows the states.
        log_joint: The log joint.
    """

    cost_per_draw, is_vectorized = 1, True

    def __init__(self, read: ReadStateChain, log_joint: LogJoint) -> None:
        self._read = read
        self._table = log_joint.table
        self.affordable, self.chunk, self.sizes = log_joint.affordable, log_joint.chunk, log_joint.sizes

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        """``(S, D)`` draws, or their parts, to ``(S,)``; differentiable."""
        packed = joined(draws)
        return self._read.log_density(packed) + log_jacobian(self._table, packed)


class Others:
    """A log joint as one of a head's other coordinates alone, ``(S, F)``, with the same noise for the innovations each
    time: candidates that are scored by as many draws as are evaluated at once are compared on equal terms.

    Args:
        target: The log joint.
        head: The head, in the coordinates of whose noise it is.
    """

    cost_per_draw, is_vectorized, chunk = 1, True, GAUSSIAN.num_elbo_draws

    def __init__(self, target: ChainTarget, head: ChainHead) -> None:
        self._target = target
        self._head = head
        self._free, self._own = head.order.split(head.sizes)
        self._noise = antithetic(self.chunk, head.raw.value[0, self._own])
        self.sizes = (len(self._free),)

    def affordable(self, count: int, gradients: int) -> int:
        """At most as many as are evaluated at once."""
        return min(count, self.chunk)

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        """``(S,)``, less the log density of the noise."""
        free = joined(draws)
        noise = self._noise[: len(free)]
        packed = free.new_zeros(len(free), len(self._free) + len(self._own)).index_copy(1, self._own, noise)
        pushed, ladj = self._head.forward_and_ladj(packed.index_copy(1, self._free, free))
        return self._target(pushed) + ladj + 0.5 * (noise.square() + math.log(2.0 * math.pi)).sum(-1)

    def best_gaussian(self) -> LowRankGaussian:
        """The best Gaussian in the head's noise, in which the innovations stay standard normal."""
        zeros = self._head.raw.value.new_zeros(len(self._free))
        found = refined(self, Gaussian(zeros, torch.ones_like(zeros)), by_differences=True)
        return embedded(found, self._free, self._head.input_dim)
