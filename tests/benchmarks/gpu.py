# SPDX-License-Identifier: Apache-2.0
"""What works on a GPU, and what a step costs there next to the CPU and to NumPyro on the same card.

    python tests/benchmarks/gpu.py checks|preview|speed [--seconds 180] [--device cuda] [--log FILE] [--write]

``checks`` runs one thing after the other and says which fail; ``speed`` times steps; ``preview`` is a minute of it.
Both print a line of JSON for each result at once, and begin nothing new after ``--seconds``. Run by hand, never by
pytest. ``--write`` makes ``docs/tables/gpu.rst`` of all results in ``--log``, which may be those of several runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the card's memory

import pyro
import pyro.distributions as dist
import torch
from guides import SCHOOLS
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from speed_steps import Case, Take, eight_schools, numpyro_side
from tables import TABLES, as_rst
from torch import Tensor, nn

import pyro_flows
from pyro_flows import (
    AutoFlowGuide,
    CompiledSVI,
    VectorizedTrace_ELBO,
    diagnose,
    fit,
    flows,
    importance_resample,
    predict,
    to_inference_data,
)

PARTICLES = (64, 1024, 16, 4096, 256)  # in the order in which they are timed
ROWS, COEFFICIENTS = 10_000, 50
IMAGES, PIXELS, LATENT_DIM, HIDDEN_DIM, CONTEXT_DIM, BATCH = 60_000, 28 * 28, 10, 256, 64, 128
GROUPS, GROUP_BATCH = 1_000_000, 10_000
ROUNDS, ROUND_SECONDS = 5, 0.3


class Log:
    """Results, as lines of JSON on the terminal and in a file."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether nothing new may begin."""
        return time.monotonic() > self._end

    def write(self, **values: Any) -> None:
        """One result."""
        line = json.dumps(values)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


def wait(device: str) -> None:
    """Until all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


# Models


def schools(y: Tensor, sd: Tensor, observed: Tensor | None = None) -> None:
    """Eight schools whose priors are on the device of the data, as without a default device."""
    zero = torch.zeros_like(sd[0])
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", len(sd), device=sd.device):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    """Logistic, for any outer plate."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
    with pyro.plate("rows", len(y), device=y.device):
        logits = (beta @ x.mT).reshape(*beta.shape[:-2], len(y))
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def regression_data(device: str) -> tuple[Tensor, Tensor]:
    """Two of the coefficients are not zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COEFFICIENTS, generator=generator)
    y = torch.bernoulli((x[:, 0] - x[:, 1]).sigmoid(), generator=generator)
    return x.to(device), y.to(device)


class Effects:
    """Random effects of many groups, in mini-batches."""

    def __init__(self, count: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = (2.0 + 1.2 * torch.randn(count, generator=generator)).to(device)

    def model(self, index: Tensor) -> None:
        """theta ~ N(mu, tau), y ~ N(theta, 1)."""
        zero = torch.zeros_like(self.y[0])
        mu = pyro.sample("mu", dist.Normal(zero, 10.0))
        tau = pyro.sample("tau", dist.LogNormal(zero, 1.0))
        with pyro.plate("groups", len(self.y), subsample=index):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=self.y[index])

    def plates(self, index: Tensor) -> pyro.plate:
        """The guide's."""
        return pyro.plate("groups", len(self.y), subsample=index)

    def batches(self, size: int) -> list[tuple[Tensor]]:
        """Shuffled once."""
        return [(part,) for part in torch.randperm(len(self.y), device=self.y.device).split(size)]


class Images:
    """A variational autoencoder of simulated binary images: a random linear decoder's."""

    def __init__(self, count: int, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            logits = 2.0 * torch.randn(count, LATENT_DIM) @ torch.randn(LATENT_DIM, PIXELS)
            self.x = torch.bernoulli(logits.sigmoid())
            self.decoder = self._network(LATENT_DIM, PIXELS)
            self.encoder = nn.Sequential(self._network(PIXELS, CONTEXT_DIM), nn.LayerNorm(CONTEXT_DIM))

    @staticmethod
    def _network(size_in: int, size_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(size_in, HIDDEN_DIM), nn.SiLU(), nn.Linear(HIDDEN_DIM, size_out))

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), x ~ Bernoulli(decoder(z))."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1, device=x.device):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self) -> AutoFlowGuide:
        """With the encoder."""
        return AutoFlowGuide(self.model, amortize={"data": self.encoder})

    def batches(self) -> list[tuple[Tensor]]:
        """All of one shape."""
        return [(part,) for part in self.x.split(BATCH) if len(part) == BATCH]


