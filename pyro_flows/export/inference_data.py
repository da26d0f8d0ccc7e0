# SPDX-License-Identifier: Apache-2.0
"""L8. Draws of a guide as ArviZ data, for its summaries, plots and model comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows._checks import check_bool, check_call, check_mapping, checked, integer, optional, shown
from pyro_flows._random import seeded
from pyro_flows._threads import one_at_a_time
from pyro_flows.export.containers import Groups, Variables, container, to_container
from pyro_flows.export.runs import OWNER, SAMPLE_DIMS, ModelRuns, dims_of, generic_dims, read_sites, to_numpy
from pyro_flows.importance.psis import pareto_smooth
from pyro_flows.importance.weights import Draws, ImportanceSampler
from pyro_flows.models.full_plates import on_full_plates
from pyro_flows.models.sites import Site
from pyro_flows.models.structure import Structure
from pyro_flows.models.traces import Call
from pyro_flows.prediction import draw_predictions, prior_predictive

__all__ = ["to_inference_data"]

Names = dict[str, tuple[str, ...]]


def _check_predictions(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tuple of arguments, or a dictionary of them."""
    is_named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not isinstance(value, tuple) and not is_named:
        raise TypeError(
            f"{owner}: expected {name} to be a tuple of the model's arguments, or a dictionary of them by name, but "
            f"got {shown(value)}. Write {name}=(x,)."
        )


