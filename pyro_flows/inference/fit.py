# SPDX-License-Identifier: Apache-2.0
"""L4. :func:`fit`: trains any Pyro guide, and says how it went and when to believe it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import check_int, check_positive
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.guides.local_start import MiniBatch
from pyro_flows.inference.objective import Batches, Estimate, Objective
from pyro_flows.inference.steps import Trainer

__all__ = ["FitResult", "fit"]

# A run is a few cycles, in each of which the rate falls to a hundredth; the next one is as long as all before it. With
# mini-batches the first is longer, to get rid of the noise that it begins with.
CYCLE, CYCLE_MINIBATCH = 250, 1000
MAX_STEPS = 8000
# Steps before a cycle that gains nothing is the last.
PATIENCE = 500
# A cycle whose gain is below this, in nats, or below so much for every local latent, or below two standard errors, is
# the last.
MIN_GAIN, MIN_LOCAL_GAIN = 0.005, 1e-4
# Half the variance of log weights is the gap, where they are nearly constant; below this nothing is left to gain.
NEGLIGIBLE_GAP = 1e-3
# Learning rates: from a warm start, in many dimensions, without one, and for networks that read data.
RATE_WARM, RATE_WARM_MANY, RATE_COLD, RATE_AMORTIZED = 2e-2, 1e-2, 1e-2, 2e-3
MANY_DIMENSIONS = 50
# Mini-batches that items are warm-started from.
WARM_CALLS = 1000
PARTICLES_VECTORIZED, PARTICLES_MINIBATCH, FEW_PARTICLES = 128, 8, 2
# Mini-batches with more items than this take few particles.
MANY_ITEMS = 1000


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` did; prints as a person reads it.

    Attributes:
        elbo: ELBO of the guide as it is now, from fresh draws, in nats.
        elbo_se: Its standard error (over mini-batches too, if there are any).
        start_elbo: ELBO at the start, from as many draws.
        steps: Number of optimiser steps.
        seconds: Wall time.
        kept: ``"flow"`` (the trained guide) or ``"start"``, where training did not gain anything.
        reason: Why it stopped, in words.
        skipped: Steps that were left out because the gradient was not finite or out of all proportion.
        rollbacks: Times that training was taken back to its best point, with half the rate.
        num_particles: Draws a step.
        learning_rate: Peak rate of the first cycle.
        losses: Negative ELBO estimates, one a step.
    """

    elbo: float
    elbo_se: float
    start_elbo: float
    steps: int
    seconds: float
    kept: str
    reason: str
    skipped: int
    rollbacks: int
    num_particles: int
    learning_rate: float
    losses: tuple[float, ...]

    def __repr__(self) -> str:
        return f"FitResult(elbo={self.elbo:.4g}, elbo_se={self.elbo_se:.2g}, steps={self.steps}, kept={self.kept!r})"

    def __str__(self) -> str:
        lines = [
            f"ELBO {self.elbo:.3f} +/- {self.elbo_se:.3f} nats (start {self.start_elbo:.3f}; kept: the {self.kept})",
            f"{self.steps} steps x {self.num_particles} draws in {self.seconds:.1f} s, rate {self.learning_rate:g}; "
            f"stopped: {self.reason}",
        ]
        if self.skipped or self.rollbacks:
            lines.append(f"{self.skipped} steps skipped, {self.rollbacks} times rolled back")
        lines.append(self.advice)
        return "\n".join(lines)

    @property
    def advice(self) -> str:
        """What to do next, in a sentence."""
        if self.kept == "start" and self.steps:
            return "Next: training gained nothing over the Gaussian start; compare another family, such as flow='iaf'."
        if self.rollbacks > 1:
            return f"Next: training was unstable; try learning_rate={self.learning_rate / 4:g}."
        if self.reason.startswith("all"):
            return "Next: call fit again; it goes on from here."
        return "Next: print(diagnose(model, guide, args)) says how far from the posterior it is."


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] | Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_steps: int | None = None,
    num_particles: int | None = None,
    learning_rate: float | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> FitResult:
    """Train a guide; everything that is None is chosen from the model.

    An :class:`~pyro_flows.AutoFlowGuide` that has not seen data yet gets a warm start where it can have one; a guide
    that has goes on from where it is. Adam with gradients clipped at twice their running median norm, in cycles of a
    falling rate, until a cycle gains less than two standard errors. What diverges is rolled back and counted. In the
    end the trained guide has to beat its own start on fresh draws, or the start is restored. Ctrl-C stops early
    and keeps the best so far.

    With mini-batches, parameters of items move when their item is seen (lazy Adam), gradients have a control variate
    (:meth:`~pyro_flows.flows.FlowDistribution.centered`), and estimates are compared mini-batch by mini-batch, so that
    the data's share in their noise cancels; there, only a significant loss to the start counts as one.

    Args:
        model: Any Pyro model; its own parameters (a decoder) are trained along.
        guide: Any Pyro guide.
        args: The model's arguments, as a tuple; or mini-batches: a list of tuples or anything else that can be
            iterated over again and again, such as a ``DataLoader``.
        kwargs: The model's keyword arguments, the same for each mini-batch.
        num_steps: Number of steps, >= 1; None stops by the rule above, after 8000 at most.
        num_particles: Draws a step, >= 1.
        learning_rate: Peak rate of Adam, > 0.
        progress: Whether to show a bar.
        seed: Makes the run repeatable and leaves torch's global random state alone.

    Raises:
        TypeError: If ``args`` is an iterator, which would be used up.
        ValueError: If a number is out of range, or the mini-batches are none.
        RuntimeError: If no step of the first ten has a finite loss.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_flows import AutoFlowGuide, fit
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> result = fit(model, AutoFlowGuide(model), (torch.tensor([1.0, 2.0, 3.0]),), seed=0, progress=False)
        >>> f"{result.elbo:.3f}"
        '-6.630'
    """
    for name, value in (("num_steps", num_steps), ("num_particles", num_particles)):
        if value is not None:
            check_int("fit", name, value, 1)
    if learning_rate is not None:
        check_positive("fit", "learning_rate", learning_rate)
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        batches = Batches(args, kwargs)
        warm = _warm_start(guide, batches, progress=progress)
        objective = Objective(model, guide, batches)
        if num_particles is None:
            num_particles = PARTICLES_MINIBATCH if objective.subsampled else PARTICLES_VECTORIZED
            if not objective.vectorized or (objective.subsampled and objective.num_items > MANY_ITEMS):
                num_particles = FEW_PARTICLES
        rate = learning_rate or _default_rate(guide, warm=warm)
        with sparse_tables(guide, enabled=objective.subsampled) as tables:
            trainer = Trainer(objective, num_particles, rate, tables)
            return _run(trainer, num_steps, progress=progress, begin=begin)