def school_data(device: str) -> tuple[Tensor, Tensor]:
    """Effects and their standard errors."""
    sd, y = (value.to(device) for value in SCHOOLS)
    return y, sd


# Checks


def on_device(values: Any, device: str) -> None:
    """Refuse tensors elsewhere."""
    for name, value in dict(values).items():
        assert value.device.type == device, f"{name} is on {value.device}"


def check_family(family: str, device: str) -> str:
    """Steps of SVI, draws and densities of one family."""
    args = school_data(device)
    guide = AutoFlowGuide(schools, flow=family)
    svi = SVI(schools, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=8))
    losses = [svi.step(*args) for _ in range(5)]
    assert all(map(torch.isfinite, torch.tensor(losses))), losses
    on_device(guide.named_parameters(), device)
    on_device(guide.named_buffers(), device)
    draws = guide.sample_posterior(10, *args)
    on_device(draws, device)
    density = guide.log_prob(draws, *args)
    assert density.shape == (10,) and density.isfinite().all() and density.device.type == device
    return f"loss {losses[-1]:.2f}"


def check_run(device: str) -> str:
    """fit, and all that follows it; save, load, and resume from a checkpoint, bit for bit."""
    args = school_data(device)
    guide = AutoFlowGuide(schools)
    result = fit(schools, guide, args, num_steps=200, seed=0, progress=False)
    again = AutoFlowGuide(schools)
    same = fit(schools, again, args, num_steps=200, seed=0, progress=False)
    assert same.losses == result.losses, "a seed does not reproduce a run"
    print(diagnose(schools, guide, args, seed=0, progress=False))
    resampled = importance_resample(schools, guide, 100, args, seed=0)
    on_device(resampled, device)
    predict(schools, guide, (None, args[1]), num_samples=100, seed=0)
    to_inference_data(schools, guide, args, num_samples=100, seed=0)
    guide.quantiles([0.1, 0.5], *args)
    with tempfile.TemporaryDirectory() as folder:
        guide.save(f"{folder}/guide")
        loaded = AutoFlowGuide.load(f"{folder}/guide", schools, args)
        at = guide.median(*args)
        assert loaded.log_prob(at, *args) == guide.log_prob(at, *args)
        moved = AutoFlowGuide.load(f"{folder}/guide", schools, school_data("cpu"))
        on_device(moved.named_parameters(), "cpu")
        there = {name: value.cpu() for name, value in at.items()}
        difference = moved.log_prob(there, *school_data("cpu")) - guide.log_prob(at, *args).cpu()
        assert difference.abs() < 1e-3, difference
        moved.save(f"{folder}/moved")
        AutoFlowGuide.load(f"{folder}/moved", schools, args).log_prob(at, *args)
        file, other = Path(folder, "run"), Path(folder, "other")
        short = {"seed": 0, "progress": False}
        fit(schools, AutoFlowGuide(schools), args, num_steps=50, checkpoint=file, **short)
        shutil.copy(file, other)
        longer = [
            fit(schools, AutoFlowGuide(schools), args, num_steps=150, checkpoint=p, **short) for p in (file, other)
        ]
        assert longer[0].losses == longer[1].losses, "two runs from one checkpoint differ"
    return f"elbo {result.elbo:.3f} +/- {result.elbo_se:.3f}"


def check_default_device(device: str) -> str:
    """A model whose priors are Python numbers, under ``torch.set_default_device``."""
    torch.set_default_device(device)
    try:
        args = tuple(value.to(device) for value in SCHOOLS)
        guide = AutoFlowGuide(eight_schools)
        result = fit(eight_schools, guide, args, num_steps=100, seed=0, progress=False)
        str(diagnose(eight_schools, guide, args, seed=0, progress=False))
        importance_resample(eight_schools, guide, 100, args, seed=0)
        predict(eight_schools, guide, (args[0],), num_samples=100, seed=0)
        to_inference_data(eight_schools, guide, args, num_samples=100, seed=0)
        svi = CompiledSVI(eight_schools, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=8))
        svi.run(20, *args)
    finally:
        torch.set_default_device("cpu")
    return f"elbo {result.elbo:.3f}"


