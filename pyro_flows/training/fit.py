# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`fit`: trains any Pyro guide and reports the result."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows._checks import (
    Settings,
    check_bool,
    check_call,
    check_choice,
    check_path,
    check_positive,
    check_type,
    checked,
    integer,
    optional,
)
from pyro_flows._threads import one_at_a_time
from pyro_flows.diagnostics import Diagnosis
from pyro_flows.diagnostics.report import NOT_KNOWN
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.precision import may_be_rounded
from pyro_flows.models.traces import Call, run_quietly, sample_nodes
from pyro_flows.posterior.mini_batches import MiniBatch
from pyro_flows.training.batches import Batches, check_batches
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.monitor import Callback, Monitor
from pyro_flows.training.objective import EstimateSettings, Objective
from pyro_flows.training.optimizers import peak_rate, resolve_optimizer
from pyro_flows.training.schedule import Schedule, ScheduleSettings
from pyro_flows.training.trainer import Trainer, TrainerSettings
from pyro_flows.training.verdict import VerdictSettings, first_verdict

__all__ = ["FitResult", "FitSettings", "fit"]


@dataclass(frozen=True)
class FitSettings(Settings):
    """Constants of :func:`fit`: values of its arguments where these are None, and constants of its parts.

    Values without a source are heuristics; ``tests/benchmarks/`` measures their joint effect.

    Attributes:
        rate_warm: Learning rate from a warm start, > 0.
        rate_warm_many: The same for guides of more than ``many_dimensions`` dimensions.
        rate_cold: Learning rate without a warm start, > 0.
        rate_annealed: Learning rate with annealing, which has to find modes that lie far apart, > 0.
        rate_amortized: Learning rate of encoders, > 0.
        many_dimensions: Number of global latents above which ``rate_warm_many`` holds.
        warm_start_batches: Number of mini-batches from which local latents are warm-started, at most.
        min_particles: Smallest number of particles per step on the full data, >= 1. Between this and
            ``max_particles``, a step has as many particles as can share its operations at next to no cost.
        max_particles: Largest number of particles per step on the full data, >= ``min_particles``.
        values_per_step: Number of values of sites, and of elements of a triangular matrix that each draw has, that a
            step takes at next to no cost.
        minibatch_particles: Particles per step with mini-batches, >= 1.
        few_particles: Particles per step where they run one by one, or with mini-batches of more than ``many_items``,
            >= 1.
        many_items: Size of the largest latent site in a mini-batch.
        checkpoint_interval: Seconds between two checkpoints within a cycle, >= 0.
        estimates: Settings of ELBO estimates.
        trainer: Settings of optimizer steps.
        verdict: Settings of the first verdict.
        schedule: Settings of learning-rate cycles and convergence.
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
    verdict: VerdictSettings = field(default_factory=VerdictSettings)
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
        """Number of particles per step."""
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
    """Result of :func:`fit`; prints as a summary.

    Attributes:
        elbo: ELBO of the guide as it is now, from fresh draws, in nats.
        elbo_se: Its standard error (over mini-batches too, if there are any).
        start_elbo: ELBO of the initial guide, after the warm start if there was one, from as many draws.
        steps: Number of optimizer steps.
        seconds: Wall time.
        kept: ``"flow"`` (the trained guide), or ``"start"`` (the initial guide) where training did not improve the
            ELBO.
        reason: Why training stopped.
        skipped: Number of skipped steps, whose gradient was not finite or above 20 times its running median norm.
        rollbacks: Number of times that, on divergence, the best parameters were restored and the learning rate halved.
        num_particles: Number of particles per step.
        learning_rate: Peak learning rate of the first cycle.
        losses: Negative ELBO estimates in nats, one per step.
        is_point: Whether the guide is a point, as AutoDelta, so that ``elbo`` is the log joint density there.
        obstacle: Reason why the particles of a step cannot share a run of the model, with the line of the model; empty
            if they can.
        skipped_at: The sites without a finite log density at a draw like those of the first skipped step; empty if none
            was found.
        diagnosis: A first verdict, by the weights of fresh draws, without the search for lost modes; None with
            mini-batches, where draws cannot share a run, and where the guide has no density.
        dtype: Precision of the guide, in which everything was computed.
        rounding: What float32 is the reason for, such as skipped steps, and what to do; empty if nothing is.
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
    is_point: bool = False
    dtype: torch.dtype | None = None
    rounding: str = ""
    skipped_at: str = ""
    diagnosis: Diagnosis | None = None

    @property
    def gap(self) -> float:
        """Estimated KL divergence from the posterior, in nats; NaN without a diagnosis."""
        return math.nan if self.diagnosis is None else self.diagnosis.gap

    @property
    def khat(self) -> float:
        """Tail shape of the importance weights; NaN without a diagnosis."""
        return math.nan if self.diagnosis is None else self.diagnosis.khat

    @property
    def verdict(self) -> str:
        """In words, as :class:`~pyro_flows.Diagnosis` has it; ``"not known"`` without a diagnosis."""
        return NOT_KNOWN if self.diagnosis is None else self.diagnosis.verdict

    def __repr__(self) -> str:
        return (
            f"FitResult(elbo={self.elbo:.4g}, elbo_se={self.elbo_se:.2g}, steps={self.steps}, kept={self.kept!r}, "
            f"verdict={self.verdict!r})"
        )

    def __str__(self) -> str:
        what = "Log joint at a point" if self.is_point else "ELBO"
        lines = [
            f"{what} {self.elbo:.3f} +/- {self.elbo_se:.3f} nats (start {self.start_elbo:.3f}; kept: the {self.kept})",
            f"{self.steps} steps x {self.num_particles} draws in {self.seconds:.1f} s, "
            f"learning rate {self.learning_rate:g}; stopped: {self.reason}",
        ]
        if self.skipped or self.rollbacks:
            where = f" (at a draw where {self.skipped_at})" if self.skipped_at else ""
            lines.append(f"{self.skipped} steps skipped{where}, {self.rollbacks} times rolled back")
        if self.obstacle:
            lines.append(f"Draws are run one by one, and few, since {self.obstacle}")
        if self.diagnosis is not None:
            verdict, reason = self.verdict, self.diagnosis.reason
            found = f"gap {self.gap:.3f} +/- {self.diagnosis.log_evidence_se:.3f} nats, k-hat {self.khat:.2f}"
            lines.append(f"{verdict[0].upper()}{verdict[1:]} ({found}): {reason}")
        if self.rounding:
            lines.append(self.rounding)
        lines.append(self.advice)
        return "\n".join(lines)

    @property
    def advice(self) -> str:
        """Recommended next step, in a sentence."""
        if not math.isfinite(self.elbo):
            return (
                "Next: the ELBO is minus infinity, since the model has no density at some draws or data. Look for data "
                "that are not finite; print(diagnose(model, guide, args)) says at which share of the draws."
            )
        if self.skipped > max(10, self.steps / 2):
            return (
                f"Next: in {self.skipped} of {self.steps} steps the loss or its gradient was not finite, or far too "
                "large; print(diagnose(model, guide, args)) says at which share of the draws the model has no density."
            )
        if self.is_point:
            return "Next: a point has no uncertainty; AutoFlowGuide(model) has."
        if self.kept == "start" and self.steps:
            return "Next: training gained nothing over the Gaussian start; compare another family, such as flow='iaf'."
        if self.rollbacks > 1:
            return f"Next: training was unstable; try learning_rate={self.learning_rate / 4:g}."
        if self.reason.startswith("all"):
            return "Next: call fit again; it goes on from here."
        if self.diagnosis is None or self.diagnosis.trustworthy:
            more = "how far from the posterior it is" if self.diagnosis is None else "whether it has lost a mode"
            return f"Next: print(diagnose(model, guide, args)) says {more}."
        return f"Next: {self.diagnosis.advice}"


