# SPDX-License-Identifier: Apache-2.0
"""L1. The head of a joint flow over the innovations of a chain of states, each of which the data see by itself."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms.fixed import FixedParameter, ReadsFixed
from pyro_flows.transforms.heads.base import encode_gaussian
from pyro_flows.transforms.heads.conditional import Pull, newton, relocated_pull
from pyro_flows.transforms.heads.correlated import StateChain
from pyro_flows.transforms.heads.ordered import OrderedHead
from pyro_flows.transforms.heads.pooling import INIT_SHARE
from pyro_flows.transforms.tridiagonal import TridiagonalCholesky, inverse_diagonal, tridiagonal_product

__all__ = ["ChainHead", "Innovations"]


class Innovations(NamedTuple):
    """The map from states to standard normal innovations, ``z = R h - m``, where R is bidiagonal."""

    lag: Tensor  # a
    unit: Tensor  # 1 / b
    mean: Tensor  # m = c / b

    @classmethod
    def of(cls, chain: StateChain, point: Tensor) -> Innovations:
        """Those of a chain at values of all coordinates, ``(..., D)``, in double precision."""
        offset, lag, scale = (part.double() for part in chain.read(point))
        unit = scale.reciprocal()
        return cls(lag, unit, offset * unit)

    def forward(self, states: Tensor) -> Tensor:
        """``R h``."""
        return self.unit * (states - self.lag * F.pad(states[..., :-1], (1, 0)))

    def transposed(self, z: Tensor) -> Tensor:
        """``R^T z``."""
        scaled = self.unit * z
        return scaled - F.pad((self.lag * scaled)[..., 1:], (0, 1))

    def of_states(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Innovations of states, and the log-determinant."""
        return self.forward(states) - self.mean, self.log_det()

    def log_det(self) -> Tensor:
        """``log|R|``."""
        return self.unit.abs().log().sum(-1)

    def to_states(self, z: Tensor) -> Tensor:
        """States that innovations drive."""
        return self.backward(z + self.mean)

    def precision(self) -> tuple[Tensor, Tensor]:
        """The diagonal of ``R^T R`` and the elements beside it."""
        own = self.unit.square()
        coupled = (self.lag * own)[..., 1:]
        return own + F.pad(self.lag[..., 1:] * coupled, (0, 1)), -coupled

    def backward(self, z: Tensor) -> Tensor:
        """``R^-1 z``."""
        return _accumulated(z / self.unit, self.lag)

    def backward_transposed(self, states: Tensor) -> Tensor:
        """``R^-T h``."""
        lag = F.pad(self.lag[..., 1:], (0, 1))
        return _accumulated(states.flip(-1), lag.flip(-1)).flip(-1) / self.unit


def _accumulated(x: Tensor, lag: Tensor) -> Tensor:
    """``h_t = x_t + a_t h_(t-1)`` by recursive doubling: in step k, from the sum over 2^k steps to that over twice as
    many. By way of ``R^T R``, rounding errors would be as its condition number, a thousand times as large.

    References:
        Kogge, Stone. A parallel algorithm for the efficient solution of a general class of recurrence equations. IEEE
        Transactions on Computers 1973.
    """
    count = 1
    while count < x.shape[-1]:
        x = x + lag * F.pad(x[..., :-count], (count, 0))
        lag = lag * F.pad(lag[..., :-count], (count, 0))
        count *= 2
    return x


