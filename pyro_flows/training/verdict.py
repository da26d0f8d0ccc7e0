# SPDX-License-Identifier: Apache-2.0
"""L7. A first verdict on a guide at the end of a run, from the importance weights of its draws, and moves of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_flows._checks import Settings, constant, integer
from pyro_flows._random import forked
from pyro_flows.diagnostics import Diagnosis
from pyro_flows.diagnostics.diagnose import weigh
from pyro_flows.diagnostics.division import Division
from pyro_flows.diagnostics.search import SearchResult
from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.models.traces import NO_DENSITY

__all__ = ["VerdictSettings", "first_verdict"]


@dataclass(frozen=True)
class VerdictSettings(Settings):
    """Cost of a first verdict.

    Attributes:
        num_draws: Number of draws, >= 100; 0 gives no verdict.
        min_draws: Number of draws below which k-hat would be noise.
        max_values: Largest number of draws times values of a draw.
    """

    num_draws: int = constant(2000, integer(0))
    min_draws: int = 500
    max_values: int = 2**24


def first_verdict(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: VerdictSettings,
) -> Diagnosis | None:
    """What :func:`~pyro_flows.diagnose` says without its search for lost modes; leaves the random state alone.

    Args:
        model: The model.
        guide: The guide, trained on all data.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        settings: Number of draws.

    Returns:
        The diagnosis; None if the guide has no density, draws cannot share a run of the model, a draw has too many
        values, or at Ctrl-C, since the guide is trained.
    """
    with forked():
        try:
            sampler = ImportanceSampler("fit", model, guide, args, kwargs)
        except (NotImplementedError, *NO_DENSITY):
            return None
        num_draws = min(settings.num_draws, settings.max_values // max(1, sampler.structure.elements))
        at_once = sampler.draws_at_once and sampler.score.is_vectorized
        if num_draws < max(settings.min_draws, 1) or not at_once or sampler.structure.subsampled:
            return None
        not_searched = SearchResult(None, "fit leaves that to diagnose")
        try:
            alone = Division("fit", distributed=False, num_samples=num_draws, seed=None)
            return weigh(sampler, guide, not_searched, alone, moves=True, progress=False)
        except KeyboardInterrupt:
            return None
