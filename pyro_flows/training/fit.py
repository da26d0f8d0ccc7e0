# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`fit`: trains any Pyro guide and reports the result."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from pyro_flows._checks import (
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
from pyro_flows._random import seeded
from pyro_flows._threads import one_at_a_time
from pyro_flows.distributed.parameters import share_parameters
from pyro_flows.distributed.processes import Processes
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.precision import may_be_rounded
from pyro_flows.training.batches import Batches, check_batches
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.division import check_options, divided, have_same_data
from pyro_flows.training.interrupts import Interrupts
from pyro_flows.training.monitor import Callback, Monitor, check_callback
from pyro_flows.training.objective import Objective
from pyro_flows.training.optimizers import described, peak_rate, resolve_optimizer
from pyro_flows.training.options import RunOptions, changed_settings
from pyro_flows.training.preparation import (
    divided_tables,
    is_point,
    restored,
    set_up,
    sparse_tables,
    warm_start,
    without_step_limit,
)
from pyro_flows.training.random_state import capture_random_state, generators_of
from pyro_flows.training.result import FitResult
from pyro_flows.training.schedule import Schedule
from pyro_flows.training.settings import FitSettings
from pyro_flows.training.trainer import Trainer
from pyro_flows.training.verdict import first_verdict
from pyro_flows.training.weighted_fit import train_weighted
from pyro_flows.training.weighted_objective import ELBO, OBJECTIVES, WeightedObjective, check_weighted
from pyro_flows.training.wider import can_widen, gap_to_close, train_wider, widened

__all__ = ["fit"]