class _Conditional:
    r"""The states given the free coordinates, whose precision is :math:`Q = R^\top R + W`.

    Args:
        innovations: The prior.
        root: :math:`W^{1/2}`, square roots of the likelihood factors' precisions, ``(..., n)``.
        pull: Locations of the factors in their units, ``(..., n)``.
        skew: :math:`\kappa` and the likelihood's gradients where it was set, ``(n,)`` each; None for Gaussian factors.
    """

    def __init__(
        self, innovations: Innovations, root: Tensor, pull: Tensor, skew: tuple[Tensor, Tensor] | None
    ) -> None:
        self.innovations = innovations
        self._prior, self._off = innovations.precision()
        self.skew: Tensor | None = None
        self._set(root, pull)
        if skew is not None:
            unit, pull, self.skew = relocated_pull(pull, self.mean_in_units(), *skew)
            self._set(root * unit, pull)

    def _set(self, root: Tensor, pull: Tensor) -> None:
        self.root, self.pull = root, pull
        self._diagonal = self._prior + root.square()
        self._cholesky = TridiagonalCholesky(self._diagonal, self._off)
        self._total = self.innovations.transposed(self.innovations.mean) + root * pull  # Q times the Gaussian's mean

    def mean_in_units(self) -> Tensor:
        """Means of the states with Gaussian factors, in units of these."""
        return self.root * self._cholesky.solve(self._total)

    def variance_in_units(self) -> Tensor:
        """Their variances, detached."""
        return self.root.square() * inverse_diagonal(self._diagonal, self._off)

    def _bent(self, slope: Tensor) -> TridiagonalCholesky:
        """``Q + W s'``."""
        return TridiagonalCholesky(self._diagonal + self.root.square() * slope, self._off)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, TridiagonalCholesky | None]:
        """States from noise, the log-determinant, and what :meth:`score` takes."""
        total, bent = self._total, None
        if self.skew is not None:
            more = self._pulled(x, self.skew)
            total, bent = total + self.root * more.value, self._bent(more.slope)
        return self._cholesky.solve_upper(self._cholesky.solve_lower(total) + x), self._log_det(bent), bent

    def _log_det(self, bent: TridiagonalCholesky | None) -> Tensor:
        own = self._cholesky.log_det()
        return -0.5 * own if bent is None else bent.log_det() - 1.5 * own

    def noise(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`draw`, and its log-determinant."""
        x, bent = self._cholesky.multiply_transposed(states) - self._cholesky.solve_lower(self._total), None
        if self.skew is not None:
            x = self._unskewed(x, self.skew)
            bent = self._bent(self._pulled(x, self.skew).slope)
        return x, -self._log_det(bent)

    def _pulled(self, x: Tensor, skew: Tensor) -> Pull:
        """What skewed factors pull more, for noise."""
        return Pull.at(self.root * self._cholesky.solve_upper(x), skew)

    def _unskewed(self, moved: Tensor, skew: Tensor) -> Tensor:
        """Solve ``x + S s(S^T x) = moved``, with ``S = C^-1 W^1/2``."""

        def residual(x: Tensor) -> tuple[Tensor, Tensor]:
            more = self._pulled(x, skew)
            return x + self._cholesky.solve_lower(self.root * more.value) - moved, more.slope

        def step(left: Tensor, slope: Tensor) -> Tensor:
            return self._cholesky.multiply_transposed(self._bent(slope).solve(self._cholesky.multiply(left)))

        return newton(moved, residual, step, dim=-1)

    def score(self, score: Tensor, bent: TridiagonalCholesky | None) -> Tensor:
        """The score of a draw from that of its noise, less the gradient of the log-determinant."""
        score = self._cholesky.multiply(score)
        if bent is not None:
            score = tridiagonal_product(self._diagonal, self._off, bent.solve(score))
        return score


class ChainHead(ReadsFixed, OrderedHead):
    r"""A chain of states,

    .. math::
        h_t = c_t(y_f) + a_t(y_f)\, h_{t-1} + b_t(y_f)\, z_t,

    with standard normal innovations z and any functions a, b, c of the free coordinates: an autoregression, a random
    walk, or a volatility, in terms of the states, or of innovations of which the data see the states only.

    Each state has a likelihood factor of its own, with location :math:`l_0 + G (y_f - f_0)` and log-scale
    :math:`s_0 + U (y_f - f_0)`, which may be skewed. Factors are set by :meth:`set_factors` and not trained. With R the
    bidiagonal matrix of :math:`z = R h - c / b`, the states are Gaussian given the free coordinates, with the precision
    :math:`Q = R^\top R + e^{-2 s}`: the exact conditional posterior if the likelihood is Gaussian. Q is tridiagonal, so
    that a draw takes O(n) work, where a :class:`LinearPredictorHead` takes O(n^3). The noise of a state is its own.

    A likelihood that is not Gaussian has skewed factors, which are set by :meth:`set_skew`, with the maps and the
    precisions of a :class:`FullPrecisionHead`.

    The chain is computed in double precision. Until :meth:`set_factors` is called the head is a mean-field normal.

    Args:
        input_dim: Number of coordinates, D.
        chain: The coordinates of the states or the innovations, n of them.

    References:
        Rue, Held. Gaussian Markov Random Fields. 2005, sections 2.3 and 2.4, for draws by way of sparse precisions.
    """

    python_state: ClassVar[tuple[str, ...]] = ("is_full", "is_skewed")
    is_chained = True

    def __init__(self, input_dim: int, chain: StateChain) -> None:
        every = torch.arange(input_dim)
        own = every[chain.rows]
        free = every[~torch.isin(every, own)]
        super().__init__(torch.cat([free, own]), [len(free), len(own)])
        self.chain = chain
        self.max_rank = len(free)  # the noise of the states is independent
        self.origin = FixedParameter(torch.zeros(2, input_dim))
        # Locations and log-scales of factors, and their slopes.
        self.factor_origin = FixedParameter(torch.zeros(2, len(own)))
        self.factor_slope = FixedParameter(torch.zeros(2, len(own), len(free)))
        # kappa, and the likelihood's gradient at the mean where the factor was set.
        self.skew = FixedParameter(torch.zeros(len(own)))
        self.rest = FixedParameter(torch.zeros(len(own)))
        # Whether the chain is in use; a parameter, so that it is saved with the others.
        self.follows = FixedParameter(torch.zeros(()))
        self.is_full, self.is_skewed = False, False

    def look(self) -> None:
        self.is_full, self.is_skewed = bool(self.follows), bool(self.skew.any())

    @torch.no_grad()
    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = INIT_SHARE) -> None:
        """Initialize to a mean-field normal, ``N(loc, diag(scale)^2)``, of which no prior has a share."""
        super().initialize(loc, scale)
        for fixed in (self.factor_origin, self.factor_slope, self.skew, self.rest, self.follows):
            fixed.zero_()
        self.look()

    @torch.no_grad()
    def set_factors(self, free: tuple[Tensor, Tensor], origin: Tensor, slope: Tensor) -> None:
        """Set the likelihood factors, without skewness.

        Args:
            free: Location and scale of the free coordinates, in order.
            origin: Locations and log-scales of the states' factors there, ``(2, n)``.
            slope: Their slopes in the free coordinates, ``(2, n, F)``.
        """
        rest = self.sizes[1]
        sites = torch.cat([free[0], free[0].new_zeros(rest)]), torch.cat([free[1], free[1].new_ones(rest)])
        self.raw.set(encode_gaussian(*map(self._restored, sites)))
        self.origin.zero_()
        self.set_origin()
        self.factor_origin.copy_(origin)
        self.factor_slope.copy_(slope)
        self.skew.zero_()
        self.follows.fill_(1.0)
        self.look()

    @torch.no_grad()
    def set_origin(self) -> None:
        before = self.origin[0].clone()
        super().set_origin()
        # The factors stay where they are.
        self.factor_origin.add_(self.factor_slope @ self._ordered(self.origin[0] - before)[: self.count_free])

    @torch.no_grad()
    def set_skew(self, free: Tensor, skew: Tensor) -> None:
        r"""Skew the likelihood factors, which have to be set, without moving their means.

        Args:
            free: The free coordinates, in order, where the factors were set.
            skew: A third of the log likelihood's third derivatives in the states, in units of the factors,
                :math:`\kappa`, ``(n,)``.
        """
        self.skew.zero_()
        self.look()
        given = self._conditional(free)
        self.factor_origin[0].sub_(0.5 * skew * given.variance_in_units() / given.root)
        given = self._conditional(free)
        self.rest.copy_(given.pull - given.mean_in_units())
        self.skew.copy_(skew)
        self.look()

    def predictors(self, point: Tensor, own: Tensor) -> Tensor:
        """States for values of the chain's coordinates, ``(S, n)`` both, with the others at a point, ``(D,)``."""
        return own if self.chain.is_centered else Innovations.of(self.chain, point).to_states(own.double()).to(own)

    def prior_variances(self, point: Tensor) -> Tensor:
        """Their variances under their prior, ``(n,)``."""
        return inverse_diagonal(*Innovations.of(self.chain, point).precision()).to(point)

    def _conditional(self, free: Tensor) -> _Conditional:
        """The conditional of the states given the free coordinates."""
        every = free.new_zeros(*free.shape[:-1], self.input_dim).index_copy(-1, self.order[: self.count_free], free)
        innovations = Innovations.of(self.chain, every)
        origin, slope, skew, rest = (
            part.detach().double() for part in (self.factor_origin, self.factor_slope, self.skew, self.rest)
        )
        factors = F.linear(self._away(free).double(), slope.flatten(0, 1), origin.flatten())
        loc, log_scale = factors.chunk(2, -1)
        root = (-log_scale).exp()
        return _Conditional(innovations, root, root * loc, (skew, rest) if self.is_skewed else None)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_full:
            loc, scale, log_scale = self._site_approximations()
            return torch.addcmul(loc, scale, x), log_scale.sum(-1).expand(x.shape[:-1])
        noise, own = x.split(self.sizes, -1)
        free, total = self._draw_free(noise)
        pooled, ladj, _ = self._draw_own(self._conditional(free), own.double())
        return torch.cat([free, pooled.to(x)], -1), total + ladj.to(x)

    def _draw_own(self, given: _Conditional, noise: Tensor) -> tuple[Tensor, Tensor, TridiagonalCholesky | None]:
        """The chain's coordinates from noise, the log-determinant, and what scores take."""
        states, ladj, bent = given.draw(noise)
        if self.chain.is_centered:
            return states, ladj, bent
        own, more = given.innovations.of_states(states)
        return own, ladj + more, bent

    def _draw_free(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Free coordinates, and their summed log-scale."""
        loc, scale, log_scale = (part[: self.count_free] for part in self._site_approximations())
        return torch.addcmul(loc, scale, noise), log_scale.sum(-1)

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, log_scale = self._site_approximations()
        if not self.is_full:
            return (y - loc) / scale, -log_scale.sum(-1).expand(y.shape[:-1])
        free, pooled = y.split(self.sizes, -1)
        count = self.count_free
        given, states = self._conditional(free), pooled.double()
        if not self.chain.is_centered:
            states = given.innovations.to_states(states)
        own, ladj = given.noise(states)
        if not self.chain.is_centered:
            ladj = ladj - given.innovations.log_det()
        return torch.cat([(free - loc[:count]) / scale[:count], own.to(y)], -1), ladj.to(y) - log_scale[:count].sum(-1)

    def draw_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = self._site_approximations()[1].detach()
        if not self.is_full:
            return *self.draw(x), score / scale
        noise, own = x.split(self.sizes, -1)
        free, total = self._draw_free(noise)
        given, own = self._conditional(free), own.double()
        pooled, ladj, bent = self._draw_own(given, own)
        to_free, to_own = score.split(self.sizes, -1)
        to_own = to_own.double()
        if bent is not None:
            to_own = to_own - torch.autograd.grad(ladj.sum(), own, retain_graph=True)[0]
        with torch.no_grad():
            to_own = given.score(to_own, bent)
            if not self.chain.is_centered:
                to_own = given.innovations.backward_transposed(to_own)
        (through,) = torch.autograd.grad((pooled, ladj), free, (to_own, torch.ones_like(ladj)), retain_graph=True)
        score = torch.cat([to_free / scale[: self.count_free] - through, to_own.to(x)], -1)
        return torch.cat([free, pooled.to(x)], -1), total + ladj.to(x), score
