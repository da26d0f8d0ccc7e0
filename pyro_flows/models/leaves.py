# SPDX-License-Identifier: Apache-2.0
"""L2. Which latents of a model are independent of each other given all others and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_flows._random import seed_all, seeded
from pyro_flows.models.layout import Layout
from pyro_flows.models.log_joint import constrain, scored_sites
from pyro_flows.models.traces import Call

__all__ = ["are_independent", "are_leaves", "possible_leaves"]


@dataclass(frozen=True)
class LeafSettings:
    """When a model's largest site is made leaves, and how dependence is tested.

    Attributes:
        min_dim: Number of latents up to which one flow over all of them finds what depends on what.
        min_leaves: Smallest number of leaves: with few, it is the others that matter.
        max_dim: Largest number of latents: a leaf has two hundred parameters, which more could not afford.
        max_free_dim: Largest number of other latents, each of which takes a row of a Hessian.
        tolerance: Relative change of a gradient below which it counts as unchanged; allows for rounding in float32.
        shift: Standard deviation by which coordinates are moved, in unconstrained space.
    """

    min_dim: int = 200
    min_leaves: int = 50
    max_dim: int = 3000
    max_free_dim: int = 300
    tolerance: float = 1e-4
    shift: float = 0.3


LEAVES = LeafSettings()


def possible_leaves(layout: Layout) -> str | None:
    """The site of a joint block whose coordinates may be leaves, independent of each other given all others, as
    abilities of students who answer some items are: its largest; None if there is little to gain, or the other sites
    are too large.

    Args:
        layout: Layout of the block's sites, in the order of the model.
    """
    largest = max(layout.sizes)
    free = layout.latent_dim - largest
    has_size = LEAVES.min_dim < layout.latent_dim <= LEAVES.max_dim and 0 < free <= LEAVES.max_free_dim
    if layout.plates or not has_size or largest < LEAVES.min_leaves:
        return None
    return layout.names[layout.sizes.index(largest)]


def are_leaves(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout, name: str
) -> bool:
    """Whether the coordinates of a site are leaves; see :func:`are_independent`."""
    where = layout.slices[name]
    rows = torch.arange(where.start, where.stop, device=layout.init_loc.device)
    return are_independent(model, args, kwargs, layout, rows)


def are_independent(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    coordinates: Tensor,
) -> bool:
    """Whether some coordinates are independent of each other given all others and the data.

    Moves one half of them and compares the gradient of the log joint with respect to the other half, for one split into
    halves per binary digit of a coordinate's number, so that any two coordinates are in different halves at least once.
    If the model raises there, they count as dependent.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the joint block's sites.
        coordinates: Indices of the coordinates, ``(P,)``.
    """

    def gradient(packed: Tensor) -> Tensor:
        packed = packed.detach().requires_grad_()
        seed_all(0)
        values, parts = constrain(layout.split(packed))
        parts += [node["log_prob"] for node in scored_sites(model, values, Call(args, kwargs))]
        (found,) = torch.autograd.grad(torch.stack([part.sum() for part in parts]).sum(), packed)
        return found[coordinates]

    number = torch.arange(len(coordinates), device=coordinates.device)
    with seeded(0), pyro.validation_enabled(False), torch.enable_grad():
        init_loc = layout.init_loc
        center = init_loc + LEAVES.shift * torch.randn_like(init_loc)
        shift = LEAVES.shift * torch.randn(len(number), device=number.device)
        try:
            before = gradient(center)
            for digit in range((len(number) - 1).bit_length()):
                moved = (number >> digit) % 2 == 1
                after = gradient(center.index_add(0, coordinates, moved * shift.to(center)))
                if not ((after - before).abs() <= LEAVES.tolerance * (1.0 + before.abs()))[~moved].all():
                    return False
        except Exception:  # models raise in many ways
            return False
    return True
