# SPDX-License-Identifier: Apache-2.0
"""L8. Predictions of a trained guide, and of the prior: draws of a model's sites for new arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import check_call, check_mapping, check_path, check_type, checked, integer, optional
from pyro_flows._random import seeded
from pyro_flows._storage import Storage
from pyro_flows._threads import one_at_a_time
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.models.alignment import Items, Trained
from pyro_flows.models.draws import GuideSampler
from pyro_flows.models.full_plates import on_full_plates
from pyro_flows.models.predictor import PredictionSettings, Predictor, check_names
from pyro_flows.models.traces import Call, run_quietly, sample_nodes

__all__ = ["draw_predictions", "predict", "prior_predictive"]

Values = dict[str, Tensor]

REMEDY = "Let what is to be drawn be optional: `def model(x, y=None)`, with `obs=y`; a guide takes the same."

_check_options = checked(
    num_samples=integer(1),
    sites=optional(check_names),
    items=optional(check_mapping),
    path=optional(partial(check_path, of="folder")),
    settings=optional(partial(check_type, kind=PredictionSettings)),
)


@_check_options
def predict(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    sites: Iterable[str] | None = None,
    items: Items | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int | None = None,
    settings: PredictionSettings | None = None,
) -> dict[str, Tensor]:
    """Posterior predictive draws for new arguments of the model: new rows, new groups, new data of an encoder.

    Each draw of the guide gets one run of the model, in which sites that the guide does not draw are drawn by the
    model. What is to be predicted must not be passed: the model takes ``y=None`` and passes ``obs=y``. Many draws
    share a run, even if the model was not written for that; a progress bar shows the rest.

    **Groups.** The latents of a plate are those of the training items where the plate has its size of the training;
    where it has another one, all its items are new, and their latents are drawn from the prior given the globals. To
    say it yourself, pass ``items``: ``items={"schools": "new"}``, or for each item the index of the training item that
    it is, ``items={"schools": [0, 1, 2, -1]}``, with -1 for a new one. In an amortized plate, the guide's encoder is
    run on the new arguments.

    **Subsampled plates** that draw their own mini-batches have all items here.

    **Enumerated sites** of new items are drawn from their prior given the other latents.

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide, trained; it need not have a density.
        args: The model's arguments, without what is to be predicted. Guides that depend on arguments, such as
            amortized ones, get them too.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws S, >= 1.
        sites: Names of sites to return, latent sites included, whose draws belong to the others'. Data sites that are
            named are drawn even if data are passed, which then give no more than their shape. None takes all sites that
            the guide does not draw, and deterministic sites.
        items: Plate -> which training items its items are.
        path: A folder for one ``.npy`` file a site, written draw by draw, for results that do not fit in memory. None
            keeps them in memory.
        progress: Whether to show a progress bar, if it takes more than a second.
        seed: Makes the result reproducible; torch's global random state is not changed. None uses the global state.
        settings: Sizes of runs and of results; None takes :class:`PredictionSettings`.

    Returns:
        Site -> ``(num_samples, *site shape)``, on the CPU; with a ``path``, tensors that read from its files.

    Raises:
        RuntimeError: If the guide has not seen any data yet.
        TypeError: If an argument is of another type, or the model or the guide does not take the arguments.
        ValueError: If a number is out of range, or there can be no folder at ``path``; if data are passed, and
            ``sites`` does not name what to draw; if a name is unknown; if the guide is for another model, or a shape
            differs elsewhere than along a plate; if ``items`` does not fit.
        MemoryError: If the result is larger than ``settings.max_bytes``, and there is no ``path``.
        NotImplementedError: If an enumerated site depends on the training data.
        Exception: Any exception of the model.

    Warns:
        UserWarning: If a plate has another size than in training, and ``items`` does not name it.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_flows import AutoFlowGuide, fit, predict
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
        >>> x = torch.arange(10.0)
        >>> guide = AutoFlowGuide(model)
        >>> result = fit(model, guide, (x, 2.0 * x), num_steps=50, seed=0, progress=False)
        >>> y = predict(model, guide, (torch.tensor([20.0, 30.0]),), seed=0)["y"]
        >>> y.shape, [round(float(mean)) for mean in y.mean(0)]
        (torch.Size([1000, 2]), [40, 60])
    """
    call = Call(args, dict(kwargs or {}))
    with one_at_a_time("predict"), seeded(seed):
        return draw_predictions(
            "predict",
            model,
            guide,
            call,
            num_samples,
            sites,
            items=items,
            path=path,
            progress=progress,
            settings=settings,
        )[0]


@torch.no_grad()
def draw_predictions(
    owner: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    call: Call,
    num_samples: int,
    sites: Iterable[str] | None = None,
    *,
    items: Items | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    settings: PredictionSettings | None = None,
) -> tuple[dict[str, Tensor], Mapping[str, Mapping[str, Any]]]:
    """What :func:`predict` returns, and the model's sample sites in a run."""
    settings = settings or PredictionSettings()
    for name, program in (("model", model), ("guide", guide)):
        check_call(owner, name, program, call.args, call.kwargs, REMEDY)
    model = on_full_plates(model)
    draw, trained, elements = guide_draws(owner, guide, call)
    probe = draw(settings.num_probes)
    predictor = Predictor(owner, model, call, probe, trained, sites, settings, items=items)
    storage = Storage(owner, predictor.like, num_samples, path, settings.max_bytes)
    step = min(predictor.chunk, max(1, settings.max_elements // elements))
    with tqdm(total=num_samples, desc="predictions", disable=not progress, delay=1.0) as bar:
        for start in range(0, num_samples, step):
            count = min(step, num_samples - start)
            storage.write(start, predictor(draw(count)))
            bar.update(count)
    return storage.finish(), predictor.nodes


@_check_options
def prior_predictive(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    sites: Iterable[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int | None = None,
    settings: PredictionSettings | None = None,
) -> dict[str, Tensor]:
    """Draws of all sites of a model from its prior, data included: what the model expects before it sees any.

    Args:
        model: Any Pyro model.
        args: The model's arguments, without the data: the model takes ``y=None`` and passes ``obs=y``.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws S, >= 1.
        sites: Names of sites to return; data sites that are named are drawn even if data are passed. None takes all.
        path: As in :func:`predict`.
        progress: As in :func:`predict`.
        seed: As in :func:`predict`.
        settings: As in :func:`predict`.

    Returns:
        Site -> ``(num_samples, *site shape)``, latent, deterministic and data sites.

    Raises:
        TypeError: As :func:`predict`.
        ValueError: If a number is out of range, or there can be no folder at ``path``; if data are passed, and
            ``sites`` does not name what to draw; if a name is unknown; if there are no latent sites.
        MemoryError: As :func:`predict`.
        NotImplementedError: If a prior cannot be drawn from.
        Exception: Any exception of the model.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_flows import prior_predictive
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
        >>> prior = prior_predictive(model, (torch.arange(3.0),), num_samples=200)
        >>> {site: tuple(draws.shape) for site, draws in prior.items()}
        {'slope': (200,), 'y': (200, 3)}
    """
    settings = settings or PredictionSettings()
    call = Call(args, dict(kwargs or {}))
    check_call("prior_predictive", "model", model, call.args, call.kwargs, REMEDY)
    model = on_full_plates(model)
    isolated = seeded(seed)
    with one_at_a_time("prior_predictive"), torch.no_grad(), isolated:
        nodes = sample_nodes(run_quietly(model, call)).values()
        root = next((node for node in nodes if not node["is_observed"] and node["value"].numel()), None)
        if root is None:
            raise ValueError(
                "prior_predictive: expected a model with latent sites, but it has none. Call the model itself, "
                "which draws all that there is."
            )

        def draw(count: int) -> Values:  # the first site depends on no other
            return {root["name"]: root["fn"].sample((count,))}

        trained = Trained({}, {})
        predictor = Predictor(
            "prior_predictive", model, call, draw(settings.num_probes), trained, sites, settings, everything=True
        )
        storage = Storage("prior_predictive", predictor.like, num_samples, path, settings.max_bytes)
        with tqdm(total=num_samples, desc="prior draws", disable=not progress, delay=1.0) as bar:
            for start in range(0, num_samples, predictor.chunk):
                count = min(predictor.chunk, num_samples - start)
                storage.write(start, predictor(draw(count)))
                bar.update(count)
    return storage.finish()


def guide_draws(owner: str, guide: Callable[..., Any], call: Call) -> tuple[Callable[[int], Values], Trained, int]:
    """A function from a number S to ``(S, *site shape)`` draws of a guide, the items that it draws, and the number of
    values of a draw.

    Raises:
        RuntimeError: If the guide has not seen any data yet.
    """
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise RuntimeError(
            f"{owner}: expected a trained guide, but it has not seen any data yet. Train it, `fit(model, guide, args)`;"
            " or, to load its state, call `guide.setup(*args)` with the training data first."
        )
    if isinstance(guide, AutoFlowGuide) and not len(guide.posterior.encoders):
        one = guide.sample_posterior(1)
        return guide.sample_posterior, Trained({}, {}), sum(value.numel() for value in one.values())
    sampler = GuideSampler(on_full_plates(guide), call)
    return sampler, Trained(sampler.indices, sampler.full_sizes), max(1, sampler.elements)
