# SPDX-License-Identifier: Apache-2.0
"""What a step costs on a GPU, next to the CPU and to NumPyro on the same card.

    python tests/benchmarks/gpu_speed.py all --log FOLDER [--seconds 560] [--set-up-seconds 330] [--workers 8]
    python tests/benchmarks/gpu_speed.py gpu|cpu --log FOLDER [--set-up-seconds 330]
    python tests/benchmarks/gpu_speed.py write --log FILE [FILE ...]

``all`` starts processes that take turns to get the next job of ``gpu``, and one on cores of its own for ``cpu``; the
checks of ``gpu.py`` are among the jobs. They compile side by side, which takes nearly all of the time. When all are
done with that, steps are timed, one job after the other: kernels of other processes would slow them down. Results are
lines of JSON in ``speed.jsonl`` and ``checks.jsonl`` of the folder; ``write`` makes ``docs/tables/gpu.rst`` and
``gpu_large.rst`` of them.
Run by hand, never by pytest.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from unittest.mock import patch

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the card's memory

import pyro
import torch
from gpu import (
    COEFFICIENTS,
    GROUP_BATCH,
    GROUPS,
    IMAGES,
    ROWS,
    Effects,
    Images,
    Log,
    explain_failures,
    regression,
    regression_data,
    school_data,
    schools,
    wait,
)
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from speed_steps import Case, Take, numpyro_side
from tables import TABLES, as_rst
from torch._inductor import metrics

import pyro_flows
from pyro_flows import AutoFlowGuide, CompiledSVI, fit, flows
from pyro_flows.compiled import inductor
from pyro_flows.compiled.combined import combined_late
from pyro_flows.compiled.cuda import CudaGraph

PARTICLES = (16, 64, 256, 1024, 4096)
ROUNDS, ROUND_SECONDS = 5, 0.3
SCHOOLS, LOGISTIC = "eight schools", f"logistic, {ROWS:,} x {COEFFICIENTS}"
OURS, IAF, EAGER = "CompiledSVI AutoFlowGuide", "CompiledSVI AutoFlowGuide, same IAF", "SVI AutoFlowGuide"
TOTAL = f"{IAF}, total gradients"  # NumPyro's estimator: no score, so no Jacobian of the flow
THEIRS = "NumPyro AutoIAFNormal, fori_loop"
# Of float32 matrix products: torch's is full by default, JAX's is TF32.
FULL, TF32 = ", full precision", ", TF32"
# How a graph may be compiled: products up to so many multiplications are sums, and kernels are combined, late or early.
VARIANTS = {
    "products as sums, combined late": (2**20, True, combined_late),
    "products as sums, combined early": (2**20, True, nullcontext),
    "products as sums": (2**20, False, nullcontext),
    "products by cuBLAS, combined late": (0, True, combined_late),
    "products by cuBLAS": (0, False, nullcontext),
}
Found = dict[str, Any]
Measure = Callable[[], Found]
SetUp = tuple[Found, Measure | None]  # first results, and how the others are measured later
Job = tuple[Found, Callable[[], SetUp]]  # what is measured, and what sets it up


@contextmanager
def locked(path: Path, *, alone: bool = True) -> Iterator[TextIO]:
    """The file at ``path``, which one process at a time has, or those have together that do not ask for it alone."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield file


def turns(path: Path) -> Iterator[int]:
    """0, 1, 2 and so on, of which each process gets the next that no other has got."""
    while True:
        with locked(path) as file:
            file.seek(0)
            number = int(file.read() or 0)
            file.truncate(0)
            file.write(str(number + 1))
        yield number


