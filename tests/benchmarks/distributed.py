# SPDX-License-Identifier: Apache-2.0
"""Two processes against one: seconds and memory, communication, and runs that are killed and started again.

    python tests/benchmarks/distributed.py [steps] [groups] [memory] [communication] [kills] [--seeds 3] [--write]

Run by hand, never by pytest, on a machine with two free cores. ``--seeds`` is the number of repeats of a timing, or of
kills. ``--write`` puts the tables in ``docs/tables``. Processor seconds are per process, so that they compare on a
machine that is busy, too; wall seconds do not.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from tables import Rows, parser, run
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.distributed.processes import Processes
from pyro_flows.training import EstimateSettings, FitSettings, VerdictSettings

NUM_GROUPS = int(os.environ.get("NUM_GROUPS", "100000"))
# Of which memory is measured; the first needs next to none for the groups themselves.
COUNTS = (20_000, 1_000_000, 2_000_000, 4_000_000)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=(x @ w.unsqueeze(-1)).squeeze(-1)), obs=y)


def groups(y: Tensor, size: int) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("groups", len(y), subsample_size=size) as index:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])


def step_of_regression(processes: int) -> dict[str, Any]:
    """Seconds of a step of 128 particles on 10,000 rows."""
    x = normal(10_000, 20)
    y = (x[:, 0] > 0).float()
    guide = AutoFlowGuide(regression, "diagonal_normal").setup(x, y)  # as one that goes on: no warm start
    return timed(guide, regression, (x, y), 30, num_particles=128)


def step_of_groups(processes: int) -> dict[str, Any]:
    """Seconds and memory with many groups; a mini-batch of 10,000 on all processes together."""
    y = 1.0 + 2.0 * normal(NUM_GROUPS) + torch.randn(NUM_GROUPS, generator=torch.Generator().manual_seed(1))
    size = 10_000 // processes
    guide = AutoFlowGuide(groups, create_plates=lambda y, size: pyro.plate("groups", len(y), subsample_size=size))
    settings = FitSettings(verdict=VerdictSettings(num_draws=0))
    return timed(guide, groups, (y, size), 100, settings=settings)


def memory_of_groups(processes: int) -> dict[str, Any]:
    """Peak memory of a run with a warm start, and enough steps for all copies of parameters."""
    y, size = normal(NUM_GROUPS), 10_000 // processes
    guide = AutoFlowGuide(groups, create_plates=lambda y, size: pyro.plate("groups", len(y), subsample_size=size))
    settings = FitSettings(verdict=VerdictSettings(num_draws=0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(groups, guide, (y, size), num_steps=210, compile=False, seed=0, progress=False, settings=settings)
    return {"mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10}


def timed(guide: Any, model: Any, args: tuple[Any, ...], steps: int, **options: Any) -> dict[str, Any]:
    """Seconds of a step, as the difference of a long run and a short one; of a run; and the peak memory."""
    settings = FitSettings(
        estimates=EstimateSettings(num_runs=2, num_particles=2), verdict=VerdictSettings(num_draws=0)
    )
    options = {"compile": False, "seed": 0, "progress": False, "settings": settings, **options}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clocks = [(time.perf_counter(), time.process_time())]
    for count in (1, 5, steps + 5):  # the first with the warm start
        result = fit(model, guide, args, num_steps=count, **options)
        clocks.append((time.perf_counter(), time.process_time()))
    wall, processor = zip(*clocks, strict=True)
    return {
        "wall": (wall[3] - wall[2] - (wall[2] - wall[1])) / steps,
        "processor": (processor[3] - processor[2] - (processor[2] - processor[1])) / steps,
        "run": wall[3] - wall[0],
        "run_processor": processor[3] - processor[0],
        "gib_of_fit": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
    }


def all_reduce(processes: int) -> dict[str, Any]:
    """Median seconds of an all-reduce by its bytes."""
    group, found = Processes.of_group("benchmark"), {}
    for size in (2**8, 2**12, 2**16, 2**20, 2**24):
        vector, seconds = torch.ones(size), []
        for _ in range(7):
            begin = time.perf_counter()
            group.sum(vector)
            seconds.append(time.perf_counter() - begin)
        found[str(4 * size)] = statistics.median(seconds)
    return found


def killed(processes: int) -> dict[str, Any]:
    """Norm of the parameters, bit for bit, of a run that someone else may kill."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    settings = FitSettings(checkpoint_interval=0.05, estimates=EstimateSettings(num_runs=4, num_particles=20))
    guide = AutoFlowGuide(schools)
    path = os.environ["CHECKPOINT"]
    options = {"num_steps": 100, "num_particles": 8, "compile": False, "seed": 0, "progress": False}
    fit(schools, guide, (y,), checkpoint=path, settings=settings, **options)
    return {"parameters": torch.cat([p.detach().reshape(-1) for p in guide.parameters()]).tolist()}


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def started(
    name: str, processes: int, folder: Path, restarts: int = 0, num_groups: int = NUM_GROUPS
) -> subprocess.Popen[bytes]:
    """One of the functions above in so many processes, each of which writes what it returns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CHECKPOINT": str(folder / "run.pt"),
        "NUM_GROUPS": str(num_groups),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # restarted processes find no addresses of those before
    }
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", __file__, "process", name, str(folder)],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def launched(name: str, processes: int, num_groups: int = NUM_GROUPS) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        assert started(name, processes, Path(folder), num_groups=num_groups).wait() == 0
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def process(name: str, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    found = globals()[name](torch.distributed.get_world_size())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def spread(values: Sequence[float], digits: int = 3) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def compare(name: str, repeats: int) -> Rows:
    """One process and two, in turns."""
    one, two = [], []
    for _ in range(repeats):
        one += launched(name, 1)
        two.append(launched(name, 2))
    rows = []
    keys = {"step": "wall", "step, processor": "processor", "run": "run", "run, processor": "run_processor"}
    for title, key in keys.items():
        slowest = [max(each[key] for each in pair) for pair in two]
        ratios = [b / a[key] for a, b in zip(one, slowest, strict=True)]
        rows.append([f"{title}, seconds", spread([each[key] for each in one]), spread(slowest), spread(ratios, 2)])
    for title, key in {"peak memory of a process": "gib", "that of fit alone": "gib_of_fit"}.items():
        memory = [[max(each[key] for each in pair) for pair in two], [each[key] for each in one]]
        ratios = [b / a for b, a in zip(*memory, strict=True)]
        rows.append([f"{title}, GiB", spread(memory[1], 2), spread(memory[0], 2), spread(ratios, 2)])
    elbos = [f"{each['elbo']:.1f} +/- {each['elbo_se']:.1f}" for each in (one[0], two[0][0])]
    rows.append(["ELBO in the end, nats", *elbos, ""])
    return rows


HEADER = ["", "one process", "two processes", "ratio"]


def measure_steps(repeats: int) -> tuple[Sequence[str], Rows]:
    """A compute-bound fit: 128 particles, 10,000 rows."""
    return HEADER, compare("step_of_regression", repeats)


def measure_groups(repeats: int) -> tuple[Sequence[str], Rows]:
    """Groups with parameters of their own, warm start included; NUM_GROUPS in the environment sets their number."""
    return HEADER, compare("step_of_groups", repeats)


def measure_memory(repeats: int) -> tuple[Sequence[str], Rows]:
    """Memory of fit alone by the number of groups: what a mini-batch needs, and what grows with the groups."""
    found = {
        (count, processes): [
            max(each["mib"] for each in launched("memory_of_groups", processes, count)) for _ in range(repeats)
        ]
        for count in COUNTS
        for processes in (1, 2)
    }
    rows = []
    for count in COUNTS:
        one, two = found[count, 1], found[count, 2]
        ratio = statistics.median(two) / statistics.median(one)
        rows.append([f"{count:,} groups, MiB", spread(one, 0), spread(two, 0), f"{ratio:.2f}"])
    slopes = []
    for processes in (1, 2):
        middle = [statistics.median(found[count, processes]) for count in COUNTS]
        slopes.append(1e6 * statistics.linear_regression(COUNTS, middle).slope)
    per_million = [f"{slope:.0f}" for slope in slopes]
    rows.append(["of which for each million groups, MiB", *per_million, f"{slopes[1] / slopes[0]:.2f}"])
    return HEADER, rows


def measure_communication(repeats: int) -> tuple[Sequence[str], Rows]:
    """Seconds of an all-reduce on two processes, measured; on 8 and 64, by the model of a ring."""
    runs = [launched("all_reduce", 2)[0] for _ in range(repeats)]
    medians = {int(size): statistics.median(each[size] for each in runs) for size in runs[0]}
    latency = min(medians.values()) / 2  # of each of the ring's 2 (n - 1) rounds
    largest = max(medians)
    bandwidth = largest / (medians[largest] - 2 * latency)  # a process sends 2 (n - 1) / n of the bytes
    rows = []
    for size, seconds in medians.items():
        model = [2 * (n - 1) * latency + 2 * (n - 1) / n * size / bandwidth for n in (8, 64)]
        lost = [seconds / (0.1 + seconds), *(each / (0.1 + each) for each in model)]
        cells = [f"{1e3 * value:.2f}" for value in (seconds, *model)]
        rows.append([f"{size:,}", *cells, *(f"{100 * share:.0f} %" for share in lost)])
    header = ["bytes", "2, measured, ms", "8, modelled", "64, modelled", "share of a step of 0.1 s: 2", "8", "64"]
    return header, rows


def measure_kills(kills: int) -> tuple[Sequence[str], Rows]:
    """One of two processes is killed at a random moment; torchrun starts both again."""
    with tempfile.TemporaryDirectory() as folder:
        job = started("killed", 2, Path(folder))
        _wait_for(Path(folder) / "pid_1")
        begin = time.perf_counter()
        assert job.wait() == 0
        expected = json.loads((Path(folder) / "0.json").read_text())
        seconds = time.perf_counter() - begin
    identical = other = failed = struck = 0
    seed = -1
    while struck < kills:  # those that were not struck had finished, or not begun
        seed += 1
        with tempfile.TemporaryDirectory() as folder:
            job, where = started("killed", 2, Path(folder), restarts=2), Path(folder)
            _wait_for(where / f"pid_{seed % 2}")
            killer = threading.Timer(random.Random(seed).uniform(0.05, 0.8) * seconds, _kill, (where, seed % 2))
            killer.start()
            code = job.wait()
            killer.cancel()
            struck += (where / "struck").exists()
            if code:
                failed += 1
                continue
            found = [json.loads((where / f"{rank}.json").read_text()) for rank in range(2)]
            identical += found == [expected, expected]
            other += found != [expected, expected]
    return ["runs", "killed while they ran", "identical", "other", "not finished"], [
        [str(seed + 1), str(struck), str(identical), str(other), str(failed)]
    ]


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def _kill(folder: Path, rank: int) -> None:
    """Kill the process that this benchmark has started as ``rank``, if it runs."""
    path = folder / f"pid_{rank}"
    if path.exists() and not (folder / f"{rank}.json").exists():
        os.kill(int(path.read_text()), signal.SIGKILL)
        (folder / "struck").touch()


MEASURES = {
    "steps": measure_steps,
    "groups": measure_groups,
    "memory": measure_memory,
    "communication": measure_communication,
    "kills": measure_kills,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["process"]:
        process(sys.argv[2], Path(sys.argv[3]))
    else:
        run(MEASURES, parser(__doc__, MEASURES, 3).parse_args(), "distributed_")
