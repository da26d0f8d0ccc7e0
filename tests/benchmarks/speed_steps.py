# SPDX-License-Identifier: Apache-2.0
"""What the speed benchmarks share: models, who takes steps on them, and how steps are timed."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import pyro
import pyro.distributions as dist
import torch
from guides import GUIDES as PEERS
from guides import SCHOOLS
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoNormal
from pyro.optim import Adam

from pyro_flows import AutoFlowGuide, CompiledSVI
from pyro_flows.__main__ import model as eight_schools

RATE = 1e-4
# A round takes about so many seconds, and no more steps than that.
ROUND_SECONDS, MAX_ROUND, WARM_UP = 0.2, 300, 3
HIDDEN = 32  # units of an IAF's two hidden layers, or as many as the latents where those are more

NOTHING = "n/a"  # a cell that was not measured

Guides = Mapping[str, Callable[[Callable[..., Any]], AutoGuide]]
Take = Callable[[int], None]
Key = TypeVar("Key")
OWN_GUIDES: Guides = {
    "AutoNormal": AutoNormal,
    "AutoFlowGuide": AutoFlowGuide,
    "AutoFlowGuide, iaf": partial(AutoFlowGuide, flow="iaf"),
}


class Case(NamedTuple):
    """A model, its arguments, and the guides and the number of particles that it is compiled with."""

    model: Callable[..., Any]
    args: Sequence[Any]
    guides: Guides = OWN_GUIDES
    num_particles: int = 16
    twin: str = ""  # the model in speed_numpyro.py


def logistic(x: torch.Tensor, y: torch.Tensor) -> None:
    """A logistic regression."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        # Without beta's place for this plate, which is there if particles are vectorized: (particles, rows).
        logits = (beta @ x.mT).reshape(*beta.shape[:-2], len(y))
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def logistic_case(num_rows: int = 1000) -> Case:
    """20 covariates, two of which matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 20, generator=generator)
    y = torch.bernoulli((x[:, 0] - x[:, 1]).sigmoid(), generator=generator)
    return Case(logistic, (x, y), twin="logistic")


def groups(y: torch.Tensor) -> None:
    """Centered random effects: a mean and a scale over 500 groups."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def digits_case() -> Case:
    """A variational autoencoder on a mini-batch of 128, one draw an image."""
    from vae import ENCODERS, LATENT_DIM, Encoder, digits, make_model, network  # needs scikit-learn

    def amortized(flow: str, model: Callable[..., Any]) -> AutoGuide:
        return AutoFlowGuide(model, flow=flow, amortize={"data": Encoder()})

    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(digits()[0][:128], generator=generator)
    encoders = {f"{name} encoder": partial(amortized, flow) for name, flow in ENCODERS.items()}
    return Case(make_model(network(LATENT_DIM, 64)), (x,), encoders, num_particles=1)


CASES: dict[str, Callable[[], Case]] = {
    "eight schools": lambda: Case(eight_schools, SCHOOLS, twin="eight_schools"),
    "logistic, 1000 x 20": logistic_case,
    "500 groups": lambda: Case(groups, (torch.randn(500, generator=torch.Generator().manual_seed(0)),)),
    "digits, batch of 128": digits_case,
}


def make_svi(
    kind: type[SVI],
    case: Case,
    guide: Callable[[Callable[..., Any]], AutoGuide],
    num_particles: int,
    rate: float = RATE,
) -> SVI:
    """An SVI with a guide of its own."""
    vectorized = num_particles > 1
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorized, max_plate_nesting=1)
    return kind(case.model, guide(case.model), Adam({"lr": rate}), elbo)


def endless(svi: SVI, calls: Iterator[Sequence[Any]]) -> Take:
    """Takes so many steps on the next arguments."""

    def take(count: int) -> None:
        for args in itertools.islice(calls, count):
            svi.step(*args)

    return take


def numpyro_side() -> types.ModuleType:
    """The benchmarks' NumPyro half, on one thread as torch is; XLA reads the environment when it is loaded."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["NPROC"] = "1"  # the size of its pool of threads
    import speed_numpyro

    return speed_numpyro


class Contender(NamedTuple):
    """Who trains what: a kind of SVI, or None for NumPyro's; and a function of a model that makes a guide."""

    kind: type[SVI] | None
    guide: Callable[[Callable[..., Any]], Any]

    def begin(self, case: Case, num_particles: int, rate: float = RATE) -> Take:
        """Set up training."""
        if self.kind is None:
            take: Take = numpyro_side().train(case.twin, self.guide, case.args, num_particles, rate).take
            return take
        svi = make_svi(self.kind, case, self.guide, num_particles, rate)
        return endless(svi, itertools.repeat(case.args))