def _warm_start(guide: Callable[..., Any], batches: Batches, *, progress: bool) -> bool:
    if not isinstance(guide, AutoFlowGuide) or guide.prototype_trace is not None:
        return False
    calls = batches.one_pass(WARM_CALLS)
    guide.setup(*calls[0][0], **calls[0][1])
    if len(calls) > 1 and not len(guide.posterior.local):
        return False  # a part of the data would make too wide a start, and a wrong one

    def watch(passed: Iterator[MiniBatch], title: str) -> Iterable[MiniBatch]:
        total = len(calls) if batches.many else None  # a plate that draws its own mini-batches has so many as it has
        return tqdm(passed, desc=f"warm start, {title}", total=total, disable=not progress, mininterval=0.5)

    try:
        guide.warm_start_on(calls, watch)
    except NotImplementedError:  # amortized plates, enumerated sites
        return False
    return True


@contextmanager
def sparse_tables(guide: Callable[..., Any], *, enabled: bool) -> Iterator[list[Tensor]]:
    """The items' tables of a guide, whose gradients are sparse here."""
    blocks = list(guide.posterior.blocks()) if enabled and isinstance(guide, AutoFlowGuide) else []
    blocks = [block for block in blocks if block.items is not None]
    try:
        for block in blocks:
            block.sparse = True
        yield [block.items for block in blocks]
    finally:
        for block in blocks:
            block.sparse = False


def _default_rate(guide: Callable[..., Any], *, warm: bool) -> float:
    if warm:
        assert isinstance(guide, AutoFlowGuide)
        return RATE_WARM if guide.latent_dim <= MANY_DIMENSIONS else RATE_WARM_MANY
    amortized = isinstance(guide, AutoFlowGuide) and len(guide.posterior.encoders) > 0
    return RATE_AMORTIZED if amortized else RATE_COLD


