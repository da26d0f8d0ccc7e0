# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`fit`: trains any Pyro guide, and says how it went and when to believe it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import check_choice, check_int, check_positive
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.posterior.mini_batches import MiniBatch
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.objective import Batches, Objective
from pyro_flows.training.schedule import Run
from pyro_flows.training.trainer import Trainer

__all__ = ["FitResult", "fit"]

# Learning rates: from a warm start, in many dimensions, without one, without one because modes are to be found, which
# lie far apart, and for networks that read data.
RATE_WARM, RATE_WARM_MANY, RATE_COLD, RATE_ANNEALED, RATE_AMORTIZED = 2e-2, 1e-2, 1e-2, 4e-2, 2e-3
MANY_DIMENSIONS = 50
# Mini-batches that items are warm-started from.
WARM_CALLS = 1000
# Particles of a step: as many as come for next to nothing where they share its operations, that is with so many values
# of sites in all, or elements of a triangular matrix that each draw has, within limits; in mini-batches; and of models
# that run one at a time, or have more than so many items in a mini-batch.
MIN_PARTICLES, MAX_PARTICLES, VALUES = 16, 128, 2**16
PARTICLES_MINIBATCH, FEW_PARTICLES, MANY_ITEMS = 8, 2, 1000


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
        obstacle: What keeps the draws of a step from sharing a run of the model, with the line; empty if nothing does.
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
    obstacle: str = ""

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
        if self.obstacle:
            lines.append(f"Draws are run one by one, and few, since {self.obstacle}")
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
    anneal: bool = False,
    compile: bool | str = "auto",
    progress: bool = True,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FitResult:
    """Train a guide; everything that is None is chosen from the model.

    An :class:`~pyro_flows.AutoFlowGuide` that has not seen data yet gets a warm start where it can have one; a guide
    that has goes on from where it is. Adam with gradients clipped at twice their running median norm, in cycles of a
    falling rate, until log weights hardly vary or a cycle gains too little for its length: 0.005 nats in 250 steps, or
    two standard errors. What diverges is rolled back and counted. In the end the trained guide has to beat its own
    start on fresh draws, or the start is restored. Ctrl-C stops early and keeps the best so far.

    With mini-batches, parameters of items move when their item is seen (lazy Adam), gradients have a control variate
    (:meth:`~pyro_flows.flows.FlowDistribution.centered`), and estimates are compared mini-batch by mini-batch, so that
    the data's share in their noise cancels; there, only a significant loss to the start counts as one.

    Args:
        model: Any Pyro model; its own parameters (a decoder) are trained along.
        guide: Any Pyro guide.
        args: The model's arguments, as a tuple; or mini-batches: a list of tuples or anything else that can be
            iterated over again and again, such as a ``DataLoader``.
        kwargs: The model's keyword arguments, the same for each mini-batch.
        num_steps: Number of steps, >= 1; None stops by the rule above, after 4000 at most, or 8000 in
            mini-batches and annealed.
        num_particles: Draws a step, >= 1.
        learning_rate: Peak rate of Adam, > 0.
        anneal: Whether to flatten the log joint at first, for a posterior of several modes: the guide sees them all
            before it settles. There is no warm start then, which would choose one.
        compile: Whether to compile a step (see :class:`CompiledSVI`): True, False, or ``"auto"``, where eager steps
            would take longer than the compiler does.
        progress: Whether to show a bar.
        seed: Makes the run repeatable and leaves torch's global random state alone.
        checkpoint: A file that is written once a minute and at the end. If it is there, the run that wrote it goes on:
            call again with the same model, guide and options. A run that was done is not trained again.

    Raises:
        TypeError: If ``args`` is an iterator, which would be used up.
        ValueError: If a number is out of range, the mini-batches are none, or the checkpoint is of other parameters.
        ValueError: If observed values are not finite or outside their support; if model and guide were swapped, or the
            guide is another model's, or of data of another size.
        RuntimeError: If the model has no finite density where the guide starts; names the sites.
        Exception: Whatever the model raises in plain runs, and Pyro about the shapes of its sites.

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
    check_choice("fit", "compile", compile, (True, False, "auto"))
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        batches = Batches(args, kwargs)
        record = Checkpoint(checkpoint)
        warm = not (anneal or record.exists) and _warm_start(model, guide, batches, progress=progress)
        objective = Objective(model, guide, batches)
        if num_particles is None:
            num_particles = _default_particles(objective)
        rate = learning_rate or _default_rate(guide, warm=warm, anneal=anneal)
        with own_pace(guide), sparse_tables(guide, enabled=objective.subsampled) as tables:
            trainer = Trainer(objective, num_particles, rate, tables, compile)
            run = Run(trainer, num_steps, record, anneal=anneal, progress=progress)
            try:
                kept, best = run.finish(run.train())
            finally:
                objective.release()
    return FitResult(
        elbo=best.mean,
        elbo_se=best.error,
        start_elbo=run.start_estimate.mean,
        steps=trainer.steps,
        seconds=time.perf_counter() - begin,
        kept=kept,
        reason=run.reason,
        skipped=trainer.skipped,
        rollbacks=trainer.rollbacks,
        num_particles=trainer.num_particles,
        learning_rate=trainer.peak_rate,
        losses=tuple(trainer.losses),
        obstacle=objective.obstacle,
    )


def _warm_start(model: Callable[..., Any], guide: Callable[..., Any], batches: Batches, *, progress: bool) -> bool:
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
        guide.warm_start_on(calls, watch, model)
    except NotImplementedError:  # amortized plates, say
        return False
    return True


def _default_particles(objective: Objective) -> int:
    if not objective.vectorized or (objective.subsampled and objective.num_items > MANY_ITEMS):
        return FEW_PARTICLES
    if objective.subsampled:
        return PARTICLES_MINIBATCH
    joint = objective.guide.posterior.joint if isinstance(objective.guide, AutoFlowGuide) else None
    matrices = 0 if joint is None else joint.flow.head.factored_entries
    return max(MIN_PARTICLES, min(MAX_PARTICLES, VALUES // (objective.num_values + matrices // 2)))


@contextmanager
def own_pace(guide: Callable[..., Any]) -> Iterator[None]:
    """A guide whose steps are not limited: the rates here suit a flow, and what diverges is taken back."""
    parts = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    flows = [part for part in parts if isinstance(part, AutoFlowGuide)]  # several in an AutoGuideList
    try:
        for flow in flows:
            flow.limits_steps = False
            flow.step_limit.forget()
        yield
    finally:
        for flow in flows:
            flow.limits_steps = True
            flow.step_limit.forget()


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


def _default_rate(guide: Callable[..., Any], *, warm: bool, anneal: bool) -> float:
    if warm:
        assert isinstance(guide, AutoFlowGuide)
        return RATE_WARM if guide.latent_dim <= MANY_DIMENSIONS else RATE_WARM_MANY
    amortized = isinstance(guide, AutoFlowGuide) and len(guide.posterior.encoders) > 0
    return RATE_AMORTIZED if amortized else RATE_ANNEALED if anneal else RATE_COLD