@checked(
    args=check_batches,
    num_steps=optional(integer(1)),
    num_particles=optional(integer(1)),
    learning_rate=optional(check_positive),
    anneal=check_bool,
    compile=partial(check_choice, choices=(True, False, "auto")),
    checkpoint=optional(check_path),
    settings=optional(partial(check_type, kind=FitSettings)),
)
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
    optim: Any = None,
    compile: bool | str = "auto",
    callback: Callback | None = None,
    progress: bool = True,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    settings: FitSettings | None = None,
) -> FitResult:
    """Train a guide; every option that is None is chosen from the model.

    An :class:`~pyro_flows.AutoFlowGuide` that has not seen data yet gets a warm start where the model allows one; a
    guide that has seen data continues from its current parameters. The optimizer is Adam, with gradients clipped at
    twice their running median norm, in learning-rate cycles with decay, each as long as all previous ones. Training
    has converged when the log weights hardly vary, or when the ELBO gain of a cycle is below tolerance: 0.005 nats in
    250 steps, or two standard errors. On divergence the best parameters are restored, and the learning rate is halved.
    If, in the end, the ELBO on fresh draws is not higher than that of the initial guide, the initial parameters are
    restored. Ctrl-C stops early and keeps the best parameters so far.

    With mini-batches, the parameters of a local latent are updated only in steps that see its item (lazy Adam),
    gradients have a control variate (:meth:`~pyro_flows.flows.FlowDistribution.centered`), and ELBO estimates are
    paired by mini-batch, so that the variance due to the data cancels; there, only a significantly lower ELBO counts
    as lower.

    Args:
        model: Any Pyro model; its own parameters (a decoder, say) are trained along with the guide.
        guide: Any Pyro guide.
        args: The model's arguments, as a tuple; or mini-batches: a list of tuples or anything else that can be
            iterated over again and again, such as a ``DataLoader``.
        kwargs: The model's keyword arguments, the same for each mini-batch.
        num_steps: Number of steps, >= 1; None stops on convergence, after 4000 steps at most, or 8000 with
            mini-batches or annealing.
        num_particles: Number of particles per step, >= 1.
        learning_rate: Peak learning rate of Adam, > 0.
        anneal: Whether to flatten the log joint at first, for a multimodal posterior, so that the guide finds all
            modes before it converges. There is no warm start then, since it would choose one mode.
        optim: The optimizer, in place of Adam: one of ``pyro.optim``, or a class or function that makes a
            ``torch.optim.Optimizer`` of parameters. Its learning rate, unless ``learning_rate`` is given, is the peak
            of the same cycles; tables of local latents have an Adam of their own still.
        compile: Whether to compile a step (see :class:`CompiledSVI`): True, False, or ``"auto"``, which compiles where
            that is expected to save time.
        callback: Called with a :class:`FitProgress` after each cycle; a true return value stops the run, which keeps
            the best parameters so far.
        progress: Whether to show a progress bar.
        seed: Random seed; makes the run reproducible and leaves torch's global random state alone.
        checkpoint: A file that is written once a minute and at the end. If the file exists, its run is resumed: call
            again with the same model, guide and options. A finished run is not trained again.
        settings: Constants of the algorithm, which rarely need a change; None takes :class:`FitSettings`.

    Raises:
        TypeError: If an argument is of another type, the model or the guide does not take the arguments, ``args`` is an
            iterator, which would be used up, or ``optim`` is no way to make an optimizer.
        ValueError: If a number is out of range, there are no mini-batches, or the checkpoint has other parameters.
        ValueError: If observed values are not finite or outside their support; if model and guide were swapped, or the
            guide is for another model or for data of another size.
        RuntimeError: If the model has no finite density at the initial guide; names the sites.
        Exception: Any exception that the model raises in plain runs, or that Pyro raises about the shapes of its sites.

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
    make = None if optim is None else resolve_optimizer(optim)
    isolated = torch.random.fork_rng(devices=[], enabled=seed is not None)
    with Monitor(progress, callback) as monitor, one_at_a_time("fit"), isolated:
        if seed is not None:
            torch.default_generator.manual_seed(int(seed))
        settings = settings or FitSettings()
        batches = Batches(args, kwargs)
        for name, program in (("model", model), ("guide", guide)):
            check_call("fit", name, program, *batches.first)
        file = Checkpoint(checkpoint, settings.checkpoint_interval)
        warm = not (anneal or file.exists) and _warm_start(model, guide, batches, settings, monitor)
        objective = Objective(model, guide, batches, settings.estimates)
        is_point = _is_point(guide, *batches.first)
        if num_particles is None:
            num_particles = settings.num_particles(objective)
        rate = learning_rate or (make and peak_rate(make)) or settings.learning_rate(guide, warm=warm, anneal=anneal)
        with without_step_limit(guide), sparse_tables(guide, enabled=objective.subsampled) as tables:
            trainer = Trainer(objective, num_particles, rate, tables, compile, settings.trainer, make)
            schedule = Schedule(trainer, num_steps, file, anneal=anneal, monitor=monitor, settings=settings.schedule)
            try:
                kept, best = schedule.finish(schedule.train())
            finally:
                objective.release()
        state = trainer.state
        is_suspect = state.num_skipped > 0 or may_be_rounded(best.mean)
        rounding = objective.rounding() if is_suspect else ""
    return FitResult(
        elbo=best.mean,
        elbo_se=best.error,
        start_elbo=schedule.initial_estimate.mean,
        steps=state.num_steps,
        seconds=time.perf_counter() - monitor.begin,
        kept=kept,
        reason=state.reason,
        skipped=state.num_skipped,
        rollbacks=state.num_rollbacks,
        num_particles=num_particles,
        learning_rate=rate,
        losses=tuple(state.losses),
        obstacle=objective.obstacle,
        skipped_at=trainer.skipped_at,
        diagnosis=None if objective.subsampled else first_verdict(model, guide, *batches.first, settings.verdict),
        dtype=objective.leaves[0].dtype if objective.leaves else None,
        rounding=rounding,
        is_point=is_point,
    )


def _is_point(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether all of a guide's sites are points."""
    with torch.random.fork_rng(devices=[]):
        nodes = sample_nodes(run_quietly(guide, Call(args, kwargs)))
    return bool(nodes) and all(isinstance(node["fn"], dist.Delta) for node in nodes.values())


