# SPDX-License-Identifier: Apache-2.0
"""L1. The affine head of a joint flow over a hierarchy in which the likelihood correlates coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import CorrCholeskyTransform

from pyro_flows.transforms.fixed import FixedParameter, ReadsFixed
from pyro_flows.transforms.heads.base import decode_gaussian, encode_gaussian
from pyro_flows.transforms.heads.conditional import (
    Factor,
    conditional_draw,
    conditional_noise,
    conditional_score,
    relocated,
    solved,
)
from pyro_flows.transforms.heads.correlated import Correlated
from pyro_flows.transforms.heads.linear_mixed import LinearMixedHead
from pyro_flows.transforms.heads.pooling import MIN_SHARE
from pyro_flows.transforms.networks import powerprop

__all__ = ["ConditionalPrior", "FullPrecisionHead"]


class ConditionalPrior(NamedTuple):
    """The conditional of pooled coordinates given the free ones: location of the prior, scales of its innovations and
    factors of their correlations; ``C``; the likelihood factor, with ``B = A^T W``, ``K = W W^T``, and ``r = W^T (b -
    a)``; ``log|det A|``."""

    loc: Tensor
    scale: Tensor
    factors: list[Tensor]
    chain: Tensor
    factor: Factor
    ladj: Tensor


class FullPrecisionHead(ReadsFixed, LinearMixedHead):
    r"""Pools the Gaussian prior of coordinates :math:`p` given the others, :math:`f`, with a likelihood factor, both
    correlated:

    .. math::
        y_p \,|\, y_f \sim N(P^{-1} (\Lambda a + K b), P^{-1}), \qquad P = \Lambda + K.

    The prior :math:`N(a(y_f), \Lambda^{-1}(y_f))` has :math:`\Lambda^{-1} = A A^\top`, :math:`A = C e^{t(y_f)} L(y_f)`,
    for log-scales :math:`t`, factors :math:`L` of correlations, and :math:`C = (I - T)^{-1}` where priors depend on
    each other, as along a random walk: :math:`y_p = a_0(y_f) + T y_p + e^t L \epsilon`, with a constant, strictly lower
    triangular :math:`T`, so that :math:`a = C a_0`. The likelihood factor has a precision
    :math:`K = e^{-2 u^\top (y_f - f_0)} W_0 D W_0^\top` and a location
    :math:`b = b_0 + W_0^{-\top} \beta + G (y_f - f_0)`. This is the exact conditional posterior of a linear mixed
    model: crossed effects, slopes with correlated covariates, a latent noise scale. As long as :math:`W_0` is diagonal
    and :math:`G, u` are zero, as at initialization, it is :class:`MultilevelHead`. They and :math:`b_0` are set by
    :meth:`set_likelihood` and not trained, while the diagonal :math:`D`, :math:`\beta` and the shares of priors are:
    each changes one of the independent directions of the likelihood. Scales and locations of the coordinates
    themselves would turn a precise direction towards vague ones, and an optimizer's step move a draw by many of its
    standard deviations.

    A likelihood that is not Gaussian, of counts or classes, has a skewed factor, which is set by :meth:`set_skew` and
    not trained either. Its precision follows the posterior's mean, and a draw that is :math:`d` away from that in a
    direction of the likelihood is pulled by :math:`\kappa d^2 / (1 + \sqrt{1 + \kappa^2 d^2})` more, in units of the
    likelihood's standard deviations: to first order, the map from the Gaussian to the posterior.

    Computed in double precision and in coordinates in which the prior is standard normal, where :math:`P` is
    well-conditioned however narrow the prior. Costs a Cholesky factor of P per draw, O(D^3).

    Args:
        known: Which coordinates have a known prior, ``(D,)``.
        slope: Slopes of prior locations, then log-scales, ``(2 D, D)``; the latter depend on free coordinates only.
        bias: Intercepts of prior locations, then log-scales, ``(2 D,)``.
        correlated: Coordinates whose priors are correlated by a latent matrix.
    """

    python_state: ClassVar[tuple[str, ...]] = ("is_skewed",)

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor, correlated: Sequence[Correlated] = ()) -> None:
        super().__init__(known, slope, bias)
        free, pooled = self.sizes
        self.correlated = tuple(correlated)
        self.is_chained = bool(self.slope[0][:, free:].any())
        self.own_factor = FixedParameter(torch.eye(pooled))
        # kappa, and the likelihood's gradient at the mean where the factor was set.
        self.skew = FixedParameter(torch.zeros(pooled))
        self.rest = FixedParameter(torch.zeros(pooled))
        self.is_skewed = False
        # Of the noise, so that a diagonal Gaussian scales each coordinate's own noise.
        self.rotation = FixedParameter(torch.eye(pooled)) if self.is_chained else None
        places = self.restore.tolist()
        # Where correlated vectors are among the pooled coordinates: first, number and length.
        self._vectors = [(places[group.offset] - free, group.num, group.size) for group in self.correlated]
        self._factors = [places[group.factor_offset] for group in self.correlated]

    @property
    def factored_entries(self) -> int:
        return self.own_factor.numel()

    def look(self) -> None:
        self.is_skewed = bool(self.skew.any())

    @torch.no_grad()
    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = 1e-3) -> None:
        super().initialize(loc, scale, max_share)
        self.own_factor.copy_(torch.eye(len(self.own_factor)))
        self._set_gaussian()
        if self.is_chained:
            self._unpool(loc, scale)

    def _unpool(self, loc: Tensor, scale: Tensor) -> None:
        """Set site approximations so that the head is ``N(loc, diag(scale)^2)``, except for the prior's correlations,
        which its small share makes weak."""
        free, pooled = loc[self.order].double().split(self.sizes)
        wanted = scale[self.order][self.count_free :].double().pow(-2)
        own_loc, log_scale = (part.double() for part in self.prior(free.to(loc)))
        weight = (powerprop(self.log_share.double()) - 2.0 * log_scale).exp()
        steps = self._steps()
        site = (wanted - steps.square().mT @ weight).clamp_min(MIN_SHARE * wanted)
        site_loc = pooled + steps.mT @ (weight * (steps @ pooled - own_loc)) / site
        rows = self.order[self.count_free :]
        encoded = encode_gaussian(site_loc.to(loc), site.rsqrt().to(loc))
        self.raw.set(self.raw.value.detach().index_copy(-1, rows, encoded))
        self._rotate()

    @torch.no_grad()
    def _rotate(self) -> None:
        """Rotate the noise so that pooled coordinates are a lower triangular function of it, at average free ones."""
        assert self.rotation is not None
        loc, *_ = self._site_approximations()
        prior = self._conditional(loc[: self.count_free])
        _, inverse, *_ = solved(prior.factor.root, prior.factor.root.dtype)
        factors = [factor.double() for factor in prior.factors]
        away = prior.scale.double().unsqueeze(-1) * self._correlate(inverse.mT, factors, transpose=False)
        orthogonal, upper = torch.linalg.qr((prior.chain.double() @ away).mT)
        self.rotation.copy_(orthogonal * upper.diagonal().sign())

    def _rotated(self, noise: Tensor) -> tuple[Tensor, Tensor | float]:
        """Noise of the pooled coordinates as the conditional takes it, and the log-determinant."""
        if self.rotation is None:
            return noise, 0.0
        rotation = self.rotation.detach()
        return noise @ rotation.mT, torch.linalg.slogdet(rotation).logabsdet

    def _rotated_back(self, noise: Tensor, *, transpose: bool = False) -> Tensor:
        """The inverse of :meth:`_rotated`, or its transpose, which maps scores forward."""
        if self.rotation is None:
            return noise
        rotation, rows = self.rotation.detach(), noise.reshape(-1, len(self.rotation))
        return torch.linalg.solve(rotation if transpose else rotation.mT, rows, left=False).reshape(noise.shape)

    def _steps(self) -> Tensor:
        """``I - T``, which maps the pooled coordinates to the innovations of their priors."""
        chain = self.slope[0][:, self.count_free :].double()
        return torch.eye(len(chain), dtype=chain.dtype, device=chain.device) - chain

    def _chain(self) -> Tensor:
        """``C``, the inverse of :meth:`_steps`."""
        steps = self._steps()
        if not self.is_chained:
            return steps
        return torch.linalg.solve_triangular(steps, torch.eye(len(steps)).to(steps), upper=False, unitriangular=True)

    @torch.no_grad()
    def set_likelihood(
        self, free: tuple[Tensor, Tensor], loc: Tensor, precision: Tensor, slope: Tensor, log_precision_slope: Tensor
    ) -> None:
        """As :meth:`LinearMixedHead.set_likelihood`, with the full precision matrix, ``K`` at that location."""
        super().set_likelihood(free, loc, precision, slope, log_precision_slope)
        scale = precision.diagonal().rsqrt()
        self.own_factor.copy_(torch.linalg.cholesky(scale.unsqueeze(-1) * precision * scale))
        self._set_gaussian()
        if self.is_chained:
            self._rotate()

    @torch.no_grad()
    def set_skew(self, free: Tensor, skew: Tensor) -> None:
        r"""Skew the likelihood factor, which has to be set, without moving its mean.

        Args:
            free: The coordinates without a known prior, in order, where the factor was set.
            skew: A third of the log likelihood's third derivatives along the columns of :math:`W_0^{-\top}`,
                :math:`\kappa`, ``(P,)``.
        """
        self._set_gaussian()
        root, pull, _ = self._conditional(free).factor
        shrunk = solved(root, pull.dtype)[2]
        variance = shrunk.square().sum(0)
        self._move_factors(-0.5 * skew * variance)
        pull = self._conditional(free).factor.pull
        self.rest.copy_((pull - shrunk.mT @ (shrunk @ pull)).squeeze(-1))
        self.skew.copy_(skew)
        self.look()

    def _move_factors(self, shift: Tensor) -> None:
        """Move the locations of likelihood factors, in units of these."""
        self.raw.value.data[0, self.order[self.count_free :]] += shift

    def _set_gaussian(self) -> None:
        """Leave the likelihood factor without skewness."""
        self.skew.zero_()
        self.look()

    def _priors(self, parents: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Locations and log-scales of the priors, given the coordinates drawn before, and factors of correlations."""
        return *super().prior(parents), self._correlations(parents)

    def _correlations(self, free: Tensor) -> list[Tensor]:
        """Factors of latent matrices of correlations."""
        factors = []
        for group, start in zip(self.correlated, self._factors, strict=True):
            entries = free[..., start : start + group.size * (group.size - 1) // 2]
            factors.append(CorrCholeskyTransform()(entries))
        return factors

    def log_prior(self, y: Tensor) -> Tensor:
        free, pooled = self._ordered(y).double().split(self.sizes, -1)
        loc, log_scale = self.prior(free.to(self.bias))
        factors = [factor.double() for factor in self._correlations(free.to(self.bias))]
        noise = ((pooled @ self._steps().mT - loc) * (-log_scale).exp()).unsqueeze(-1)
        noise = self._uncorrelate(noise, factors, transpose=False).squeeze(-1)
        return -log_scale.sum(-1) - self._log_det_correlations(factors) - 0.5 * noise.square().sum(-1)

    def _correlate(self, rows: Tensor, factors: Sequence[Tensor], *, transpose: bool) -> Tensor:
        """``L`` or its transpose times ``(..., P, C)``."""
        for (start, num, size), factor in zip(self._vectors, factors, strict=True):
            here = slice(start, start + num * size)
            inner = rows[..., here, :].unflatten(-2, (num, size))
            mixed = (factor.mT if transpose else factor).unsqueeze(-3) @ inner
            rows = torch.cat([rows[..., : here.start, :], mixed.flatten(-3, -2), rows[..., here.stop :, :]], -2)
        return rows

    def _uncorrelate(self, rows: Tensor, factors: Sequence[Tensor], *, transpose: bool) -> Tensor:
        """The inverse of :meth:`_correlate`."""
        for (start, num, size), factor in zip(self._vectors, factors, strict=True):
            here = slice(start, start + num * size)
            inner = rows[..., here, :].unflatten(-2, (num, size))
            matrix = (factor.mT if transpose else factor).unsqueeze(-3).expand(*inner.shape[:-1], size)
            solved = torch.linalg.solve_triangular(matrix, inner, upper=transpose)
            rows = torch.cat([rows[..., : here.start, :], solved.flatten(-3, -2), rows[..., here.stop :, :]], -2)
        return rows

    def _log_det_correlations(self, factors: Sequence[Tensor]) -> Tensor | float:
        """``log|det L|``."""
        total: Tensor | float = 0.0
        for (_, num, _), factor in zip(self._vectors, factors, strict=True):
            total = total + num * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return total

    def _factor(self, root: Tensor, pull: Tensor) -> Factor:
        """The likelihood factor, skewed if it is: with ``B`` and, ``(..., k)``, r."""
        factor = Factor(root, pull.unsqueeze(-1))
        if not self.is_skewed:
            return factor
        skew, rest = (part.detach().unsqueeze(-1) for part in (self.skew, self.rest))
        return relocated(factor._replace(skew=skew), rest)

    def _conditional(self, free: Tensor) -> ConditionalPrior:
        """The conditional of the pooled coordinates given the free ones."""
        own_loc, prior_log_scale, factors = self._priors(free)
        chain = self._chain()
        prior_loc = own_loc @ chain.to(own_loc).mT if self.is_chained else own_loc
        prior_log_scale = prior_log_scale - 0.5 * powerprop(self.log_share)
        shift, _, log_scale = decode_gaussian(self._ordered(self.raw.value)[:, self.count_free :])
        site_loc, log_unit = self._ordered(self.origin.detach())[:, self.count_free :]
        fixed = (-log_unit).exp().unsqueeze(-1) * self.own_factor.detach()  # W_0
        shrink = (-log_scale).exp()
        away = self._away(free)
        root_precision = (away @ -self.own_tilt.detach()).exp()
        scale = prior_log_scale.exp()
        mixed = chain.mT @ fixed.double() if self.is_chained else fixed.double()
        root = (scale * root_precision.unsqueeze(-1)).double().unsqueeze(-1) * (mixed * shrink)
        root = self._correlate(root, [factor.double() for factor in factors], transpose=True)
        offset = site_loc + away @ self.own_slope.detach().mT - prior_loc
        pull = root_precision.unsqueeze(-1) * (shrink * (offset @ fixed + shift))
        ladj = prior_log_scale.sum(-1) + self._log_det_correlations(factors)
        return ConditionalPrior(prior_loc, scale, factors, chain.to(scale), self._factor(root, pull), ladj)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, free, total, ladj, *_ = self._draw(x)
        return torch.cat([free, pooled], -1), total + ladj

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, ConditionalPrior, list[Tensor | None]]:
        """Pooled and free coordinates, the free ones' summed log-scale, the pooled ones' log-determinant, and what
        :func:`conditional_score` takes."""
        loc, scale, log_scale = (part[: self.count_free] for part in self._site_approximations())
        noise, rest = x.split(self.sizes, -1)
        free = torch.addcmul(loc, scale, noise)
        prior = self._conditional(free)
        rest, rotation_ladj = self._rotated(rest)
        z, ladj, *to_score = conditional_draw(prior.factor, rest.unsqueeze(-1))
        away = prior.scale * self._correlate(z, prior.factors, transpose=False).squeeze(-1)
        pooled = prior.loc + (away @ prior.chain.mT if self.is_chained else away)
        return pooled, free, log_scale.sum(-1), prior.ladj + ladj + rotation_ladj, prior, to_score

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, log_scale = self._site_approximations()
        count = self.count_free
        free = y[..., :count]
        prior = self._conditional(free)
        away = y[..., count:] - prior.loc
        away = away @ self._steps().to(away).mT if self.is_chained else away
        z = (away / prior.scale).unsqueeze(-1)
        z = self._uncorrelate(z, prior.factors, transpose=False)
        noise, ladj = conditional_noise(prior.factor, z)
        ladj = ladj - prior.ladj
        noise = noise.squeeze(-1)
        ladj = ladj - self._rotated(noise)[1]
        noise = self._rotated_back(noise)
        x = torch.cat([(free - loc[:count]) / scale[:count], noise], -1)
        return x, ladj - log_scale[:count].sum(-1)

    def draw_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, free, total, ladj, prior, to_score = self._draw(x)
        count = self.count_free
        with torch.no_grad():
            # A^-T times the score of z; A^-T is (I - T)^T e^-t L^-T.
            own = self._rotated_back(score[..., count:], transpose=True).unsqueeze(-1)
            own = conditional_score(own, *to_score)  # type: ignore[arg-type]
            own = self._uncorrelate(own, prior.factors, transpose=True).squeeze(-1) / prior.scale
            own = own @ self._steps().to(own) if self.is_chained else own
            scale = self._site_approximations()[1][:count]
        (through,) = torch.autograd.grad((pooled, ladj), free, (own, torch.ones_like(ladj)), retain_graph=True)
        score = torch.cat([score[..., :count] / scale - through, own], -1).detach()
        return torch.cat([free, pooled], -1), total + ladj, score
