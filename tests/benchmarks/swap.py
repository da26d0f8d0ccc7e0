# SPDX-License-Identifier: Apache-2.0
"""The swap in users' own loops: ``AutoNormal(model)`` becomes ``AutoFlowGuide(model)`` and nothing else changes.

    python tests/benchmarks/swap.py [clients|sweep] [--only NAME ...] [--guides NAME ...] [--seeds 4] [--write]
        [--jobs 1] [--flow NAME] [--families NAME ...] [--limit SECONDS]

``clients`` (by default): the programs of ``swap_clients.py``, with their optimizers, rates, steps and one particle.
A guide that makes a loss that is not finite, or raises, has failed, whatever came of it. It is *below* another if on
any seed its ELBO of fresh draws is lower by more than two standard errors and by more than half a nat. ``sweep``: two
small models under four optimizers and five rates, with 1 and 16 particles. Run by hand, never by pytest. ``--write``
also puts the tables in ``docs/tables``.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pyro
import torch
from pyro import optim, poutine
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.poutine.util import site_is_subsample
from swap_clients import CLIENTS, Client, Program, eight_schools, linear_regression
from tables import TABLES, Rows, as_rst
from torch import Generator, nn
from torch.distributions import biject_to

from pyro_flows import AutoFlowGuide, flows

OURS, BASELINE, PEER = "AutoFlowGuide", "AutoNormal", "AutoMultivariateNormal"
GUIDES: dict[str, Callable[..., Any]] = {
    BASELINE: AutoNormal,
    PEER: AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    OURS: AutoFlowGuide,
}
PEER_LATENTS = 1500  # beyond them a full matrix is nobody's choice
FIRST_STEPS = 20  # set-up and warm-up, not timed
TAIL = 0.1  # the part of the losses that the last ones are
EVALUATION_SECONDS, MIN_EVALUATIONS, MAX_EVALUATIONS = 2.0, 100, 1000
ERRORS, NATS = 2.0, 0.5  # what a difference has to exceed, both

SWEEP_MODELS = {"eight schools": eight_schools, "linear regression": linear_regression}
SWEEP_STEPS = 600
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SGD_RATES = {  # where AutoNormal trains, which depends on the loss's scale
    "eight schools": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "linear regression": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
}
OPTIMISERS: dict[str, Callable[[float], Any]] = {
    "Adam": lambda rate: optim.Adam({"lr": rate}),
    "ClippedAdam": lambda rate: optim.ClippedAdam({"lr": rate}),
    "AdagradRMSProp": lambda rate: optim.AdagradRMSProp({"eta": rate}),
    "SGD": lambda rate: optim.SGD({"lr": rate}),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a guide in a loop.

    Args:
        elbo: Mean over fresh draws; minus infinity if one was not finite, or none could be had.
        error: Its standard error.
        tail: Mean of the last losses.
        milliseconds: A step, the median.
        non_finite: Losses in training that were NaN or infinite.
        bad_draws: Those of the fresh draws.
        lost: Whether a parameter ended NaN or infinite.
        crash: First line of the exception that ended it.
    """

    elbo: float
    error: float
    tail: float
    milliseconds: float
    non_finite: int
    bad_draws: int
    lost: bool
    crash: str

    @property
    def failure(self) -> str:
        """``crash``, ``NaN`` or nothing."""
        if self.crash:
            return "crash"
        return "NaN" if self.non_finite or self.lost or not math.isfinite(self.elbo) else ""


Outcomes = dict[str, list[Outcome]]  # of each guide, by seed


# One guide in one loop


def latents(client: Client) -> int:
    """Unconstrained dimension of what the guide is for, all items of subsampled plates included."""
    pyro.set_rng_seed(0)
    program = client.build()
    trace = poutine.trace(guided(client, program)).get_trace(*supplier(program, 0)())
    count = 0
    for _, site in trace.iter_stochastic_nodes():
        if not site_is_subsample(site):
            scale = math.prod((frame.full_size or frame.size) / frame.size for frame in site["cond_indep_stack"])
            count += round(biject_to(site["fn"].support).inv(site["value"]).numel() * scale)
    return count


