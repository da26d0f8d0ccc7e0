# SPDX-License-Identifier: Apache-2.0
"""L2. Chains of states: latents that drive a recursion over time, of which the data see the states only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from pyro_flows._random import seeded
from pyro_flows.compiled.affine import AffineParts
from pyro_flows.compiled.recursion import read_recursion
from pyro_flows.compiled.tracer import LEARNED
from pyro_flows.models.layout import Layout
from pyro_flows.models.recorded_run import (
    RecordedLikelihood,
    RecordedRun,
    RunRecorder,
    is_standard_normal,
    likelihood_of,
    without_unused,
)
from pyro_flows.models.sites import Site
from pyro_flows.transforms import StateChain

__all__ = ["STATE_CHAINS", "ReadStateChain", "RecordedRecursion", "read_state_chain"]


@dataclass(frozen=True)
class StateChainSettings:
    """Which chains are read.

    Attributes:
        min_dim: Smallest number n of states.
        max_dim: Largest number.
        max_others: Largest number of other coordinates.
        tolerance: Largest difference of log densities that count as the same, relative to their size.
    """

    min_dim: int = 3
    max_dim: int = 5000
    max_others: int = 32
    tolerance: float = 1e-4


STATE_CHAINS = StateChainSettings()


class RecordedRecursion:
    """Coefficients of states that follow each other, by the model's own operations, without its Python.

    Data that the model reads are those of the recording, as are dtype and device of the operations. What is not finite
    is replaced by zero.

    Args:
        graph: From the parts of packed latents to the coefficients of a
            :class:`~pyro_flows.compiled.recursion.Recursion`, ``(n,)`` each.
        captured: The graph's further inputs, which are copied.
        sizes: Lengths of the parts.
        like: A tensor of the dtype and on the device of the recording.
    """

    def __init__(self, graph: GraphModule, captured: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> None:
        self._graph = graph
        self._captured = tuple(value.clone() for value in captured)
        self._sizes = [*sizes]
        self._like = like.new_zeros(())

    def __call__(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(..., n)`` each at packed latents, ``(..., D)``; differentiable."""

        def one(packed: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                part.nan_to_num(0.0, 0.0, 0.0) for part in self._graph(*packed.split(self._sizes), *self._captured)
            )

        rows = torch.vmap(one)(packed.to(self._like).reshape(-1, packed.shape[-1]))
        offset, lag, scale, shift, unit = (part.reshape(*packed.shape[:-1], -1).to(packed) for part in rows)
        # Of the states as they are seen, m + s h.
        before, unit_before = F.pad(shift[..., :-1], (1, 0)), F.pad(unit[..., :-1], (1, 0), value=1.0)
        lag = unit * lag / unit_before
        return shift + unit * offset - lag * before, lag, unit * scale


class ReadStateChain(NamedTuple):
    """A chain of states.

    Attributes:
        chain: The coordinates that drive it, and its coefficients.
        likelihood: The log density of the other sites, given the states.
    """

    chain: StateChain
    likelihood: RecordedLikelihood


@torch.no_grad()
def read_state_chain(recorder: RunRecorder) -> ReadStateChain | None:
    """Find a site z with a standard normal prior that drives states, one by one, :math:`h_t = c_t + a_t h_{t-1} + b_t
    z_t`, of which the data see these only: an autoregression or a random walk, by a loop over time or a cumulative sum.

    Left out are sites that are scaled or masked, and what cannot be recorded: see
    :func:`~pyro_flows.models.linear_predictors.read_linear_predictor`.

    Args:
        recorder: Of the model's runs, with the layout of the joint block's sites.

    Returns:
        The longest chain; None if there is none.
    """
    layout = recorder.layout
    if layout.plates or len(layout.names) < 2:
        return None

    def is_candidate(site: Site) -> bool:
        size = layout.sizes[layout.names.index(site.name)]
        return (
            site.is_real
            and STATE_CHAINS.min_dim <= size <= STATE_CHAINS.max_dim
            and layout.latent_dim - size <= STATE_CHAINS.max_others
        )

    sites = sorted(filter(is_candidate, layout), key=lambda site: -layout.sizes[layout.names.index(site.name)])
    run = recorder.first() if sites else None
    if run is None:
        return None
    for site in sites:
        try:
            read = _read(run, layout, site, recorder.points)
            if read is not None and _is_same(recorder, site, read):
                return read
        except Exception:  # operations that cannot be batched, such as random ones, are refused in many ways
            continue
    return None


def _read(run: RecordedRun, layout: Layout, site: Site, points: Tensor) -> ReadStateChain | None:
    """The chain that a site drives in a run; None if it drives none, or training changes it.

    Raises:
        NotImplementedError: If the site is written into memory.
    """
    if not is_standard_normal(run.sites[site.name]):
        return None
    graph = run.without(site.name)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"][: len(layout.names)]
    rows = layout.slices[site.name]
    affine = AffineParts(graph, inputs[layout.names.index(site.name)], inputs)
    recursion = read_recursion(graph, affine, affine.outermost(rows.stop - rows.start))
    if recursion is None or any(node.meta.get(LEARNED) and node.users for node in recursion.graph.graph.nodes):
        return None
    captured = without_unused(recursion.graph, run.captured)
    read = RecordedRecursion(recursion.graph, captured, layout.sizes, points)
    return ReadStateChain(StateChain(rows, read), likelihood_of(run, graph, recursion.nodes, layout, points))


def _is_same(recorder: RunRecorder, site: Site, read: ReadStateChain) -> bool:
    """Whether the states have the log density of the model's own run at each point."""
    points, layout = recorder.points, recorder.layout
    states = _states(read.chain.read(points), points[:, layout.slices[site.name]])
    values = read.likelihood(points, states)
    with seeded(0), pyro.validation_enabled(False):
        for point, value in zip(points, values, strict=True):
            sites = recorder.scored(point.split(layout.sizes))
            expected = torch.stack([node["log_prob"].sum() for name, node in sites.items() if name != site.name]).sum()
            if not (value - expected).abs() <= STATE_CHAINS.tolerance * expected.abs():
                return False
    return True


def _states(coefficients: Sequence[Tensor], drive: Tensor) -> Tensor:
    """States from offsets, slopes and scales, ``(..., n)`` each, and what drives them."""
    offset, back, scale = (part.unbind(-1) for part in coefficients)
    states = [offset[0] + scale[0] * drive[..., 0]]
    for place in range(1, drive.shape[-1]):
        states.append(offset[place] + back[place] * states[-1] + scale[place] * drive[..., place])
    return torch.stack(states, -1)
