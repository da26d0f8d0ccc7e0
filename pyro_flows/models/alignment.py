# SPDX-License-Identifier: Apache-2.0
"""L2. Which rows of a guide's draws belong to the items of a model on new data, and which items are new."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows._blame import user_level
from pyro_flows._checks import shown
from pyro_flows.models.sites import full_size
from pyro_flows.models.traces import NO_DENSITY, Call, as_indices, sample_nodes

__all__ = ["NEW", "Alignment", "Items", "Trained", "align"]

NEW = "new"
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Plate -> for each of its items the training item that it is, or -1; or "new", if all are.
Items = Mapping[str, str | Sequence[int] | Tensor]


class Trained(NamedTuple):
    """The items that a guide draws.

    Attributes:
        indices: Plate -> indices of the items in the guide's order; all of them, in order, where it is missing.
        full_sizes: Plate -> number of its items without subsampling.
    """

    indices: Mapping[str, Tensor]
    full_sizes: Mapping[str, int]


class Alignment:
    """Maps draws of a guide to values of a model's latent sites on other data.

    Attributes:
        rows: Site -> axis of its value, counted from the right -> the row of the draws of each item, -1 for new ones.
        known: Site -> whether an entry is that of a training item, broadcastable to its value; only for sites with new
            items.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.known: dict[str, Tensor] = {}

    def take(self, name: str, value: Tensor) -> Tensor:
        """The rows of a site's draws, ``(S, *trained shape)``, that its items have; any row for new items."""
        for axis, rows in self.rows.get(name, {}).items():
            value = value.index_select(value.dim() + axis, rows.clamp_min(0).to(value.device))
        return value

    def split(self, draws: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of sites whose items are all known, and of those of which some are; ``(S, *site shape)``."""
        whole = {name: self.take(name, draws[name]) for name in self.rows if name not in self.known}
        mixed = {n: self.take(n, draws[n]) for n, known in self.known.items() if known.any() and known.numel()}
        return whole, mixed


class _Aligner(Messenger):
    """Gives latent sites the values of the items that they share with the guide; innermost around the model."""

    def __init__(self, owner: str, draw: Mapping[str, Tensor], trained: Trained, items: Items) -> None:
        super().__init__()
        self.owner, self.draw, self.trained, self.items = owner, draw, trained, items
        self.indices: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.other_sizes: dict[str, tuple[int, int]] = {}
        self.alignment = Alignment()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._note_items(msg)
        elif msg["name"] in self.draw and not msg["is_observed"]:
            self._align(msg)
        elif msg["infer"].get("enumerate") and not msg["is_observed"]:
            self._check_enumerated(msg)

    def _note_items(self, msg: Any) -> None:
        name, fn, given = msg["name"], msg["fn"], msg["value"]
        self.indices[name] = torch.arange(fn.size) if given is None else as_indices(given)

    def _align(self, msg: Any) -> None:
        name, value, fn = msg["name"], self.draw[msg["name"]], msg["fn"]
        rows: dict[int, Tensor] = {}
        known = torch.ones((), dtype=torch.bool)
        for frame in msg["cond_indep_stack"]:
            axis = frame.dim - fn.event_dim if frame.vectorized else 0
            if not frame.vectorized or value.dim() < -axis:
                continue
            rows[axis] = self._rows_of(frame, value.shape[axis])
            known = known & (rows[axis] >= 0).reshape(-1, *(1,) * (-axis - 1))
        expected = list(fn.shape())
        for axis in rows:
            expected[axis] = value.shape[axis]
        if tuple(expected) != tuple(value.shape):
            raise ValueError(
                f"{self.owner}: expected site '{name}' to have shape {tuple(value.shape)}, as in the guide's draws, but"
                f" the model with these arguments has {tuple(fn.shape())}. Only plates may have another size; pass "
                "arguments that fit the guide, or a guide of this model."
            )
        self.alignment.rows[name] = rows
        if not known.all():
            self.alignment.known[name] = known
        else:
            msg["value"] = self.alignment.take(name, value.unsqueeze(0)).squeeze(0)
            msg["done"] = True

    def _rows_of(self, frame: Any, num_rows: int) -> Tensor:
        """Row of the guide's draws for each item of a plate, -1 for new items."""
        plate, count = frame.name, frame.size
        ids = self.trained.indices.get(plate, torch.arange(num_rows))
        size = self.trained.full_sizes.get(plate, num_rows)
        if plate in self.items:
            wanted = self._wanted(plate, count, size)
        elif full_size(frame) == size:
            wanted = self.indices.get(plate, torch.arange(count))
        else:
            self.other_sizes[plate] = (full_size(frame), size)
            wanted = torch.full((count,), -1)
        self.chosen[plate] = wanted
        where = torch.full((size + 1,), -1)  # the last one is for -1
        where[ids.cpu()] = torch.arange(len(ids))
        return where[wanted.cpu()]

    def _wanted(self, plate: str, count: int, size: int) -> Tensor:
        """The training items that the user names."""
        given = self.items[plate]
        if isinstance(given, str) and given == NEW:
            return torch.full((count,), -1)
        try:
            wanted = as_indices(given)
        except (TypeError, ValueError, RuntimeError):  # torch has one for each way to be no tensor
            wanted = torch.empty(0)
        are_indices = wanted.shape == (count,) and wanted.dtype in INDICES
        if not are_indices or (wanted < -1).any() or (wanted >= size).any():
            raise ValueError(
                f"{self.owner}: expected items['{plate}'] to be '{NEW}', or {count} indices of training items in "
                f"[0, {size - 1}], with -1 for a new item, but got {shown(given)}."
            )
        return wanted.long()

    def _check_enumerated(self, msg: Any) -> None:
        """Refuse discrete sites of training items, whose values depend on the training data."""
        plates = [frame.name for frame in msg["cond_indep_stack"] if frame.vectorized]
        if all(plate in self.chosen and (self.chosen[plate] >= 0).any() for plate in plates):
            where = f"in plate '{plates[0]}', whose items are those of the training data" if plates else "in no plate"
            raise NotImplementedError(
                f"{self.owner}: expected enumerated sites of new items only, but '{msg['name']}' is {where}, so that "
                "it depends on the training data, and draws of its prior would be wrong. Draw it by "
                "pyro.infer.infer_discrete given the guide's draws; the docs on prediction have the lines."
            )


def align(
    owner: str,
    model: Callable[..., Any],
    call: Call,
    draws: Mapping[str, Tensor],
    trained: Trained,
    items: Items,
) -> tuple[Alignment, list[Trace]]:
    """Run a model at a few draws of a guide for other data, and read off which rows of the draws its items have.

    Args:
        owner: Name of the caller, for error messages.
        model: The model.
        call: Its arguments.
        draws: A guide's draws, site -> ``(S, *trained shape)``.
        trained: The items of these draws.
        items: What the user says of the model's items.

    Returns:
        The alignment, and the traces of the runs that did not raise, one or more.

    Raises:
        NotImplementedError: If an enumerated site depends on the training data.
        ValueError: If the guide has none of the model's latent sites, shapes differ in other dimensions than those of
            plates, or ``items`` does not fit.
        Exception: Any exception of the model; if it raises at all draws, that of the first.

    Warns:
        UserWarning: If a plate has another size than in training, and ``items`` does not name it.
    """
    traces, refused, aligner = [], None, None
    for row in range(len(next(iter(draws.values()), ()))):
        draw = {name: value[row] for name, value in draws.items()}
        now = _Aligner(owner, draw, trained, items)
        try:
            with torch.no_grad(), poutine.block():
                traces.append(poutine.trace(now(model)).get_trace(*call.args, **call.kwargs))
            aligner = now
        except NO_DENSITY as error:
            refused = refused or error
    if aligner is None:
        assert refused is not None
        raise refused
    _check_match(owner, aligner, sample_nodes(traces[0]))
    return aligner.alignment, traces


def _check_match(owner: str, aligner: _Aligner, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    latents = [name for name, node in nodes.items() if not node["is_observed"]]
    if not aligner.alignment.rows:
        raise ValueError(
            f"{owner}: expected a guide of this model, whose unobserved sites are {', '.join(map(repr, latents))}, but "
            f"the guide draws {', '.join(map(repr, aligner.draw))}. Make a guide from this model, and train it."
        )
    plates = {frame.name for node in nodes.values() for frame in node["cond_indep_stack"]}
    unknown = sorted(set(aligner.items) - plates)
    if unknown:
        raise ValueError(
            f"{owner}: expected items of plates of the model, {', '.join(map(repr, sorted(plates)))}, but got "
            f"{unknown[0]!r}."
        )
    for plate, (size, before) in aligner.other_sizes.items():
        warnings.warn(
            f"{owner}: plate '{plate}' has {size} items, and had {before} in training, so all of them are taken for new"
            f" ones, drawn from their prior given the globals. Write items={{'{plate}': '{NEW}'}} if they are; or list"
            f" the training item that each one is, with -1 for a new one.",
            stacklevel=user_level(),
        )
