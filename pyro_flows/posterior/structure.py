# SPDX-License-Identifier: Apache-2.0
"""L3. Which plates are local to a guide, and what may change about a plate between calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flows._recording import is_recording
from pyro_flows.models.sites import full_size

__all__ = ["STRUCTURES", "check_plate", "local_plates"]

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
        low, high = int(plate.indices.min()), int(plate.indices.max())
        if low < 0 or high >= plate.size:
            raise ValueError(
                f"AutoFlowGuide: expected indices of plate '{frame.name}' in [0, {plate.size - 1}], but got "
                f"{low if low < 0 else high}. Check the subsample that create_plates passes to pyro.plate."
            )
