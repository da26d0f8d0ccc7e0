# SPDX-License-Identifier: Apache-2.0
"""L3. Which plates are local to a guide, and what may change about a plate between calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flows._checks import shown
from pyro_flows._recording import is_recording
from pyro_flows.models.sites import full_size
from pyro_flows.models.traces import as_indices

__all__ = ["STRUCTURES", "check_plate", "listed_plates", "local_plates"]

STRUCTURES = ("auto", "joint", "plates")


@dataclass(frozen=True)
class StructureSettings:
    """When plates are made local.

    Attributes:
        max_joint_dim: Largest dimension of a joint flow if plates can be made local.
    """

    max_joint_dim: int = 10_000


STRUCTURE = StructureSettings()


def local_plates(
    trace: Trace,
    plates: Mapping[str, pyro.plate],
    user_plates: Collection[str],
    amortized: Collection[str],
    structure: str,
) -> frozenset[str]:
    """Names of the plates whose latents are local; see ``AutoFlowGuide``.

    Args:
        trace: The model's latent sites.
        plates: The guide's plates.
        user_plates: Names of the plates from ``create_plates``, which later calls may subsample though this one does
            not.
        amortized: Names of the plates to amortize.
        structure: One of :data:`STRUCTURES`.

    Raises:
        ValueError: If a plate to amortize holds no latents, or ``structure="joint"`` cannot be.
    """
    sites: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, node in trace.iter_stochastic_nodes():
        for frame in node["cond_indep_stack"]:
            sites.setdefault(frame.name, []).append(name)
            sizes[frame.name] = full_size(frame)
    for plate in amortized:
        if plate not in sites:
            raise ValueError(
                f"AutoFlowGuide: expected the amortized plate '{plate}' to hold latent sites, but those that do "
                f"are {sorted(sites)}. Name one of them in amortize=, or leave it out."
            )
    subsampled = {name for name in sites if name in plates and plates[name].subsample_size < plates[name].size}
    local = subsampled | set(amortized)
    if structure == "auto":
        local |= set(sites) & set(user_plates)
    if structure == "joint" and local:
        plate = min(local)
        raise ValueError(
            f"AutoFlowGuide: expected no subsampled or amortized plate with structure='joint', but plate '{plate}' "
            f"is one and holds {sites[plate]}. Write structure='auto', or run the model on the full plate."
        )
    if structure == "plates":
        return frozenset(sites)
    if structure == "auto":
        for plate in sorted(sites, key=lambda name: -sizes[name]):
            if _joint_dim(trace, local) <= STRUCTURE.max_joint_dim:
                break
            local.add(plate)
    return frozenset(local)


def _joint_dim(trace: Trace, local: Collection[str]) -> int:
    total = 0
    for _, node in trace.iter_stochastic_nodes():
        value: Tensor = node["value"]
        if not any(frame.name in local for frame in node["cond_indep_stack"]):
            total += value.numel()
    return total


def listed_plates(plates: Any) -> list[pyro.plate]:
    """What ``create_plates`` returned, as a list.

    Raises:
        TypeError: If it is neither a plate nor an iterable of plates; or an iterator, which Pyro would use up.
    """
    is_list = isinstance(plates, Iterable) and not isinstance(plates, (pyro.plate, Iterator))
    found = list(plates) if is_list else [plates]
    if not all(isinstance(plate, pyro.plate) for plate in found):
        raise TypeError(
            f"AutoFlowGuide: expected create_plates to return a plate, or a list of them, but got {shown(plates)}. "
            "Write create_plates=lambda *args: pyro.plate('data', size, subsample=...)."
        )
    for plate in found:
        check_subsample(plate)
    return found


def check_subsample(plate: pyro.plate) -> None:
    """Refuse indices of a mini-batch that are none.

    Raises:
        TypeError: If they are no integers.
        ValueError: If there are none, or one is outside of the plate, or they are not in one dimension.
    """
    owner, indices = f"AutoFlowGuide: expected the subsample of plate '{plate.name}' to be", plate._indices
    if indices is None:
        return
    indices = as_indices(indices)
    if indices.dim() != 1 or not len(indices):
        found = f"shape {tuple(indices.shape)}" if indices.numel() else "none"
        raise ValueError(f"{owner} a tensor of one dimension, with at least one index, but got {found}.")
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(f"{owner} integers, but got {indices.dtype}. Write subsample=index.long().")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= plate.size:
        raise ValueError(
            f"AutoFlowGuide: expected indices of plate '{plate.name}' in [0, {plate.size - 1}], but got "
            f"{low if low < 0 else high}. Check the subsample that create_plates passes to pyro.plate."
        )


def check_plate(plate: Any, frame: CondIndepStackFrame, *, local: bool) -> None:
    """Refuse changes of a plate that is not amortized since the guide was set up.

    Raises:
        ValueError: If a plate that is not local is subsampled, or a local one has another size or indices outside it.
    """
    if not local:
        if plate.subsample_size < plate.size:
            raise ValueError(
                f"AutoFlowGuide: expected plate '{frame.name}' to be whole, as it was when the guide was set up, but "
                f"it is subsampled now ({plate.subsample_size} of {plate.size}). Set the guide up with a mini-batch, "
                "give it the plate by create_plates, or write AutoFlowGuide(model, structure='plates')."
            )
        return
    if plate.size != full_size(frame):
        raise ValueError(
            f"AutoFlowGuide: expected plate '{frame.name}' to have the {full_size(frame)} items that it had when the "
            f"guide was set up, each with parameters of its own, but got {plate.size}. Set up a new guide, or write "
            f'amortize={{"{frame.name}": encoder}} for a posterior that carries over to new items.'
        )
    if plate.subsample_size < plate.size and not is_recording():  # compiled code checks indices itself
        check_subsample(plate)
