# SPDX-License-Identifier: Apache-2.0
"""L2. Many draws of a model's latents in one run of the model, even if it was not written for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flows._blame import blame
from pyro_flows._memory import does_not_fit, is_out_of_memory
from pyro_flows.models.agreement import AGREEMENT, agree, agree_on_average, are_same
from pyro_flows.models.checks import check_data, first_run
from pyro_flows.models.enumeration import (
    EnumerateSites,
    PackedTerm,
    check_enumeration,
    enumerated_sites,
    packed_terms,
    sum_out,
)
from pyro_flows.models.memory import BatchedMemory, Place, WrittenTo
from pyro_flows.models.solves import SharedSolves, has_solves
from pyro_flows.models.traces import (
    DRAWS,
    NO_DENSITY,
    Call,
    by_draw,
    mini_batches,
    nesting_of,
    replay_trace,
    rows_of,
    sample_nodes,
)

__all__ = ["ENUMERATED", "BatchedModel"]

# Site name of terms in which enumerated sites are summed out.
ENUMERATED = "_pyro_flows_enumerated"


Values = Mapping[str, Tensor]
Pick = Callable[[Trace], Mapping[str, Tensor]]


class _Task(NamedTuple):
    """A model, its arguments, and the tensors to read off its traces; see :meth:`BatchedModel.read`."""

    model: Callable[..., Any]
    call: Call
    pick: Pick
    shapes: Mapping[str, Sequence[int]] | None = None
    packed: Mapping[str, PackedTerm] = {}
    splits: bool = True  # whether a draw at which the model raises is dropped alone, not its whole batch


Run = Callable[[Values, _Task], dict[str, Tensor]]


class BatchedModel:
    """A model, run at many values of its latents at once.

    Tries draws as an outer plate first, as vectorized particles do, and ``torch.vmap`` next, for models that are not
    written for outer dimensions: matrix products, indexing, loops, modules. The first that reproduces the log densities
    of plain runs is used, and one run per draw if neither does. Sites that are enumerated in parallel are summed out.

    Args:
        owner: Name of the caller, for error messages.
        model: The model.
        call: Its arguments.
        probe: A few draws at which to compare: latent site -> ``(S, *site shape)``.
        nesting: Number of batch dimensions in use, if a guide has more than the model.

    Attributes:
        nodes: The model's sample sites in a plain run.
        nesting: Number of batch dimensions in use.
        enumerated: Names of the sites that are summed out.
        obstacle: Reason why draws cannot be run at once, with the line of the model; empty if they can.

    Raises:
        NotImplementedError: If sites are enumerated sequentially, or enumerated sites are scaled.
        ValueError: If observed values have no density, or draws have other shapes than the model's sites.
        Exception: Any exception that the model raises in plain runs at all draws, or that Pyro raises about the shapes
            of its sites.
    """

    def __init__(self, owner: str, model: Callable[..., Any], call: Call, probe: Values, nesting: int = 0) -> None:
        self.model = model
        self.call = call
        self._owner = owner
        self._max_draws = math.inf  # that fit into memory in one run
        self._written: set[Place] = set()
        self.enumerated: tuple[str, ...] = ()
        rows = ({name: value[row] for name, value in probe.items()} for row in range(_count(probe)))
        trace = first_run(owner, model, call, rows, check=partial(check_data, owner))
        self.nodes = sample_nodes(trace)
        self._has_solves = has_solves(self.nodes.values())
        check_enumeration(owner, self.nodes)
        self.enumerated = tuple(enumerated_sites(self.nodes))
        self.nesting = max(nesting, nesting_of(self.nodes.values()))
        self.obstacle = ""
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            self._run: Run = self._choose(probe, mini_batches(trace))

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return not self.obstacle

    @property
    def is_mapped(self) -> bool:
        """Whether draws share a run of the model by ``torch.vmap``."""
        return self._run in (self._by_vmap, self._by_vmap_in_place)

    def rows(self, name: str, value: Tensor, count: int) -> Tensor:
        """Reshape a latent's value, with or without the outermost plate's dimension, to ``(count, *site shape)``."""
        return rows_of(value, self.nodes[name]["value"].dim(), count)

    def __call__(self, values: Values, call: Call | None = None, model: Callable[..., Any] | None = None) -> Trace:
        """Score draws; differentiable.

        Runs without validation, since one invalid draw would fail them all. Where the model has no density, log
        densities are NaN or minus infinity; if the model raises at a draw, only that draw's are NaN.

        Args:
            values: Latent site -> ``(S, *site shape)``.
            call: Arguments of the model; None takes those of the constructor.
            model: A model with the same sites to run instead; None takes that of the constructor.

        Returns:
            A trace of parameters and sample sites. Sample sites have a ``log_prob``, scaled and masked, of
            ``nesting + 1`` dimensions, the first of length S. Sites that depend on enumerated ones are replaced by
            sites named after ``ENUMERATED``, with the enumerated ones summed out.
        """
        seen: dict[str, dict[str, Any]] = {}

        def note(trace: Trace) -> dict[str, Tensor]:
            seen.update({name: node for name, node in trace.nodes.items() if node["type"] == "param"})
            seen.update({name: _described(name, node) for name, node in sample_nodes(trace).items()})
            return {}

        log_probs = self._log_probs(values, _Task(model or self.model, call or self.call, note))
        found = Trace()
        for name, node in seen.items():
            if node["type"] == "param":
                found.add_node(name, **node)
        for name, log_prob in log_probs.items():
            node = seen.get(name) or _described(name, self.nodes.get(name, {}))
            found.add_node(name, **node, log_prob=log_prob, log_prob_sum=log_prob.sum())
        return found

    def read(
        self,
        values: Values,
        pick: Pick,
        shapes: Mapping[str, Sequence[int]],
        call: Call | None = None,
        model: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        """Read tensors off runs at many draws.

        Args:
            values: Latent site -> ``(S, *site shape)``.
            pick: Function from a trace to the tensors by name.
            shapes: Their shapes in a run of one draw.
            call: Arguments of the model; None takes those of the constructor.
            model: A model with the same sites to run instead; None takes that of the constructor.

        Returns:
            Name -> ``(S, *shape)``.
        """
        task = _Task(model or self.model, call or self.call, pick, shapes)
        with poutine.block(hide_types=["sample"]), pyro.validation_enabled(False):
            if self.is_mapped:
                try:
                    return self._by_vmap_in_place(values, task)
                except RuntimeError:  # random numbers that vmap does not allow
                    return self._one_by_one(values, task)
            return self._run_or_split(values, task)

    def verify(self, values: Values, pick: Pick, shapes: Mapping[str, Sequence[int]]) -> BatchedModel:
        """Take the first way to run the model that also reproduces what :meth:`read` reads in one run per draw: log
        densities say nothing of a sum over items, say, that no density depends on. Returns the model itself.

        Args:
            values: Sample site -> ``(S, *site shape)``, for all sites that would be drawn else.
            pick: As in :meth:`read`.
            shapes: As in :meth:`read`.
        """
        ways: list[Run] = [self._in_a_plate, self._by_vmap, self._by_vmap_in_place, self._one_by_one]
        few = {name: value[: max(1, len(value) - 1)] for name, value in values.items()}
        with torch.no_grad():
            self._run, chosen = self._one_by_one, self._run
            expected = self.read(values, pick, shapes)
            for self._run in ways[ways.index(chosen) : -1]:
                try:
                    both = [self.read(part, pick, shapes) for part in (values, few)]  # at two numbers, as in _choose
                except Exception as error:
                    obstacle = blame(error)
                    continue
                wrong = (
                    n for n in shapes if not all(are_same(found[n], expected[n][: len(found[n])]) for found in both)
                )
                other = next(wrong, None)
                if other is None:
                    return self
                obstacle = f"site '{other}' has another value where draws share a run"
        if chosen != self._one_by_one:
            self._run, self.obstacle = self._one_by_one, obstacle
        return self

    def _log_probs(self, values: Values, task: _Task) -> dict[str, Tensor]:
        """Log densities, with enumerated sites summed out; ``task.pick`` gets the traces."""
        packed: dict[str, PackedTerm] = {}

        def pick(trace: Trace) -> dict[str, Tensor]:
            task.pick(trace)
            trace.compute_log_prob()
            nodes = sample_nodes(trace)
            found = {name: node["log_prob"] for name, node in nodes.items()}
            if self.enumerated:
                for name, (term, known) in packed_terms(trace, nodes, DRAWS).items():
                    found[name], packed[name] = term, known
            return found

        with poutine.block(hide_types=["sample"]), pyro.validation_enabled(False):
            found = self._run_or_split(values, task._replace(pick=pick, packed=packed))
        if packed:
            terms = sum_out({name: found.pop(name) for name in packed}, packed)
            found |= {f"{ENUMERATED}_{index}": term for index, term in enumerate(terms)}
        return {name: _padded(term, self.nesting) for name, term in found.items()}

    def _run_or_split(self, values: Values, task: _Task) -> dict[str, Tensor]:
        count = _count(values)
        try:
            if count <= self._max_draws:
                return self._run(values, task)
        except NO_DENSITY:
            if not task.splits:
                raise
            if count == 1:
                # NaN as a function of the draw, so that a gradient exists.
                nan = math.nan + torch.stack([0.0 * value.sum() for value in values.values()]).sum()
                return {name: nan.expand(1) for name in task.shapes or self.nodes}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise does_not_fit(self._owner, count, error) from error
            self._max_draws = count // 2
        halves = zip(*(value.tensor_split(2) for value in values.values()), strict=True)
        parts = [self._run_or_split(dict(zip(values, half, strict=True)), task) for half in halves]
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}

    # Ways to run a model

    def _in_a_plate(self, values: Values, task: _Task) -> dict[str, Tensor]:
        count, lead = _count(values), {}
        for name, value in values.items():
            node = self.nodes[name]
            pad = self.nesting - node["value"].dim() + node["fn"].event_dim
            lead[name] = value.reshape(count, *(1,) * pad, *value.shape[1:])
        with pyro.plate(DRAWS, count, dim=-1 - self.nesting):
            found = dict(task.pick(self._trace(lead, task)))
        for name, value in found.items():
            if task.shapes is not None:
                value = value.reshape(-1, *task.shapes[name])
            else:
                rank = len(task.packed[name].dims) if name in task.packed else self.nesting
                value = value.reshape((1,) * (rank + 1 - value.dim()) + value.shape)
            found[name] = value.expand(count, *value.shape[1:])
        return found

    def _by_vmap(self, values: Values, task: _Task, *, in_place: bool = False) -> dict[str, Tensor]:
        def one(row: dict[str, Tensor]) -> dict[str, Tensor]:
            with ExitStack() as stack:
                if in_place:
                    stack.enter_context(BatchedMemory(next(iter(row.values())), self._written))
                if self._has_solves:
                    stack.enter_context(SharedSolves())
                return dict(task.pick(self._trace(row, task)))

        while True:
            try:
                found: dict[str, Tensor] = torch.vmap(one, randomness="different")(dict(values))
                return found
            except WrittenTo:  # a place is known now that was not
                continue

    def _by_vmap_in_place(self, values: Values, task: _Task) -> dict[str, Tensor]:
        """Run by ``torch.vmap``, for models that create tensors and write values to them that differ between draws."""
        return self._by_vmap(values, task, in_place=True)

    def _one_by_one(self, values: Values, task: _Task) -> dict[str, Tensor]:
        rows = ({name: value[row] for name, value in values.items()} for row in range(_count(values)))
        singles = [task.pick(self._trace(row, task)) for row in rows]
        return {name: torch.stack([one[name] for one in singles]) for name in singles[0]}

    def _trace(self, values: Mapping[str, Any], task: _Task) -> Trace:
        model = task.model
        if self.enumerated and task.shapes is None:
            model = EnumerateSites(-2 - self.nesting)(model)
        replayed = poutine.replay(model, trace=replay_trace({**values, **task.call.fixed}))
        return poutine.trace(replayed).get_trace(*task.call.args, **task.call.kwargs)

    # Which of them

    def _choose(self, probe: Values, drawn: Mapping[str, Any]) -> Run:
        """The first way to run the model that agrees with plain runs. All use one mini-batch: with different ones they
        would agree on average only."""
        call = self.call._replace(fixed={**drawn, **self.call.fixed})
        task = _Task(self.model, call, lambda trace: {})
        self._run = self._one_by_one
        expected, again = self._log_probs(probe, task), self._log_probs(probe, task)
        if all(torch.equal(again[name].nan_to_num(), expected[name].nan_to_num()) for name in expected):
            agrees = agree
            kept = torch.stack([by_draw(term) for term in expected.values()]).sum(0).isfinite()
            if kept.any():  # draws without a finite density can't be compared
                probe = {name: value[kept] for name, value in probe.items()}
                expected = {name: term[kept] for name, term in expected.items()}
        else:
            agrees = agree_on_average
            probe = {name: value[:1].expand(AGREEMENT.num_averaged, *value.shape[1:]) for name, value in probe.items()}
            expected = self._log_probs(probe, task)
        obstacle = ""
        for run in (self._in_a_plate, self._by_vmap, self._by_vmap_in_place):
            self._run = run
            try:
                # At two numbers of draws: with three, `effects[group]` takes draws for groups where there are three.
                other = None
                for count in {_count(probe), max(1, _count(probe) - 1)}:
                    few = {name: value[:count] for name, value in probe.items()}
                    found = self._log_probs(few, task._replace(splits=False))
                    wrong = (n for n in expected if n not in found or not agrees(found[n], expected[n][:count]))
                    other = other or next(wrong, None)
            except Exception as error:  # each model fails in its own way at shapes it never meant to see
                obstacle = blame(error)
                continue
            if other is None:
                return run
            obstacle = f"site '{other}' has another log density where draws share a run"
        self.obstacle = obstacle
        return self._one_by_one


def _described(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """A site without its tensors, which are of no use outside ``torch.vmap``."""
    stack = tuple(frame for frame in node.get("cond_indep_stack", ()) if frame.name != DRAWS)
    observed = bool(node.get("is_observed", True))
    return {
        "name": name,
        "type": "sample",
        "fn": None,
        "is_observed": observed,
        "infer": {},
        "cond_indep_stack": stack,
    }


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def _padded(term: Tensor, rank: int) -> Tensor:
    """``(S, ...)`` with ``rank`` dimensions beside the first; new ones come right after the first."""
    return term.reshape(len(term), *(1,) * (rank + 1 - term.dim()), *term.shape[1:])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate terms of different draws; parts without a density are ``(count,)`` and are broadcast."""
    shape = torch.broadcast_shapes(*(part.shape[1:] for part in parts))
    return torch.cat([_padded(part, len(shape)).expand(-1, *shape) for part in parts])