def guided(client: Client, program: Program) -> Callable[..., Any]:
    """The model as the guide is given it."""
    return poutine.block(program.model, expose=list(client.expose)) if client.expose else program.model


def supplier(program: Program, seed: int) -> Callable[[], tuple[Any, ...]]:
    """Makes the arguments of a step; batches are every guide's, since no guide draws from this generator."""
    if program.batches is None:
        return lambda: program.args
    return partial(program.batches, Generator().manual_seed(seed))


def make_guide(name: str, flow: str, client: Client, program: Program) -> Callable[..., Any]:
    """The guide, with those of the client's options that it has."""
    if name == BASELINE and program.baseline is not None:
        return program.baseline
    kind = GUIDES[name]
    options = {k: v for k, v in client.guide_options.items() if k in inspect.signature(kind).parameters}
    if name == OURS:
        options |= {"flow": flow, **program.flow_options}
    return kind(guided(client, program), **options)


def stepper(client: Client, program: Program, guide: Callable[..., Any], elbo: ELBO, args: tuple) -> Callable:
    """A function of a step's arguments that takes the step and returns the loss."""
    if client.torch_loop:
        guide(*args)  # makes the parameters
        optimizer = client.optimizer(guide.parameters())

        def torch_step(*args: Any) -> float:
            optimizer.zero_grad()
            loss = elbo.differentiable_loss(program.model, guide, *args)
            loss.backward()
            optimizer.step()
            return loss.item()

        return torch_step
    optimizer = client.optimizer()
    svi = SVI(program.model, guide, optimizer, elbo)
    if not isinstance(optimizer, PyroLRScheduler):
        return svi.step

    def scheduled_step(*args: Any) -> float:
        loss = svi.step(*args)
        optimizer.step()
        return loss

    return scheduled_step


def first_line(error: Exception) -> str:
    """Kind and message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def measure(client: Client, name: str, seed: int, flow: str = "auto", limit: float = math.inf) -> Outcome:
    """Train as the client does, then evaluate; survives whatever the guide does."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    program = client.build()
    supply, elbo = supplier(program, seed), client.loss()
    losses: list[float] = []
    times: list[float] = []
    guide, crash = None, ""
    begin = time.perf_counter()
    try:
        guide = make_guide(name, flow, client, program)
        step = stepper(client, program, guide, elbo, supply())
        for _ in range(client.steps):
            args = supply()
            start = time.perf_counter()
            losses.append(step(*args))
            times.append(time.perf_counter() - start)
            if time.perf_counter() - begin > limit:
                raise TimeoutError(f"step {len(losses)} after {limit:.0f} s")
    except Exception as error:  # whatever it is, it is what the client would have seen
        crash = first_line(error)
    # TraceMeanField_ELBO leaves out the Jacobian of the supports of Pyro's own autoguides: no ELBO to compare by.
    fair = Trace_ELBO() if isinstance(elbo, TraceMeanField_ELBO) else elbo
    mean, error, bad = (-math.inf, 0.0, 0) if crash else evaluate(fair, program, guide, seed)
    last = losses[-max(1, round(TAIL * client.steps)) :]
    return Outcome(
        elbo=mean,
        error=error,
        tail=statistics.fmean(last) if last else math.nan,
        milliseconds=1e3 * statistics.median(times[FIRST_STEPS:] or times or [math.nan]),
        non_finite=sum(not math.isfinite(loss) for loss in losses),
        bad_draws=bad,
        lost=not finite_parameters(guide),
        crash=crash,
    )


