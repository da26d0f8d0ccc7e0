# SPDX-License-Identifier: Apache-2.0
"""L2. log p(x, z) of many draws of all latents, in its two terms: likelihood and prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.structure import Structure
from pyro_flows.models.traces import Call, sample_nodes

__all__ = ["ModelScorer", "Score", "concatenate"]

Values = Mapping[str, Tensor]


class Score(NamedTuple):
    """Log densities of S draws, by item, in float64; NaN for draws at which the model raises.

    Attributes:
        log_likelihood: Log density of observed sites and of all sites that depend on an enumerated one, ``(S, N)``.
        log_priors: Latent site -> its log density given the sites before it, ``(S, N)``; without sites whose prior
            depends on an enumerated site.
    """

    log_likelihood: Tensor
    log_priors: dict[str, Tensor]

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), ``(S, N)``."""
        return self.log_likelihood + sum(self.log_priors.values())


def concatenate(scores: Sequence[Score]) -> Score:
    """Concatenate scores along the draws, in order."""
    priors = {name: torch.cat([score.log_priors[name] for score in scores]) for name in scores[0].log_priors}
    return Score(torch.cat([score.log_likelihood for score in scores]), priors)


class ModelScorer:
    """Scores draws, in one run of the model where that works.

    Args:
        owner: Name of the caller, for error messages.
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: Structure of the model and the guide.
        probe: A few draws at which to compare ways of running the model: latent site -> ``(S, *site shape)``.

    Attributes:
        model: The model.
    """

    def __init__(
        self,
        owner: str,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        structure: Structure,
        probe: Values,
    ) -> None:
        self._structure = structure
        # The same mini-batch for all runs, or else their densities could not agree.
        call = Call(args, kwargs, structure.indices)
        self.model = BatchedModel(owner, model, call, probe, structure.nesting)

    @property
    def is_vectorized(self) -> bool:
        """Whether many draws take one run of the model."""
        return self.model.is_vectorized

    def __call__(self, values: Values, indices: Mapping[str, Any] | None = None) -> Score:
        """Score draws; differentiable.

        Args:
            values: Latent site -> ``(S, *site shape)``.
            indices: Plate -> indices of its mini-batch; other plates draw their own.

        Returns:
            The log densities; NaN for draws at which the model raises, minus infinity where its density is zero.
        """
        count = len(next(iter(values.values())))
        nodes = sample_nodes(self.model(values, self.model.call._replace(fixed=indices or {})))
        terms = {name: self._structure.per_draw(node["log_prob"], count) for name, node in nodes.items()}
        priors = {name: terms.pop(name) for name in values if name in terms}
        like = next(iter((*priors.values(), *terms.values())))
        likelihood = sum(terms.values(), torch.zeros_like(like))
        refused = (likelihood + sum(priors.values())).isnan()
        priors = {name: torch.where(refused, torch.nan, prior) for name, prior in priors.items()}
        return Score(torch.where(refused, torch.nan, likelihood), priors)
