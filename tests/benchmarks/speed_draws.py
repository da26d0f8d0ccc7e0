# SPDX-License-Identifier: Apache-2.0
"""Whether compiling would pay for many draws of a guide, as in ``sample_posterior`` and ``diagnose``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from guides import SCHOOLS, wide_model
from speed_steps import milliseconds, rounds
from tables import Rows
from torch._inductor.utils import fresh_inductor_cache

from pyro_flows import AutoFlowGuide
from pyro_flows.__main__ import model as eight_schools
from pyro_flows.compiled.inductor import to_machine_code
from pyro_flows.compiled.tracer import trace_operations
from pyro_flows.transforms import FlowTransform

CHUNK, ROUND = 2**14, 10
MODELS: dict[str, tuple[Callable[..., Any], Sequence[Any]]] = {
    "eight schools": (eight_schools, SCHOOLS),
    "100-D": (partial(wide_model, 100), ()),
}


class Passes(NamedTuple):
    """Calls of a function, timed."""

    run: Callable[[], Any]

    def seconds(self) -> float:
        """Of a call, over a round."""
        begin = time.perf_counter()
        for _ in range(ROUND):
            self.run()
        return (time.perf_counter() - begin) / ROUND


def compiled(flow: FlowTransform, noise: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The map of noise and its log-determinant in machine code."""

    def forward(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flow.forward_and_ladj(noise)

    graph, captured, _ = trace_operations(forward, [noise])
    with fresh_inductor_cache():
        run = to_machine_code(graph, [noise, *captured])
    return lambda noise: run(noise, *captured)


@torch.no_grad()
def measure_draws(repeats: int) -> tuple[Sequence[str], Rows]:
    """The default flow's map of 16,384 draws and their density: eager, compiled, and after how many draws that pays."""
    rows = []
    for title, (model, args) in MODELS.items():
        flow = AutoFlowGuide(model).setup(*args).get_transform().transform
        noise = torch.randn(CHUNK, flow.input_dim)
        begin = time.perf_counter()
        quick = partial(compiled(flow, noise), noise)
        first = time.perf_counter() - begin
        made = {"eager": Passes(partial(flow.forward_and_ladj, noise)), "compiled": Passes(quick)}
        times = rounds(made, repeats)
        saved = statistics.median(times["eager"]) - statistics.median(times["compiled"])
        pays = f"{first / saved * CHUNK / 1e6:.0f} million draws" if saved > 0 else "never"
        rows.append([title, *map(milliseconds, times.values()), f"{first:.1f}", pays])
        print("  ".join(rows[-1]), flush=True)
    return ("model", "eager, ms", "compiled, ms", "to compile, s", "pays after"), rows
