# SPDX-License-Identifier: Apache-2.0
"""L8. Draws of a guide as ArviZ data, for its summaries, plots and model comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import identity_transform

from pyro_flows._checks import check_int
from pyro_flows.importance.psis import pareto_smooth
from pyro_flows.importance.weights import Draws, ImportanceSampler
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.layout import Layout
from pyro_flows.models.sites import Site
from pyro_flows.models.structure import Structure
from pyro_flows.models.traces import replay_trace, run_quietly

__all__ = ["to_inference_data"]

OWNER = "to_inference_data"
SAMPLE_DIMS = ("chain", "draw")
Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


@dataclass(frozen=True)
class ExportSettings:
    """Settings of runs of the model.

    Attributes:
        max_elements: Largest number of values in memory at once: draws in a run times the values of all sites.
    """

    max_elements: int = 2**22


def to_inference_data(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 2000,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
) -> Any:
    """Draws of a guide as ArviZ's ``InferenceData`` (0.x) or ``DataTree`` (1.x): ``az.summary(idata)`` and so on.

    The draws are independent and make one chain. A plate is a dimension of its own name, whose coordinates are the
    plate's indices; dimensions of events are named as ArviZ does, ``beta_dim_0``.

    =========================  ========================================================================================
    ``posterior``              latent and deterministic sites
    ``sample_stats``           ``lp``, log p(x, z), and ``log_q``, log q(z), a draw; ``log_weight``, their difference,
                               and ``khat``, its Pareto tail shape, both along the plate that every site is in, if any
    ``posterior_predictive``   new values of the observed sites
    ``log_likelihood``         of each observed value (an event is one), for ``az.loo`` and ``az.compare``; never scaled
    ``observed_data``          observed sites
    ``constant_data``          the model's other arguments that are tensors, by name
    =========================  ========================================================================================

    These are draws of the guide, not of the posterior: check ``khat`` first. Posterior means are weighted means::

        log_weight = idata["sample_stats"]["log_weight"]
        idata["posterior"]["mu"].weighted(np.exp(log_weight - log_weight.max())).mean()

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide that has a density.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws, >= 1.
        posterior_predictive: Whether to draw new data, which takes one more run of the model.
        log_likelihood: Whether to store the log likelihood of each observed value at each draw.
        coords: Dimension -> labels, one for each index.
        dims: Variable -> names of all its dimensions but chain and draw, in place of those from the plates.
        seed: Makes the draws reproducible; torch's global random state is not changed. None uses the global state.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` from ArviZ 1.0 on.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: If labels or names do not fit the model, the guide has a plate's items in another order than the
            model, or a number is out of range.
        NotImplementedError: If a plate is subsampled; if the guide has no density; if the model has enumerated sites
            and ``log_likelihood`` is asked for.

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
    try:
        import arviz
    except ImportError as error:
        raise ImportError(f'{OWNER}: expected ArviZ, but found none. Type: pip install "pyro-flows[arviz]"') from error
    check_int(OWNER, "num_samples", num_samples, 1)
    kwargs = dict(kwargs or {})
    with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.no_grad():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        sampler = ImportanceSampler(OWNER, model, guide, args, kwargs)
        structure = sampler.structure
        _check_structure(structure, log_likelihood=log_likelihood)
        chunks = list(sampler.chunks(num_samples, progress=False))
        values = {site.name: torch.cat([chunk.values[site.name] for chunk in chunks]) for site in structure.latents}
        runs = _Runs(sampler.score.model, structure)
        deterministic, likelihood = runs.on_data(values)
        predictive = runs.new_data(values) if posterior_predictive else {}
    observed = runs.observed
    constants = {
        name: value
        for name, value in _tensor_arguments(model, args, kwargs).items()
        if name not in runs.sites.names and not any(_same(value, other) for other in observed.values())
    }
    names = {site.name: _dims(site) for site in runs.sites}
    names |= {name: _generic(name, value.dim()) for name, value in constants.items()}
    names |= _checked_dims(dims or {}, names)
    groups: dict[str, Variables] = {
        "posterior": _draws({**values, **deterministic}, names),
        "sample_stats": _sample_stats(chunks, structure),
        "posterior_predictive": _draws(predictive, names),
        "log_likelihood": _draws(likelihood if log_likelihood else {}, names),
        "observed_data": {name: (names[name], _numpy(value)) for name, value in observed.items()},
        "constant_data": {name: (names[name], _numpy(value)) for name, value in constants.items()},
    }
    return _assemble(arviz, groups, runs.indices, coords or {})


