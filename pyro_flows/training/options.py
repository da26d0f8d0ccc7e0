# SPDX-License-Identifier: Apache-2.0
"""L7. Options of a run that a resumed run has to share, and what happens where a call asks for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

__all__ = ["RunOptions", "changed_settings"]


@dataclass(frozen=True)
class RunOptions:
    """Options of :func:`~pyro_flows.fit` as a user gave them; in a checkpoint, as they were chosen.

    Attributes:
        num_steps: Number of steps, or None.
        num_particles: Number of particles per step, or None.
        learning_rate: Peak learning rate of the first cycle, or None.
        anneal: Whether to anneal.
        compile: Whether to compile.
        seed: Random seed, or None.
        settings: Names and values of settings that are not the default.
        optimizer: Name and options of the optimizer.
        num_parts: Number of parts of a step, or None.
        objective: What is optimized in the end.
        target_gap: Gap below which the flow is not made wider; None in a run that was finished before there were wider
            flows, which has none, whatever a call asks for.
    """

    num_steps: int | None = None
    num_particles: int | None = None
    learning_rate: float | None = None
    anneal: bool = False
    compile: bool | str = "auto"
    seed: int | None = None
    settings: Mapping[str, Any] | None = None
    optimizer: str = "Adam"
    num_parts: int | None = None
    objective: str = "elbo"
    target_gap: float | None = 0.05

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary of what a checkpoint can hold."""
        return asdict(self)

    def difference(self, asked: RunOptions) -> str:
        """The first option that a call asks for and that this run does not have, as a clause; empty if there is none.

        None asks for nothing, except in ``num_steps``, which :class:`~pyro_flows.training.schedule.Schedule` compares.
        """
        for each in fields(self):
            own, other = getattr(self, each.name), getattr(asked, each.name)
            if each.name == "settings":
                own, other = own or {}, other or {}
                names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
                if names:
                    own, other = (of.get(names[0], "the default") for of in (own, other))
                    return f"{names[0]} of its settings to be {own}, but got {other}"
            elif each.name == "target_gap" and own is None:
                continue
            elif each.name != "num_steps" and other is not None and other != own:
                return f"{each.name} to be {own!r}, but got {other!r}"
        return ""


def changed_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Names, such as ``schedule.max_steps``, and values, as text, of settings that differ from their defaults.

    ``checkpoint_interval`` is left out, since it changes no number, and ``num_parts``, which is an option by itself.
    """
    defaults = type(settings)()
    found: dict[str, Any] = {}
    for each in fields(settings):
        own, default = getattr(settings, each.name), getattr(defaults, each.name)
        if is_dataclass(own):
            found |= changed_settings(own, f"{prefix}{each.name}.")
        elif own != default and each.name not in ("checkpoint_interval", "num_parts"):
            found[f"{prefix}{each.name}"] = repr(own)
    return found