class Own:
    """Our steps.

    Args:
        svi: Takes them.
        args: Of the model.
        precision: Of float32 matrix products.
    """

    def __init__(self, svi: SVI, args: Any, precision: str) -> None:
        self._svi, self._args, self._precision = svi, args, precision

    def __call__(self, count: int) -> None:
        """Take so many."""
        torch.set_float32_matmul_precision(self._precision)
        if isinstance(self._svi, CompiledSVI):
            self._svi.run(count, *self._args)
        else:
            for _ in range(count):
                self._svi.step(*self._args)
        torch.set_float32_matmul_precision("highest")

    def inside(self) -> Found:
        """Milliseconds of the captured kernels alone, launched without Python in between."""
        graphs = getattr(self._svi, "_graphs", [])
        if not graphs or not isinstance(graphs[0]._run, CudaGraph):
            return {}
        run, count = graphs[0]._run, 300
        wait("cuda")
        start = time.perf_counter()
        for _ in range(count):
            run._graph.replay()
        wait("cuda")
        seconds = time.perf_counter() - start
        return {"replay_ms": 1e3 * seconds / count, "copied": len(run._buffers), "operations": graphs[0].num_operations}

    def profile(self) -> Found:
        """The kernels of three steps."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            self(3)
            wait("cuda")
        rows = [row for row in seen.key_averages() if row.device_time_total and not row.cpu_time_total]
        rows.sort(key=lambda row: -row.device_time_total)
        return {
            "kernels_a_step": sum(row.count for row in rows) / 3,
            "kernel_us_a_step": sum(row.device_time_total for row in rows) / 3,
            "most": [[row.key[:60], row.count / 3, round(row.device_time_total / row.count, 2)] for row in rows[:12]],
        }


def in_full_precision(take: Take) -> Take:
    """NumPyro's steps without TF32."""
    import jax

    def taken(count: int) -> None:
        with jax.default_matmul_precision("highest"):
            take(count)

    return taken


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

    def begin(self) -> Take:
        """Set up."""
        is_small = self.title == SCHOOLS
        model, data = (schools, school_data) if is_small else (regression, regression_data)
        size = 32 if is_small else COEFFICIENTS
        if self.by.startswith("NumPyro"):
            args = data("cpu")[:: -1 if is_small else 1]  # the twin of eight schools takes the errors first
            case = Case(model, args, twin="eight_schools" if is_small else "logistic")
            name = self.by.split()[1].rstrip(",")
            options = {"num_flows": 2, "hidden_dims": [size, size]} if name == "AutoIAFNormal" else {}
            side = numpyro_side()
            guide = partial(getattr(side.autoguide, name), **options)
            loop: Take = side.train(case.twin, guide, case.args, self.count, 1e-4).loop
            return in_full_precision(loop) if self.by.endswith(FULL) else loop
        kind = CompiledSVI if self.by.startswith("Compiled") else SVI
        made: Callable[..., Any] = AutoFlowGuide
        if self.by.startswith(IAF):
            flow = flows.IAF(num_transforms=2, hidden_dims=(size, size))
            made = partial(AutoFlowGuide, flow=flow, path_gradient=not self.by.startswith(TOTAL))
        elbo = Trace_ELBO(num_particles=self.count, vectorize_particles=self.count > 1, max_plate_nesting=1)
        svi = kind(model, made(model), Adam({"lr": 1e-4}), elbo)
        return Own(svi, data(self.device), "high" if self.by.endswith(TF32) else "highest")

    @property
    def job(self) -> Job:
        """What is measured, and how."""
        return {"model": self.title, "particles": self.count, "by": self.by, "on": self.device}, self.set_up

    def set_up(self) -> SetUp:
        """Seconds of the first step, set-up and compilation included."""
        torch.manual_seed(0)
        metrics.reset()
        start = time.perf_counter()
        take = self.begin()
        take(1)
        wait(self.device)
        first = {"first_s": time.perf_counter() - start, "kernels": metrics.generated_kernel_count}
        return first, partial(time_steps, take, self.device)


def time_steps(take: Take, device: str) -> Found:
    """Milliseconds of steps: the median of rounds."""
    take(3)
    wait(device)
    start = time.perf_counter()
    take(10)
    wait(device)
    steps = max(1, min(2000, round(ROUND_SECONDS / ((time.perf_counter() - start) / 10))))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        take(steps)
        wait(device)
        times.append(1e3 * (time.perf_counter() - start) / steps)
    found = {"ms": statistics.median(times), "least": min(times), "most": max(times), "steps": steps}
    if isinstance(take, Own) and device == "cuda":
        found |= take.inside()
    return found


def set_up_variant(name: str, device: str) -> SetUp:
    """Eight schools with 64 particles, compiled in that way."""
    before = inductor.COMPILER, inductor.GPU_OPTIONS
    max_summed, combined, order = VARIANTS[name]
    inductor.COMPILER = replace(before[0], max_summed=max_summed)
    inductor.GPU_OPTIONS = {**before[1], "combo_kernels": combined}
    try:
        with patch.object(inductor, "combined_late", order):
            return Timing(SCHOOLS, OURS, device, 64).set_up()
    finally:
        inductor.COMPILER, inductor.GPU_OPTIONS = before


def set_up_profile(device: str) -> SetUp:
    """Where the time goes at 64 particles."""
    take = Timing(SCHOOLS, OURS, device, 64).begin()
    assert isinstance(take, Own)
    take(10)
    return {}, take.profile


