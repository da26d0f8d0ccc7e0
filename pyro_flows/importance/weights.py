# SPDX-License-Identifier: Apache-2.0
"""L6. Log importance weights, log p(x, z) - log q(z) of draws z of any guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import checked, integer
from pyro_flows._memory import in_chunks
from pyro_flows._threads import one_at_a_time
from pyro_flows.models.particles import runs_in_a_plate
from pyro_flows.models.scoring import ModelScorer, Score, concatenate
from pyro_flows.models.structure import Structure, read_structure
from pyro_flows.models.traces import DRAWS, Call, mini_batches, run_quietly, sample_nodes

__all__ = ["Draws", "ImportanceSampler", "SamplerSettings", "gap_of", "log_weights"]


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of runs of the guide and the model.

    Attributes:
        max_elements: Largest number of values in memory at once: draws in a chunk times the values of one draw.
        max_chunk: Largest number of draws in a chunk.
        num_probes: Draws by which ways of running the guide and the model are compared.
        num_mini_batches: Number of mini-batches in an estimate with subsampled plates.
    """

    max_elements: int = 2**20
    max_chunk: int = 4096
    num_probes: int = 3
    num_mini_batches: int = 100


class Draws(NamedTuple):
    """Draws of a guide and their log densities, the latter in float64 on the CPU; N is the number of items, or 1.

    Log densities of the model are NaN for draws that it refuses: an exception (a failed Cholesky factorization) or NaN.

    Attributes:
        values: Latent site -> ``(S, *site shape)``.
        log_likelihood: log p(x | z), ``(S, N)``.
        log_priors: Latent site -> log p(site | those before it), ``(S, N)``.
        log_guide: log q(z), ``(S, N)``.
    """

    values: dict[str, Tensor]
    log_likelihood: Tensor
    log_priors: dict[str, Tensor]
    log_guide: Tensor

    @property
    def log_prior(self) -> Tensor:
        """log p(z), ``(S, N)``."""
        return sum(self.log_priors.values(), torch.zeros_like(self.log_guide))

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), ``(S, N)``; minus infinity where the model has no density or refuses the draw."""
        return _or_none(self.log_likelihood + self.log_prior)

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z), ``(S, N)``; minus infinity where :attr:`log_joint` is."""
        return _or_none(self.log_likelihood + self.log_prior - self.log_guide)


