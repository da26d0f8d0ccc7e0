# SPDX-License-Identifier: Apache-2.0
"""L2. The log joint density of a model as a function of packed unconstrained draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent

from pyro_flows._random import seeded
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.checks import outside_support, start_elsewhere, without_density
from pyro_flows.models.layout import Layout
from pyro_flows.models.precision import remedy_at
from pyro_flows.models.sites import Site
from pyro_flows.models.traces import NO_DENSITY, Call, by_draw, run_quietly, sample_nodes

__all__ = ["LogJoint", "PulledBack", "Target", "constrain", "in_parts", "joined", "log_jacobian", "scored_sites"]

OWNER = "AutoFlowGuide.warm_start"


@dataclass(frozen=True)
class EvaluationSettings:
    """How a log joint is evaluated.

    Attributes:
        num_probes: Number of draws at which ways of running a model are compared.
        distance: Standard deviation of these about the initial location, in unconstrained space.
        max_rows: Largest number of draws times items of a model that an average is taken over; bounds time.
        max_elements: Largest number of draws times values of a model's sites in one evaluation: more would need more
            memory, and take longer, since nothing is left in a processor's caches.
        max_values: Largest number of draws times their gradients times values of a model's sites in one step of an
            algorithm; a gradient takes 20 nanoseconds a value.
        min_draws: Number of draws that an average is taken over even if they have more.
    """

    num_probes: int = 3
    distance: float = 0.1
    max_rows: int = 2**18
    max_elements: int = 2**19
    max_values: int = 2**27
    min_draws: int = 16


EVALUATION = EvaluationSettings()


class LogJoint:
    """log p(x, z) as a function of packed unconstrained draws, all of them in one run of the model where that works.

    Enumerated sites are summed out exactly. See :class:`~pyro_flows.models.batching.BatchedModel`.

    Args:
        model: The model.
        table: Layout of its latent sites.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        NotImplementedError: If the model has latents that are not in the layout.
        Exception: Those of :class:`~pyro_flows.models.batching.BatchedModel`.
    """

    # Number of plate items per draw, in addition to the model's own cost.
    cost_per_draw = 1

    def __init__(
        self, model: Callable[..., Any], table: Layout, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.table = table
        start = table.init_loc
        generator = torch.Generator(start.device).manual_seed(0)
        noise = torch.randn(
            EVALUATION.num_probes, len(start), generator=generator, dtype=start.dtype, device=start.device
        )
        probe, _ = table.unpack(torch.cat([start.unsqueeze(0), start + EVALUATION.distance * noise]))
        self.batched = BatchedModel(OWNER, model, Call(args, kwargs), probe)
        for name, node in self.batched.nodes.items():
            if not (node["is_observed"] or name in probe or name in self.batched.enumerated):
                raise NotImplementedError(f"{OWNER}: expected a guide that draws all latents, but not '{name}'.")

    @property
    def sizes(self) -> Sequence[int]:
        """Number of coordinates of each site, in the order of the model."""
        return self.table.sizes

    @property
    def values_per_draw(self) -> int:
        """Number of values of the model's sites."""
        return max(1, sum(node["value"].numel() for node in self.batched.nodes.values()))

    def affordable(self, count: int, gradients: int) -> int:
        """Up to ``count`` draws, an even number, that an average is worth if each takes some gradients."""
        by_values = max(EVALUATION.min_draws, EVALUATION.max_values // (gradients * self.values_per_draw))
        return max(2, min(count, EVALUATION.max_rows // self.cost_per_draw, by_values) // 2 * 2)

    @property
    def chunk(self) -> int:
        """Number of draws that may be evaluated at once."""
        rows, elements = EVALUATION.max_rows // self.cost_per_draw, EVALUATION.max_elements // self.values_per_draw
        return max(1, min(rows, elements))

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return self.batched.is_vectorized

    def from_prior(self, count: int) -> Iterator[Tensor]:
        """Up to ``count`` draws of the prior, ``(D,)`` each; skips those at which the model raises."""
        call = self.batched.call
        for _ in range(count):
            try:
                trace = run_quietly(self.batched.model, call)
                packed, _ = self.table.pack({site.name: trace.nodes[site.name]["value"] for site in self.table})
            except Exception:  # many likelihoods raise at draws of their own prior, in many ways
                continue
            yield packed

    def without_density(self, start: Tensor) -> str:
        """Error message if no draw around an initial location, ``(D,)``, has a density; names the sites without one.

        Raises:
            Exception: Any exception that the model raises there.
        """
        values, _ = self.table.unpack(start)
        sites = without_density(self.batched.model, values, self.batched.call)
        if sites:
            return start_elsewhere(OWNER, sites, remedy_at(self.batched.model, values, self.batched.call))
        with seeded(0):
            far = start + 3.0 * torch.randn(100, len(start), dtype=start.dtype, device=start.device)
        for point in far:
            names: list[str] = []
            with suppress(*NO_DENSITY):
                names = outside_support(self.batched.model, self.table.unpack(point)[0], self.batched.call)
            if names:
                name = names[0]
                return (
                    f"{OWNER}: expected sites of one support at all draws, but that of '{name}' follows other "
                    f"latents. Write a site of fixed support, such as `u = pyro.sample('{name}_share', "
                    f"dist.Uniform(0.0, 1.0))`, and `pyro.deterministic('{name}', low + (high - low) * u)`."
                )
        return (
            f"{OWNER}: expected a Gaussian with a finite ELBO, but none has one, although the log density is finite at "
            "the start. Look for what overflows around it, or give a smaller init_scale."
        )

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        """Evaluate at ``(S, D)`` draws, or their parts, to ``(S,)``; differentiable. -inf or NaN where the model has no
        density."""
        return self.without((), draws)

    def observed(self, draws: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Terms of the log likelihood at ``(S, D)`` draws, ``(S, ...)`` for each observed site: one for each element
        that is independent of others given the latents, also where ``to_event`` makes them one event; but only one for
        each element of the batch where discrete sites are summed out."""
        values, _ = self.table.unpack(draws)
        if self.batched.enumerated:
            found = sample_nodes(self.batched(values))
            return [node["log_prob"] for name, node in found.items() if name not in self.table.names]
        nodes = self.batched.nodes.items()
        shapes = {name: _by_element(node).shape for name, node in nodes if name not in self.table.names}

        def pick(trace: Trace) -> dict[str, Tensor]:
            return {name: _by_element(trace.nodes[name]) for name in shapes}

        return list(self.batched.read(values, pick, shapes).values())

    def without(self, sites: Collection[str], draws: Tensor | Sequence[Tensor]) -> Tensor:
        """As a call, without the densities of some sites."""
        values, log_det = self.table.unpack(draws)
        nodes = sample_nodes(self.batched(values)).items()
        terms = (by_draw(node["log_prob"]).to(log_det) for name, node in nodes if name not in sites)
        return torch.stack([log_det, *terms]).sum(0)

    def partners(self, sites: Collection[str], point: Tensor) -> set[str]:
        """Latent sites with which some sites share a term of the density at a point, ``(D,)``, apart from the densities
        of those sites themselves."""
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in point.unsqueeze(0).split([*self.sizes], -1)]
            values, _ = self.table.unpack(parts)
            nodes = sample_nodes(self.batched(values)).items()
            terms = [node["log_prob"].sum() for name, node in nodes if name not in sites]
        partners: set[str] = set()
        for term in terms:
            if term.requires_grad:
                found = torch.autograd.grad(term, parts, retain_graph=True, allow_unused=True)
                seen = {name for name, part in zip(self.table.names, found, strict=True) if part is not None}
                partners |= seen if not seen.isdisjoint(sites) else set()
        return partners


@dataclass(frozen=True, eq=False)
class PulledBack:
    r"""A log joint in the coordinates of a map: :math:`\log p(f(x)) + \log|\det f'(x)|`.

    Attributes:
        log_joint: The log joint.
        push: The map from ``x``, ``(S, D)``, to ``f(x)``, ``(S, D)``, and its log-determinant, ``(S,)``.
    """

    log_joint: LogJoint
    push: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def cost_per_draw(self) -> int:
        """Cost of a draw of the log joint."""
        return self.log_joint.cost_per_draw

    @property
    def sizes(self) -> Sequence[int]:
        """A single part, since the map mixes them."""
        return (sum(self.log_joint.sizes),)

    def affordable(self, count: int, gradients: int) -> int:
        """As :meth:`LogJoint.affordable`."""
        return self.log_joint.affordable(count, gradients)

    @property
    def chunk(self) -> int:
        """Number of draws that may be evaluated at once."""
        return self.log_joint.chunk

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return self.log_joint.is_vectorized

    def observed(self, draws: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """As :meth:`LogJoint.observed`."""
        pushed, _ = self.push(joined(draws))
        return self.log_joint.observed(pushed)

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        """Evaluate at ``(S, D)`` draws, or their parts, to ``(S,)``; differentiable."""
        pushed, ladj = self.push(joined(draws))
        return self.log_joint(pushed) + ladj


class Target(Protocol):
    """A log density to which Gaussians are fitted: of ``(S, D)`` draws, ``(S,)``, differentiable."""

    @property
    def sizes(self) -> Sequence[int]:
        """Lengths of the parts of a draw, those first on which the densities of others depend."""

    def affordable(self, count: int, gradients: int, /) -> int:
        """Up to ``count`` draws that an average is worth if each takes some gradients."""

    @property
    def chunk(self) -> int:
        """Number of draws that may be evaluated at once."""

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""

    def __call__(self, draws: Tensor | Sequence[Tensor], /) -> Tensor:
        """Evaluate at ``(S, D)`` draws, or their parts."""


def _by_element(node: Mapping[str, Any]) -> Tensor:
    """Log density of each independent element of a site's value, scaled and masked as the site is."""
    fn, event_dim = node["fn"], 0
    while isinstance(fn, Independent):
        event_dim += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    of_batch = (node["scale"], node["mask"])
    scale, mask = (each[(..., *[None] * event_dim)] if isinstance(each, Tensor) else each for each in of_batch)
    found: Tensor = scale_and_mask(fn.log_prob(node["value"]), scale, mask)
    return found


def in_parts(log_joint: Target, draws: Tensor) -> Tensor:
    """Evaluate at ``(S, D)`` draws, as many at once as ``chunk`` says, to ``(S,)``."""
    return torch.cat([log_joint(part) for part in draws.split(log_joint.chunk)])


def joined(draws: Tensor | Sequence[Tensor]) -> Tensor:
    """Draws from their parts."""
    return draws if isinstance(draws, Tensor) else torch.cat([*draws], -1)


def constrain(split: Iterable[tuple[Site, Tensor]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Values on the supports by site, and the log-determinants of the maps to them, of the sites' batch shapes."""
    values, ladjs = {}, []
    for site, part in split:
        values[site.name], log_density = site.constrain(part)
        if torch.is_tensor(log_density):
            ladjs.append(-log_density.to(part.dtype))
    return values, ladjs


def log_jacobian(table: Layout, packed: Tensor) -> Tensor:
    """Log-determinant of the map from unconstrained values, ``(S, D)``, to the supports, ``(S,)``."""

    def one(packed: Tensor) -> Tensor:
        _, ladjs = constrain(table.split(packed.split(table.sizes)))
        return torch.stack([packed.new_zeros(()), *(ladj.sum() for ladj in ladjs)]).sum()

    return torch.vmap(one)(packed)


def scored_sites(model: Callable[..., Any], values: Mapping[str, Tensor], call: Call) -> Iterator[dict[str, Any]]:
    """The model's sample sites, with their ``log_prob``, in a run with all latents given."""
    with poutine.block(), poutine.trace() as tape:
        poutine.condition(model, data={**values, **call.fixed})(*call.args, **call.kwargs)
    tape.trace.compute_log_prob()
    for name, node in sample_nodes(tape.trace).items():
        if not node["is_observed"]:
            raise RuntimeError(f"LogJoint: expected a model whose latents are all given, but '{name}' is not.")
        yield node
