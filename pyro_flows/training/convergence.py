# SPDX-License-Identifier: Apache-2.0
"""L7. When to stop a training loop of the user's own, with a progress bar, and where a NaN comes from."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_flows._checks import (
    Settings,
    check_call,
    check_positive,
    check_type,
    checked,
    constant,
    integer,
    optional,
    shown,
)
from pyro_flows.distributed import DistributedOptim
from pyro_flows.models.checks import where_not_finite
from pyro_flows.models.traces import Call
from pyro_flows.training.batches import Batches, check_batches
from pyro_flows.training.monitor import Monitor

__all__ = ["Convergence", "ConvergenceSettings", "until_converged"]


def _check_share(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is in (0, 0.5], so that there is room for two windows."""
    check_positive(owner, name, value)
    if value > 0.5:
        raise ValueError(f"{owner}: expected {name} to be a number in (0, 0.5], but got {shown(value)}.")


@dataclass(frozen=True)
class ConvergenceSettings(Settings):
    """The stopping rule of a loop.

    Attributes:
        min_window: Smallest number of steps of each of the two windows that are compared, >= 10.
        share: Length of a window as a share of all steps, in (0, 0.5], so that the comparison gets sharper the longer
            a run lasts.
        growth: Ratio of the numbers of steps at two checks, > 1.
        z_score: Standard errors that the loss has to fall by from one window to the next for training to go on.
        min_gain: Nats that it has to fall by, > 0.
        num_checks: Number of checks in a row at which it did not fall, >= 1.
        max_failures: Number of steps in a row without a finite loss after which training gives up, >= 1.
        snapshot_interval: Number of steps between two copies of the parameters, by which the cause of a NaN is found.
        num_draws: Number of draws at which it is looked for.
    """

    min_window: int = constant(400, integer(10))
    share: float = constant(0.25, _check_share)
    growth: float = constant(1.2, partial(check_positive, low=1))
    z_score: float = 0.5
    min_gain: float = 0.01
    num_checks: int = 2
    max_failures: int = 10
    snapshot_interval: int = constant(10, integer(1))
    num_draws: int = 100