def _read_sites(nodes: Mapping[str, Mapping[str, Any]]) -> Layout:
    """All sites of a run, including those without unconstrained values, with their original values."""
    sites = []
    for node in nodes.values():
        is_deterministic = _is_deterministic(node)
        value = node["value"] if is_deterministic else node["value"].expand(node["fn"].shape())
        site = Site.read({**node, "value": value}, identity_transform)
        if is_deterministic and site.event_dim == value.dim():  # Pyro's default, which ignores plates
            site = replace(site, event_dim=0)
        sites.append(site)
    return Layout(sites)


def _is_deterministic(node: Mapping[str, Any]) -> bool:
    return bool(node["infer"].get("_deterministic"))


def _dims(site: Site) -> tuple[str, ...]:
    """Names of a site's dimensions: those of plates, and ArviZ's own for all others."""
    dims = list(_generic(site.name, len(site.shape)))
    for frame in site.frames:
        axis = site.batch_rank + frame.dim
        if axis >= 0 and site.shape[axis] == frame.size and frame.name not in SAMPLE_DIMS:
            dims[axis] = frame.name
    return tuple(dims)


class _Runs:
    """Runs the model at given values of its latents, for all groups other than log densities.

    Args:
        model: The model.
        structure: Structure of the model.
        settings: How draws are split into runs.

    Attributes:
        sites: All sites of the model, from one run.
        observed: Site -> data.
        indices: Plate -> indices of its items in the model.
    """

    def __init__(self, model: BatchedModel, structure: Structure, settings: ExportSettings = ExportSettings()) -> None:
        self._model = model
        self.sites = _read_sites(model.nodes)
        # As deterministic sites do; and pyro.factor, which has no value.
        observing = [n for n, node in model.nodes.items() if node["is_observed"] and node["value"].numel()]
        self._deterministic = [name for name in observing if _is_deterministic(model.nodes[name])]
        self.observed = {n: self.sites[n].init_loc for n in observing if n not in self._deterministic}
        drawn = replay_trace({name: node["value"] for name, node in model.nodes.items() if not node["is_observed"]})
        trace = run_quietly(model.model, model.call, drawn)
        self.indices = {n: _numpy(node["value"]) for n, node in trace.nodes.items() if site_is_subsample(node)}
        for plate, index in self.indices.items():
            if not np.array_equal(index, _numpy(structure.indices[plate])):
                raise ValueError(
                    f"{OWNER}: expected one order of the items of plate '{plate}', but the model has {index} and the "
                    f"guide {_numpy(structure.indices[plate])}. Give the guide the model's plate: create_plates=..."
                )
        self._chunk = max(1, settings.max_elements // sum(max(site.shape.numel(), 1) for site in self.sites))

    def on_data(self, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Deterministic sites, ``(S, *site shape)``, and log likelihoods of observed ones, ``(S, *batch shape)``."""
        deterministic = {name: self.sites[name].shape for name in self._deterministic}
        likelihood = {name: self.sites[name].shape[: self.sites[name].batch_rank] for name in self.observed}

        def pick(trace: Trace) -> dict[str, Tensor]:
            trace.compute_log_prob(lambda name, node: name in likelihood)
            found = {name: trace.nodes[name]["unscaled_log_prob"] for name in likelihood}
            return found | {name: trace.nodes[name]["value"] for name in deterministic}

        found = self._read(values, pick, {**deterministic, **likelihood})
        return {name: found[name] for name in deterministic}, {name: found[name] for name in likelihood}

    def new_data(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws of the observed sites given those of the latents, ``(S, *site shape)``."""
        shapes = {name: value.shape for name, value in self.observed.items()}
        model = poutine.uncondition(self._model.model)
        return self._read(values, lambda trace: {name: trace.nodes[name]["value"] for name in shapes}, shapes, model)

    def _read(
        self,
        values: dict[str, Tensor],
        pick: Callable[[Trace], dict[str, Tensor]],
        shapes: Mapping[str, torch.Size],
        model: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        chunks = zip(*(value.split(self._chunk) for value in values.values()), strict=True)
        call = self._model.call._replace(fixed={})
        parts = [self._model.read(dict(zip(values, chunk, strict=True)), pick, shapes, call, model) for chunk in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in shapes}


def _check_structure(structure: Structure, *, log_likelihood: bool) -> None:
    for plate in structure.subsampled:
        raise NotImplementedError(
            f"{OWNER}: expected the model to run on its full plates, but plate '{plate}' is subsampled, so that "
            "each draw would be of other items. Pass arguments, or a model and a guide, that take all items, such as "
            "subsample_size=None."
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


def _generic(name: str, rank: int) -> tuple[str, ...]:
    """Names of dimensions as ArviZ makes them."""
    return tuple(f"{name}_dim_{axis}" for axis in range(rank))


def _checked_dims(
    dims: Mapping[str, Sequence[str]], names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    for name, given_dims in dims.items():
        if name not in names:
            raise ValueError(f"{OWNER}: expected dims of {', '.join(map(repr, names))}, but got {name!r}.")
        if isinstance(given_dims, str) or len(given_dims) != len(names[name]):
            raise ValueError(
                f"{OWNER}: expected dims[{name!r}] to be a list of {len(names[name])} names, in place of "
                f"{list(names[name])}, but got {given_dims!r}."
            )
    return {name: tuple(given_dims) for name, given_dims in dims.items()}


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _draws(values: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> Variables:
    """Variables of ``(S, *shape)``, where the shape is that of the site or of its batch, as one chain."""
    return {
        name: (SAMPLE_DIMS + names[name][: value.dim() - 1], _numpy(value.unsqueeze(0)))
        for name, value in values.items()
    }


def _sample_stats(chunks: Sequence[Draws], structure: Structure) -> Variables:
    log_weights = torch.cat([chunk.log_weights for chunk in chunks])  # (S, N)
    log_q = torch.cat([chunk.log_guide for chunk in chunks]).sum(-1)
    log_p = torch.cat([chunk.log_joint for chunk in chunks]).sum(-1)
    khats = torch.tensor([pareto_smooth(column).khat for column in log_weights.unbind(-1)], dtype=torch.double)
    plate = () if structure.items is None else (structure.items.name,)
    if not plate:
        log_weights, khats = log_weights.squeeze(-1), khats.squeeze(-1)
    dims = {"lp": SAMPLE_DIMS, "log_q": SAMPLE_DIMS, "log_weight": SAMPLE_DIMS + plate, "khat": SAMPLE_DIMS[:1] + plate}
    values = {"lp": log_p, "log_q": log_q, "log_weight": log_weights, "khat": khats}
    return {name: (dims[name], _numpy(value.unsqueeze(0))) for name, value in values.items()}


def _assemble(
    arviz: ModuleType,
    groups: Mapping[str, Variables],
    indices: Mapping[str, np.ndarray],
    coords: Mapping[str, Sequence[Any]],
) -> Any:
    """The container of the installed version of ArviZ."""
    import xarray

    sizes = {
        dim: size
        for variables in groups.values()
        for dims, array in variables.values()
        for dim, size in zip(dims, array.shape, strict=True)
    }
    for dim, labels in coords.items():
        if dim not in sizes or len(labels) != sizes[dim]:
            expected = f"{sizes[dim]} labels" if dim in sizes else f"labels of {', '.join(map(repr, sizes))}"
            raise ValueError(f"{OWNER}: expected coords[{dim!r}] to be {expected}, but got {len(labels)} labels.")
    index: dict[str, Any] = {dim: np.arange(size) for dim, size in sizes.items()} | {**indices, **coords}
    datasets = {}
    for group, variables in groups.items():
        if variables:
            own = {dim: index[dim] for dims, _ in variables.values() for dim in dims}
            attrs = {"inference_library": "pyro_flows"}
            datasets[group] = xarray.Dataset(variables, coords=own, attrs=attrs)
    if int(arviz.__version__.split(".")[0]) >= 1:
        return xarray.DataTree.from_dict(datasets)
    return arviz.InferenceData(**datasets)
