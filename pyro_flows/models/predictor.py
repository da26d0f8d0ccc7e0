# SPDX-License-Identifier: Apache-2.0
"""L2. A model's sites at draws of a guide: those that the guide does not draw, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flows._checks import Settings, shown
from pyro_flows.models.alignment import Items, Trained, align
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.enumeration import enumerated_sites
from pyro_flows.models.traces import Call, sample_nodes

__all__ = ["DrawData", "PredictionSettings", "Predictor", "check_names", "data_of"]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class PredictionSettings(Settings):
    """Sizes of runs and of results.

    Attributes:
        max_elements: Largest number of values in memory at once: draws in a run times the values of all sites.
        max_chunk: Largest number of draws in a run.
        num_probes: Number of draws by which ways to run the model are compared.
        max_bytes: Largest size of a result in memory, in bytes; larger ones need a ``path``.
    """

    max_elements: int = 2**22
    max_chunk: int = 1000
    num_probes: int = 3
    max_bytes: int = 2**32


def check_names(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a name, or names; an iterator is left alone, since a look would use it up."""
    if isinstance(value, (str, Iterator)):
        return
    is_list = isinstance(value, Collection) and not torch.is_tensor(value)
    if not is_list or not all(isinstance(site, str) for site in value):
        raise TypeError(f"{owner}: expected {name} to be a list of names, such as ['y'], but got {shown(value)}.")


class Predictor:
    """Runs a model at draws of a guide, for its sites that the guide does not draw.

    Args:
        owner: Name of the caller, for error messages.
        model: The model.
        call: Its arguments.
        probe: A few draws of the guide, site -> ``(S, *trained shape)``.
        trained: The items of these draws.
        sites: Names of sites to return, which are drawn even if they are observed; None takes all that the draws do not
            have, and deterministic ones.
        settings: Sizes of runs.
        items: Plate -> which training items its items are.
        everything: Whether to return the sites of the draws too, where ``sites`` is None.

    Attributes:
        nodes: The model's sample sites in a run.
        like: Site to return -> its value in a run.
        chunk: Number of draws in a run.
    """

    def __init__(
        self,
        owner: str,
        model: Callable[..., Any],
        call: Call,
        probe: Values,
        trained: Trained,
        sites: Iterable[str] | None,
        settings: PredictionSettings,
        *,
        items: Items | None = None,
        everything: bool = False,
    ) -> None:
        sites = [sites] if isinstance(sites, str) else None if sites is None else list(sites)
        model = DrawData(sites or ())(model)
        self._alignment, traces = align(owner, model, call, probe, trained, items or {})
        nodes = self.nodes = sample_nodes(traces[0])
        drawn = {name for name in self._alignment.rows if name not in self._alignment.known}
        names = _chosen(owner, nodes, set() if everything else drawn, sites)
        self.like = {name: nodes[name]["value"] for name in names}
        self._shapes = {name: nodes[name]["value"].shape for name in nodes}
        # All sites are given where ways to run the model are compared, so that nothing is random.
        latent = [name for name, node in nodes.items() if not node["is_observed"]]
        values = {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in latent}
        summed_out = enumerated_sites(nodes)
        scored = {name: value for name, value in values.items() if name not in summed_out}
        self._model = BatchedModel(owner, model, call, scored)
        read = [name for name, node in nodes.items() if node["value"].numel()]  # no pyro.factor
        self._model.verify(values, self._pick(read), {name: self._shapes[name] for name in read})
        self._first = next(node for name, node in nodes.items() if name in latent)
        elements = sum(shape.numel() for shape in self._shapes.values())
        self.chunk = max(1, min(settings.max_chunk, settings.max_elements // max(elements, 1)))

    def __call__(self, draws: Mapping[str, Tensor]) -> Values:
        """Site to return -> ``(S, *site shape)``, at ``(S, *trained shape)`` draws."""
        values, mixed = self._alignment.split(draws)
        if not values:  # all items are new: a run needs a site that says how many draws there are
            count = len(next(iter(draws.values())))
            values = {self._first["name"]: self._first["fn"].sample((count,))}
        if mixed:  # a run draws new items of all sites; a site's known items do not depend on them
            drawn = self._read(values, list(mixed))
            for name, rows in mixed.items():
                values[name] = torch.where(self._alignment.known[name].to(rows.device), rows, drawn[name].to(rows))
        return {name: value.cpu() for name, value in self._read(values, list(self.like)).items()}

    def _read(self, values: Values, names: list[str]) -> Values:
        return self._model.read(values, self._pick(names), {name: self._shapes[name] for name in names})

    @staticmethod
    def _pick(names: list[str]) -> Callable[[Trace], Values]:
        return lambda trace: {name: trace.nodes[name]["value"] for name in names}


class DrawData(Messenger):
    """Draws data sites anew. Unlike ``poutine.uncondition`` it leaves deterministic sites alone, which would get
    another shape in a plate.

    Args:
        names: Names of the sites.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def data_of(nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the sites with data: observed ones, without ``pyro.deterministic`` and ``pyro.factor``."""
    observed = [name for name, node in nodes.items() if node["is_observed"] and node["value"].numel()]
    return [name for name in observed if not nodes[name]["infer"].get("_deterministic")]


def _chosen(
    owner: str, nodes: Mapping[str, Mapping[str, Any]], drawn: set[str], sites: Sequence[str] | None
) -> list[str]:
    """Names of the sites to return."""
    if sites is not None:
        unknown = [repr(name) for name in sites if name not in nodes] or ([] if sites else ["none"])
        if unknown:
            raise ValueError(
                f"{owner}: expected sites of the model, {', '.join(map(repr, nodes))}, but got {unknown[0]}."
            )
        return list(sites)
    data = data_of(nodes)
    if data:
        listed = f"site '{data[0]}' is" if len(data) == 1 else f"sites {', '.join(map(repr, data))} are"
        raise ValueError(
            f"{owner}: expected data to be drawn, but {listed} observed. Write the model as `def model(x, y=None)` "
            f"with `pyro.sample('{data[0]}', ..., obs=y)`, and leave y out here; or name the sites to draw, whose "
            f"data then give no more than their shape: sites={data}."
        )
    deterministic = [name for name, node in nodes.items() if node["infer"].get("_deterministic")]
    left = [n for n, node in nodes.items() if n in deterministic or not (n in drawn or node["is_observed"])]
    if not left:
        raise ValueError(
            f"{owner}: expected sites of the model that the guide does not draw, but it draws all of its sites, "
            f"{', '.join(map(repr, nodes))}. Train the guide with the data, or name what to return: sites=[...]."
        )
    return left
