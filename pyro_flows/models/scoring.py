# SPDX-License-Identifier: Apache-2.0
"""L2. log p(x, z) of many draws of all latents at once, in its two terms: likelihood and prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flows.models.log_joint import DRAWS, NO_DENSITY, sum_out
from pyro_flows.models.structure import Structure, sample_nodes

__all__ = ["ModelScorer", "Score", "concatenate", "given"]

Values = Mapping[str, Tensor]


class Score(NamedTuple):
    """Log densities of S draws, by item; float64.

    Attributes:
        log_likelihood: Of what is observed, and of all that depends on an enumerated site, ``(S, N)``.
        log_priors: Latent site -> its log density given those before it, ``(S, N)``.
    """

    log_likelihood: Tensor
    log_priors: dict[str, Tensor]

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), ``(S, N)``."""
        return self.log_likelihood + sum(self.log_priors.values())


def given(values: Mapping[str, Any]) -> Trace:
    """A trace to replay: these values, still as latents."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    return trace


def concatenate(scores: Sequence[Score]) -> Score:
    """Scores of several draws as one, in order."""
    names = [name for name in scores[0].log_priors if all(name in score.log_priors for score in scores)]
    priors = {name: torch.cat([score.log_priors[name] for score in scores]) for name in names}
    return Score(torch.cat([score.log_likelihood for score in scores]), priors)


class ModelScorer:
    """Scores draws in one run of the model where that works, and one by one where it does not.

    Tries an outer plate first, as vectorised particles do, and ``torch.vmap`` next, for models that are not written
    for outer dimensions. Whichever agrees with one run a draw is used, and one run a draw if neither does.

    Enumerated discrete sites are summed out exactly, by Pyro's tensor variable elimination.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Likewise.
        structure: What is known of it.
        probe: A few draws to choose by, ``(S, *site shape)`` each.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        structure: Structure,
        probe: Values,
    ) -> None:
        self._model = model
        self._args = args
        self._kwargs = kwargs
        self._structure = structure
        self._run = self._choose(probe)

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return self._run != self._one_by_one

    def __call__(self, values: Values, indices: Mapping[str, Any] | None = None) -> Score:
        """Score draws; differentiable.

        Args:
            values: Latent site -> ``(S, *site shape)``.
            indices: Plate -> mini-batch; plates that are not named draw their own.

        Returns:
            Minus infinity for draws that the model refuses.
        """
        try:
            return self._run(values, indices or {})
        except NO_DENSITY:  # one draw that a distribution refuses stops the run
            if self._run == self._one_by_one:
                raise
            return self._one_by_one(values, indices or {})

    @torch.no_grad()
    def _choose(self, probe: Values) -> Callable[[Values, Mapping[str, Any]], Score]:
        indices = self._structure.indices  # the same mini-batch for all, or else nothing could agree
        expected = self._one_by_one(probe, indices)
        if (expected.log_joint == -torch.inf).all():
            self._one({name: value[0] for name, value in probe.items()}, indices)  # says what is wrong, if it can
        for run in (self._in_a_plate, self._by_vmap):
            try:
                found = run(probe, indices)
            except (ValueError, RuntimeError, IndexError, NotImplementedError):
                continue
            pairs = zip((found.log_likelihood, found.log_joint), (expected.log_likelihood, expected.log_joint))
            if all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in pairs):
                return run
        return self._one_by_one

    def _in_a_plate(self, values: Values, indices: Mapping[str, Any]) -> Score:
        structure = self._structure
        lead = {site.name: structure.lead(site, values[site.name]) for site in structure.latents}
        count = len(next(iter(lead.values())))
        with poutine.block(), pyro.plate(DRAWS, count, dim=-1 - structure.nesting):
            return self._score(lead, indices, count)

    def _one(self, values: Values, indices: Mapping[str, Any]) -> Score:
        with poutine.block():
            return self._score(values, indices, 1)

    def _one_by_one(self, values: Values, indices: Mapping[str, Any]) -> Score:
        scores = []
        for row in range(len(next(iter(values.values())))):
            one = {name: value[row] for name, value in values.items()}
            try:
                scores.append(self._one(one, indices))
            except NO_DENSITY:
                device = next(iter(one.values())).device
                nothing = torch.zeros(1, self._structure.num_items, dtype=torch.double, device=device)
                scores.append(Score(nothing - torch.inf, dict.fromkeys(one, nothing)))
        return concatenate(scores)

    def _by_vmap(self, values: Values, indices: Mapping[str, Any]) -> Score:
        def one(row: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            likelihood, priors = self._one(row, indices)
            return likelihood, priors

        with pyro.validation_enabled(False):  # checks branch on values, which vmap cannot; infinities tell as much
            likelihood, priors = torch.vmap(one, randomness="different")(dict(values))
        return Score(likelihood.squeeze(1), {name: value.squeeze(1) for name, value in priors.items()})

    def _score(self, values: Values, indices: Mapping[str, Any], count: int) -> Score:
        run = poutine.replay(self._model, trace=given({**values, **indices}))
        if self._structure.enumerates:
            run = poutine.enum(run, first_available_dim=-2 - self._structure.nesting)
        trace = poutine.trace(run).get_trace(*self._args, **self._kwargs)
        trace.compute_log_prob()
        nodes = sample_nodes(trace)
        if self._structure.enumerates:
            return self._sum_out(trace, nodes, count)
        terms = {name: self._structure.per_draw(node["log_prob"], count) for name, node in nodes.items()}
        priors = {name: terms.pop(name) for name in values}
        likelihood = sum(terms.values(), torch.zeros_like(next(iter(priors.values()))))
        return Score(likelihood, priors)

    def _sum_out(self, trace: Trace, nodes: Mapping[str, Any], count: int) -> Score:
        trace.pack_tensors()
        plates = trace.plate_to_symbol
        latents = {site.name for site in self._structure.latents}
        symbols = set(plates.values())
        priors = {
            name: self._structure.per_draw(node["log_prob"], count)
            for name, node in nodes.items()
            if name in latents and symbols.issuperset(node["packed"]["log_prob"]._pyro_dims)
        }
        items = self._structure.items
        keep = [plates[name] for name in (DRAWS, *([items.name] if items else [])) if name in plates]
        likelihood = []
        for dims, term in sum_out(trace, (node for name, node in nodes.items() if name not in priors)):
            left = sorted((symbol for symbol in dims if symbol in keep), key=keep.index)
            value = torch.einsum(f"{dims}->{''.join(left)}", term.double())
            rows = count if plates.get(DRAWS) in left else 1
            likelihood.append(value.reshape(rows, -1).expand(count, self._structure.num_items))
        return Score(torch.stack(likelihood).sum(0), priors)
