# SPDX-License-Identifier: Apache-2.0
"""L2. Chains of states that follow each other over time: sites of their own, or driven by a site."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from pyro_flows._random import seeded
from pyro_flows.compiled.affine import AffineParts
from pyro_flows.compiled.recursion import read_recursion, read_transitions
from pyro_flows.compiled.tracer import LEARNED
from pyro_flows.models.covariances import RECORDING
from pyro_flows.models.layout import Layout
from pyro_flows.models.recorded_run import (
    RecordedLikelihood,
    RecordedRun,
    RunRecorder,
    is_standard_normal,
    likelihood_of,
)
from pyro_flows.transforms import Innovations, StateChain

__all__ = ["STATE_CHAINS", "ReadStateChain", "RecordedRecursion", "read_state_chain"]


@dataclass(frozen=True)
class StateChainSettings:
    """Which chains are read.

    Attributes:
        min_dim: Smallest number n of states.
        max_dim: Largest number.
        max_others: Largest number of other coordinates.
        max_begins: Number of adjacent sites of which each may be the first state.
        tolerance: Largest difference of log densities that count as the same, relative to their size.
    """

    min_dim: int = 3
    max_dim: int = 5000
    max_others: int = 32
    max_begins: int = 4
    tolerance: float = 1e-4


STATE_CHAINS = StateChainSettings()


class RecordedRecursion:
    """Coefficients of states that follow each other, by the model's own operations, without its Python.

    Data that the model reads are those of the recording, as are dtype and device of the operations. What is not finite
    is replaced by zero.

    Args:
        graph: From the parts of packed latents to the coefficients of a
            :class:`~pyro_flows.compiled.recursion.Recursion`, ``(n,)`` each, or the first three of them.
        captured: The graph's further inputs.
        sizes: Lengths of the parts.
        like: A tensor of the dtype and on the device of the recording.
    """

    def __init__(self, graph: GraphModule, captured: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> None:
        self._graph = graph
        self._captured = tuple(captured)
        self._sizes = [*sizes]
        self._like = like.new_zeros(())

    def __call__(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(..., n)`` each at packed latents, ``(..., D)``; differentiable."""

        def one(packed: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                part.nan_to_num(0.0, 0.0, 0.0) for part in self._graph(*packed.split(self._sizes), *self._captured)
            )

        rows = torch.vmap(one)(packed.to(self._like).reshape(-1, packed.shape[-1]))
        offset, lag, scale, *seen = (part.reshape(*packed.shape[:-1], -1).to(packed) for part in rows)
        if not seen:
            return offset, lag, scale
        shift, unit = seen
        # Of the states as they are seen, m + s h.
        before, unit_before = F.pad(shift[..., :-1], (1, 0)), F.pad(unit[..., :-1], (1, 0), value=1.0)
        lag = unit * lag / unit_before
        return shift + unit * offset - lag * before, lag, unit * scale


class ReadStateChain(NamedTuple):
    """A chain of states.

    Attributes:
        chain: The coordinates that drive it, or those of the states, and its coefficients.
        likelihood: The log density of the other sites, given the states.
    """

    chain: StateChain
    likelihood: RecordedLikelihood

    def log_density(self, packed: Tensor) -> Tensor:
        """That of all sites on their supports, ``(S,)``, at packed latents, ``(S, D)``, without a loop over the states;
        differentiable."""
        innovations = Innovations.of(self.chain, packed)
        own = packed[:, self.chain.rows].double()
        if self.chain.is_centered:
            states, (own, more) = own, innovations.of_states(own)
        else:
            states, more = innovations.to_states(own), torch.zeros_like(own[:, 0])
        prior = more - 0.5 * (own.square() + math.log(2.0 * math.pi)).sum(-1)
        return self.likelihood(packed, states.to(packed)) + prior.to(packed)

    def turns(self, points: Tensor) -> bool:
        """Whether other latents, at points ``(N, D)``, change how much of a state follows from the one before it."""
        lag = self.chain.read(points)[1][:, 1:]
        return bool((lag - lag[:1]).abs().max() > RECORDING.tolerance)


