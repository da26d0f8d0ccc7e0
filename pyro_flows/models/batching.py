# SPDX-License-Identifier: Apache-2.0
"""L2. Many draws of a model's latents in one run of the model, whichever way it was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from pyro.util import check_site_shape
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_flows._blame import blame
from pyro_flows.models.enumeration import (
    EnumerateSites,
    PackedTerm,
    check_enumeration,
    enumerated_sites,
    packed_terms,
    sum_out,
)
from pyro_flows.models.traces import DRAWS, NO_DENSITY, Call, by_draw, given, mini_batches, sample_nodes

__all__ = ["ENUMERATED", "BatchedModel", "runs_in_a_plate"]

# What a sum over enumerated sites is called among the sites.
ENUMERATED = "_pyro_flows_enumerated"

# How closely many draws at once have to agree with one run a draw: relative to the log density, and in nats.
RELATIVE, NATS = 1e-4, 1e-3
# The same for guides, whose flows are inverted for it.
GUIDE_RELATIVE, GUIDE_NATS = 1e-3, 1e-2
# Models that draw numbers of their own agree on average only: over so many draws, within so many standard errors.
AVERAGED, ERRORS = 100, 5.0

Values = Mapping[str, Tensor]
Pick = Callable[[Trace], Mapping[str, Tensor]]


class _Task(NamedTuple):
    """What is to be read off which model; see :meth:`BatchedModel.read`."""

    model: Callable[..., Any]
    call: Call
    pick: Pick
    shapes: Mapping[str, Sequence[int]] | None = None
    packed: Mapping[str, PackedTerm] = {}


Run = Callable[[Values, _Task], dict[str, Tensor]]


class BatchedModel:
    """A model, run at many values of its latents at once.

    Tries draws as an outer plate first, as vectorised particles do, and ``torch.vmap`` next, for models that are not
    written for outer dimensions: matrix products, indexing, loops, modules. Whichever gives the log densities of plain
    runs is used, and one run a draw if neither does. Sites that are enumerated in parallel are summed out.

    Args:
        owner: Whom errors name.
        model: The model.
        call: Its arguments.
        probe: A few draws to choose by: latent site -> ``(S, *site shape)``.
        nesting: Number of batch dimensions in use, if a guide has more than the model.

    Attributes:
        nodes: The model's sample sites in a plain run.
        nesting: Number of batch dimensions in use.
        enumerated: Names of the sites that are summed out.
        obstacle: What keeps draws from being run at once, with the line of the model; empty if nothing does.

    Raises:
        NotImplementedError: If sites are enumerated one value after another, or scaled besides.
        Exception: Whatever the model raises in plain runs at all draws, or Pyro about the shapes of its sites.
    """

    def __init__(self, owner: str, model: Callable[..., Any], call: Call, probe: Values, nesting: int = 0) -> None:
        self.model = model
        self.call = call
        self.enumerated: tuple[str, ...] = ()
        trace = self._plain_run(probe)
        self.nodes = sample_nodes(trace)
        check_enumeration(owner, self.nodes)
        self.enumerated = tuple(enumerated_sites(self.nodes))
        self.nesting = max(nesting, _nesting(self.nodes.values()))
        if is_validation_enabled():  # as SVI checks single particles; of vectorised ones it asks less
            trace.compute_log_prob()
            for node in self.nodes.values():
                check_site_shape(node, max_plate_nesting=math.inf)
        self.obstacle = ""
        self._draws_numbers = False
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            self._run: Run = self._choose(probe)

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return not self.obstacle

    @property
    def is_mapped(self) -> bool:
        """Whether that is by ``torch.vmap``."""
        return self._run == self._by_vmap

    def rows(self, name: str, value: Tensor, count: int) -> Tensor:
        """A latent site of a run in an outermost plate, or of one without draws, as ``(count, *site shape)``."""
        return _rows(value, self.nodes[name]["value"].dim(), count)

    def __call__(self, values: Values, call: Call | None = None, model: Callable[..., Any] | None = None) -> Trace:
        """Score draws; differentiable.

        Runs without validation, which would refuse all draws for the sake of one. Where the model has no density, log
        densities are NaN or minus infinity; a draw that it refuses by an exception costs itself only.

        Args:
            values: Latent site -> ``(S, *site shape)``.
            call: Arguments other than those at first.
            model: A model with the same sites to run in place of the own one.

        Returns:
            Parameters and sample sites, these with ``log_prob``, scaled and masked, of ``nesting + 1`` dimensions, the
            first of which has length S. In place of all that enumerated sites have a part in there are sites named
            after :data:`ENUMERATED`, in which these are summed out.
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
        call: Call | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        model: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of runs at many draws.

        Args:
            values: Latent site -> ``(S, *site shape)``.
            pick: Takes tensors from a trace, by name: log densities of sites, or what has the ``shapes`` given.
            call: Arguments other than those at first.
            shapes: Name -> shape in a run of one draw; None says that all are log densities.
            model: A model with the same sites to run in place of the own one.

        Returns:
            Name -> ``(S, *shape)``; log densities padded to ``nesting`` dimensions beside that of the draws.
        """
        return self._read(values, _Task(model or self.model, call or self.call, pick, shapes))

    def _read(self, values: Values, task: _Task) -> dict[str, Tensor]:
        with poutine.block(hide_types=["sample"]), pyro.validation_enabled(False):
            return self._run_or_split(values, task)

    def _log_probs(self, values: Values, task: _Task) -> dict[str, Tensor]:
        """Log densities, with what enumerated sites have a part in summed out; ``task.pick`` sees the traces."""
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

        found = self._read(values, task._replace(pick=pick, packed=packed))
        if packed:
            terms = sum_out({name: found.pop(name) for name in packed}, packed)
            found |= {f"{ENUMERATED}_{index}": term for index, term in enumerate(terms)}
        return {name: _padded(term, self.nesting) for name, term in found.items()}

    def _run_or_split(self, values: Values, task: _Task) -> dict[str, Tensor]:
        run = self._run
        if self.is_mapped and (task.shapes is not None or self._draws_numbers):
            run = self._by_vmap_with_draws
        try:
            return run(values, task)
        except NO_DENSITY:
            if _count(values) == 1:
                # NaN as a function of the draw, for those who ask for a gradient.
                nan = math.nan + torch.stack([0.0 * value.sum() for value in values.values()]).sum()
                return {name: nan.expand(1) for name in task.shapes or self.nodes}
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

    def _by_vmap(self, values: Values, task: _Task) -> dict[str, Tensor]:
        def one(row: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(task.pick(self._trace(row, task)))

        found: dict[str, Tensor] = torch.vmap(one, randomness="different")(dict(values))
        return found

    def _by_vmap_with_draws(self, values: Values, task: _Task) -> dict[str, Tensor]:
        """As :meth:`_by_vmap` for models that draw numbers; one by one where these are drawn in a way of their own."""

        def one(row: dict[str, Tensor]) -> dict[str, Tensor]:
            with _BatchedMemory(next(iter(row.values()))):
                return dict(task.pick(self._trace(row, task)))

        try:
            found: dict[str, Tensor] = torch.vmap(one, randomness="different")(dict(values))
        except RuntimeError:
            return self._one_by_one(values, task)
        return found

    def _one_by_one(self, values: Values, task: _Task) -> dict[str, Tensor]:
        rows = ({name: value[row] for name, value in values.items()} for row in range(_count(values)))
        singles = [task.pick(self._trace(row, task)) for row in rows]
        return {name: torch.stack([one[name] for one in singles]) for name in singles[0]}

    def _trace(self, values: Mapping[str, Any], task: _Task) -> Trace:
        model = task.model
        if self.enumerated and task.shapes is None:
            model = EnumerateSites(-2 - self.nesting)(model)
        replayed = poutine.replay(model, trace=given({**values, **task.call.fixed}))
        return poutine.trace(replayed).get_trace(*task.call.args, **task.call.kwargs)

    # Which of them

    def _plain_run(self, probe: Values) -> Trace:
        """A run at the first draw that the model does not refuse, as its user would run it."""
        refused: Exception | None = None
        for row in range(_count(probe)):
            task = _Task(self.model, self.call, lambda trace: {})
            try:
                with torch.no_grad(), poutine.block():
                    return self._trace({name: value[row] for name, value in probe.items()}, task)
            except NO_DENSITY as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _choose(self, probe: Values) -> Run:
        """The first way that agrees with plain runs."""
        task = _Task(self.model, self.call, lambda trace: {})
        self._run = self._one_by_one
        expected, again = self._log_probs(probe, task), self._log_probs(probe, task)
        self._draws_numbers = not all(torch.equal(again[n].nan_to_num(), expected[n].nan_to_num()) for n in expected)
        if self._draws_numbers:
            probe = {name: value[:1].expand(AVERAGED, *value.shape[1:]) for name, value in probe.items()}
            expected = self._log_probs(probe, task)
        agree = _agree_on_average if self._draws_numbers else _agree
        obstacle = ""
        for run in (self._in_a_plate, self._by_vmap):
            self._run = run
            try:
                found = self._log_probs(probe, task)
            except Exception as error:  # each model fails in its own way at shapes it never meant to see
                obstacle = blame(error)
                continue
            other = next((n for n in expected if n not in found or not agree(found[n], expected[n])), None)
            if other is None:
                return run
            obstacle = f"site '{other}' has another log density where draws share a run"
        self.obstacle = obstacle
        return self._one_by_one


class _BatchedMemory(TorchFunctionMode):
    """Has new memory differ between draws, so that random numbers can be written into it under ``torch.vmap``."""

    def __init__(self, batched: Tensor) -> None:
        super().__init__()
        self._zero = 0.0 * batched.detach().sum()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.empty, Tensor.new, Tensor.new_empty):  # type: ignore[attr-defined]
            return found + self._zero.to(found.dtype)
        return found


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
                name: _rows(node["value"], plain[name]["value"].dim(), count)
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
        return torch.allclose(torch.as_tensor(found), torch.stack(expected), rtol=GUIDE_RELATIVE, atol=GUIDE_NATS)


def _nesting(nodes: Iterable[Mapping[str, Any]]) -> int:
    """Number of batch dimensions that plates use."""
    return max((-f.dim for node in nodes for f in node["cond_indep_stack"] if f.vectorized), default=0)


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


def _rows(value: Tensor, rank: int, count: int) -> Tensor:
    shape = value.shape[max(value.dim() - rank, 0) :]
    return value.reshape(-1, *shape).expand(count, *shape)


def _in_front(term: Tensor, nesting: int, count: int) -> Tensor:
    """A term of a run in an outermost plate, or of one without draws, summed to ``(count,)``."""
    term = term.reshape((1,) * (nesting + 1 - term.dim()) + term.shape)
    return by_draw(term).expand(count)


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def _padded(term: Tensor, rank: int) -> Tensor:
    """``(S, ...)`` with so many dimensions beside the first, the new ones in front of the others."""
    return term.reshape(len(term), *(1,) * (rank + 1 - term.dim()), *term.shape[1:])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of different draws as one; those without a density have a number each."""
    shape = torch.broadcast_shapes(*(part.shape[1:] for part in parts))
    return torch.cat([_padded(part, len(shape)).expand(-1, *shape) for part in parts])


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether log densities, ``(S, ...)``, have the same sums."""
    one, other = (by_draw(value) for value in (found, expected))
    return torch.allclose(one, other, rtol=RELATIVE, atol=NATS, equal_nan=True)


def _agree_on_average(found: Tensor, expected: Tensor) -> bool:
    """Whether log densities that are random, ``(S, ...)``, have the same mean."""
    one, other = (by_draw(value).double() for value in (found, expected))
    error = ((one.var() + other.var()) / len(one)).sqrt() * ERRORS
    return bool((one.mean() - other.mean()).abs() <= error + RELATIVE * other.mean().abs() + NATS)