def _check_loss(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a number, or a tensor of one, which need not be finite."""
    if torch.is_tensor(value) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: expected {name} to be a number, but got {shown(value)}.")


def _check_svi(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` takes steps on data, which an optimizer does not."""
    no_data = isinstance(value, (type, torch.optim.Optimizer))
    if no_data or not callable(getattr(value, "step", None)):
        raise TypeError(
            f"{owner}: expected {name} to be an SVI, or to have a method step(*args, **kwargs), but got {shown(value)}."
            " Write SVI(model, guide, optim, Trace_ELBO())."
        )


_check_settings = optional(partial(check_type, kind=ConvergenceSettings))


class Convergence:
    """A stopping rule for noisy losses: training has converged when the median loss of the last quarter of all steps is
    below that of the quarter before by less than half a standard error, or by less than 0.01 nats, twice in a row.

    Losses that fall much slower than they scatter look flat at first: by 2 nats in 3000 steps, say, where they scatter
    by 3. More particles scatter less.

    Args:
        settings: Constants of the rule; None takes :class:`ConvergenceSettings`.

    Attributes:
        losses: All losses so far, without those that are not finite.
        gain: Nats that the loss fell by at the last check; infinity before the first.

    Example:
        >>> from pyro_flows import Convergence
        >>> rule = Convergence()
        >>> step = next(step for step in range(10_000) if rule.add(100.0 * 0.9**step))
        >>> step < 1000
        True
    """

    @checked(settings=_check_settings)
    def __init__(self, settings: ConvergenceSettings | None = None) -> None:
        self.settings = settings or ConvergenceSettings()
        self.losses: list[float] = []
        self.gain = math.inf
        self._next = 2 * self.settings.min_window
        self._num_flat = 0

    @checked(loss=_check_loss)
    def add(self, loss: float) -> bool:
        """Add the loss of a step, in nats; returns whether training has converged."""
        loss = float(loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        settings, count = self.settings, len(self.losses)
        if count < self._next:
            return False
        self._next = math.ceil(count * settings.growth)
        window = max(settings.min_window, int(count * settings.share))
        before, recent = self.losses[-2 * window : -window], self.losses[-window:]
        self.gain = statistics.median(before) - statistics.median(recent)
        error = math.hypot(_error_of_median(before), _error_of_median(recent))
        is_flat = self.gain < max(settings.min_gain, settings.z_score * error)
        self._num_flat = self._num_flat + 1 if is_flat else 0
        return self._num_flat >= settings.num_checks


def _error_of_median(values: list[float]) -> float:
    """Standard error, by the interquartile range and as for a normal: a mean would not withstand rare large losses."""
    low, _, high = statistics.quantiles(values, n=4)
    normal = statistics.NormalDist()
    return (high - low) / (2 * normal.inv_cdf(0.75)) * math.sqrt(math.pi / (2 * len(values)))


@checked(svi=_check_svi, args=check_batches, max_steps=integer(1), settings=_check_settings)
def until_converged(
    svi: Any,
    args: tuple[Any, ...] | Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_steps: int = 50_000,
    progress: bool = True,
    settings: ConvergenceSettings | None = None,
) -> Iterator[float]:
    """Steps of any ``SVI`` with a progress bar, until they gain no more: ``for loss in until_converged(svi, (x, y))``.

    The body of the loop is yours: schedulers, logs, ``break``. The rule is that of :class:`Convergence`. A
    decaying learning rate stops training by itself; leave the rule to constant ones.

    Args:
        svi: ``pyro.infer.SVI``, :class:`~pyro_flows.CompiledSVI`, or anything with ``step(*args, **kwargs)``.
        args: The model's arguments, as a tuple; or mini-batches, as for :func:`~pyro_flows.fit`.
        kwargs: The model's keyword arguments.
        max_steps: Largest number of steps, >= 1.
        progress: Whether to show a progress bar.
        settings: Constants of the rule; None takes :class:`ConvergenceSettings`.

    Yields:
        The loss of each step, in nats.

    Raises:
        TypeError: If an argument is of another type, ``svi`` or its model or guide does not take the arguments, or
            ``args`` is an iterator, which would be used up.
        ValueError: If a number is out of range, or there are no mini-batches.
        RuntimeError: If the parameters are no longer finite, or losses have not been for ten steps; names the sites of
            the model that have no finite log density at draws of the guide.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.optim import Adam
        >>> from pyro_flows import AutoFlowGuide, until_converged
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> guide = AutoFlowGuide(model)
        >>> svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
        >>> losses = list(until_converged(svi, (y,), progress=False))
        >>> len(losses) < 2000
        True
    """
    batches = Batches(args, kwargs, "until_converged")
    programs = {"model": svi.model, "guide": svi.guide} if isinstance(svi, SVI) else {}
    for name, program in {**programs, "svi.step": svi.step}.items():
        check_call("until_converged", name, program, *batches.first)
    return _steps(svi, batches, max_steps, progress, settings or ConvergenceSettings())


def _steps(
    svi: Any, batches: Batches, max_steps: int, progress: bool, settings: ConvergenceSettings
) -> Iterator[float]:
    rule = Convergence(settings)
    num_failures, point = 0, _parameters()
    shared = svi.optim if isinstance(getattr(svi, "optim", None), DistributedOptim) else None
    with Monitor(progress and (shared is None or shared.is_first)) as monitor:
        monitor.begin_cycle(None, 0, max_steps)
        for step in range(1, max_steps + 1):
            if num_failures == 0 and (not point or step % settings.snapshot_interval == 0):
                point = _parameters()
            args, kwargs = batches.next()
            loss = svi.step(*args, **kwargs)
            _check_loss("until_converged", "what svi.step returns", loss)
            # The same in all processes, which have to stop after the same step.
            loss = float(loss) if shared is None else shared.mean(float(loss))
            num_failures = 0 if math.isfinite(loss) else num_failures + 1
            lost = [name for name, value in _parameters().items() if not value.isfinite().all()] if num_failures else []
            if lost or num_failures >= settings.max_failures:
                raise RuntimeError(_cause(svi, Call(args, kwargs), step, lost, point, settings))
            has_converged = rule.add(loss)
            monitor.step(rule.losses, step)
            yield loss
            if has_converged:
                return


def _parameters() -> dict[str, Tensor]:
    """Copies of all unconstrained parameters in Pyro's store."""
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def _cause(
    svi: Any, call: Call, step: int, lost: list[str], point: Mapping[str, Tensor], settings: ConvergenceSettings
) -> str:
    """Error message for losses that are not finite; looks at the last parameters that were."""
    with torch.no_grad():
        for name, value in pyro.get_param_store().named_parameters():
            if lost and name in point and point[name].isfinite().all():
                value.copy_(point[name])
    where = ""
    if hasattr(svi, "model") and hasattr(svi, "guide"):
        where = where_not_finite(svi.model, svi.guide, call, settings.num_draws)
    what = f"parameter '{lost[0]}' is not finite after step {step}" if lost else f"losses are not up to step {step}"
    finite = "The log densities of all sites are finite at draws of the guide: look for what overflows in a gradient."
    cause = f"At draws of the guide, {where}." if where else finite
    restored = " The parameters of some steps before were restored." if lost else ""
    return (
        f"until_converged: expected finite losses, but {what}. {cause}{restored} Lower the learning rate, or bound "
        "what overflows."
    )