def set_up_epoch(kind: type[SVI], device: str) -> SetUp:
    """Seconds of an epoch of the VAE, the median of three, or one eager epoch; and of the first step."""
    images = Images(IMAGES, device)
    svi = kind(images.model, images.guide(), Adam({"lr": 1e-3}), Trace_ELBO(max_plate_nesting=1))
    start = time.perf_counter()
    svi.step(*images.batches()[0])

    def measure() -> Found:
        seconds = []
        for _ in range(3 if kind is CompiledSVI else 1):
            start = time.perf_counter()
            for batch in images.batches():
                svi.step(*batch)
            wait(device)
            seconds.append(time.perf_counter() - start)
        return {"epoch_s": statistics.median(seconds)}

    return {"first_s": time.perf_counter() - start}, measure


def fit_groups(device: str) -> SetUp:
    """Seconds of ``fit`` on a million groups in mini-batches: three passes, warm start included."""
    effects = Effects(GROUPS, device)
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
    steps = 3 * GROUPS // GROUP_BATCH
    start = time.perf_counter()
    result = fit(effects.model, guide, effects.batches(GROUP_BATCH), num_steps=steps, seed=0, progress=False)
    wait(device)
    seconds = time.perf_counter() - start
    mu, tau = (guide.median(*effects.batches(GROUP_BATCH)[0])[name].item() for name in ("mu", "tau"))
    return {"fit_s": seconds, "elbo": result.elbo, "mu": mu, "tau": tau}, None


def run_checks(only: str, device: str, folder: Path) -> SetUp:
    """Checks, in a process of their own: a fault of the card ends no other job."""
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--device", device, "--only", only]
    done = subprocess.run([*command, "--log", str(folder / "checks.jsonl")], check=False)
    return {"exit": done.returncode}, None


def jobs(part: str, device: str, folder: Path) -> list[Job]:
    """What a part measures, by importance."""

    def steps(title: str, by: str, *counts: int, where: str = device) -> list[Job]:
        return [Timing(title, by, where, count).job for count in counts]

    def epoch(kind: type[SVI], where: str) -> Job:
        what = {"model": f"VAE, {IMAGES:,} images", "by": kind.__name__, "on": where}
        return what, partial(set_up_epoch, kind, where)

    def checks(*names: str) -> list[Job]:
        return [({"checks": only}, partial(run_checks, only, device, folder)) for only in names]

    if part == "cpu":
        return [
            *steps(SCHOOLS, OURS, 1024, 4096, 16, 256, 64, where="cpu"),
            epoch(CompiledSVI, "cpu"),
            *steps(LOGISTIC, OURS, 64, where="cpu"),
        ]
    return [
        *checks("compiled, SGD;compiled, AdamW", "compiled, ClippedAdam", "fit, recorded"),
        *steps(SCHOOLS, OURS, 16, 256),
        *steps(SCHOOLS, IAF, 16, 256),
        epoch(CompiledSVI, device),
        *steps(LOGISTIC, IAF, 64, 1024),
        *steps(SCHOOLS, OURS, 64),
        *steps(SCHOOLS, THEIRS, 64, 16, 256),
        *steps(SCHOOLS, IAF, 64),
        *steps(SCHOOLS, TOTAL, 64, 1024, 256, 4096),
        *steps(LOGISTIC, TOTAL, 64, 1024),
        *steps(LOGISTIC, TOTAL + TF32, 1024),
        *steps(LOGISTIC, THEIRS + FULL, 1024),
        *steps(SCHOOLS, OURS, 4096, 1024),
        *steps(SCHOOLS, IAF, 4096, 1024),
        *steps(LOGISTIC, OURS, 64, 1024),
        *steps(SCHOOLS, THEIRS, 4096, 1024),
        *steps(LOGISTIC, THEIRS, 64, 1024),
        *checks("compiled, Adam in;memory"),
        *steps(SCHOOLS, EAGER, 64),
        *steps(LOGISTIC, EAGER, 64),
        ({"model": "a million groups", "on": device}, partial(fit_groups, device)),
        *checks("new data;default device", "mini-batches;encoder", "fit and all;family", "processes"),
        *steps(SCHOOLS, "NumPyro AutoBNAFNormal, fori_loop", 64),
        epoch(SVI, device),
        ({"profile": SCHOOLS}, partial(set_up_profile, device)),
        *(({"variant": name, "model": SCHOOLS}, partial(set_up_variant, name, device)) for name in VARIANTS),
    ]


