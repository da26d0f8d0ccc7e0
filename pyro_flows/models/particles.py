# SPDX-License-Identifier: Apache-2.0
"""L2. Whether a guide makes many draws in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_flows.models.traces import DRAWS, Call, by_draw, given, mini_batches, rows_of, sample_nodes

__all__ = ["runs_in_a_plate"]

# How closely the densities have to agree, relative and in nats: flows are inverted for that.
RELATIVE, NATS = 1e-3, 1e-2


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
            replayed = given({**{name: value[row] for name, value in rows.items()}, **mini_batches(together)})
            try:
                single = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*call.args, **call.kwargs)
                expected.append(torch.as_tensor(single.log_prob_sum()))
            except (NotImplementedError, ValueError):  # a flow without an inverse scores its own draws only
                return True
            except Exception:
                return False
        return torch.allclose(torch.as_tensor(found), torch.stack(expected), rtol=RELATIVE, atol=NATS)


def _in_front(term: Tensor, nesting: int, count: int) -> Tensor:
    """A term of a run in an outermost plate, or of one without draws, summed to ``(count,)``."""
    term = term.reshape((1,) * (nesting + 1 - term.dim()) + term.shape)
    return by_draw(term).expand(count)
