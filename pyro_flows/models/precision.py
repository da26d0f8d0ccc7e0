# SPDX-License-Identifier: Apache-2.0
"""L2. What float32 does to a model's log density: the same draws in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch

from pyro_flows._random import forked
from pyro_flows.models.traces import NO_DENSITY, Call, mini_batches, replay_trace, run_quietly, sample_nodes

__all__ = ["may_be_rounded", "remedy_at", "rounding_message", "rounding_variance"]

USE_FLOAT64 = (
    "Use float64: `torch.set_default_dtype(torch.float64)` before the guide is made, and the data as `x.double()`."
)


@dataclass(frozen=True)
class RoundingSettings:
    """How float32 is compared with float64.

    Attributes:
        num_draws: Number of draws with a density, or else without one, at which to compare, >= 2.
        max_error: Standard deviation of the error of log densities, in nats, above which log weights of draws, and so
            k-hat and the gap, are those of rounding.
        large: Absolute log density, in nats, above which float32 resolves a thousandth of a nat at best, and a sum of
            many terms far less.
    """

    num_draws: int = 32
    max_error: float = 0.1
    large: float = 1e4


ROUNDING = RoundingSettings()


def may_be_rounded(log_density: float) -> bool:
    """Whether a log density is not finite, or so large that rounding in float32 may matter."""
    return not abs(log_density) < ROUNDING.large


class Comparison(NamedTuple):
    """Draws of a guide in float32, and the same in float64.

    Attributes:
        errors: Error of the log density in float32, of each draw that has one, in nats.
        num_refused: Number of draws without a density in float32.
        num_recovered: Number of these that have one in float64.
    """

    errors: list[float]
    num_refused: int
    num_recovered: int

    @property
    def variance(self) -> float:
        """Variance of the errors, in nats squared."""
        return statistics.variance(self.errors) if len(self.errors) > 1 else 0.0


@torch.no_grad()
def _compared(model: Callable[..., Any], guide: Callable[..., Any], call: Call) -> Comparison | None:
    """Draws in both; None where the error is not known.

    It is known where the model runs with latents, arguments and new tensors in float64, and draws no random numbers of
    its own. Tensors that the model holds keep their dtype, and need not be in float64.
    """
    errors: list[float] = []
    num_refused = num_recovered = 0
    with forked():
        while len(errors) < ROUNDING.num_draws and num_refused < ROUNDING.num_draws:
            trace = run_quietly(guide, call)
            values = {name: node["value"] for name, node in sample_nodes(trace).items()}
            if not _has_single(values):
                return None
            drawn = call._replace(fixed={**mini_batches(trace), **call.fixed})
            single, again = _log_joint(model, values, drawn), _log_joint(model, values, drawn)
            try:
                double = _log_joint(model, *_doubled(values, drawn))
            except Exception:  # a product of matrices of both dtypes, say
                return None
            if single != again and not (math.isnan(single) and math.isnan(again)):
                return None
            if not math.isfinite(single):
                num_refused += 1
                num_recovered += math.isfinite(double)
            elif math.isfinite(double):
                errors.append(single - double)
            else:
                return None
    return Comparison(errors, num_refused, num_recovered)


def rounding_variance(model: Callable[..., Any], guide: Callable[..., Any], call: Call) -> float:
    """Variance of the error of log densities in float32, at draws of a guide, in nats squared; 0 if it is not known."""
    found = _compared(model, guide, call)
    return 0.0 if found is None else found.variance


def rounding_message(model: Callable[..., Any], guide: Callable[..., Any], call: Call) -> str:
    """What float32 is the reason for, at draws of a guide, and what to do; empty if it is not, or it is not known."""
    found = _compared(model, guide, call)
    if found is None:
        return ""
    if found.num_recovered > found.num_refused / 2:
        return (
            f"{found.num_recovered} of {found.num_refused} draws without a finite log density in float32 have one in "
            f"float64. {USE_FLOAT64}"
        )
    error = math.sqrt(found.variance)
    if error > ROUNDING.max_error:
        return f"Log densities of draws are off by {error:.2g} nats, by rounding in float32. {USE_FLOAT64}"
    return ""


@torch.no_grad()
def remedy_at(model: Callable[..., Any], values: Mapping[str, Any], call: Call) -> str:
    """What to do where float32 is the reason that a model has no density at a draw; empty if it is not.

    Args:
        model: The model.
        values: Latent site -> value.
        call: Arguments of the model.
    """
    if not _has_single(values):
        return ""
    with forked():
        try:
            single, double = _log_joint(model, values, call), _log_joint(model, *_doubled(values, call))
        except Exception:  # a product of matrices of both dtypes, say
            return ""
    if math.isfinite(single):  # it is something else, such as a shape
        return ""
    return f"In float64 the log density is finite there. {USE_FLOAT64}" if math.isfinite(double) else ""


def _log_joint(model: Callable[..., Any], values: Mapping[str, Any], call: Call) -> float:
    """log p(x, z) in one plain run; NaN where the model raises."""
    dtype = torch.float64 if not _has_single(values) else torch.float32
    try:
        with _default_dtype(dtype), pyro.validation_enabled(False):
            return float(run_quietly(model, call, replay_trace({**values, **call.fixed})).log_prob_sum())
    except NO_DENSITY:
        return math.nan


def _has_single(values: Mapping[str, Any]) -> bool:
    return any(torch.is_tensor(value) and value.dtype == torch.float32 for value in values.values())


def _doubled(values: Mapping[str, Any], call: Call) -> tuple[dict[str, Any], Call]:
    def double(value: Any) -> Any:
        return value.double() if torch.is_tensor(value) and value.dtype == torch.float32 else value

    kwargs = {name: double(value) for name, value in call.kwargs.items()}
    found: dict[str, Any] = {name: double(value) for name, value in values.items()}
    return found, Call(tuple(map(double, call.args)), kwargs, call.fixed)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
