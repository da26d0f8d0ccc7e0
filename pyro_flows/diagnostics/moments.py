# SPDX-License-Identifier: Apache-2.0
"""L7. Means and standard deviations of draws, plain and by importance weights, in one pass of bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MomentErrors", "MomentState", "Moments"]


class MomentErrors(NamedTuple):
    """Estimated errors of the moments of draws, of the shape of a draw.

    Attributes:
        shift: Error of the mean, in standard deviations of the posterior.
        shift_se: Its standard error.
        log_sd: Error of the log standard deviation.
        log_sd_se: Its standard error.
    """

    shift: Tensor
    shift_se: Tensor
    log_sd: Tensor
    log_sd_se: Tensor


class MomentState(NamedTuple):
    """Sums of a :class:`Moments`, on the CPU.

    Attributes:
        num_draws: Number of draws.
        top: Largest log weight, by item.
        sums: Sums of powers, in units of that weight.
    """

    num_draws: int
    top: Tensor
    sums: Tensor


class Moments:
    """Running moments of arrays whose first dimension is that of the draws.

    Weighted sums are kept in units of the largest weight so far, per item, so that nothing overflows.

    Args:
        center: Point that sums are about, near the draws, of the shape of one; None takes the median of the first.
    """

    def __init__(self, center: Tensor | None = None) -> None:
        self._count = 0
        self._center = center

    def add(self, values: Tensor, log_weights: Tensor) -> None:
        """Add draws.

        Args:
            values: Draws, ``(S, *shape)``.
            log_weights: Log importance weights, ``(S, *shape)``; dimensions may be 1 where elements share a weight.
        """
        values, log_weights = values.double(), log_weights.to(values.device)
        top = log_weights.max(0).values
        if not self._count:
            # The median is finite, though draws may overflow.
            self._center = (values.median(0).values if self._center is None else self._center).to(values)
            self._top = top
            # Sums of z^k, w z^k and w^2 z^k about the center, for k = 0 to 4.
            self._sums = values.new_zeros(3, 5, *self._center.shape)
        new_top = self._raise_top(top)
        weights = _exp(log_weights - new_top)
        assert self._center is not None
        power, centered = torch.ones_like(values), values - self._center
        counted = torch.where(weights > 0.0, centered, 0.0)  # a draw that overflows, where there is no density
        counted_power = power
        for k in range(5):
            self._sums[0, k] += power.sum(0)
            self._sums[1, k] += (weights * counted_power).sum(0)
            self._sums[2, k] += (weights.square() * counted_power).sum(0)
            power, counted_power = power * centered, counted_power * counted
        self._count += len(values)

    def _raise_top(self, top: Tensor) -> Tensor:
        """Take a larger unit of the weights, where ``top`` is larger than the former; returns it."""
        new_top = torch.maximum(self._top, top)
        rescale = _exp(self._top - new_top)
        self._sums[1] *= rescale
        self._sums[2] *= rescale.square()
        self._top = new_top
        return new_top

    @property
    def state(self) -> MomentState:
        """Sums, for :meth:`merge`."""
        return MomentState(self._count, self._top.cpu(), self._sums.cpu())

    def merge(self, other: MomentState) -> None:
        """Add the draws of another one, about the same center."""
        new_top = self._raise_top(other.top.to(self._top))
        rescale = _exp(other.top.to(new_top) - new_top)
        sums = other.sums.to(self._sums)
        self._sums += torch.stack([sums[0], sums[1] * rescale, sums[2] * rescale.square()])
        self._count += other.num_draws

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Unweighted mean and standard deviation of the draws."""
        return self._mean_and_sd(0)

    @property
    def weighted(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by self-normalized importance sampling."""
        return self._mean_and_sd(1)

    def has_sd(self, max_log_sd_se: float, *, weighted: bool = False) -> Tensor:
        """Where draws, plain or weighted, determine the standard deviation up to a relative error, or it is zero, as of
        the zeros in a Cholesky factor."""
        constant = (self.plain[1] == 0.0) & (self.weighted[1] == 0.0)
        _, of_sd = self._influences(int(weighted))
        variance = self._covariance(of_sd, int(weighted), of_sd, int(weighted)) / self._count
        return constant | (variance.clamp_min(0.0).sqrt() < max_log_sd_se)

    def errors(self) -> MomentErrors:
        r"""Errors of the plain moments, estimated by the weighted ones.

        Standard errors are those of the differences, by the delta method: with weights w of mean 1, a mean changes by
        the average of :math:`w (z - \mu_w) - (z - \mu)`, which hardly varies where weights hardly do.
        """
        variances = [
            self._covariance(p, 0, p, 0) - 2.0 * self._covariance(p, 0, w, 1) + self._covariance(w, 1, w, 1)
            for p, w in zip(self._influences(0), self._influences(1), strict=True)
        ]
        return _errors(self.plain, self.weighted, *(variance / self._count for variance in variances))

    def errors_against(self, reference: Moments) -> MomentErrors:
        """Errors of the plain moments, estimated by the weighted ones of independent draws."""
        variances = [
            self._covariance(p, 0, p, 0) / self._count + reference._covariance(w, 1, w, 1) / reference._count
            for p, w in zip(self._influences(0), reference._influences(1), strict=True)
        ]
        return _errors(self.plain, reference.weighted, *variances)

    def _averages(self, power: int) -> Tensor:
        """Averages of w^power z^k about the center, for weights of mean 1; ``(5, *shape)``."""
        if power == 0:
            return self._sums[0] / self._count
        total = self._sums[1, 0]
        return self._sums[1] / total if power == 1 else self._sums[2] * self._count / total.square()

    def _mean_and_sd(self, power: int) -> tuple[Tensor, Tensor]:
        _, first, second, *_ = self._averages(power)
        assert self._center is not None
        return self._center + first, (second - first.square()).clamp_min(0.0).sqrt()

    def _influences(self, power: int) -> tuple[list[Tensor], list[Tensor]]:
        r"""Coefficients in z of the influence of a draw on the mean, and on the log standard deviation.

        A mean has the influence :math:`w (z - \mu)`, a log standard deviation
        :math:`w ((z - \mu)^2 / \sigma^2 - 1) / 2`.
        """
        _, mean, second, *_ = self._averages(power)
        variance = (second - mean.square()).clamp_min(torch.finfo(torch.double).tiny)
        one = torch.ones_like(mean)
        of_sd = [0.5 * (mean.square() / variance - 1.0), -mean / variance, 0.5 / variance]
        return [-mean, one, torch.zeros_like(mean)], of_sd

    def _covariance(self, left: list[Tensor], left_power: int, right: list[Tensor], right_power: int) -> Tensor:
        """Average product of two influences, polynomials in z times a power of the weight."""
        averages = self._averages(left_power + right_power)
        products = [a * b * averages[i + j] for i, a in enumerate(left) for j, b in enumerate(right)]
        return torch.stack(products).sum(0)


def _errors(
    plain: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor], variance_of_mean: Tensor, variance_of_log_sd: Tensor
) -> MomentErrors:
    """Errors, none where values are constant; infinite where a moment is not finite."""
    sd = best[1]
    constant = (sd == 0.0) & (plain[1] == 0.0)
    found = (
        (plain[0] - best[0]) / sd,
        variance_of_mean.clamp_min(0.0).sqrt() / sd,
        (plain[1] / sd).log(),
        variance_of_log_sd.clamp_min(0.0).sqrt(),
    )
    return MomentErrors(*(torch.where(constant, 0.0, error).nan_to_num(torch.inf) for error in found))


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.nan_to_num(-torch.inf, neginf=-torch.inf).exp()  # minus infinity less itself gives weight zero
