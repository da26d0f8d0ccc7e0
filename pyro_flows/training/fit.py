# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`fit`: trains any Pyro guide, and says how it went."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import check_choice, check_int, check_positive
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.posterior.mini_batches import MiniBatch
from pyro_flows.training.batches import Batches
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.objective import EstimateSettings, Objective
from pyro_flows.training.schedule import Schedule, ScheduleSettings
from pyro_flows.training.trainer import Trainer, TrainerSettings

__all__ = ["FitResult", "FitSettings", "fit"]


@dataclass(frozen=True)
class FitSettings:
    """The constants of :func:`fit`: what it chooses where its arguments are None, and those of its parts.

    Values without a source are heuristics; ``tests/benchmarks/`` measures what they do together.

    Attributes:
        rate_warm: Learning rate from a warm start, > 0.
        rate_warm_many: The same for guides of more than ``many_dimensions``.
        rate_cold: Learning rate without a warm start, > 0.
        rate_annealed: Learning rate where modes are to be found, which lie far apart, > 0.
        rate_amortized: Learning rate of encoders, > 0.
        many_dimensions: Number of global latents.
        warm_start_batches: Number of mini-batches that items are warm-started from, at most.
        min_particles: Particles of a step that sees all of the data, >= 1: as many as share its operations at next to
            no cost, within this and ``max_particles``.
        max_particles: See there.
        values_per_step: Number of values of sites, and of elements of a triangular matrix that each draw has, that a
            step takes at next to no cost.
        minibatch_particles: Particles of a step in mini-batches, >= 1.
        few_particles: Particles of a step where they run one by one, or in mini-batches of more than ``many_items``,
            >= 1.
        many_items: Size of the largest latent site in a mini-batch.
        checkpoint_interval: Seconds between two checkpoints within a cycle, >= 0.
        estimates: Of the ELBO.
        trainer: Of optimizer steps.
        schedule: Of cycles and convergence.
    """

    rate_warm: float = 2e-2
    rate_warm_many: float = 1e-2
    rate_cold: float = 1e-2
    rate_annealed: float = 4e-2
    rate_amortized: float = 2e-3
    many_dimensions: int = 50
    warm_start_batches: int = 1000
    min_particles: int = 16
    max_particles: int = 128
    values_per_step: int = 2**16
    minibatch_particles: int = 8
    few_particles: int = 2
    many_items: int = 1000
    checkpoint_interval: float = 60.0
    estimates: EstimateSettings = field(default_factory=EstimateSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)

    def learning_rate(self, guide: Callable[..., Any], *, warm: bool, anneal: bool) -> float:
        """Peak learning rate of the first cycle.

        Args:
            guide: The guide.
            warm: Whether it had a warm start.
            anneal: Whether the log joint is flattened at first.
        """
        if warm:
            assert isinstance(guide, AutoFlowGuide)
            return self.rate_warm if guide.latent_dim <= self.many_dimensions else self.rate_warm_many
        amortized = isinstance(guide, AutoFlowGuide) and len(guide.posterior.encoders) > 0
        return self.rate_amortized if amortized else self.rate_annealed if anneal else self.rate_cold

    def num_particles(self, objective: Objective) -> int:
        """Draws a step."""
        if not objective.vectorized or (objective.subsampled and objective.num_items > self.many_items):
            return self.few_particles
        if objective.subsampled:
            return self.minibatch_particles
        joint = objective.guide.posterior.joint if isinstance(objective.guide, AutoFlowGuide) else None
        matrices = 0 if joint is None else joint.flow.head.factored_entries
        affordable = self.values_per_step // (objective.num_values + matrices // 2)
        return max(self.min_particles, min(self.max_particles, affordable))


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` did; prints as a summary.

    Attributes:
        elbo: ELBO of the guide as it is now, from fresh draws, in nats.
        elbo_se: Its standard error (over mini-batches too, if there are any).
        start_elbo: ELBO at the start, from as many draws.
        steps: Number of optimizer steps.
        seconds: Wall time.
        kept: ``"flow"`` (the trained guide) or ``"start"``, where training did not gain anything.
        reason: Why it stopped.
        skipped: Number of steps that were left out since the gradient was not finite, or 20 times its running median.
        rollbacks: Number of times that, on divergence, the best parameters were restored and the learning rate halved.
        num_particles: Draws a step.
        learning_rate: Peak learning rate of the first cycle.
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
            f"{self.steps} steps x {self.num_particles} draws in {self.seconds:.1f} s, "
            f"learning rate {self.learning_rate:g}; stopped: {self.reason}",
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
    settings: FitSettings | None = None,
) -> FitResult:
    """Train a guide; everything that is None is chosen from the model.

    An :class:`~pyro_flows.AutoFlowGuide` that has not seen data yet gets a warm start where it can have one; a guide
    that has goes on from where it is. Adam with gradients clipped at twice their running median norm, in learning-rate
    cycles with decay, each as long as all previous ones, until log weights hardly vary or the ELBO gain of a cycle is
    below tolerance: 0.005 nats in 250 steps, or two standard errors. On divergence the best parameters are restored,
    and the learning rate is halved. In the end the trained guide has to have a higher ELBO than it had before, on
    fresh draws, or its initial parameters are restored. Ctrl-C stops early and keeps the best parameters so far.

    With mini-batches, parameters of items move when their item is seen (lazy Adam), gradients have a control variate
    (:meth:`~pyro_flows.flows.FlowDistribution.centered`), and estimates are compared mini-batch by mini-batch, so that
    the data's share in their variance cancels; there, only a significantly lower ELBO counts as lower.

    Args:
        model: Any Pyro model; its own parameters (a decoder) are trained along.
        guide: Any Pyro guide.
        args: The model's arguments, as a tuple; or mini-batches: a list of tuples or anything else that can be
            iterated over again and again, such as a ``DataLoader``.
        kwargs: The model's keyword arguments, the same for each mini-batch.
        num_steps: Number of steps, >= 1; None stops on convergence, after 4000 at most, or 8000 in
            mini-batches and annealed.
        num_particles: Draws a step, >= 1.
        learning_rate: Peak learning rate of Adam, > 0.
        anneal: Whether to flatten the log joint at first, for a posterior of several modes: the guide sees them all
            before it converges. There is no warm start then, which would choose one.
        compile: Whether to compile a step (see :class:`CompiledSVI`): True, False, or ``"auto"``, where eager steps
            would take longer than the compiler does.
        progress: Whether to show a bar.
        seed: Makes the run repeatable and leaves torch's global random state alone.
        checkpoint: A file that is written once a minute and at the end. If it is there, the run that wrote it goes on:
            call again with the same model, guide and options. A run that was done is not trained again.
        settings: Constants of the algorithm, which rarely need a change; None takes :class:`FitSettings`.

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
        settings = settings or FitSettings()
        batches = Batches(args, kwargs)
        file = Checkpoint(checkpoint, settings.checkpoint_interval)
        warm = not (anneal or file.exists) and _warm_start(model, guide, batches, settings, progress=progress)
        objective = Objective(model, guide, batches, settings.estimates)
        if num_particles is None:
            num_particles = settings.num_particles(objective)
        rate = learning_rate or settings.learning_rate(guide, warm=warm, anneal=anneal)
        with without_step_limit(guide), sparse_tables(guide, enabled=objective.subsampled) as tables:
            trainer = Trainer(objective, num_particles, rate, tables, compile, settings.trainer)
            schedule = Schedule(trainer, num_steps, file, anneal=anneal, progress=progress, settings=settings.schedule)
            try:
                kept, best = schedule.finish(schedule.train())
            finally:
                objective.release()
    state = trainer.state
    return FitResult(
        elbo=best.mean,
        elbo_se=best.error,
        start_elbo=schedule.initial_estimate.mean,
        steps=state.num_steps,
        seconds=time.perf_counter() - begin,
        kept=kept,
        reason=state.reason,
        skipped=state.num_skipped,
        rollbacks=state.num_rollbacks,
        num_particles=num_particles,
        learning_rate=rate,
        losses=tuple(state.losses),
        obstacle=objective.obstacle,
    )


def _warm_start(
    model: Callable[..., Any], guide: Callable[..., Any], batches: Batches, settings: FitSettings, *, progress: bool
) -> bool:
    """Warm-start a flow guide that has not seen data yet; returns whether it has been."""
    if not isinstance(guide, AutoFlowGuide) or guide.prototype_trace is not None:
        return False
    calls = batches.one_pass(settings.warm_start_batches, settings.estimates.max_elements)
    guide.setup(*calls[0][0], **calls[0][1])
    if len(calls) > 1 and not len(guide.posterior.local):
        return False  # the posterior given a part of the data is too wide, and elsewhere

    def watch(passed: Iterator[MiniBatch], title: str) -> Iterable[MiniBatch]:
        total = len(calls) if batches.many else None  # a plate that draws its own mini-batches has so many as it has
        return tqdm(passed, desc=f"warm start, {title}", total=total, disable=not progress, mininterval=0.5)

    try:
        guide.warm_start_on(calls, watch, model)
    except NotImplementedError:  # amortized plates, say
        return False
    return True


@contextmanager
def without_step_limit(guide: Callable[..., Any]) -> Iterator[None]:
    """A guide whose steps are not limited: the learning rates here suit a flow, and divergence is rolled back."""
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