def finite_parameters(guide: Callable[..., Any] | None) -> bool:
    """Of the guide and of everything in Pyro's store."""
    tensors = list(pyro.get_param_store().values())
    if isinstance(guide, nn.Module):
        tensors += list(guide.parameters())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def evaluate(elbo: ELBO, program: Program, guide: Callable[..., Any], seed: int) -> tuple[float, float, int]:
    """ELBO of fresh draws, its standard error, and how many draws were not finite."""
    pyro.set_rng_seed(seed + 1)
    supply = supplier(program, seed + 1)  # the same fresh batches for every guide
    values: list[float] = []
    bad = 0
    begin = time.perf_counter()
    while len(values) + bad < MAX_EVALUATIONS:
        try:
            with torch.no_grad():
                value = -elbo.loss(program.model, guide, *supply())
        except Exception:  # NaN where a distribution's parameter should be
            value = math.nan
        if math.isfinite(value):
            values.append(value)
        else:
            bad += 1
        done = len(values) + bad
        if done >= MIN_EVALUATIONS and (time.perf_counter() - begin > EVALUATION_SECONDS or not values):
            break
    if bad:
        return -math.inf, 0.0, bad
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), 0


# Verdicts


@dataclass(frozen=True)
class Comparison:
    """Our ELBO less another guide's, by seed; seeds that ended finite for neither are equal."""

    gains: tuple[float, ...]
    errors: tuple[float, ...]

    @classmethod
    def of(cls, ours: Sequence[Outcome], theirs: Sequence[Outcome], *, finite: bool = False) -> Comparison:
        """Pair them; ``finite`` leaves out seeds in which theirs failed."""
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if not (finite and b.failure)]
        both = [math.isinf(a.elbo) and math.isinf(b.elbo) for a, b in pairs]
        gains = tuple(0.0 if equal else a.elbo - b.elbo for equal, (a, b) in zip(both, pairs, strict=True))
        return cls(gains, tuple(math.hypot(a.error, b.error) for a, b in pairs))

    @property
    def below(self) -> bool:
        """Whether it is, on any seed."""
        return any(gain < -max(NATS, ERRORS * error) for gain, error in zip(self.gains, self.errors, strict=True))

    @property
    def median(self) -> float:
        """Of the gains; NaN if there are none."""
        return statistics.median(self.gains) if self.gains else math.nan

    def __str__(self) -> str:
        if not self.gains:
            return "-"
        return f"{self.median:+.2f} ({min(self.gains):+.2f})"


def failures(outcomes: Sequence[Outcome]) -> str:
    """``NaN 1/4, crash 2/4``, or nothing."""
    found = [outcome.failure for outcome in outcomes]
    counts = ((kind, found.count(kind)) for kind in ("NaN", "crash"))
    return ", ".join(f"{kind} {count}/{len(found)}" for kind, count in counts if count)


def cell(outcomes: Sequence[Outcome]) -> str:
    """Median ELBO of the seeds that ended finite, and what failed."""
    finite = [outcome.elbo for outcome in outcomes if math.isfinite(outcome.elbo)]
    parts = [f"{statistics.median(finite):.1f}"] if finite else []
    return ", ".join([*parts, failures(outcomes)]).strip(", ") or "-"


@dataclass(frozen=True)
class Verdict:
    """A client's."""

    failed: bool
    normal: Comparison
    multivariate: Comparison

    @classmethod
    def of(cls, outcomes: Outcomes) -> Verdict:
        """Judge."""
        ours = outcomes.get(OURS, [])
        return cls(
            any(outcome.failure for outcome in ours),
            Comparison.of(ours, outcomes.get(BASELINE, [])),
            Comparison.of(ours, outcomes.get(PEER, []), finite=True),
        )


def pace(outcomes: Outcomes) -> str:
    """A step of ours over one of ``AutoNormal``."""
    times = {name: statistics.median(o.milliseconds for o in outcomes[name]) for name in outcomes if outcomes[name]}
    return f"{times[OURS] / times[BASELINE]:.1f}" if {OURS, BASELINE} <= times.keys() else "-"


# Many of them

Task = TypeVar("Task")
Result = TypeVar("Result")