def _check_gap(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number > 0, or infinite."""
    if not (isinstance(value, float) and value == math.inf):
        check_positive(owner, name, value)


@checked(
    args=check_batches,
    num_steps=optional(integer(1)),
    num_particles=optional(integer(1)),
    learning_rate=optional(check_positive),
    target_gap=_check_gap,
    objective=partial(check_choice, choices=OBJECTIVES),
    max_seconds=optional(check_positive),
    anneal=check_bool,
    callback=optional(check_callback),
    compile=partial(check_choice, choices=(True, False, "auto")),
    checkpoint=optional(check_path),
    distributed=check_bool,
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
    max_seconds: float | None = None,
    target_gap: float = 0.05,
    objective: str = "elbo",
    anneal: bool = False,
    optim: Any = None,
    compile: bool | str = "auto",
    callback: Callback | None = None,
    progress: bool = True,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    distributed: bool = True,
    settings: FitSettings | None = None,
) -> FitResult:
    """Train a guide; every option that is None is chosen from the model.

    An :class:`~pyro_flows.AutoFlowGuide` that has not seen data yet gets a warm start where the model allows one; a
    guide that has seen data continues from its current parameters. The optimizer is Adam, with gradients clipped at
    twice their running median norm, in learning-rate cycles with decay, each as long as all previous ones. Training
    has converged when the log weights hardly vary, or when the ELBO gain of a cycle is below tolerance: 0.005 nats in
    250 steps, or two standard errors. On divergence the best parameters are restored, and the learning rate is halved.
    If, in the end, the ELBO on fresh draws is not higher than that of the initial guide, the initial parameters are
    restored. Ctrl-C stops after the step at hand and keeps the best parameters so far; a second Ctrl-C raises
    ``KeyboardInterrupt``, and keeps them too.

    With mini-batches, the parameters of a local latent are updated only in steps that see its item (lazy Adam),
    gradients have a control variate (:meth:`~pyro_flows.flows.FlowDistribution.centered`), and ELBO estimates are
    paired by mini-batch, so that the variance due to the data cancels; there, only a significantly lower ELBO counts
    as lower.

    In a program that ``torchrun`` starts several times, after ``torch.distributed.init_process_group``, the processes
    share the run: the particles of a step, or, with mini-batches, each takes one of its own. See :doc:`/distributed`.

    If the gap to the log evidence is still above ``target_gap``, by the weights of 10,000 draws, the flow becomes a
    wider one of that size which begins where the smaller one has ended, with four times the draws where that is
    affordable, and is trained until the gap is small enough, does not fall any more, or memory runs out
    (``FitResult.widening``). It does so early where gains of cycles, if they go on falling, would not add up to the
    gap. This needs the default family with 2 to 600 latents, besides leaves, and none of
    them in mini-batches. A later call goes on with the wider flow, in cycles as any other.

    Args:
        model: Any Pyro model; its own parameters (a decoder, say) are trained along with the guide.
        guide: Any Pyro guide.
        args: The model's arguments, as a tuple; or mini-batches: a list of tuples or anything else that can be
            iterated over again and again, such as a ``DataLoader``.
        kwargs: The model's keyword arguments, the same for each mini-batch.
        num_steps: Number of steps, >= 1; None stops on convergence, after 4000 steps at most, or 8000 with
            mini-batches or annealing; a wider flow takes 8000 more at most. Another objective than the ELBO takes as
            many in addition.
        num_particles: Number of particles per step, >= 1; a wider flow may take four times as many.
        learning_rate: Peak learning rate of Adam, > 0.
        max_seconds: Seconds after which the run stops as at Ctrl-C, > 0, counted from the call; a warm start, which
            takes some seconds, and the estimate at the end are not cut short. None sets no limit.
        target_gap: Gap in nats, > 0, that is small enough: above it, the flow becomes wider; with ``math.inf`` it never
            does. Not used if ``num_steps`` is given.
        objective: What to optimize: ``"elbo"``, the reverse KL; ``"importance_weighted"``, the bound of 16 draws; or
            ``"forward_kl"``, from the posterior to the guide, which then covers it, heavy tails included. The latter
            two go on from the ELBO's fit, so that importance weights are usable, and the result has the ELBO still. For
            few dimensions (:doc:`/training`).
        anneal: Whether to flatten the log joint at first, for a multimodal posterior, so that the guide finds all
            modes before it converges. There is no warm start then, since it would choose one mode.
        optim: The optimizer, in place of Adam: one of ``pyro.optim``, or a class or function that makes a
            ``torch.optim.Optimizer`` of parameters. Its learning rate, unless ``learning_rate`` is given, is the peak
            of the same cycles; tables of local latents have an Adam of their own still.
        compile: Whether to compile a step (see :class:`CompiledSVI`): True, False, or ``"auto"``, which compiles where
            that is expected to save time, by the number of operations of a step.
        callback: Called with a :class:`FitProgress` after each cycle; a true return value stops the run, which keeps
            the best parameters so far.
        progress: Whether to show a progress bar.
        seed: Random seed; makes the run reproducible and leaves torch's global random state alone.
        checkpoint: A file that is written at the beginning, once a minute and at the end. If it exists, its run is
            resumed, and becomes what it would have been without interruption: call again with the same model, guide,
            data and options, of which those that can be None may be left out. A finished run is not trained again,
            unless ``num_steps`` is larger than its number of steps. Mini-batches have to depend only on the random
            state at the beginning of a pass (of torch, NumPy and Python, or of a ``DataLoader``'s own generator).
        distributed: Whether the processes of ``torch.distributed``'s default group share the run, which all of them
            have to call; False trains in this process alone.
        settings: Constants of the algorithm, which rarely need a change; None takes :class:`FitSettings`.

    Raises:
        TypeError: If an argument is of another type, the model or the guide does not take the arguments, ``args`` is an
            iterator, which would be used up, or ``optim`` is no way to make an optimizer.
        ValueError: If a number is out of range, or there are no mini-batches; if the checkpoint can't be written, is
            not a run's file or was damaged, or is of a run of another model, guide, other data or options.
        ValueError: If observed values are not finite or outside their support; if model and guide were swapped, or the
            guide is for another model or for data of another size.
        ValueError: If processes of a group call with other options, or with parameters of other shapes.
        RuntimeError: If the model has no finite density at the initial guide; names the sites.
        RuntimeError: If another process of the group has ended.
        NotImplementedError: If another objective than the ELBO is asked for with mini-batches, on several processes,
            where draws cannot share a run of the model, or for a guide whose draws are points or not reparameterized.
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
    settings = settings or FitSettings()
    changed = changed_settings(settings)
    make = None if optim is None else resolve_optimizer(optim)
    own_rate = None if make is None or learning_rate is not None else peak_rate(make)
    processes = Processes.of_group("fit") if distributed else Processes("fit")
    asked = RunOptions(
        num_steps,
        num_particles,
        learning_rate,
        anneal,
        compile,
        seed,
        changed,
        described(make),
        settings.num_parts,
        objective,
        target_gap,
    )
    check_options(processes, asked, checkpoint)
    with Monitor(progress and processes.is_first, callback) as monitor, one_at_a_time("fit"):
        file = Checkpoint(checkpoint, settings.checkpoint_interval, processes)
        file.read(asked)
        if seed is None and file.run.options is not None:
            seed = file.run.options.seed
        asked, parts = divided(processes, asked, file.run)
        if seed is None:
            seed = asked.seed
        with seeded(seed):
            file.begin(asked, generators_of(args))
            batches = Batches(args, kwargs)
            batches.in_turns = have_same_data(processes, batches)
            for name, program in (("model", model), ("guide", guide)):
                check_call("fit", name, program, *batches.first)
            calls = (
                [] if anneal else set_up(guide, batches, settings.warm_start_batches, settings.estimates.max_elements)
            )
            if not parts.is_whole:
                share_parameters(processes, model, guide, *batches.first)
            if file.run.state is None:
                state, warm = None, warm_start(model, guide, batches, calls, monitor, parts)
                file.run.before_analysis = capture_random_state(batches.generators)
                if not parts.is_whole:
                    share_parameters(processes, model, guide, *batches.first)
                elbo = Objective(model, guide, batches, settings.estimates, parts)
            else:
                elbo, state = restored(file, model, guide, batches, settings.estimates, parts)
                warm = False
            if objective != ELBO:
                check_weighted(objective, elbo)
            at_point = is_point(guide, *batches.first)
            added = widening = None
            options = file.run.options or asked
            if options.num_particles is None:
                options = replace(options, num_particles=settings.num_particles(elbo))
            if options.learning_rate is None:
                peak = own_rate or settings.learning_rate(guide, warm=warm, anneal=anneal)
                options = replace(options, learning_rate=peak)
            options = processes.broadcast(options)
            assert options.num_particles is not None and options.learning_rate is not None
            with ExitStack() as stack:
                stack.enter_context(without_step_limit(guide))
                tables = stack.enter_context(sparse_tables(guide, enabled=elbo.subsampled))
                interrupts = stack.enter_context(Interrupts(monitor.begin + (max_seconds or math.inf)))
                stack.callback(elbo.release)
                file.describe(elbo)
                stack.enter_context(divided_tables(elbo, state))
                num_particles = options.num_particles
                make_trainer = partial(
                    Trainer,
                    learning_rate=options.learning_rate,
                    compile=compile,
                    settings=settings.trainer,
                    make=make,
                )
                make_schedule = partial(
                    Schedule,
                    num_steps=num_steps,
                    checkpoint=file,
                    interrupts=interrupts,
                    monitor=monitor,
                )
                trainer = make_trainer(elbo, num_particles, tables=tables)
                is_open = num_steps is None and target_gap < math.inf and can_widen(elbo)
                schedule = make_schedule(
                    trainer,
                    anneal=anneal,
                    settings=settings.schedule,
                    gap_to_leave=target_gap if is_open else None,
                )
                if state is None:
                    file.run.options = options
                    schedule.begin()
                elif file.run.weighted is None and file.run.wider is None:
                    schedule.resume(state)
                    is_old = file.run.options is None or file.run.options.target_gap is None
                    of_run = None if is_old and state.reason else target_gap
                    file.run.options = replace(options, num_steps=num_steps, target_gap=of_run)
                else:
                    schedule.restore(state)
                kept, best = schedule.finish(schedule.train())
                start = trainer.state.initial_estimate
                gap = gap_to_close(schedule, file)
                if gap is not None:
                    elbo.release()
                    elbo = widened(elbo)
                    stack.callback(elbo.release)
                    num_particles = settings.num_wider_particles(elbo, num_particles)
                    wider = make_trainer(elbo, num_particles)
                    schedule = make_schedule(wider, anneal=False, settings=settings.wider_schedule(target_gap))
                    widening, best = train_wider(schedule, trainer, file, gap)
                    kept, trainer = "flow" if widening.kept else kept, wider
                if objective != ELBO and trainer.state.kept and not schedule.was_stopped:
                    elbo.release()
                    weighted = WeightedObjective(
                        objective, model, guide, batches, settings.estimates, settings.weighted
                    )
                    stack.callback(weighted.release)
                    second = make_schedule(
                        make_trainer(weighted, num_particles), anneal=False, settings=settings.schedule
                    )
                    added, best = train_weighted(second, trainer, file)
            diagnosis = None
            if not elbo.subsampled:
                diagnosis = first_verdict(model, guide, *batches.first, settings.verdict)
        state = trainer.state
        assert start is not None
        is_suspect = state.num_skipped > 0 or may_be_rounded(best.mean)
        rounding = elbo.rounding() if is_suspect else ""
    return FitResult(
        elbo=best.mean,
        elbo_se=best.error,
        start_elbo=start.mean,
        steps=state.num_steps,
        seconds=time.perf_counter() - monitor.begin,
        kept=kept,
        reason=_out_of_time(max_seconds) if interrupts.ran_out else state.reason,
        skipped=state.num_skipped,
        rollbacks=state.num_rollbacks,
        num_particles=options.num_particles,
        learning_rate=options.learning_rate,
        losses=tuple(state.losses),
        obstacle=elbo.obstacle,
        skipped_at=trainer.skipped_at,
        diagnosis=diagnosis,
        dtype=elbo.leaves[0].dtype if elbo.leaves else None,
        rounding=rounding,
        is_point=at_point,
        widening=widening,
        weighted=added,
        num_modes=guide.posterior.num_modes if isinstance(guide, AutoFlowGuide) else 1,
    )


def _out_of_time(max_seconds: float | None) -> str:
    """Why a run stopped that was late; one without a limit of its own in this process shares another's."""
    return f"its {max_seconds:g} seconds are over" if max_seconds else "the seconds of another process are over"
