# SPDX-License-Identifier: Apache-2.0
"""What a step costs on a GPU, next to the CPU and to NumPyro on the same card.

    python tests/benchmarks/gpu_speed.py PART [--seconds 180] [--device cuda] [--log FILE] [--lock FILE]
    python tests/benchmarks/gpu_speed.py all --log FOLDER [--seconds 420] [--check-seconds 90]
    python tests/benchmarks/gpu_speed.py write --log FILE

Parts are ``small``, ``large``, ``numpyro`` and ``cpu``. Each prints a line of JSON for each result at once, and begins
nothing new after ``--seconds``. They compile side by side, and time their steps one after the other, by a lock. ``all``
does that, after the checks of ``gpu.py``; ``write`` makes ``docs/tables/gpu.rst`` and ``gpu_large.rst`` of all results.
Run by hand, never by pytest.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from pyro_flows.compiled.cuda import CudaGraph

PARTICLES = (64, 1024, 4096, 16, 256)  # in the order in which they are timed
ROUNDS, ROUND_SECONDS = 5, 0.3
SCHOOLS, LOGISTIC = "eight schools", f"logistic, {ROWS:,} x {COEFFICIENTS}"
OURS, IAF, EAGER = "CompiledSVI AutoFlowGuide", "CompiledSVI AutoFlowGuide, same IAF", "SVI AutoFlowGuide"
THEIRS = "NumPyro AutoIAFNormal, fori_loop"
# How a graph may be compiled: products up to so many multiplications are sums, and kernels are combined.
VARIANTS = {
    "products as sums, combined kernels": (2**20, True),
    "products as sums": (2**20, False),
    "products by cuBLAS, combined kernels": (0, True),
    "products by cuBLAS": (0, False),
}
Found = dict[str, Any]
Job = tuple[Found, Callable[[], Found]]


class Lock:
    """One process at a time times its steps."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for it."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)


class Own:
    """Our steps.

    Args:
        svi: Takes them.
        args: Of the model.
    """

    def __init__(self, svi: SVI, args: Any) -> None:
        self._svi, self._args = svi, args

    def __call__(self, count: int) -> None:
        """Take so many."""
        if isinstance(self._svi, CompiledSVI):
            self._svi.run(count, *self._args)
        else:
            for _ in range(count):
                self._svi.step(*self._args)

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


def own(kind: type[SVI], guide: Callable[..., Any], model: Callable[..., Any], args: Any, count: int) -> Own:
    """Set up our steps."""
    elbo = Trace_ELBO(num_particles=count, vectorize_particles=count > 1, max_plate_nesting=1)
    return Own(kind(model, guide(model), Adam({"lr": 1e-4}), elbo), args)


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
            return loop
        kind = CompiledSVI if self.by.startswith("Compiled") else SVI
        made: Callable[..., Any] = AutoFlowGuide
        if self.by == IAF:
            made = partial(AutoFlowGuide, flow=flows.IAF(num_transforms=2, hidden_dims=(size, size)))
        return own(kind, made, model, data(self.device), self.count)

    def job(self, lock: Lock) -> Job:
        """What is measured, and how."""
        what = {"model": self.title, "particles": self.count, "by": self.by, "on": self.device}
        return what, partial(time_steps, self, lock)