def check_fit_kinds(device: str) -> str:
    """Steps of ``fit`` by a recorded and by a compiled step."""
    args = school_data(device)
    elbos = {
        how: fit(schools, AutoFlowGuide(schools), args, num_steps=400, seed=0, progress=False, compile=how).elbo
        for how in (False, True)
    }
    assert abs(elbos[True] - elbos[False]) < 0.1, elbos
    return str(elbos)


def check_compiled(device: str, make_optim: Callable[[], Any] = lambda: Adam({"lr": 0.01})) -> str:
    """CompiledSVI against SVI from the same noise, in float64."""
    args, values, times = [value.double() for value in school_data(device)], [], {}
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoFlowGuide(schools)
        svi = kind(schools, guide, make_optim(), VectorizedTrace_ELBO(num_particles=16))
        first = time.perf_counter()
        losses = [svi.step(*args)]
        begin = time.perf_counter()
        losses += [svi.step(*args) for _ in range(100)]
        wait(device)
        times[kind.__name__] = f"first {begin - first:.1f} s, then {10 * (time.perf_counter() - begin):.3f} ms"
        values.append((losses, torch.cat([p.detach().flatten() for p in guide.parameters()])))
    (losses, point), (others, other) = values
    apart = (point - other).norm() / point.norm()
    assert apart < 1e-5, f"parameters differ by {apart:.2g}; losses {losses[:3]} and {others[:3]}; {times}"
    return f"parameters differ by {apart:.1g}; {times}"


def check_compiled_data(device: str) -> str:
    """New data of the same shape, and data that change in place, are seen by the captured graph."""
    y, sd = school_data(device)
    guide = AutoFlowGuide(schools)
    svi = CompiledSVI(schools, guide, Adam({"lr": 1e-9}), VectorizedTrace_ELBO(num_particles=512))
    base = statistics.fmean(svi.step(y, sd) for _ in range(20))
    other = statistics.fmean(svi.step(y + 100.0, sd) for _ in range(20))
    y.add_(100.0)
    in_place = statistics.fmean(svi.step(y, sd) for _ in range(20))
    assert other > base + 50 and abs(other - in_place) < 0.1 * other, (base, other, in_place)
    return f"{base:.1f}, {other:.1f}, {in_place:.1f}"


def check_mini_batches(device: str) -> str:
    """Local latents in mini-batches: fit with sparse tables, and CompiledSVI."""
    effects = Effects(2000, device)
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
    result = fit(effects.model, guide, effects.batches(200), num_steps=100, seed=0, progress=False)
    svi = CompiledSVI(effects.model, guide, Adam({"lr": 1e-3}), VectorizedTrace_ELBO(num_particles=4))
    for (index,) in effects.batches(200):
        svi.step(index)
    on_device(guide.named_parameters(), device)
    return f"elbo {result.elbo:.1f}"


def check_encoder(device: str) -> str:
    """A VAE: eager and compiled steps, and fit."""
    images = Images(1024, device)
    guide = images.guide()
    svi = CompiledSVI(images.model, guide, Adam({"lr": 1e-3}), Trace_ELBO(max_plate_nesting=1))
    losses = [svi.step(*batch) for batch in images.batches() * 5]
    assert losses[-1] < losses[0], losses
    fit(images.model, images.guide(), images.batches(), num_steps=20, seed=0, progress=False)
    return f"loss {losses[0]:.0f} to {losses[-1]:.0f}"


def check_memory(device: str) -> str:
    """Memory does not grow in a thousand steps, eager and captured."""
    args, found = school_data(device), []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        svi = kind(schools, AutoFlowGuide(schools), Adam({"lr": 1e-3}), VectorizedTrace_ELBO(num_particles=16))
        for number in range(1000 if kind is CompiledSVI else 300):
            svi.step(*args)
            if number in (50, 299, 999):
                found.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
    first, last, compiled_first, *_, compiled_last = found
    assert last <= first + 2**16 and compiled_last <= compiled_first + 2**16, found
    return f"{found} bytes"


def every_check() -> dict[str, Callable[[str], str]]:
    """By name."""
    checks: dict[str, Callable[[str], str]] = {
        "compiled, Adam in the graph": check_compiled,
        "compiled, SGD outside": partial(check_compiled, make_optim=lambda: pyro.optim.SGD({"lr": 1e-5})),
        "compiled, new data": check_compiled_data,
        "fit and all that follows": check_run,
        "default device": check_default_device,
        "fit, recorded and compiled": check_fit_kinds,
        "mini-batches": check_mini_batches,
        "encoder": check_encoder,
        "memory": check_memory,
    }
    return checks | {f"family {name}": partial(check_family, name) for name in flows.names()}


