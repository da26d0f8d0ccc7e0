# SPDX-License-Identifier: Apache-2.0
"""L8. Runs of a model at draws of a guide, for all that ArviZ keeps but densities of whole draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import identity_transform

from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.layout import Layout
from pyro_flows.models.predictor import DrawData, data_of
from pyro_flows.models.sites import Site
from pyro_flows.models.structure import Structure
from pyro_flows.models.traces import replay_trace, run_quietly

__all__ = ["OWNER", "SAMPLE_DIMS", "ModelRuns", "OnData", "dims_of", "generic_dims", "read_sites", "to_numpy"]

OWNER = "to_inference_data"
SAMPLE_DIMS = ("chain", "draw")


@dataclass(frozen=True)
class ExportSettings:
    """Settings of runs of the model.

    Attributes:
        max_elements: Largest number of values in memory at once: draws in a run times the values of all sites.
        num_probes: Number of draws by which ways to run the model are compared.
    """

    max_elements: int = 2**22
    num_probes: int = 3


def read_sites(nodes: Mapping[str, Mapping[str, Any]]) -> Layout:
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


def dims_of(site: Site) -> tuple[str, ...]:
    """Names of a site's dimensions: those of plates, and ArviZ's own for all others."""
    dims = list(generic_dims(site.name, len(site.shape)))
    for frame in site.frames:
        axis = site.batch_rank + frame.dim
        if axis >= 0 and site.shape[axis] == frame.size:
            dims[axis] = frame.name
    return tuple(dims)


class OnData(NamedTuple):
    """What the data and the latents determine.

    Attributes:
        deterministic: Deterministic site -> its values, ``(S, *site shape)``.
        log_prior: Latent site -> log densities given the sites before it, never scaled, ``(S, *batch shape)``.
        log_likelihood: Observed site -> log densities, never scaled, ``(S, *batch shape)``.
    """

    deterministic: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]


class ModelRuns:
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
        self._model, self._settings = model, settings
        self.sites = read_sites(model.nodes)
        self._deterministic = [name for name, node in model.nodes.items() if _is_deterministic(node)]
        self.observed = {name: self.sites[name].init_loc for name in data_of(model.nodes)}
        drawn = replay_trace({name: node["value"] for name, node in model.nodes.items() if not node["is_observed"]})
        trace = run_quietly(model.model, model.call, drawn)
        self.indices = {n: to_numpy(node["value"]) for n, node in trace.nodes.items() if site_is_subsample(node)}
        for plate, index in self.indices.items():
            if not np.array_equal(index, to_numpy(structure.indices[plate])):
                raise ValueError(
                    f"{OWNER}: expected one order of the items of plate '{plate}', but the model has {index} and the "
                    f"guide {to_numpy(structure.indices[plate])}. Give the guide the model's plate: create_plates=..."
                )
        self._chunk = max(1, settings.max_elements // sum(max(site.shape.numel(), 1) for site in self.sites))

    def on_data(self, values: dict[str, Tensor], *, log_prior: bool = True, log_likelihood: bool = True) -> OnData:
        """What the data and the latents determine, at ``(S, *site shape)`` values of the latents.

        Args:
            values: Values of the latents.
            log_prior: Whether to compute log densities of the latents.
            log_likelihood: Whether to compute those of the data.
        """
        scored = [*(values if log_prior else ()), *(self.observed if log_likelihood else ())]
        deterministic = {name: self.sites[name].shape for name in self._deterministic}
        densities = {name: self.sites[name].shape[: self.sites[name].batch_rank] for name in scored}

        def pick(trace: Trace) -> dict[str, Tensor]:
            trace.compute_log_prob(lambda name, node: name in densities)
            found = {name: trace.nodes[name]["unscaled_log_prob"] for name in densities}
            return found | {name: trace.nodes[name]["value"] for name in deterministic}

        if deterministic and not self._model.enumerated:
            few = {name: value[: self._settings.num_probes] for name, value in values.items()}
            self._model.verify(few, pick, deterministic)
        found = self._read(values, pick, {**deterministic, **densities})
        priors = {name: found[name] for name in values if name in densities}
        likelihoods = {name: found[name] for name in self.observed if name in densities}
        return OnData({name: found[name] for name in deterministic}, priors, likelihoods)

    def new_data(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws of the observed sites given those of the latents, ``(S, *site shape)``."""
        shapes = {name: value.shape for name, value in self.observed.items()}
        model = DrawData(shapes)(self._model.model)
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


def generic_dims(name: str, rank: int) -> tuple[str, ...]:
    """Names of dimensions as ArviZ makes them."""
    return tuple(f"{name}_dim_{axis}" for axis in range(rank))


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array on the CPU."""
    return value.detach().cpu().numpy()
