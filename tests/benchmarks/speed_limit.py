# SPDX-License-Identifier: Apache-2.0
"""A compiled step next to the time that the machine needs for the matrix products and the memory traffic in it."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from speed_steps import CASES, NOTHING, Case, Contender, make_svi, milliseconds, ratio, rounds, started
from tables import Rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pyro_flows import CompiledSVI

# Products and copies are timed on so much work at least, next to which a call costs nothing.
MIN_FLOPS, MIN_BYTES = 2e7, 2**20
# Vectors as long as the parameters that a step of Adam reads and writes: they, the gradient, and two moments.
ADAM_VECTORS = 4
TIMINGS = 15
Shape = tuple[int, int, int]  # rows, inner, columns


class Products(TorchDispatchMode):
    """Counts matrix products by shape; ``FlopCounterMode`` does not bear a gradient that is taken within a step.

    Attributes:
        flops: Floating point operations of each shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            # The factors come last: what is added to a product comes first.
            left, right = [value for value in args if torch.is_tensor(value)][-2:]
            shape = (left.shape[-2], left.shape[-1], right.shape[-1])
            self.flops[shape] += count(*args, **(kwargs or {}), out_val=out)
        return out


class Work(NamedTuple):
    """What is in a step: operations of matrix products, the shape that most of them are of, and bytes moved."""

    flops: float
    shape: Shape
    moved: float


def work_of(case: Case, name: str) -> Work:
    """Of an eager step; the compiled one has the same products."""
    with pyro.get_param_store().scope():
        svi = make_svi(SVI, case, case.guides[name], case.num_particles)
        svi.step(*case.args)
        with Products() as products:
            svi.loss_and_grads(svi.model, svi.guide, *case.args)
        size = sum(p.numel() * p.element_size() for p in pyro.get_param_store()._params.values())
    shape = products.flops.most_common(1)[0][0] if products.flops else (0, 0, 0)
    return Work(float(products.flops.total()), shape, 2.0 * ADAM_VECTORS * size)


def quickest(run: Callable[[], Any]) -> float:
    """Seconds."""
    times = []
    for _ in range(TIMINGS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def flop_rate(shape: Shape) -> float:
    """Operations a second in products of this shape, many in one call."""
    rows, inner, columns = shape
    flops = 2.0 * math.prod(shape)
    if not flops:
        return math.inf
    count = max(1, math.ceil(MIN_FLOPS / flops))
    left, right = torch.randn(count, rows, inner), torch.randn(count, inner, columns)
    out = torch.empty(count, rows, columns)
    return count * flops / quickest(lambda: torch.bmm(left, right, out=out))


def byte_rate(moved: float) -> float:
    """Bytes a second, read and written, in copies that move as many."""
    source: Tensor = torch.zeros(max(int(moved), MIN_BYTES) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / quickest(lambda: target.copy_(source))


def measure_limit(repeats: int) -> tuple[Sequence[str], Rows]:
    """A compiled step over the time that its matrix products and its parameters' memory traffic need at least."""
    rows = []
    for title, load in CASES.items():
        for name in load().guides:
            rows.append([title, name, *compare(load(), name, repeats)])
            print("  ".join(rows[-1]), flush=True)
    header = ("MFLOP", "GFLOP/s", "products, ms", "KiB", "GB/s", "traffic, ms", "step, ms", "step / limit")
    return ("model", "guide", *header), rows


def compare(case: Case, name: str, repeats: int) -> list[str]:
    """The cells of a row."""
    work = work_of(case, name)
    steps = started(partial(Contender(CompiledSVI, case.guides[name]).begin, case, case.num_particles))
    times, flop_rates, byte_rates = [], [], []
    for _ in range(repeats):  # in turns, so that all see the same machine
        times += rounds({name: steps}, 1)[name]
        flop_rates.append(flop_rate(work.shape))
        byte_rates.append(byte_rate(work.moved))
    flops_second, bytes_second = statistics.median(flop_rates), statistics.median(byte_rates)
    products, traffic = work.flops / flops_second, work.moved / bytes_second
    return [
        f"{work.flops / 1e6:.3g}",
        f"{flops_second / 1e9:.3g}" if work.flops else NOTHING,
        milliseconds([products]),
        f"{work.moved / 1024:.3g}",
        f"{bytes_second / 1e9:.3g}",
        milliseconds([traffic]),
        milliseconds(times),
        ratio(times, [products + traffic] * len(times)),
    ]