def _warm_start(
    model: Callable[..., Any], guide: Callable[..., Any], batches: Batches, settings: FitSettings, monitor: Monitor
) -> bool:
    """Warm-start a flow guide that has not seen data yet; returns whether it was warm-started."""
    if not isinstance(guide, AutoFlowGuide) or guide.prototype_trace is not None:
        return False
    calls = batches.one_pass(settings.warm_start_batches, settings.estimates.max_elements)
    guide.setup(*calls[0][0], **calls[0][1])
    if len(calls) > 1 and not len(guide.posterior.local):
        return False  # the posterior given a part of the data is too wide, and in another place

    def watch(passed: Iterator[MiniBatch], title: str) -> Iterable[MiniBatch]:
        total = len(calls) if batches.many else None  # unknown for plates that draw their own
        return monitor.watch(passed, title, total)

    try:
        guide.warm_start_on(calls, watch, model)
    except NotImplementedError:  # amortized plates, say
        return False
    return True


@contextmanager
def without_step_limit(guide: Callable[..., Any]) -> Iterator[None]:
    """Lift a guide's step limit: the learning rates here suit a flow, and divergence is rolled back."""
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
    """The parameter tables of a guide's local latents, with sparse gradients within this context."""
    blocks = list(guide.posterior.blocks()) if enabled and isinstance(guide, AutoFlowGuide) else []
    blocks = [block for block in blocks if block.items is not None]
    try:
        for block in blocks:
            block.sparse = True
        yield [block.items for block in blocks]
    finally:
        for block in blocks:
            block.sparse = False