def quietly() -> None:
    """One thread, and none of Pyro's warnings of NaN: they are counted here."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pyro").setLevel(logging.WARNING)  # "Guessed max_plate_nesting", at every fresh ELBO


def spread_out(work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Result]]:
    """Place in ``tasks`` and result of each, as they finish."""
    quietly()
    if jobs == 1:
        yield from enumerate(map(work, tasks))
        return
    with ProcessPoolExecutor(jobs, initializer=quietly) as pool:
        places = {pool.submit(work, task): place for place, task in enumerate(tasks)}
        for done in as_completed(places):
            yield places[done], done.result()


def run_client(options: argparse.Namespace, name: str) -> tuple[int, Outcomes]:
    """Number of latents, and outcomes of all guides and seeds."""
    client = CLIENTS[name]
    count = latents(client)
    guides = [g for g in options.guides if g in (BASELINE, OURS) or (client.peers and count <= PEER_LATENTS)]
    outcomes = {
        guide: [
            measure(client, guide, seed, options.flow, options.limit)
            for seed in range(options.seeds if guide in (BASELINE, OURS) else min(options.seeds, options.peer_seeds))
        ]
        for guide in guides
    }
    return count, outcomes


def line(name: str, count: int, outcomes: Outcomes) -> str:
    """A client's, with what raised and what the draws of evaluation met."""
    verdict = Verdict.of(outcomes)
    tails = ", ".join(f"{o.tail:.1f}" for o in outcomes.get(OURS, []))
    parts = [
        f"{name} ({count} latents, {CLIENTS[name].steps} steps)",
        *(f"{guide} {cell(found)}" for guide, found in outcomes.items()),
        f"over {BASELINE}, median (worst): {verdict.normal}{' BELOW' if verdict.normal.below else ''}",
        f"over {PEER}: {verdict.multivariate}{' BELOW' if verdict.multivariate.below else ''}",
        f"{OURS}'s last losses {tails or '-'}",
        f"ms {', '.join(f'{statistics.median(o.milliseconds for o in found):.1f}' for found in outcomes.values())}",
    ]
    for guide, found in outcomes.items():
        parts += sorted({f"{guide} raised {o.crash}" for o in found if o.crash})
        losses, draws = sum(o.non_finite for o in found), sum(o.bad_draws for o in found)
        if losses or draws:
            parts.append(f"{guide}: {losses} losses and {draws} fresh draws not finite")
    return "; ".join(parts)


def measure_clients(options: argparse.Namespace) -> tuple[Sequence[str], Rows]:
    """Every client, a line as it finishes."""
    names = [name for name in CLIENTS if not options.only or any(part in name for part in options.only)]
    rows: dict[int, list[str]] = {}
    verdicts = []
    for place, (count, outcomes) in spread_out(partial(run_client, options), names, options.jobs):
        name = names[place]
        print(line(name, count, outcomes), flush=True)
        verdicts.append(Verdict.of(outcomes))
        title = f"{name}, {CLIENTS[name].steps:,} steps"
        cells = [cell(outcomes.get(guide, [])) for guide in options.guides]
        rows[place] = [title, f"{count:,}", *cells, pace(outcomes)]
    print(
        f"{len(verdicts)} clients: {sum(v.failed for v in verdicts)} with NaN or a crash, "
        f"{sum(v.normal.below for v in verdicts)} below {BASELINE}, "
        f"{sum(v.multivariate.below for v in verdicts)} below {PEER}, "
        f"{sum(v.normal.median > 1 for v in verdicts)} above {BASELINE} by more than 1 nat"
    )
    header = ("client", "latents", *options.guides, f"a step of {OURS}, x {BASELINE}")
    return header, [rows[place] for place in sorted(rows)]


# The sweep

Setting = tuple[str, str, float, int]  # model, optimizer, rate, particles


