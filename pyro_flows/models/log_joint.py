# SPDX-License-Identifier: Apache-2.0
"""L2. The log joint density of a model as a function of packed unconstrained draws."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.models.sites import Site, SiteTable

__all__ = [
    "DRAWS",
    "NO_DENSITY",
    "LogJoint",
    "PulledBack",
    "Target",
    "check_unscaled",
    "constrain",
    "read_nesting",
    "scored_sites",
    "sum_out",
]

# The plate of many draws in one run of a model.
DRAWS = "_pyro_flows_draws"

# What a model raises where it has no density: a distribution refuses its parameters, a covariance is not one.
NO_DENSITY = (ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]

# Draws times items that are in flight at once.
MAX_ROWS = 2**18


class LogJoint:
    """log p(x, z) as a function of packed unconstrained draws, all of them in one run of the model where that works.

    Tries draws as an outer batch dimension first, as vectorised particles do, and ``torch.vmap`` next, for models that
    are not written for outer dimensions; whichever agrees with one run a draw is used, and one run a draw if neither
    does. Enumerated sites are summed out exactly.

    Args:
        model: The model.
        table: Its latent sites.
        args: Its arguments.
        kwargs: Likewise.
        max_plate_nesting: Number of batch dimensions that the model uses.
        enumerates: Whether it has sites that are enumerated in parallel.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        table: SiteTable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        max_plate_nesting: int,
        enumerates: bool = False,
    ) -> None:
        self.model = model
        self.table = table
        self.args = args
        self.kwargs = kwargs
        self.nesting = max_plate_nesting
        self.enumerates = enumerates
        with pyro.validation_enabled(False):
            self._run = self._choose()

    # Items of plates that a draw runs over, beyond the model's own cost.
    rows = 1

    @property
    def chunk(self) -> int:
        """Draws that may be in flight at once."""
        return max(1, MAX_ROWS // self.rows)

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return self._run != self._one_by_one

    def from_prior(self, count: int) -> Iterator[Tensor]:
        """Up to so many draws of the prior, ``(D,)``; none where a likelihood does not bear its own prior."""
        for _ in range(count):
            try:
                with torch.no_grad(), poutine.block():
                    trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
                packed, _ = self.table.pack({site.name: trace.nodes[site.name]["value"] for site in self.table})
            except Exception:  # many a likelihood does not bear its own prior, each in its own way
                continue
            yield packed

    def __call__(self, draws: Tensor) -> Tensor:
        """``(S, D)`` to ``(S,)``; differentiable. Minus infinity or NaN where the model has no density.

        Runs without validation, which would refuse all draws for the sake of one.
        """
        with pyro.validation_enabled(False):
            return self._run_or_split(draws)

    def _run_or_split(self, draws: Tensor) -> Tensor:
        try:
            return self._run(draws)
        except NO_DENSITY:
            if len(draws) == 1:
                return 0.0 * draws.sum(-1) - torch.inf
            return torch.cat([self._run_or_split(half) for half in draws.tensor_split(2)])

    @torch.no_grad()
    def _choose(self) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator(self.table.init_loc.device).manual_seed(0)
        shape = (3, len(self.table.init_loc))
        noise = torch.randn(shape, generator=generator, dtype=self.table.init_loc.dtype, device=generator.device)
        draws = self.table.init_loc + 0.1 * noise
        expected = self._one_by_one(draws)
        for run in (self._side_by_side, self._by_vmap):
            try:
                found = run(draws)
            except (ValueError, RuntimeError, IndexError):
                continue
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
                return run
        return self._one_by_one

    def _side_by_side(self, draws: Tensor) -> Tensor:
        count = len(draws)
        lead = draws.reshape(count, *(1,) * self.nesting, draws.shape[-1])
        return torch.stack([_sum_draws(part, count, self.nesting) for part in self._parts(lead)]).sum(0)

    def one(self, draw: Tensor) -> Tensor:
        """``(D,)`` to ``()``."""
        return torch.stack([part.sum() for part in self._parts(draw)]).sum()

    def _one_by_one(self, draws: Tensor) -> Tensor:
        return torch.stack([self.one(draw) for draw in draws])

    def _by_vmap(self, draws: Tensor) -> Tensor:
        result: Tensor = torch.vmap(self.one, randomness="different")(draws)
        return result

    def _parts(self, packed: Tensor) -> list[Tensor]:
        """Terms of the log density in unconstrained space."""
        values, parts = constrain(self.table.split(packed))
        if self.enumerates:
            count = len(packed) if packed.dim() > 1 else 1
            return [*parts, *(part.to(packed.dtype) for part in self._summed_out(values, count))]
        nodes = scored_sites(self.model, values, self.args, self.kwargs)
        return [*parts, *(node["log_prob"].to(packed.dtype) for node in nodes)]

    def _summed_out(self, values: Mapping[str, Tensor], count: int) -> Iterator[Tensor]:
        """Terms of the log joint of so many draws, which are in the outermost dimension."""
        model = poutine.enum(poutine.condition(self.model, data=values), first_available_dim=-2 - self.nesting)
        with poutine.block(), pyro.plate(DRAWS, count, dim=-1 - self.nesting):
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        nodes = [n for n in trace.nodes.values() if n["type"] == "sample" and not site_is_subsample(n)]
        trace.compute_log_prob()
        trace.pack_tensors()
        draws = trace.plate_to_symbol[DRAWS]
        for dims, term in sum_out(trace, nodes):
            left = draws if draws in dims else ""
            total = torch.einsum(f"{dims}->{left}", term)
            yield total.reshape(-1, *(1,) * self.nesting) if left else total


@dataclass(frozen=True, eq=False)
class PulledBack:
    r"""A log joint in the coordinates of a map: :math:`\log p(f(x)) + \log|\det f'(x)|`.

    Attributes:
        log_joint: The log joint.
        push: ``x``, ``(S, D)``, to ``f(x)`` and its log-determinant.
    """

    log_joint: LogJoint
    push: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def rows(self) -> int:
        """As of the log joint."""
        return self.log_joint.rows

    @property
    def chunk(self) -> int:
        """As of the log joint."""
        return self.log_joint.chunk

    @property
    def is_vectorized(self) -> bool:
        """As of the log joint."""
        return self.log_joint.is_vectorized

    def __call__(self, draws: Tensor) -> Tensor:
        """``(S, D)`` to ``(S,)``; differentiable."""
        pushed, ladj = self.push(draws)
        return self.log_joint(pushed) + ladj


# What Gaussians are fitted to.
Target = LogJoint | PulledBack


def constrain(split: Iterable[tuple[Site, Tensor]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Values on the supports by site, and the log-determinants of the maps to them, of the sites' batch shapes."""
    values, ladjs = {}, []
    for site, part in split:
        values[site.name], log_density = site.constrain(part)
        if torch.is_tensor(log_density):
            ladjs.append(-log_density.to(part.dtype))
    return values, ladjs


def scored_sites(
    model: Callable[..., Any], values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The model's sample sites, with their ``log_prob``, in a run with all latents (and subsamples) given."""
    with poutine.block(), poutine.trace() as tape:
        poutine.condition(model, data=values)(*args, **kwargs)
    tape.trace.compute_log_prob()
    for name, node in tape.trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if not node["is_observed"]:
            raise RuntimeError(f"LogJoint: expected a model whose latents are all given, but '{name}' is not.")
        yield node


def sum_out(trace: Trace, nodes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Terms of the log density of some sites of a packed trace, with enumerated sites summed out by tensor variable
    elimination; and their dimensions, which are the symbols of plates."""
    plates = trace.plate_to_symbol
    tree: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    symbols: set[str] = set()
    for node in nodes:
        term = node["packed"]["log_prob"]
        symbols |= set(term._pyro_dims)
        ordinal = frozenset(plates[frame.name] for frame in node["cond_indep_stack"] if frame.vectorized)
        tree.setdefault(ordinal, []).append(term)
    for terms in contract_tensor_tree(tree, symbols - set(plates.values()), cache={}).values():
        for term in terms:
            yield term._pyro_dims, term


def read_nesting(
    owner: str,
    model: Callable[..., Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[int, tuple[str, ...]]:
    """Number of batch dimensions that a model uses, and its sites that are to be summed out.

    Raises:
        NotImplementedError: If a site is enumerated one value after another, or scaled besides.
    """
    with torch.no_grad(), poutine.block(), poutine.trace() as tape:
        poutine.condition(model, data=values)(*args, **kwargs)
    nodes = [n for n in tape.trace.nodes.values() if n["type"] == "sample" and not site_is_subsample(n)]
    nesting = max((-f.dim for node in nodes for f in node["cond_indep_stack"] if f.vectorized), default=0)
    ways = {node["name"]: node["infer"]["enumerate"] for node in nodes if node["infer"].get("enumerate")}
    for name, way in ways.items():
        if way != "parallel":
            raise NotImplementedError(
                f"{owner}: expected sites to be enumerated in parallel, but '{name}' is enumerated one value after "
                "another. Write `model = config_enumerate(model)`."
            )
    check_unscaled(owner, tuple(ways), {node["name"]: node for node in nodes})
    return nesting, tuple(ways)


def check_unscaled(owner: str, enumerated: Sequence[str], nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse models that sum sites out and scale others: the sum does not commute with the scale.

    Raises:
        NotImplementedError: If a site is scaled and another enumerated.
    """
    for name, node in nodes.items():
        if enumerated and not (isinstance(node["scale"], float) and node["scale"] == 1.0):
            raise NotImplementedError(
                f"{owner}: expected a model that enumerates '{enumerated[0]}' to have no scaled or subsampled sites, "
                f"but '{name}' is one. Run the model on its full plates."
            )


def _sum_draws(log_prob: Tensor, count: int, nesting: int) -> Tensor:
    """Sum over all dimensions but that of the draws."""
    if log_prob.dim() > nesting and log_prob.shape[-1 - nesting] == count:
        return log_prob.reshape(count, -1).sum(-1)
    return log_prob.sum().expand(count)  # nothing that was drawn is in it