@checked(
    num_samples=integer(1),
    num_chains=integer(1),
    num_prior_samples=integer(0),
    posterior_predictive=check_bool,
    log_likelihood=check_bool,
    log_prior=check_bool,
    predictions=optional(_check_predictions),
    coords=optional(check_mapping),
    dims=optional(check_mapping),
)
def to_inference_data(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 2000,
    num_chains: int = 1,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    log_prior: bool = True,
    num_prior_samples: int = 0,
    predictions: tuple[Any, ...] | Mapping[str, Any] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
) -> Any:
    """Draws of a guide as ArviZ's ``InferenceData`` (0.x) or ``DataTree`` (1.x): ``az.summary(idata)`` and so on.

    Needs ArviZ, or arviz-base alone, which arviz-stats and arviz-plots work with. The draws are independent; they make
    one chain, or as many as a function that compares chains needs. A plate is a dimension of its own name, whose
    coordinates are the plate's indices; dimensions of events are named as ArviZ does, ``beta_dim_0``. Plates that draw
    their own mini-batches have all items here.

    =============================  ====================================================================================
    ``posterior``                  latent and deterministic sites
    ``sample_stats``               ``lp``, log p(x, z), and ``log_q``, log q(z), a draw; ``log_weight``, their
                                   difference, and ``khat``, its Pareto tail shape, both along the plate that every site
                                   is in, if any
    ``posterior_predictive``       new values of the observed sites
    ``log_likelihood``             of each observed value (an event is one), for ``az.loo`` and ``az.compare``; never
                                   scaled
    ``log_prior``                  of each latent given those before it, for sensitivity to the prior; never scaled
    ``observed_data``              observed sites
    ``constant_data``              the model's other arguments that are tensors, by name
    ``prior``                      latent and deterministic sites, if ``num_prior_samples`` is positive
    ``prior_predictive``           new values of the observed sites given those
    ``predictions``                sites drawn for the arguments in ``predictions``, by :func:`~pyro_flows.predict`
    ``predictions_constant_data``  these arguments, as far as they are tensors
    =============================  ====================================================================================

    These are draws of the guide, not of the posterior: check ``khat`` first. Posterior means are weighted means::

        log_weight = idata["sample_stats"]["log_weight"]
        idata["posterior"]["mu"].weighted(np.exp(log_weight - log_weight.max())).mean()

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide that has a density.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws of all chains, >= 1.
        num_chains: Number of chains that the draws are split into, a divisor of ``num_samples``, >= 1.
        posterior_predictive: Whether to draw new data, which takes one more run of the model.
        log_likelihood: Whether to store the log likelihood of each observed value at each draw.
        log_prior: Whether to store the log prior of each latent at each draw; never with enumerated sites.
        num_prior_samples: Number of draws of the prior, in one chain, >= 0.
        predictions: The model's arguments for new data, without what is to be predicted: a tuple, or a dictionary of
            keyword arguments. None leaves predictions out.
        coords: Dimension -> labels, one for each index; in all groups where it has that length.
        dims: Variable -> names of all its dimensions but chain and draw, in place of those from the plates.
        seed: Makes the draws reproducible; torch's global random state is not changed. None uses the global state.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` from ArviZ 1.0 on.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: If labels or names do not fit the model, the guide has a plate's items in another order than the
            model, or a number is out of range.
        NotImplementedError: If the arguments choose some items of a plate; if the guide has no density; if the model
            has enumerated sites and ``log_likelihood`` is asked for.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_flows import AutoFlowGuide
        >>> from pyro_flows.export import to_inference_data
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("schools", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 10.0), obs=y)
        >>> y = torch.tensor([28.0, 8.0, -3.0])
        >>> guide = AutoFlowGuide(model).setup(y)
        >>> idata = to_inference_data(model, guide, (y,), coords={"schools": ["A", "B", "C"]})  # doctest: +SKIP
        >>> dict(idata.posterior_predictive.sizes)  # doctest: +SKIP
        {'chain': 1, 'draw': 2000, 'schools': 3}
    """
    make = container(OWNER)
    if num_samples % num_chains:
        raise ValueError(
            f"{OWNER}: expected chains of one length, but {num_samples} draws do not split into {num_chains}. Take "
            f"num_samples={num_samples // num_chains * num_chains or num_chains}."
        )
    kwargs = dict(kwargs or {})
    for name, program in (("model", model), ("guide", guide)):
        check_call(OWNER, name, program, args, kwargs)
    with one_at_a_time(OWNER), seeded(seed), torch.no_grad():
        sampler = ImportanceSampler(OWNER, on_full_plates(model), on_full_plates(guide), args, kwargs)
        structure = sampler.structure
        _check_structure(structure, log_likelihood=log_likelihood)
        _check_plates(read_sites(sampler.score.model.nodes))
        chunks = list(sampler.chunks(num_samples, progress=False))
        values = {site.name: torch.cat([chunk.values[site.name] for chunk in chunks]) for site in structure.latents}
        runs = ModelRuns(sampler.score.model, structure)
        on_data = runs.on_data(values, log_prior=log_prior and not structure.enumerates, log_likelihood=log_likelihood)
        predictive = runs.new_data(values) if posterior_predictive else {}
        prior = {}
        if num_prior_samples:
            wanted = [*values, *on_data.deterministic, *runs.observed]
            prior = prior_predictive(model, args, kwargs, num_samples=num_prior_samples, sites=wanted, progress=False)
        new = None if predictions is None else _predictions(model, guide, predictions, num_samples)
    observed = runs.observed
    constants = {
        name: value
        for name, value in _tensor_arguments(model, args, kwargs).items()
        if name not in runs.sites.names and not any(_same(value, other) for other in observed.values())
    }
    names = {site.name: dims_of(site) for site in runs.sites}
    names |= {name: generic_dims(name, value.dim()) for name, value in constants.items()}
    names |= _checked_dims(dims or {}, names)
    groups: dict[str, Variables] = {
        "posterior": _draws({**values, **on_data.deterministic}, names, num_chains),
        "sample_stats": _sample_stats(chunks, structure, num_chains),
        "posterior_predictive": _draws(predictive, names, num_chains),
        "log_likelihood": _draws(on_data.log_likelihood, names, num_chains),
        "log_prior": _draws(on_data.log_prior, names, num_chains),
        "observed_data": {name: (names[name], to_numpy(value)) for name, value in observed.items()},
        "constant_data": {name: (names[name], to_numpy(value)) for name, value in constants.items()},
        "prior": _draws({name: value for name, value in prior.items() if name not in observed}, names, 1),
        "prior_predictive": _draws({name: value for name, value in prior.items() if name in observed}, names, 1),
    }
    if new is not None:
        groups |= _prediction_groups(*new, names, num_chains)
    return to_container(OWNER, make, groups, runs.indices, coords or {})


def _predictions(
    model: Callable[..., Any], guide: Callable[..., Any], given: tuple[Any, ...] | Mapping[str, Any], num_samples: int
) -> tuple[dict[str, Tensor], Names, dict[str, Tensor]]:
    """Predictions, the dimensions of all sites, and the arguments that are tensors."""
    call = Call((), dict(given)) if isinstance(given, Mapping) else Call(given, {})
    drawn, nodes = draw_predictions(OWNER, model, guide, call, num_samples)
    names = {site.name: dims_of(site) for site in read_sites(nodes)}
    return drawn, names, _tensor_arguments(model, call.args, call.kwargs)