def run_checks(log: Log, device: str, only: str) -> None:
    """All checks, each of which may fail by itself."""
    for name, check in every_check().items():
        if only not in name:
            continue
        if log.is_over:
            log.write(check=name, result="not run")
            continue
        pyro.clear_param_store()
        torch.manual_seed(0)
        begin, heard = time.perf_counter(), []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                said = check(device)
            result = "ok"
            heard = [str(each.message)[:300] for each in caught if issubclass(each.category, UserWarning)]
        except BaseException as error:  # an assertion, or what a GPU raises
            said, result = "\n".join(traceback.format_exc().splitlines()[-15:]), f"FAILED: {type(error).__name__}"
            if isinstance(error, KeyboardInterrupt):
                raise
        seconds = round(time.perf_counter() - begin, 1)
        log.write(check=name, result=result, seconds=seconds, said=said, warnings=sorted(set(heard))[:4])


# Speed


def own(kind: type[SVI], guide: Callable[..., Any], model: Callable[..., Any], args: Any, count: int) -> Take:
    """Ours: takes so many steps."""
    elbo = Trace_ELBO(num_particles=count, vectorize_particles=count > 1, max_plate_nesting=1)
    svi = kind(model, guide(model), Adam({"lr": 1e-4}), elbo)

    def take(steps: int) -> None:
        for _ in range(steps):
            svi.step(*args)

    return take


def numpyro_loop(case: Case, name: str, count: int, size: int) -> Take:
    """NumPyro's updates in one ``fori_loop``; IAFs have two layers with two hidden layers of ``size`` units."""
    side = numpyro_side()
    options = {"num_flows": 2, "hidden_dims": [size, size]} if name == "AutoIAFNormal" else {}
    guide = partial(getattr(side.autoguide, name), **options)
    take: Take = side.train(case.twin, guide, case.args, count, 1e-4).loop
    return take


