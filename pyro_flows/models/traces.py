# SPDX-License-Identifier: Apache-2.0
"""L2. Runs of a model: arguments, values to replay, sample sites and mini-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = [
    "DRAWS",
    "NO_DENSITY",
    "REFUSALS",
    "Call",
    "DrawnPlates",
    "as_indices",
    "by_draw",
    "mean_of_kept",
    "mini_batches",
    "nesting_of",
    "replay_trace",
    "rows_of",
    "run_quietly",
    "sample_nodes",
]

# Name of the plate of draws, where many share one run of a model.
DRAWS = "_pyro_flows_draws"

# Exceptions of a model where it has no density: invalid parameters of a distribution, or a matrix that is not positive
# definite.
NO_DENSITY = (ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RefusalSettings:
    """Means over draws at some of which a model raises.

    Attributes:
        max_share: Largest share of draws that may be left out; above it the mean is NaN.
    """

    max_share: float = 0.1


REFUSALS = RefusalSettings()


class Call(NamedTuple):
    """Arguments of a model, and mini-batches of its plates.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        fixed: Plate -> indices of its mini-batch, the same for all draws.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fixed: Mapping[str, Any] = {}


def replay_trace(values: Mapping[str, Any]) -> Trace:
    """A trace that replays these values as latents."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    return trace


@torch.no_grad()
def run_quietly(program: Callable[..., Any], call: Call, values: Trace | None = None) -> Trace:
    """Run a model or a guide without gradients, hidden from active handlers.

    Args:
        program: The model or the guide.
        call: Its arguments.
        values: Values to replay; plates whose indices are not among them draw their own.
    """
    with poutine.block():
        program = program if values is None else poutine.replay(program, trace=values)
        return poutine.trace(program).get_trace(*call.args, **call.kwargs)


def sample_nodes(trace: Trace) -> dict[str, dict[str, Any]]:
    """Sample sites of a trace, without those that draw mini-batches."""
    return {n: node for n, node in trace.nodes.items() if node["type"] == "sample" and not site_is_subsample(node)}


def mini_batches(trace: Trace) -> dict[str, Any]:
    """Plate -> indices of its mini-batch, from a trace."""
    return {name: node["value"] for name, node in trace.nodes.items() if site_is_subsample(node)}


def as_indices(values: Any) -> Tensor:
    """Indices of a mini-batch as a tensor; ``torch.as_tensor`` moves tensors to the default device, if one is set."""
    return values if torch.is_tensor(values) else torch.as_tensor(values)


class DrawnPlates(Messenger):
    """Records the plates that draw their own mini-batches.

    Attributes:
        sizes: Plate -> its full size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            size, count = msg["fn"].size, msg["fn"].subsample_size
            if count is not None and count < size:
                self.sizes[msg["name"]] = size


def nesting_of(nodes: Iterable[Mapping[str, Any]]) -> int:
    """Number of batch dimensions that the plates of sites use."""
    return max((-f.dim for node in nodes for f in node["cond_indep_stack"] if f.vectorized), default=0)


def by_draw(term: Tensor) -> Tensor:
    """Sum ``(S, ...)`` to ``(S,)``."""
    return term.reshape(len(term), -1).sum(-1)


def mean_of_kept(terms: Tensor) -> Tensor:
    """Mean of ``(..., S)`` over the draws whose terms are not NaN; those at which the model raises are."""
    refused = terms.isnan()
    share = refused.to(terms.dtype).mean(-1)
    mean = torch.where(refused, 0.0, terms).mean(-1) / (1.0 - share)
    return torch.where(share <= REFUSALS.max_share, mean, math.nan)


def rows_of(value: Tensor, rank: int, count: int) -> Tensor:
    """Reshape a value of ``rank`` dimensions, with or without the outermost plate's, to ``(count, ...)``."""
    shape = value.shape[max(value.dim() - rank, 0) :]
    return value.reshape(-1, *shape).expand(count, *shape)