def time_steps(timing: Timing, lock: Lock) -> Found:
    """Seconds of the first step, set-up included, and milliseconds of later ones: the median of rounds."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    metrics.reset()
    start = time.perf_counter()
    take = timing.begin()
    take(1)
    wait(timing.device)
    found: Found = {"first_s": time.perf_counter() - start, "kernels": metrics.generated_kernel_count}
    with lock.held():
        take(3)
        wait(timing.device)
        start = time.perf_counter()
        take(10)
        wait(timing.device)
        steps = max(1, min(2000, round(ROUND_SECONDS / ((time.perf_counter() - start) / 10))))
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            take(steps)
            wait(timing.device)
            times.append(1e3 * (time.perf_counter() - start) / steps)
        found |= {"ms": statistics.median(times), "least": min(times), "most": max(times), "steps": steps}
        if isinstance(take, Own) and timing.device == "cuda":
            found |= take.inside()
    return found


def time_variant(name: str, device: str, lock: Lock) -> Found:
    """Eight schools with 64 particles, compiled in that way."""
    before = inductor.COMPILER, inductor.GPU_OPTIONS
    max_summed, combined = VARIANTS[name]
    inductor.COMPILER = replace(before[0], max_summed=max_summed)
    inductor.GPU_OPTIONS = {**before[1], "combo_kernels": combined}
    try:
        return time_steps(Timing(SCHOOLS, OURS, device, 64), lock)
    finally:
        inductor.COMPILER, inductor.GPU_OPTIONS = before


def profile_steps(device: str, lock: Lock) -> Found:
    """Where the time goes at 64 particles."""
    pyro.clear_param_store()
    take = Timing(SCHOOLS, OURS, device, 64).begin()
    assert isinstance(take, Own)
    take(10)
    with lock.held():
        return take.profile()


def time_epoch(device: str, lock: Lock) -> Found:
    """Seconds of an epoch of the VAE by CompiledSVI, the median of three; and of the first, compiled in it."""
    pyro.clear_param_store()
    images = Images(IMAGES, device)
    svi = CompiledSVI(images.model, images.guide(), Adam({"lr": 1e-3}), Trace_ELBO(max_plate_nesting=1))
    start = time.perf_counter()
    svi.step(*images.batches()[0])
    found, seconds = {"first_s": time.perf_counter() - start}, []
    with lock.held():
        for _ in range(3):
            start = time.perf_counter()
            for batch in images.batches():
                svi.step(*batch)
            wait(device)
            seconds.append(time.perf_counter() - start)
    return {**found, "epoch_s": statistics.median(seconds)}


def time_groups(device: str) -> Found:
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


def jobs(part: str, device: str, lock: Lock) -> list[Job]:
    """What a part measures, by importance."""

    def steps(title: str, by: str, counts: tuple[int, ...], where: str = device) -> list[Job]:
        return [Timing(title, by, where, count).job(lock) for count in counts]

    def epoch(where: str) -> Job:
        return {"model": f"VAE, {IMAGES:,} images", "on": where}, partial(time_epoch, where, lock)

    def groups(where: str) -> Job:
        return {"model": "a million groups", "on": where}, partial(time_groups, where)

    if part == "small":
        profiled = ({"profile": SCHOOLS}, partial(profile_steps, device, lock))
        variants: list[Job] = [
            ({"variant": name, "model": SCHOOLS}, partial(time_variant, name, device, lock)) for name in VARIANTS
        ]
        return [*steps(SCHOOLS, OURS, PARTICLES), profiled, *variants]
    if part == "large":
        return [
            epoch(device),
            *steps(SCHOOLS, IAF, (64,)),
            *steps(LOGISTIC, OURS, (64,)),
            *steps(SCHOOLS, EAGER, (64,)),
            *steps(LOGISTIC, EAGER, (64,)),
            groups(device),
            *steps(SCHOOLS, IAF, (1024, 4096)),
            *steps(LOGISTIC, OURS, (1024,)),
            *steps(LOGISTIC, IAF, (64, 1024)),
            *steps(SCHOOLS, IAF, (16, 256)),
        ]
    if part == "numpyro":
        bnaf = "NumPyro AutoBNAFNormal, fori_loop"
        return [*steps(SCHOOLS, THEIRS, PARTICLES), *steps(LOGISTIC, THEIRS, (64, 1024)), *steps(SCHOOLS, bnaf, (64,))]
    return [
        *steps(SCHOOLS, OURS, (64,), "cpu"),
        epoch("cpu"),
        groups("cpu"),
        *steps(SCHOOLS, OURS, (1024, 16), "cpu"),
        *steps(LOGISTIC, OURS, (64,), "cpu"),
        *steps(SCHOOLS, OURS, (4096, 256), "cpu"),
    ]


def run_part(part: str, device: str, log: Log, lock: Lock) -> None:
    """One job after the other, each of which may fail by itself."""
    explain_failures()
    if part == "small" and device == "cuda":
        log.write(card=torch.cuda.get_device_name(), torch=torch.__version__, pyro_flows=pyro_flows.__version__)
    for what, job in jobs(part, device, lock):
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


# Side by side

CHECKS = (
    "compiled, Adam;compiled, SGD;memory",
    "new data;default device;mini-batches;encoder",
    "fit and all;fit, recorded;family block;family neural",
)


def side_by_side(commands: dict[str, list[str]], folder: Path, seconds: float) -> None:
    """Run commands on cores of their own, their output in a file each; those that are not over by then are ended."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // len(commands))
    running = []
    for index, (name, command) in enumerate(commands.items()):
        mine = cores[index * share : (index + 1) * share] or cores[:1]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(share)}
        with (folder / f"{name}.txt").open("w") as output:
            running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        with suppress(OSError):
            os.sched_setaffinity(running[-1].pid, mine)
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for name in commands:
        print(f"== {name}\n{(folder / f'{name}.txt').read_text()[-1500:]}", flush=True)