class ImportanceSampler:
    """Draws from a guide in chunks of bounded size, with log densities of guide and model.

    The guide is run once for each chunk, in an outer plate as for vectorized particles, if densities are then the same
    as in single runs; else once for each draw. For the model see :class:`~pyro_flows.models.scoring.ModelScorer`.

    Args:
        owner: Name of the public function, for errors.
        model: The model.
        guide: Any guide that has a density.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        settings: How draws are split into runs.

    Attributes:
        structure: Structure of the model and the guide.
        score: The model's log density.
        draws_at_once: Whether many draws take one run of the guide.
        chunk: Number of draws that are taken at once.
    """

    def __init__(
        self,
        owner: str,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        settings: SamplerSettings = SamplerSettings(),
    ) -> None:
        self._owner = owner
        self._guide = guide
        self._settings = settings
        self._call = Call(args, dict(kwargs or {}))
        self.structure: Structure = read_structure(owner, model, guide, args, self._call.kwargs)
        singles = [self._draw_one() for _ in range(settings.num_probes)]
        probe = {name: torch.stack([values[name] for values, _, _ in singles]) for name in singles[0][0]}
        self.score = ModelScorer(owner, model, args, self._call.kwargs, self.structure, probe)
        call = self.score.model.call
        self.draws_at_once = runs_in_a_plate(guide, call, self.structure.nesting, settings.num_probes)
        # Matrices of each draw, of a guide that knows correlated priors.
        modules = guide.modules() if isinstance(guide, torch.nn.Module) else ()
        elements = self.structure.elements + sum(getattr(module, "factored_entries", 0) for module in modules)
        self.chunk = max(1, min(settings.max_chunk, settings.max_elements // max(elements, 1)))

    def chunks(self, num_samples: int, *, progress: bool) -> Iterator[Draws]:
        """Draws in chunks, smaller ones where memory runs out; with subsampled plates in at least 100, each of which is
        one mini-batch."""
        chunk = self.chunk
        if self.structure.subsampled:
            chunk = min(chunk, max(1, num_samples // self._settings.num_mini_batches))
        with tqdm(total=num_samples, desc="draws", disable=not progress, delay=1.0) as bar:
            for count, draws in in_chunks(self._owner, num_samples, chunk, self.draw):
                bar.update(count)
                yield draws

    @torch.no_grad()
    def draw(self, count: int) -> Draws:
        """``count`` draws, in one run of the guide and of the model where these support it."""
        values, (likelihood, priors), log_guide = self._draw_and_score(count)
        return Draws(values, likelihood.cpu(), {name: prior.cpu() for name, prior in priors.items()}, log_guide.cpu())

    def _draw_and_score(self, count: int) -> tuple[dict[str, Tensor], Score, Tensor]:
        if self.draws_at_once:
            values, indices, log_guide = self._draw_many(count)
            return values, self.score(values, indices), log_guide
        singles = [self._draw_one() for _ in range(count)]
        values = {name: torch.stack([single[0][name] for single in singles]) for name in singles[0][0]}
        log_guide = torch.cat([single[2] for single in singles])
        if not self.structure.subsampled:
            return values, self.score(values, singles[0][1]), log_guide
        scores = [self.score({k: v.unsqueeze(0) for k, v in one.items()}, indices) for one, indices, _ in singles]
        return values, concatenate(scores), log_guide

    def log_joint(self, packed: Tensor | Sequence[Tensor]) -> Tensor:
        """log p(x, z) in unconstrained space, ``(S, N, d)`` or its parts to ``(S, N)`` in float64; differentiable.

        Minus infinity where the model has no density or refuses the draw.
        """
        values, log_det = self.structure.unpack(packed)
        return _or_none(self.score(values).log_joint) + log_det

    def log_joint_in_parts(self, packed: Tensor) -> Tensor:
        """As :meth:`log_joint`, of at most ``chunk`` draws at once."""
        return torch.cat([self.log_joint(part) for part in packed.split(self.chunk)])

    def _draw_one(self) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """Values of the latents, mini-batches, and log q ``(1, N)``."""
        with torch.no_grad():
            trace = run_quietly(self._guide, self._call)
            trace.compute_log_prob()
        values = {site.name: trace.nodes[site.name]["value"] for site in self.structure.latents}
        return values, mini_batches(trace), self._log_guide(trace, 1)

    def _draw_many(self, count: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        with torch.no_grad():
            outermost = pyro.plate(DRAWS, count, dim=-1 - self.structure.nesting)
            trace = run_quietly(outermost(self._guide), self._call)
            trace.compute_log_prob()
        drawn = {site.name: trace.nodes[site.name]["value"] for site in self.structure.latents}
        values = {name: self.score.model.rows(name, value, count) for name, value in drawn.items()}
        return values, mini_batches(trace), self._log_guide(trace, count)

    def _log_guide(self, trace: Trace, count: int) -> Tensor:
        terms = [self.structure.per_draw(node["log_prob"], count) for node in sample_nodes(trace).values()]
        return torch.stack(terms).sum(0)


def _or_none(log_density: Tensor) -> Tensor:
    """Log density with NaN, of refused draws, replaced by minus infinity."""
    return torch.where(log_density.isnan(), -torch.inf, log_density)


def gap_of(log_weights: Tensor) -> tuple[float, float]:
    """How far the mean of log weights, ``(S,)``, is below the log of their mean, in nats, and its standard error by the
    delta method; infinite if draws have no weights."""
    log_mean = log_weights.logsumexp(0) - math.log(len(log_weights))
    gap = (log_mean - log_weights.mean()).item()
    error = ((log_weights - log_mean).exp() - log_weights).std().item() / math.sqrt(len(log_weights))
    return (gap, error) if math.isfinite(gap) else (math.inf, 0.0)


@checked(num_samples=integer(1))
def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    num_samples: int,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log importance weights of new draws of a guide; :func:`~pyro_flows.diagnose` interprets them.

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide with a density.
        num_samples: Number of draws, >= 1.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Returns:
        Log weights ``(num_samples,)`` in float64, minus infinity where the model has no density; and the draws, site
        name -> ``(num_samples, *site shape)``.

    Raises:
        NotImplementedError: As :func:`~pyro_flows.diagnose`.
    """
    with one_at_a_time("log_weights"):
        sampler = ImportanceSampler("log_weights", model, guide, args, kwargs)
        chunks = list(sampler.chunks(num_samples, progress=False))
    values = {name: torch.cat([chunk.values[name] for chunk in chunks]) for name in chunks[0].values}
    return torch.cat([chunk.log_weights.sum(-1) for chunk in chunks]), values