def _prediction_groups(
    drawn: dict[str, Tensor], own: Names, constants: dict[str, Tensor], names: Names, num_chains: int
) -> Groups:
    """Groups of predictions; dimensions are named as in the other groups, where a site or an argument is in them."""
    named = {name: names.get(name, dims) for name, dims in own.items()}
    data = {}
    for name, value in constants.items():
        if name not in own:
            dims = names.get(name, ())
            data[name] = dims if len(dims) == value.dim() else generic_dims(name, value.dim()), to_numpy(value)
    return {"predictions": _draws(drawn, named, num_chains), "predictions_constant_data": data}


def _check_structure(structure: Structure, *, log_likelihood: bool) -> None:
    for plate in structure.subsampled:
        raise NotImplementedError(
            f"{OWNER}: expected the model to run on its full plates, but the arguments choose some items of plate "
            f"'{plate}'. Pass arguments that have all items."
        )
    if structure.enumerates and log_likelihood:
        raise NotImplementedError(
            f"{OWNER}: expected a model without enumerated sites, whose values the log likelihood of an item is summed "
            "over. Write log_likelihood=False for all other groups."
        )


def _tensor_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's arguments that are tensors, by name."""
    try:
        bound = inspect.signature(model).bind(*args, **kwargs).arguments
    except ValueError:  # no signature, as of some built-in callables
        return {}
    return {name: value for name, value in bound.items() if isinstance(value, Tensor)}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _checked_dims(
    dims: Mapping[str, Sequence[str]], names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    for name, given_dims in dims.items():
        if name not in names:
            raise ValueError(f"{OWNER}: expected dims of {', '.join(map(repr, names))}, but got {name!r}.")
        if not isinstance(given_dims, (list, tuple)) or len(given_dims) != len(names[name]):
            raise ValueError(
                f"{OWNER}: expected dims[{name!r}] to be a list of {len(names[name])} names, in place of "
                f"{list(names[name])}, but got {shown(given_dims)}."
            )
    return {name: tuple(given_dims) for name, given_dims in dims.items()}


def _check_plates(sites: Iterable[Site]) -> None:
    for frame in (frame for site in sites for frame in site.frames):
        if frame.name in SAMPLE_DIMS:
            raise ValueError(
                f"{OWNER}: expected plates with names of their own, but got plate '{frame.name}', a dimension of all "
                "draws in ArviZ. Give it another name in the model."
            )


def _draws(values: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], num_chains: int) -> Variables:
    """Variables of ``(S, *shape)``, where the shape is that of the site or of its batch, split into chains."""
    return {
        name: (SAMPLE_DIMS + names[name][: value.dim() - 1], to_numpy(_chains(value, num_chains)))
        for name, value in values.items()
    }


def _chains(value: Tensor, num_chains: int) -> Tensor:
    return value.reshape(num_chains, -1, *value.shape[1:])


def _sample_stats(chunks: Sequence[Draws], structure: Structure, num_chains: int) -> Variables:
    log_weights = torch.cat([chunk.log_weights for chunk in chunks])  # (S, N)
    log_q = torch.cat([chunk.log_guide for chunk in chunks]).sum(-1)
    log_p = torch.cat([chunk.log_joint for chunk in chunks]).sum(-1)
    khats = log_q.new_tensor([pareto_smooth(column).khat for column in log_weights.unbind(-1)], dtype=torch.double)
    plate = () if structure.items is None else (structure.items.name,)
    if not plate:
        log_weights, khats = log_weights.squeeze(-1), khats.squeeze(-1)
    dims = {"lp": SAMPLE_DIMS, "log_q": SAMPLE_DIMS, "log_weight": SAMPLE_DIMS + plate}
    values = {"lp": log_p, "log_q": log_q, "log_weight": log_weights}
    stats: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (dims[name], to_numpy(_chains(value, num_chains))) for name, value in values.items()
    }
    stats["khat"] = SAMPLE_DIMS[:1] + plate, to_numpy(khats.expand(num_chains, *khats.shape))
    return stats
