# SPDX-License-Identifier: Apache-2.0
"""L6. :func:`importance_resample`: approximate posterior draws from a guide that is close to the posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_flows._blame import user_level
from pyro_flows._checks import check_type, checked, integer, optional
from pyro_flows._random import seeded
from pyro_flows._threads import one_at_a_time
from pyro_flows.importance.psis import Smoothed, khat_threshold, nearly_constant, pareto_smooth
from pyro_flows.importance.weights import Draws, ImportanceSampler

__all__ = ["importance_resample"]


@dataclass(frozen=True)
class ResampleSettings:
    """Default number of draws of the guide, and the limit on the tail of their weights.

    Attributes:
        draws_per_sample: Draws of the guide per draw that is kept.
        min_draws: Smallest default number of draws of the guide.
        max_khat: Largest k-hat that is accepted; above 1 weights have no mean.
        max_bad_items: Share of items whose k-hat may be above that, since k-hat is noisy.
        min_usable: Smallest number of draws with a weight, of each item: a tail cannot be judged from fewer.
    """

    draws_per_sample: int = 10
    min_draws: int = 10_000
    max_khat: float = 1.0
    max_bad_items: float = 0.05
    min_usable: int = 50


@checked(
    num_samples=integer(1),
    num_draws=optional(integer(100)),
    settings=partial(check_type, kind=ResampleSettings),
)
def importance_resample(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    num_samples: int,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int | None = None,
    progress: bool = True,
    seed: int | None = None,
    settings: ResampleSettings = ResampleSettings(),
) -> dict[str, Tensor]:
    r"""Draw from the guide, and resample the draws by their Pareto-smoothed importance weights.

    Resampling is systematic: a draw of normalized weight w is taken ``num_samples * w`` times, rounded up or down, so
    that draws with large weights repeat. Where every site is in one plate, each item is resampled on its own. Mass
    where the guide does not draw cannot be brought back, nor seen from weights: :func:`~pyro_flows.diagnose` looks for
    it.

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide with a density, trained.
        num_samples: Number of draws to keep, >= 1.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        num_draws: Number of draws of the guide, all of which are held in memory, >= 100. None takes ten for each
            that is kept, and at least 10,000.
        progress: Whether to show a progress bar, if it takes more than a second.
        seed: As in :func:`diagnose`.
        settings: The default of ``num_draws``, and the limit on k-hat.

    Returns:
        Site name -> ``(num_samples, *site shape)``, in random order.

    Raises:
        RuntimeError: If k-hat is above 1: the weights have no mean, and no number of draws suffices. If the model has a
            finite density at fewer than 50 draws.
        NotImplementedError: If plates are subsampled, or as :func:`diagnose`.

    Warns:
        UserWarning: If k-hat is above the limit (0.7 for 2000 draws and more).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_flows import importance_resample
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = AutoNormal(model, init_scale=1.2)
        >>> {name: tuple(z.shape) for name, z in importance_resample(model, guide, 500, seed=0).items()}
        {'z': (500,)}
    """
    if num_draws is None:
        num_draws = max(settings.min_draws, settings.draws_per_sample * num_samples)
    with one_at_a_time("importance_resample"), seeded(seed):
        sampler = ImportanceSampler("importance_resample", model, guide, args, kwargs)
        if sampler.structure.subsampled:
            raise NotImplementedError(
                f"importance_resample: expected full plates, but '{sampler.structure.subsampled[0]}' is subsampled, "
                "which makes weights noisy. Pass a model of the full plate."
            )
        chunks = list(sampler.chunks(num_draws, progress=progress))
        log_weights = torch.cat([chunk.log_weights for chunk in chunks])
        _check_usable(log_weights, chunks, settings)
        smoothed = [pareto_smooth(column) for column in log_weights.unbind(1)]
        _check(log_weights.new_tensor([_khat(item) for item in smoothed]), num_draws, settings)
        picks = torch.stack([_systematic(item.log_weights.exp(), num_samples) for item in smoothed], -1)  # (S, N)
    result = {}
    for latent in sampler.structure.latents:
        values = torch.cat([chunk.values[latent.name] for chunk in chunks])
        axis = sampler.structure.item_axis(latent)
        if axis is None:
            result[latent.name] = values[picks[:, 0]]
        else:
            rows = values.movedim(1 + axis, 1)  # (num_draws, N, ...)
            chosen = rows[picks, torch.arange(rows.shape[1], device=rows.device)]
            result[latent.name] = chosen.movedim(1, 1 + axis)
    return result


def _khat(smoothed: Smoothed) -> float:
    """k-hat; 0 where the weights are nearly constant, so that it would only describe noise."""
    weights = smoothed.log_weights
    largest, ess = float(weights.max()) + math.log(len(weights)), float((-(2.0 * weights).logsumexp(0)).exp())
    return 0.0 if nearly_constant(largest, ess, len(weights)) else smoothed.khat


def _check_usable(log_weights: Tensor, chunks: Sequence[Draws], settings: ResampleSettings) -> None:
    """Refuse draws that have no weights, ``(S, N)``: a single draw would be repeated."""
    if log_weights.isposinf().any():
        raise RuntimeError(
            "importance_resample: expected finite log densities, but the model's is infinite, or the guide's minus "
            f"infinite, at {int(log_weights.isposinf().any(-1).sum())} of {len(log_weights)} draws. Look for a "
            "parameter that underflows, such as a scale of 0."
        )
    usable = int(log_weights.isfinite().sum(0).min())
    if usable < settings.min_usable:
        refused = sum(int(chunk.log_likelihood.isnan().any(-1).sum()) for chunk in chunks)
        raise RuntimeError(
            f"importance_resample: expected draws of the guide that the model gives a density, but only {usable} of "
            f"{len(log_weights)} have one ({refused} are refused: it raises, or its log density is NaN). Train the "
            "guide, `fit(model, guide, args)`, or look at the model at its draws: "
            "`pyro.condition(model, guide.median(*args))(*args)`."
        )


def _check(khat: Tensor, num_draws: int, settings: ResampleSettings) -> None:
    worst = khat.quantile(1.0 - settings.max_bad_items, interpolation="higher").item()
    if worst > settings.max_khat:
        raise RuntimeError(
            f"importance_resample: expected weights with a mean, but k-hat is {worst:.2f}, and a few draws carry all "
            "of the weight. Train longer, or use NUTS; `print(diagnose(model, guide, args))` says which."
        )
    if worst > khat_threshold(num_draws):
        warnings.warn(
            f"importance_resample: k-hat is {worst:.2f}, above {khat_threshold(num_draws):.2f}; the draws still lean "
            "toward the guide. See `diagnose(model, guide, args)` for what else to do.",
            UserWarning,
            stacklevel=user_level(),
        )


def _systematic(weights: Tensor, count: int) -> Tensor:
    """Indices of ``count`` draws by systematic resampling: one uniform number for all of them, for low variance."""
    shift = torch.rand((), device=weights.device)
    positions = (torch.arange(count, dtype=torch.double, device=weights.device) + shift) / count
    index = torch.searchsorted(weights.cumsum(0), positions).clamp_max(len(weights) - 1)
    return index[torch.randperm(count, device=index.device)]
