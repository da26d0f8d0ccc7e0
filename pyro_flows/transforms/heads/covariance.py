# SPDX-License-Identifier: Apache-2.0
"""L1. The head of a joint flow over multivariate normals whose covariance follows other latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads.correlated import Correlated, Covariance
from pyro_flows.transforms.heads.full_precision import FullPrecisionHead
from pyro_flows.transforms.heads.multilevel import MultilevelHead

__all__ = ["CovarianceHead"]


class CovarianceHead(FullPrecisionHead, MultilevelHead):
    r"""A :class:`FullPrecisionHead` in which some priors are :math:`N(a(y_f), \Sigma(y_f))`, with any functions
    :math:`a, \Sigma`: a Gaussian process with unknown hyperparameters, say.

    Until :meth:`set_likelihood` is called it is a :class:`MultilevelHead` of the priors' marginals, which is a
    mean-field Gaussian at the start: a prior whose conditionals are a thousandth as wide as its marginals would have to
    be weakened so much that training could not bring it back. Afterwards, with a Gaussian likelihood, it is the exact
    conditional posterior at all values of the free coordinates.

    Args:
        known: Which coordinates have a known prior, ``(D,)``; none follows another.
        slope: Slopes of prior locations, then log-scales, ``(2 D, D)``; of marginals, where there is a covariance.
        bias: Intercepts of prior locations, then log-scales, ``(2 D,)``.
        correlated: Coordinates whose priors are correlated by a latent matrix.
        covariances: Coordinates whose priors are multivariate normals.

    References:
        Rasmussen, Williams. Gaussian Processes for Machine Learning. 2006, section 3.4, for the conditional posterior
        with one Gaussian factor for each coordinate. Opper, Archambeau. The variational Gaussian approximation
        revisited. Neural Computation 2009.
    """

    python_state: ClassVar[tuple[str, ...]] = ("is_full", "is_skewed")

    has_own: Tensor

    def __init__(
        self,
        known: Tensor,
        slope: Tensor,
        bias: Tensor,
        correlated: Sequence[Correlated] = (),
        covariances: Sequence[Covariance] = (),
    ) -> None:
        super().__init__(known, slope, bias, correlated)
        assert not self.is_chained, "priors depend on pooled coordinates"
        self.covariances = tuple(covariances)
        self.rotation = FixedParameter(torch.eye(self.sizes[1]))
        # Whether covariances are in use; a parameter, so that it is saved with the others.
        self.follows = FixedParameter(torch.zeros(()))
        self.is_full = False
        places = self.restore.tolist()
        own = [(places[group.offset] - self.count_free, group.num, group.size) for group in self.covariances]
        self._vectors += own
        has_own = torch.zeros(self.sizes[1], dtype=torch.bool)
        for start, num, size in own:
            has_own[start : start + num * size] = True
        self.register_buffer("has_own", has_own, persistent=False)

    def look(self) -> None:
        super().look()
        self.is_full = bool(self.follows)

    def _switch(self, *, full: bool) -> None:
        self.follows.fill_(float(full))
        self.is_full = full

    @torch.no_grad()
    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = 1e-3) -> None:
        self._switch(full=False)
        super().initialize(loc, scale, max_share)

    @torch.no_grad()
    def set_likelihood(
        self, free: tuple[Tensor, Tensor], loc: Tensor, precision: Tensor, slope: Tensor, log_precision_slope: Tensor
    ) -> None:
        self._switch(full=True)
        super().set_likelihood(free, loc, precision, slope, log_precision_slope)
        self._rotate()

    @property
    def own_densities(self) -> list[slice]:
        return [group.rows for group in self.covariances]

    def full_prior(self, free: Tensor) -> tuple[Tensor, Tensor]:
        return self._priors(free)[:2]

    def log_prior(self, y: Tensor) -> Tensor:
        free, pooled = self._ordered(y).split(self.sizes, -1)
        loc, log_scale = self.prior(free)
        factors = [factor.double() for factor in self._correlations(free)]
        noise = ((pooled.double() - loc) * (-log_scale).exp()).masked_fill(self.has_own, 0.0).unsqueeze(-1)
        factors += [torch.eye(group.size).to(noise) for group in self.covariances]
        noise = self._uncorrelate(noise, factors, transpose=False).squeeze(-1)
        log_scale = log_scale.masked_fill(self.has_own, 0.0).sum(-1)
        return -log_scale - self._log_det_correlations(factors) - 0.5 * noise.square().sum(-1)

    def _priors(self, parents: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        loc, log_scale, factors = super()._priors(parents)
        every = parents.new_zeros(*parents.shape[:-1], self.input_dim)
        every = every.index_copy(-1, self.order[: self.count_free], parents)
        for group, (start, num, size) in zip(self.covariances, self._vectors[len(self.correlated) :], strict=True):
            own_loc, factor = group.prior(every)
            scale = factor.square().sum(-1).sqrt()
            factors.append(factor / scale.unsqueeze(-1))
            own = own_loc, scale.log().repeat(*(1,) * (scale.dim() - 1), num)
            stop = start + num * size
            loc, log_scale = (
                torch.cat([rest[..., :start], part, rest[..., stop:]], -1)
                for rest, part in zip((loc, log_scale), own, strict=True)
            )
        return loc, log_scale, factors

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return FullPrecisionHead.draw(self, x) if self.is_full else MultilevelHead.draw(self, x)

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return FullPrecisionHead.noise(self, y) if self.is_full else MultilevelHead.noise(self, y)

    def draw_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = FullPrecisionHead if self.is_full else MultilevelHead
        return kind.draw_with_score(self, x, score)
