# SPDX-License-Identifier: Apache-2.0
"""L2. Running a model and a guide together: at one draw, and at many draws in one run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape
from torch import Tensor

from pyro_flows._blame import user_level
from pyro_flows._random import forked
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.checks import check_guide, check_latents, first_run, warn_without_data
from pyro_flows.models.traces import (
    DRAWS,
    NO_DENSITY,
    Call,
    by_draw,
    mini_batches,
    nesting_of,
    replay_trace,
    rows_of,
    run_quietly,
    sample_nodes,
)

__all__ = ["at_a_draw", "check_shapes", "look_at", "runs_in_a_plate"]


@dataclass(frozen=True)
class ProbeSettings:
    """How ways of running a guide are compared.

    Attributes:
        num_runs: Number of runs of the guide, at whose draws the densities are compared.
        relative: Largest difference of a log density, relative to it; allows for the numerical inverse of flows.
        nats: Largest absolute difference, in nats, in addition to the relative one.
    """

    num_runs: int = 3
    relative: float = 1e-3
    nats: float = 1e-2


PROBES = ProbeSettings()


def at_a_draw(model: Callable[..., Any], guide: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model so that each run is at a fresh draw of the guide."""

    def run(*args: Any, **kwargs: Any) -> None:
        trace = run_quietly(guide, Call(args, kwargs))
        poutine.replay(model, trace=trace)(*args, **kwargs)

    return run


@torch.no_grad()
def check_shapes(model: Callable[..., Any], guide: Callable[..., Any], call: Call) -> None:
    """Check the shapes of a model's sites as ``SVI`` does, at a draw of a guide; nothing where validation is off.

    Raises:
        ValueError: Pyro's own, of a site whose log density has not the shape of its plates.
        Exception: Any exception of the model, but those that it raises where it has no density.
    """
    if not is_validation_enabled():
        return
    with forked(), pyro.validation_enabled(False):
        try:
            trace = run_quietly(at_a_draw(model, guide), call)
            trace.compute_log_prob()
        except NO_DENSITY:
            return
    for node in sample_nodes(trace).values():
        check_site_shape(node, max_plate_nesting=math.inf)


def look_at(
    owner: str, model: Callable[..., Any], guide: Callable[..., Any], call: Call, least_nesting: int = 0
) -> BatchedModel:
    """Find out how to run a model at many draws of a guide.

    Raises:
        ValueError: If the two were swapped, the guide is for another model, or observed values have no density.
        Exception: Any exception that the model or the guide raises in plain runs, or that Pyro raises about shapes.
    """
    traces = [run_quietly(guide, call) for _ in range(PROBES.num_runs)]
    drawn = [sample_nodes(found) for found in traces]
    check_guide(owner, drawn[0])
    call = call._replace(fixed=mini_batches(traces[0]))
    draws = [{name: node["value"] for name, node in nodes.items()} for nodes in drawn]
    nodes = sample_nodes(first_run(owner, model, call, draws))
    missing = check_latents(owner, nodes, drawn[0])
    if missing:
        warnings.warn(
            f"{owner}: the guide does not draw {', '.join(map(repr, missing))}, which the model draws from the prior "
            "at every step.",
            stacklevel=user_level(),
        )
    warn_without_data(owner, nodes, call)
    latents = [name for name, node in nodes.items() if name in drawn[0] and not node["is_observed"]]
    probe = {name: torch.stack([draw[name] for draw in draws]) for name in latents}
    batched = BatchedModel(owner, model, call, probe, max(nesting_of(drawn[0].values()), least_nesting))
    if not (batched.obstacle or runs_in_a_plate(guide, call, batched.nesting)):
        batched.obstacle = "the guide does not run in an outer plate"
    return batched


@torch.no_grad()
def runs_in_a_plate(guide: Callable[..., Any], call: Call, nesting: int, count: int = 3) -> bool:
    """Whether a guide runs in an outer plate, with the same densities as single runs at the same values."""
    with poutine.block(), pyro.validation_enabled(False):
        try:
            plain = sample_nodes(poutine.trace(guide).get_trace(*call.args, **call.kwargs))
            with pyro.plate(DRAWS, count, dim=-1 - nesting):
                together = poutine.trace(guide).get_trace(*call.args, **call.kwargs)
            together.compute_log_prob()
            found = sum(_in_front(node["log_prob"], nesting, count) for node in sample_nodes(together).values())
            rows = {
                name: rows_of(node["value"], plain[name]["value"].dim(), count)
                for name, node in sample_nodes(together).items()
            }
        except Exception:  # guides that are not written for outer dimensions fail in many ways
            return False
        expected = []
        for row in range(count):
            replayed = replay_trace({**{name: value[row] for name, value in rows.items()}, **mini_batches(together)})
            try:
                single = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*call.args, **call.kwargs)
                expected.append(torch.as_tensor(single.log_prob_sum()))
            except (NotImplementedError, ValueError):  # a flow without an inverse scores its own draws only
                return True
            except Exception:
                return False
        each = torch.stack(expected)
        kept = each.isfinite()  # rounding may put a draw onto the edge of its support, from which there is no way back
        found = torch.as_tensor(found).expand_as(each)
        return bool(kept.any()) and torch.allclose(found[kept], each[kept], rtol=PROBES.relative, atol=PROBES.nats)


def _in_front(term: Tensor, nesting: int, count: int) -> Tensor:
    """Sum a term of a run in an outermost plate, or a term without that dimension, to ``(count,)``."""
    term = term.reshape((1,) * (nesting + 1 - term.dim()) + term.shape)
    return by_draw(term).expand(count)