@torch.no_grad()
def read_state_chain(recorder: RunRecorder) -> ReadStateChain | None:
    """Find states that follow each other, one by one, :math:`h_t = c_t + a_t h_{t-1} + b_t z_t` with standard normal z,
    as a random walk, an autoregression or a volatility does:

    - driven by a site z, of which the data see the states only, by a loop over time or a cumulative sum;
    - or sites of their own, each with a normal prior that follows the one before it, in the order of the model.

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

    def may_be(size: int) -> bool:
        is_of_size = STATE_CHAINS.min_dim <= size <= STATE_CHAINS.max_dim
        return is_of_size and layout.latent_dim - size <= STATE_CHAINS.max_others

    sizes = dict(zip(layout.names, layout.sizes, strict=True))
    driving = [site.name for site in layout if site.is_real and may_be(sizes[site.name])]
    scalars = [site.name for site in layout if site.is_real and sizes[site.name] == 1]
    run = recorder.first() if driving or may_be(len(scalars)) else None
    if run is None:
        return None
    for name in sorted(driving, key=lambda name: -sizes[name]):
        # Operations that cannot be batched, such as random ones, are refused in many ways.
        with suppress(Exception):
            read = _read_driven(run, layout, name, recorder.points)
            if read is not None and _is_same(recorder, read):
                return read
    for names in _adjacent(run, layout, set(scalars)):
        with suppress(Exception):
            read = _read_sites(run, layout, names, recorder.points) if may_be(len(names)) else None
            if read is not None and _is_same(recorder, read):
                return read
    return None


def _adjacent(run: RecordedRun, layout: Layout, scalars: Collection[str]) -> Iterator[list[str]]:
    """Adjacent sites that may be states: all but the first few, which may be something else."""
    for normal, group in groupby(layout.names, key=lambda name: name in scalars and name in run.normals):
        names = [*group]
        if normal:
            yield from (names[begin:] for begin in range(min(STATE_CHAINS.max_begins, len(names))))


def _read_driven(run: RecordedRun, layout: Layout, name: str, points: Tensor) -> ReadStateChain | None:
    """The chain that a site drives in a run; None if it drives none, or training changes it.

    Raises:
        NotImplementedError: If the site is written into memory.
    """
    if not is_standard_normal(run.sites[name]):
        return None
    graph, _ = run.without([name])
    inputs = _inputs(graph, layout)
    rows = layout.slices[name]
    affine = AffineParts(graph, [inputs[layout.names.index(name)]], inputs)
    recursion = read_recursion(graph, affine, affine.outermost(rows.stop - rows.start))
    if recursion is None or _is_learned(recursion.graph):
        return None
    read = RecordedRecursion(recursion.graph, run.inputs_of(recursion.graph), layout.sizes, points)
    return ReadStateChain(StateChain(rows, read), likelihood_of(run, graph, recursion.nodes, layout, points))


def _read_sites(run: RecordedRun, layout: Layout, names: Sequence[str], points: Tensor) -> ReadStateChain | None:
    """The chain that sites are in a run; None if they are none, or training changes it.

    Raises:
        NotImplementedError: If a site is written into memory.
    """
    parameters = [run.normals[name] for name in names]
    graph, nodes = run.without(names, [loc for loc, _ in parameters] + [scale for _, scale in parameters])
    inputs = _inputs(graph, layout)
    first = layout.names.index(names[0])
    affine = AffineParts(graph, inputs[first : first + len(names)], inputs)
    transitions = read_transitions(graph, affine, nodes[: len(names)], nodes[len(names) :])
    if transitions is None or _is_learned(transitions):
        return None
    read = RecordedRecursion(transitions, run.inputs_of(transitions), layout.sizes, points)
    rows = slice(layout.slices[names[0]].start, layout.slices[names[-1]].stop)
    graph, _ = run.without(names)
    states = _inputs(graph, layout)[first : first + len(names)]
    return ReadStateChain(StateChain(rows, read, True), likelihood_of(run, graph, states, layout, points))


def _inputs(graph: GraphModule, layout: Layout) -> list[Node]:
    """The inputs of a run's graph that are parts of packed latents."""
    return [node for node in graph.graph.nodes if node.op == "placeholder"][: len(layout.names)]


def _is_learned(graph: GraphModule) -> bool:
    return any(node.meta.get(LEARNED) and node.users for node in graph.graph.nodes)


def _is_same(recorder: RunRecorder, read: ReadStateChain) -> bool:
    """Whether states and what follows them have the log density of the model's own run at each point."""
    points, layout = recorder.points, recorder.layout
    values = read.log_density(points)
    with seeded(0), pyro.validation_enabled(False):
        for point, value in zip(points, values, strict=True):
            expected = torch.stack([n["log_prob"].sum() for n in recorder.scored(point.split(layout.sizes)).values()])
            if not (value - expected.sum()).abs() <= STATE_CHAINS.tolerance * (1.0 + expected.abs().sum()):
                return False
    return True