def _run(trainer: Trainer, num_steps: int | None, *, progress: bool, begin: float) -> FitResult:
    objective = trainer.objective
    start = trainer.snapshot()
    # With mini-batches the same noise each time: differences between them would drown any gain.
    seed = int(torch.randint(2**31, ())) if objective.subsampled else None
    at_start = best = objective.estimate(seed)
    best_point = start
    lengths = [num_steps or (CYCLE_MINIBATCH if objective.subsampled else CYCLE)]
    while num_steps is None and sum(lengths) < MAX_STEPS:
        lengths.append(sum(lengths))
    reason = f"all {sum(lengths)} steps done"
    if num_steps is None and not objective.trains_model and at_start.variance / 2 < NEGLIGIBLE_GAP:
        lengths, reason = [], "the start is the posterior, as far as its draws can tell"
    rate = trainer.peak_rate
    min_gain = max(MIN_GAIN, MIN_LOCAL_GAIN * _num_local(objective.guide))
    try:
        for cycle, length in enumerate(lengths):
            done = sum(lengths[:cycle])
            bar = tqdm(total=length, desc=f"cycle {cycle + 1}", disable=not progress, mininterval=0.5)
            with bar:
                trainer.cycle(length, rate, partial(_advance, bar, trainer))
            now = objective.estimate(seed)
            gain, error = now.gain_over(best)
            if objective.trains_model or objective.prefers(now, best):
                best, best_point = now, trainer.snapshot()
            if num_steps is None and not objective.trains_model and now.variance / 2 < NEGLIGIBLE_GAP:
                reason = f"the log weights of its draws vary by {math.sqrt(now.variance):.3f} nats, next to nothing"
                break
            if gain < -2 * error and not objective.trains_model:
                trainer.restore(best_point)
                trainer.rollbacks += 1
                rate /= 2
            elif num_steps is None and done >= PATIENCE and gain < max(min_gain, 2 * error):
                reason = f"the last {length} steps gained {max(gain, 0.0):.3f} nats, not more than noise"
                break
            rate /= 2
    except KeyboardInterrupt:
        reason = "interrupted"
        now = objective.estimate(seed)
        if objective.prefers(now, best):
            best, best_point = now, trainer.snapshot()
    trainer.restore(best_point)
    kept = "flow"
    if not objective.trains_model and best_point is not start:
        kept, best = _keep_the_better(trainer, best_point, start)
    elif best_point is start:
        kept = "start"
    return FitResult(
        elbo=best.mean,
        elbo_se=best.error,
        start_elbo=at_start.mean,
        steps=trainer.steps,
        seconds=time.perf_counter() - begin,
        kept=kept,
        reason=reason,
        skipped=trainer.skipped,
        rollbacks=trainer.rollbacks,
        num_particles=trainer.num_particles,
        learning_rate=trainer.peak_rate,
        losses=tuple(trainer.losses),
    )


def _num_local(guide: Callable[..., Any]) -> int:
    """Number of local latents that have parameters of their own."""
    blocks = guide.posterior.blocks() if isinstance(guide, AutoFlowGuide) else ()
    return sum(block.table.num_items * block.table.item_dim for block in blocks if block.items is not None)


def _keep_the_better(
    trainer: Trainer, trained: dict[Tensor, Tensor], start: dict[Tensor, Tensor]
) -> tuple[str, Estimate]:
    """Which of two points has the higher ELBO on fresh draws, from the same noise and mini-batches."""
    objective, seed = trainer.objective, int(torch.randint(2**31, ()))
    flow = objective.estimate(seed)
    trainer.restore(start)
    gaussian = objective.estimate(seed)
    if objective.prefers(flow, gaussian):
        trainer.restore(trained)
        return "flow", flow
    return "start", gaussian


def _advance(bar: Any, trainer: Trainer) -> None:
    bar.update()
    if trainer.steps % 50 == 0:
        recent = trainer.losses[-200:]
        half = len(recent) // 2
        trend = statistics.fmean(recent[:half] or [0.0]) - statistics.fmean(recent[half:] or [0.0])
        bar.set_postfix_str(f"ELBO {-statistics.fmean(recent[half:]):.3f}, trend {trend:+.3f}")
