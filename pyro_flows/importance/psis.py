# SPDX-License-Identifier: Apache-2.0
"""L6. Pareto-smoothed importance sampling (PSIS): the tail of importance weights, its shape and smoothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_flows._checks import check_type, checked, integer, shown

__all__ = ["PsisSettings", "Smoothed", "khat_threshold", "nearly_constant", "pareto_smooth"]


@dataclass(frozen=True)
class PsisSettings:
    """When the tail of importance weights is not fitted.

    Attributes:
        max_short_tail: Largest number of weights in a tail that is too short to fit; as in ArviZ.
        rounding: Difference of log weights in nats that may be float32 rounding: if the largest weights exceed the rest
            by less than this, there is no tail to fit.
    """

    max_short_tail: int = 4
    rounding: float = 1e-4


class Smoothed(NamedTuple):
    """Pareto-smoothed weights.

    Attributes:
        log_weights: Normalized to ``logsumexp = 0``, in the order of the draws, ``(S,)``, float64.
        khat: Tail shape; infinite if the tail is too short to fit, or no weight is positive and finite; 0 if its
            weights are equal up to rounding.
    """

    log_weights: Tensor
    khat: float


def nearly_constant(largest: float, ess: float, num_samples: int) -> bool:
    """Whether weights differ so little that k-hat describes noise: none is twice the mean, and the ESS is nearly S.

    Args:
        largest: log of the largest weight over the mean one.
        ess: Effective sample size.
        num_samples: Number of draws.
    """
    return largest < math.log(2.0) and ess > 0.99 * num_samples


def _check_log_weights(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor; ValueError unless it is ``(S,)`` and not NaN."""
    if not torch.is_tensor(value):
        raise TypeError(f"{owner}: expected {name} to be a tensor of shape (S,), but got {shown(value)}.")
    if value.dim() != 1 or not len(value):
        raise ValueError(f"{owner}: expected {name} to be a tensor of shape (S,), but got shape {tuple(value.shape)}.")
    if value.isnan().any():
        raise ValueError(
            f"{owner}: expected {name} to be a tensor without NaN, but got {int(value.isnan().sum())} of "
            f"{len(value)} that are NaN. Write -inf where the model has no density."
        )


@checked(num_samples=integer(1))
def khat_threshold(num_samples: int) -> float:
    r"""Largest k-hat at which estimates from S draws are reliable, :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 25(72), 2024, section 3.2.4.
    """
    return min(1.0 - 1.0 / math.log10(max(num_samples, 2)), 0.7)


@checked(log_weights=_check_log_weights, settings=partial(check_type, kind=PsisSettings))
def pareto_smooth(log_weights: Tensor, settings: PsisSettings = PsisSettings()) -> Smoothed:
    """Fit a generalized Pareto distribution to the largest :math:`M = min(S / 5, 3 sqrt(S))` weights, and replace them
    by its quantiles, truncated at the largest raw weight.

    The fit is that of Zhang and Stephens with a weak prior, as in ArviZ and in R's loo.

    Args:
        log_weights: ``(S,)``, not normalized.
        settings: When the tail is not fitted.

    Raises:
        TypeError: If ``log_weights`` is no tensor.
        ValueError: If it has another shape, is empty, or has values that are NaN.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 25(72), 2024.
        Zhang, Stephens. A New and Efficient Estimation Method for the Generalized Pareto Distribution.
        Technometrics 51(3), 2009.
    """
    count = len(log_weights)
    if not log_weights.max().isfinite():
        return Smoothed(log_weights.double(), math.inf)
    shifted = log_weights.double() - log_weights.double().max()
    ordered, order = shifted.sort()
    tail_length = min(math.ceil(min(count / 5, 3 * math.sqrt(count))), count - 1)
    if not ordered[-tail_length - 1] < -settings.rounding:
        return Smoothed(shifted - shifted.logsumexp(0), 0.0)
    cutoff = max(ordered[-tail_length - 1].item(), math.log(torch.finfo(torch.double).tiny))
    tail = ordered[ordered > cutoff]
    khat = math.inf
    if len(tail) > settings.max_short_tail:
        with tail.device:  # where Pyro makes tensors of its own
            khat, sigma = fit_generalized_pareto(tail.exp() - math.exp(cutoff))
        if math.isfinite(khat):
            levels = (torch.arange(len(tail), dtype=torch.double, device=tail.device) + 0.5) / len(tail)
            smooth = (math.exp(cutoff) + _pareto_quantile(levels, khat, sigma)).log().clamp_max(0.0)
            shifted[order[-len(tail) :]] = smooth
        else:
            khat = math.inf
    return Smoothed(shifted - shifted.logsumexp(0), khat)


def _pareto_quantile(levels: Tensor, shape: float, scale: float) -> Tensor:
    if abs(shape) < 1e-10:
        return -scale * torch.log1p(-levels)
    return scale * torch.expm1(-shape * torch.log1p(-levels)) / shape