def run_all(folder: Path, device: str, seconds: float, check_seconds: float) -> None:
    """The checks, and then all parts, with results in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    here = Path(__file__).parent
    checks = {
        f"checks_{index}": [
            *(sys.executable, str(here / "gpu.py"), "--device", device, "--only", only),
            *("--seconds", str(0.8 * check_seconds), "--log", str(folder / "checks.jsonl")),
        ]
        for index, only in enumerate(CHECKS)
    }
    if check_seconds:
        side_by_side(checks, folder, check_seconds)
    left = end - time.monotonic()
    parts = {
        part: [
            *(sys.executable, str(Path(__file__)), part, "--device", device, "--seconds", str(left - 30.0)),
            *("--log", str(folder / "speed.jsonl"), "--lock", str(folder / "lock")),
        ]
        for part in ("small", "large", "numpyro", "cpu")
    }
    side_by_side(parts, folder, left)


def write_tables(path: Path) -> None:
    """Make the documentation's tables of a log; later results replace earlier ones."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    others: dict[str, dict[str, str]] = {}
    for values in results:
        if "particles" in values and "ms" in values:
            row = cells.setdefault((values["model"], values["by"], values["on"]), {})
            row[values["particles"]] = f"{values['ms']:#.3g}"
        elif seconds := [values[name] for name in ("epoch_s", "fit_s") if name in values]:
            what = f"{values['model']}: {'an epoch' if 'epoch_s' in values else 'fit'}"
            others.setdefault(what, {})[values["on"]] = f"{seconds[0]:#.3g}"
    counts, devices = sorted(PARTICLES), ("cuda", "cpu")
    rows = [[*key, *(row.get(count, "n/a") for count in counts)] for key, row in cells.items()]
    (TABLES / "gpu.rst").write_text(as_rst(("model", "by, guide", "on", *map(str, counts)), sorted(rows)))
    rows = [[what, *(row.get(on, "n/a") for on in devices)] for what, row in others.items()]
    (TABLES / "gpu_large.rst").write_text(as_rst(("what, seconds", *devices), sorted(rows)))


def main() -> None:
    """Run what is named."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("part", choices=("small", "large", "numpyro", "cpu", "all", "write"))
    made.add_argument("--seconds", type=float, default=180.0, help="after which nothing new begins, or all ends")
    made.add_argument("--check-seconds", type=float, default=90.0, help="for the checks before; 0 for none")
    made.add_argument("--device", default="cuda")
    made.add_argument("--log", type=Path, help="file that results are added to; a folder for `all`")
    made.add_argument("--lock", type=Path, help="file that is locked while steps are timed")
    options = made.parse_args()
    if options.part == "write":
        write_tables(options.log)
    elif options.part == "all":
        run_all(options.log, options.device, options.seconds, options.check_seconds)
    else:
        log, lock = Log(options.log, options.seconds), Lock(options.lock)
        run_part(options.part, options.device, log, lock)


if __name__ == "__main__":
    main()
