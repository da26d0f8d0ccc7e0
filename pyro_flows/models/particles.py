# SPDX-License-Identifier: Apache-2.0
"""L2. How a model and a guide are run together: at one draw, and at many in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.checks import check_guide, check_latents, first_run, warn_without_data
from pyro_flows.models.traces import (
    DRAWS,
    Call,
    by_draw,
    mini_batches,
    nesting_of,
    replay_trace,
    rows_of,
    run_quietly,
    sample_nodes,
)

__all__ = ["at_a_draw", "look_at", "runs_in_a_plate"]


@dataclass(frozen=True)
class ProbeSettings:
    """How ways of running a guide are compared.

    Attributes:
        num_runs: Runs of the guide at whose draws the densities are compared.
        relative: Largest difference of a log density, relative to it: flows are inverted for that.
        nats: And beside that, in nats.
    """

    num_runs: int = 3
    relative: float = 1e-3
    nats: float = 1e-2


PROBES = ProbeSettings()


def at_a_draw(model: Callable[..., Any], guide: Callable[..., Any]) -> Callable[..., Any]:
    """The model at a draw of the guide, made anew for each run."""

    def run(*args: Any, **kwargs: Any) -> None:
        trace = run_quietly(guide, Call(args, kwargs))
        poutine.replay(model, trace=trace)(*args, **kwargs)

    return run


def look_at(
    owner: str, model: Callable[..., Any], guide: Callable[..., Any], call: Call, least_nesting: int = 0
) -> BatchedModel:
    """How to run a model at draws of a guide.

    Raises:
        ValueError: If the two were swapped, the guide is another model's, or observed values have no density.
        Exception: Whatever the model or the guide raises in plain runs, or Pyro about their shapes.
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
            stacklevel=3,
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
    """Whether a guide runs in an outer plate, with the densities that its single runs have at the same values."""
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
        except Exception:  # each guide fails in its own way at dimensions that it never meant to see
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
        return torch.allclose(torch.as_tensor(found), torch.stack(expected), rtol=PROBES.relative, atol=PROBES.nats)


def _in_front(term: Tensor, nesting: int, count: int) -> Tensor:
    """A term of a run in an outermost plate, or of one without draws, summed to ``(count,)``."""
    term = term.reshape((1,) * (nesting + 1 - term.dim()) + term.shape)
    return by_draw(term).expand(count)