def run_setting(options: argparse.Namespace, setting: Setting) -> Outcomes:
    """Outcomes of ``AutoNormal`` and of each family, by its name."""
    model, optimizer, rate, particles = setting
    client = Client(
        name=f"{model}, {optimizer} {rate:g}",
        build=SWEEP_MODELS[model],
        optimizer=partial(OPTIMISERS[optimizer], rate),
        steps=SWEEP_STEPS,
        loss=partial(Trace_ELBO, num_particles=particles, vectorize_particles=particles > 1),
    )
    seeds = range(options.seeds)
    outcomes = {BASELINE: [measure(client, BASELINE, seed) for seed in seeds]}
    for family in options.families:
        outcomes[family] = [measure(client, OURS, seed, family, options.limit) for seed in seeds]
    return outcomes


def measure_sweep(options: argparse.Namespace) -> tuple[Sequence[str], Rows]:
    """Every setting, a line as it finishes; families that fail where ``AutoNormal`` does not are counted."""
    settings: list[Setting] = [
        (model, optimizer, rate, particles)
        for model in SWEEP_MODELS
        for optimizer in OPTIMISERS
        for rate in (SGD_RATES[model] if optimizer == "SGD" else RATES)
        for particles in (1, 16)
        if not options.only or any(part in f"{model}, {optimizer} {rate:g}" for part in options.only)
    ]
    rows: dict[int, list[str]] = {}
    failed, below = dict.fromkeys(options.families, 0), dict.fromkeys(options.families, 0)
    for place, outcomes in spread_out(partial(run_setting, options), settings, options.jobs):
        model, optimizer, rate, particles = settings[place]
        cells = []
        for family in options.families:
            pairs = zip(outcomes[family], outcomes[BASELINE], strict=True)
            fair = [ours for ours, normal in pairs if not normal.failure]
            comparison = Comparison.of(outcomes[family], outcomes[BASELINE], finite=True)
            failed[family] += any(outcome.failure for outcome in fair)
            below[family] += comparison.below
            cells.append(", ".join(filter(None, [str(comparison), failures(fair)])))
        rows[place] = [model, optimizer, f"{rate:g}", str(particles), cell(outcomes[BASELINE]), *cells]
        print("  ".join(rows[place]), flush=True)
    for family in options.families:
        print(
            f"{family}: of {len(settings)} settings, {failed[family]} with NaN or a crash where {BASELINE} is finite, "
            f"{below[family]} below it"
        )
    header = (
        "model",
        "optimizer",
        "rate",
        "particles",
        BASELINE,
        *(f"{family} over {BASELINE}: median (worst)" for family in options.families),
    )
    return header, [rows[place] for place in sorted(rows)]


MEASURES = {"clients": (measure_clients, "swap"), "sweep": (measure_sweep, "swap_sweep")}


def main() -> None:
    """Run what is named, and write its table."""
    one_pass = [name for name in flows.names() if flows.get(name).one_pass_sampling]
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("measure", nargs="?", default="clients", choices=list(MEASURES))
    made.add_argument("--only", nargs="*", default=[], metavar="NAME", help="those whose names contain one of these")
    made.add_argument("--guides", nargs="*", default=list(GUIDES), choices=list(GUIDES), metavar="NAME")
    made.add_argument("--seeds", type=int, default=4, help="seeds 0 to N-1")
    made.add_argument("--peer-seeds", type=int, default=4, help="likewise, of other guides than AutoNormal and ours")
    made.add_argument("--write", action="store_true", help="write docs/tables too")
    made.add_argument("--jobs", type=int, default=1, help="processes, a thread each")
    made.add_argument("--flow", default="auto", choices=one_pass, metavar="NAME", help=f"the family of {OURS}")
    made.add_argument("--families", nargs="*", default=["auto"], choices=one_pass, metavar="NAME", help="of the sweep")
    made.add_argument("--limit", type=float, default=900.0, help="seconds after which a training counts as a crash")
    options = made.parse_args()
    measure, file = MEASURES[options.measure]
    header, rows = measure(options)
    if options.write:
        TABLES.mkdir(exist_ok=True)
        (TABLES / f"{file}.rst").write_text(as_rst(header, rows))


if __name__ == "__main__":
    main()
