# SPDX-License-Identifier: Apache-2.0
"""Soak: memory, threads and open files over 100,000 steps of SVI, of CompiledSVI and of ``fit`` on mini-batches.

Run by hand: ``python tests/benchmarks/soak.py [--steps 100000] [svi compiled fit]``; prints a table in Markdown.
Resident memory counts from the 1000th step on, and should stay within 2 %.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_flows import AutoFlowGuide, CompiledSVI, fit

DATA = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2.0 + 1.0
BATCHES = [(batch,) for batch in DATA.split(8)]


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(DATA), subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def resident() -> float:
    """Resident memory, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Record:
    """Memory in MiB, Python objects, open files and threads, read every so many steps."""

    def __init__(self, name: str, num_steps: int) -> None:
        self.name, self.every = name, max(1000, num_steps // 20)
        self.count, self.begin = 0, time.perf_counter()
        self.rows: list[tuple[int, float, int, int, int]] = []

    def step(self) -> None:
        self.count += 1
        if self.count == 1000 or self.count % self.every == 0:
            gc.collect()
            files = len(os.listdir("/proc/self/fd"))
            self.rows.append((self.count, resident(), len(gc.get_objects()), files, threading.active_count()))
            print(self.name, *(f"{value:g}" for value in self.rows[-1]), file=sys.stderr, flush=True)

    def line(self) -> str:
        first, last = self.rows[0], self.rows[-1]
        growth = max(row[1] for row in self.rows) / first[1] - 1.0
        seconds = time.perf_counter() - self.begin
        objects, files, threads = (f"{first[i]}, {last[i]}" for i in (2, 3, 4))
        return (
            f"| {self.name} | {self.count} | {seconds:.0f} | {first[1]:.1f} | {last[1]:.1f} | {growth:+.2%} "
            f"| {objects} | {files} | {threads} |"
        )


def loop(name: str, svi: Any, num_steps: int) -> Record:
    record = Record(name, num_steps)
    for step in range(num_steps):
        svi.step(*BATCHES[step % len(BATCHES)])
        record.step()
    return record


def by_svi(num_steps: int) -> Record:
    return loop("SVI, AutoFlowGuide", SVI(model, AutoFlowGuide(model), Adam({"lr": 1e-3}), Trace_ELBO()), num_steps)


def by_compiled(num_steps: int) -> Record:
    svi = CompiledSVI(model, AutoFlowGuide(model), Adam({"lr": 1e-3}), Trace_ELBO())
    return loop("CompiledSVI, AutoFlowGuide", svi, num_steps)


class Watched(list[Any]):
    """Mini-batches that note each step as they are taken."""

    record: Record

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.record.step()
            yield batch


def by_fit(num_steps: int) -> Record:
    batches = Watched(BATCHES)
    batches.record = Record("fit, AutoNormal, mini-batches", num_steps)
    fit(model, AutoNormal(model), batches, num_steps=num_steps, num_particles=2, progress=False, seed=0)
    return batches.record


RUNS: dict[str, Callable[[int], Record]] = {"svi": by_svi, "compiled": by_compiled, "fit": by_fit}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("runs", nargs="*", help="svi, compiled, fit; all of them by default")
    options = parser.parse_args()
    print("| run | steps | s | MiB at 1000 | MiB at the end | largest growth | objects | files | threads |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in options.runs or RUNS:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        print(RUNS[run](options.steps).line(), flush=True)