def time_steps(begin: Callable[[], Take], device: str) -> dict[str, Any]:
    """Seconds of the first step, set-up included, and milliseconds of later ones: the median of rounds."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    start = time.perf_counter()
    take = begin()
    take(1)
    wait(device)
    first = time.perf_counter() - start
    take(3)
    wait(device)
    start = time.perf_counter()
    take(10)
    wait(device)
    steps = max(1, min(2000, round(ROUND_SECONDS / ((time.perf_counter() - start) / 10))))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        take(steps)
        wait(device)
        rounds.append(1e3 * (time.perf_counter() - start) / steps)
    return {
        "ms": statistics.median(rounds),
        "least": min(rounds),
        "most": max(rounds),
        "first_s": first,
        "steps": steps,
    }


class Timing(NamedTuple):
    """Steps of one contender.

    Attributes:
        title: The model's.
        by: Who takes the steps.
        device: Where.
        count: Number of particles.
    """

    title: str
    by: str
    device: str
    count: int

    @property
    def is_large(self) -> bool:
        """Whether a step would take seconds on a CPU."""
        return self.title != "eight schools" and self.count > 256

    def begin(self) -> Take:
        """Set up."""
        is_small = self.title == "eight schools"
        model, data = (schools, school_data) if is_small else (regression, regression_data)
        size = 32 if is_small else COEFFICIENTS
        if self.by.startswith("NumPyro"):
            args = data("cpu")[:: -1 if is_small else 1]  # the twin of eight schools takes the errors first
            case = Case(model, args, twin="eight_schools" if is_small else "logistic")
            return numpyro_loop(case, self.by.split()[1].rstrip(","), self.count, size)
        kind = CompiledSVI if self.by.startswith("Compiled") else SVI
        guide: Callable[..., Any] = AutoFlowGuide
        if self.by.endswith("IAF"):
            spec = flows.IAF(num_transforms=2, hidden_dims=(size, size))
            guide = partial(AutoFlowGuide, flow=spec)
        return own(kind, guide, model, data(self.device), self.count)


def timings(device: str) -> Iterator[Timing]:
    """What is timed, by importance."""
    contenders = (
        ("CompiledSVI AutoFlowGuide", device),
        ("NumPyro AutoBNAFNormal, fori_loop", device),
        ("NumPyro AutoIAFNormal, fori_loop", device),
        ("SVI AutoFlowGuide", device),
        ("CompiledSVI AutoFlowGuide, same IAF", device),
        ("CompiledSVI AutoFlowGuide", "cpu"),
    )
    for count, title in itertools.product(PARTICLES, ("eight schools", f"logistic, {ROWS:,} x {COEFFICIENTS}")):
        for by, where in contenders:
            timing = Timing(title, by, where, count)
            if where == device or not timing.is_large:
                yield timing


def time_epoch(device: str) -> dict[str, Any]:
    """Seconds of an epoch of the VAE by CompiledSVI, the median of three; and of the first, compiled in it."""
    pyro.clear_param_store()
    images = Images(IMAGES, device)
    svi = CompiledSVI(images.model, images.guide(), Adam({"lr": 1e-3}), Trace_ELBO(max_plate_nesting=1))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        for batch in images.batches():
            svi.step(*batch)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0], "epoch_s": statistics.median(seconds[1:])}


def time_groups(device: str) -> dict[str, Any]:
    """Seconds of ``fit`` on a million groups in mini-batches: three passes, warm start included."""
    pyro.clear_param_store()
    effects = Effects(GROUPS, device)
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
    steps = 3 * GROUPS // GROUP_BATCH
    start = time.perf_counter()
    result = fit(effects.model, guide, effects.batches(GROUP_BATCH), num_steps=steps, seed=0, progress=False)
    wait(device)
    mu, tau = (guide.median(*effects.batches(GROUP_BATCH)[0])[name].item() for name in ("mu", "tau"))
    return {"fit_s": time.perf_counter() - start, "elbo": result.elbo, "mu": mu, "tau": tau}


def run_speed(log: Log, device: str, *, preview: bool) -> None:
    """All timings, or the first few."""
    if device == "cuda":
        log.write(card=torch.cuda.get_device_name(), torch=torch.__version__, pyro_flows=pyro_flows.__version__)
    jobs: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        (
            {"model": one.title, "particles": one.count, "by": one.by, "on": one.device},
            partial(time_steps, one.begin, one.device),
        )
        for one in timings(device)
    ]
    if preview:
        jobs = jobs[:4]
    else:
        places = [device, "cpu"] if device != "cpu" else ["cpu"]
        epochs = [({"model": "VAE, 60,000 images", "on": place}, partial(time_epoch, place)) for place in places]
        groups = [({"model": "a million groups", "on": place}, partial(time_groups, place)) for place in places]
        jobs[20:20] = [*epochs, *groups]
    for what, job in jobs:
        if log.is_over:
            log.write(**what, failed="not run")
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = job()
            except Exception as error:  # out of memory, say
                found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        said = {str(each.message)[:300] for each in caught if "CompiledSVI" in str(each.message)}
        log.write(**what, **found, **({"warnings": sorted(said)} if said else {}))


def write_table(path: Path) -> None:
    """Make the documentation's table of a log; later results replace earlier ones."""
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        if "particles" in values:
            row = cells.setdefault((values["model"], values["by"], values["on"]), {})
            row[values["particles"]] = f"{values['ms']:#.3g}" if "ms" in values else "n/a"
    counts = sorted(PARTICLES)
    rows = [[*key, *(row.get(count, "n/a") for count in counts)] for key, row in cells.items()]
    header = ("model", "by, guide", "on", *map(str, counts))
    (TABLES / "gpu.rst").write_text(as_rst(header, sorted(rows)))


def main() -> None:
    """Run what is named."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="*", choices=("checks", "preview", "speed", []))
    made.add_argument("--seconds", type=float, default=180.0, help="after which nothing new begins")
    made.add_argument("--device", default="cuda")
    made.add_argument("--only", default="", help="checks whose name has this in it")
    made.add_argument("--log", type=Path, help="file that results are added to")
    made.add_argument("--write", action="store_true", help="write docs/tables/gpu.rst of the log")
    options = made.parse_args()
    log = Log(options.log, options.seconds)
    if "checks" in options.what:
        run_checks(log, options.device, options.only)
    for name in ("preview", "speed"):
        if name in options.what:
            run_speed(log, options.device, preview=name == "preview")
    if options.write:
        write_table(options.log)


if __name__ == "__main__":
    main()