def run_part(part: str, device: str, folder: Path, seconds: float) -> None:
    """Set up jobs for so many seconds, each of which may fail by itself; then measure them, when no process sets up
    any."""
    explain_failures()
    folder.mkdir(parents=True, exist_ok=True)
    log, lock = Log(folder / "speed.jsonl", seconds), folder / "lock"
    numbers, todo = turns(folder / f"next_{part}"), jobs(part, device, folder)
    waiting: list[tuple[Found, Measure, Any]] = []
    with locked(lock, alone=False):
        while not log.is_over and (number := next(numbers)) < len(todo):
            what, set_up = todo[number]
            if number == 0 and device == "cuda":
                versions = {name: version(name) for name in ("torch", "numpyro", "jax")}
                log.write(card=torch.cuda.get_device_name(), **versions, pyro_flows=pyro_flows.__version__)
            with warnings.catch_warnings(record=True) as caught, pyro.get_param_store().scope() as state:
                warnings.simplefilter("always")
                try:
                    found, measure = set_up()
                except Exception as error:  # out of memory, say
                    found, measure = failure(error), None
            said = {str(each.message)[:300] for each in caught if "CompiledSVI" in str(each.message)}
            found = {**what, **found, **({"warnings": sorted(said)} if said else {})}
            log.write(**found)
            if measure is not None:
                waiting.append((found, measure, state))
    for found, measure, state in waiting:
        with locked(lock), pyro.get_param_store().scope(state):
            try:
                more = measure()
            except Exception as error:
                more = failure(error)
        log.write(**found, **more)


def failure(error: Exception) -> Found:
    """What is written of a job that failed."""
    return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def run_all(folder: Path, device: str, seconds: float, set_up_seconds: float, workers: int) -> None:
    """All jobs: those of the CPU on a quarter of the cores, those of the GPU on the others. What is not over after
    ``seconds`` is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    kept = max(1, len(cores) // 4)
    shares = [("cpu", cores[:kept]), *[("gpu", cores[kept:] or cores)] * workers]
    running, end = [], time.monotonic() + seconds
    for index, (part, mine) in enumerate(shares):
        threads = len(mine) if part == "cpu" else 1
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(kept)
        command = [sys.executable, str(Path(__file__)), part, "--device", device, "--log", str(folder)]
        command += ["--set-up-seconds", str(set_up_seconds)]
        with (folder / f"{part}_{index}.txt").open("w") as output:
            running.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0)
            )
        with suppress(OSError):
            os.sched_setaffinity(running[-1].pid, mine)
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its checks
            process.wait()


def write_tables(paths: Sequence[Path]) -> None:
    """Make the documentation's tables of logs; later results replace earlier ones."""
    results = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    others: dict[str, dict[str, str]] = {}
    for values in results:
        if "particles" in values and "ms" in values:
            row = cells.setdefault((values["model"], values["by"], values["on"]), {})
            row[values["particles"]] = f"{values['ms']:#.3g}"
        elif seconds := [values[name] for name in ("epoch_s", "fit_s") if name in values]:
            by = f" by {values['by']}" if "by" in values else ""
            what = f"{values['model']}: {'an epoch' if 'epoch_s' in values else 'fit'}{by}"
            others.setdefault(what, {})[values["on"]] = f"{seconds[0]:#.3g}"
    devices = ("cuda", "cpu")
    rows = [[*key, *(row.get(count, "n/a") for count in PARTICLES)] for key, row in cells.items()]
    (TABLES / "gpu.rst").write_text(as_rst(("model", "by, guide", "on", *map(str, PARTICLES)), sorted(rows)))
    rows = [[what, *(row.get(on, "n/a") for on in devices)] for what, row in others.items()]
    (TABLES / "gpu_large.rst").write_text(as_rst(("what, seconds", *devices), sorted(rows)))


def main() -> None:
    """Run what is named."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("part", choices=("gpu", "cpu", "all", "write"))
    made.add_argument("--log", type=Path, nargs="+", required=True, help="folder of results; for write, files")
    made.add_argument("--seconds", type=float, default=560.0, help="after which `all` ends what still runs")
    made.add_argument("--set-up-seconds", type=float, default=330.0, help="after which no job is set up")
    made.add_argument("--workers", type=int, default=8, help="processes of `all` that set up jobs of the GPU")
    made.add_argument("--device", default="cuda")
    options = made.parse_args()
    if options.part == "write":
        write_tables(options.log)
    elif options.part == "all":
        run_all(options.log[0], options.device, options.seconds, options.set_up_seconds, options.workers)
    else:
        run_part(options.part, options.device, options.log[0], options.set_up_seconds)


if __name__ == "__main__":
    main()