def contenders(latent_dim: int) -> dict[str, Contender]:
    """Pyro, NumPyro and us; IAFs are two layers, with two hidden layers of :data:`HIDDEN` units or a unit a latent."""
    hidden = [max(HIDDEN, latent_dim)] * 2

    def iaf(model: Callable[..., Any]) -> AutoGuide:
        return AutoIAFNormal(model, hidden_dim=hidden, num_transforms=2)

    def numpyro_iaf(model: Callable[..., Any]) -> Any:
        return numpyro_side().autoguide.AutoIAFNormal(model, num_flows=2, hidden_dims=hidden)

    return {
        "Pyro AutoNormal": Contender(SVI, PEERS["AutoNormal"]),
        "Pyro AutoIAFNormal": Contender(SVI, iaf),
        "Pyro AutoNormalizingFlow": Contender(SVI, PEERS["AutoNormalizingFlow, 4 couplings"]),
        "NumPyro AutoNormal": Contender(None, lambda model: numpyro_side().autoguide.AutoNormal(model)),
        "NumPyro AutoIAFNormal": Contender(None, numpyro_iaf),
        "NumPyro AutoBNAFNormal": Contender(None, lambda model: numpyro_side().autoguide.AutoBNAFNormal(model)),
        "SVI AutoFlowGuide": Contender(SVI, AutoFlowGuide),
        "CompiledSVI AutoNormal": Contender(CompiledSVI, PEERS["AutoNormal"]),
        "CompiledSVI AutoIAFNormal": Contender(CompiledSVI, iaf),
        "CompiledSVI AutoFlowGuide": Contender(CompiledSVI, AutoFlowGuide),
    }


class Timed(Protocol):
    """What takes a round of steps when asked."""

    def seconds(self) -> float:
        """Of a step, over a round."""


class Steps:
    """Steps of one contender, timed.

    Its parameters are in a store of its own: guides that train side by side share names.

    Args:
        begin: Sets up the training, and returns what takes so many steps.

    Attributes:
        first: Seconds of set-up and first step, recorded and compiled.

    Raises:
        UserWarning: Where ``CompiledSVI`` would take eager steps, or run its graph without machine code.
    """

    def __init__(self, begin: Callable[[], Take]) -> None:
        start = time.perf_counter()
        with pyro.get_param_store().scope() as self._state, warnings.catch_warnings():
            warnings.filterwarnings("error", message="CompiledSVI")
            self._take = begin()
            self._take(1)
        self.first = time.perf_counter() - start
        self._count = WARM_UP
        self._count = min(MAX_ROUND, max(1, round(ROUND_SECONDS / self.seconds())))

    def seconds(self) -> float:
        """Of a step, over a round."""
        with pyro.get_param_store().scope(self._state):
            start = time.perf_counter()
            self._take(self._count)
            return (time.perf_counter() - start) / self._count


def started(begin: Callable[[], Take]) -> Steps | None:
    """Steps; or None, and the reason on the terminal, where they can't be compiled."""
    try:
        return Steps(begin)
    except UserWarning as reason:
        print(reason, flush=True)
        return None


def rounds(made: Mapping[Key, Timed | None], repeats: int) -> dict[Key, list[float]]:
    """Seconds a step, in rounds that take turns; none for those that have no steps."""
    times: dict[Key, list[float]] = {key: [] for key in made}
    for _ in range(repeats):
        for key, steps in made.items():
            if steps is not None:
                times[key].append(steps.seconds())
    return times


def milliseconds(times: Sequence[float]) -> str:
    """The median, with three digits or all that are whole."""
    if not times:
        return NOTHING
    value = 1e3 * statistics.median(times)
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def ratio(times: Sequence[float], others: Sequence[float]) -> str:
    """Median over rounds of the ratio."""
    ratios = [one / other for one, other in zip(times, others, strict=False)]
    return f"{statistics.median(ratios):.2f}" if ratios else NOTHING


def alone(*words: str, cache: str | None = None, limit: float | None = None) -> list[float] | None:
    """Numbers from ``speed.py --alone`` in a process of its own; None if it takes longer than ``limit`` seconds.

    Args:
        words: What to run, and its arguments.
        cache: Folder of inductor's cache; None leaves it where it is.
        limit: In seconds.
    """
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--alone", *words]
    environment = dict(os.environ) if cache is None else {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    return [float(word) for word in done.stdout.splitlines()[-1].split()]
