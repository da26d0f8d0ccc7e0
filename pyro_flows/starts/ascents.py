# SPDX-License-Identifier: Apache-2.0
"""L4. Ascents of a log joint from several points: where candidates of a warm start are, and its modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flows.models.log_joint import LogJoint
from pyro_flows.starts.lbfgs import lbfgs_paths

__all__ = ["ASCENTS", "ascents", "batched", "climb", "distinct_points"]


@dataclass(frozen=True)
class AscentSettings:
    """Settings of ascents.

    Attributes:
        num_near_expensive: Number of ascents from around the initial location, if a draw is expensive.
        num_prior_expensive: Number of ascents from draws of the prior, if a draw is expensive.
        num_near: Number of ascents from around the initial location, otherwise.
        num_prior: Number of ascents from draws of the prior, otherwise.
        spread: Standard deviation of initial points about the initial location, in unconstrained space.
        num_steps: Steps of an ascent.
        tolerance: Gain in nats below which an ascent has converged.
        candidate_steps: Numbers of steps after which the point of an ascent is a candidate.
        patience: Once the highest ascent has converged, the others get this many times its steps.
        same_point: End points of ascents closer to each other than this in each coordinate are considered equal.
    """

    num_near_expensive: int = 1
    num_prior_expensive: int = 1
    num_near: int = 3
    num_prior: int = 12
    spread: float = 0.7
    num_steps: int = 150
    tolerance: float = 1e-4
    candidate_steps: tuple[int, ...] = (2, 5, 12, 35, 150)
    patience: float = 1.5
    same_point: float = 1e-3


ASCENTS = AscentSettings()


def ascents(
    log_joint: LogJoint, init_loc: Tensor, prior: int = ASCENTS.num_prior, patience: float = ASCENTS.patience
) -> list[Tensor]:
    """Points on paths of ascent, a list of ``(number of ascents, D)``; the last entry has the end points.

    If the model is cheap, ``prior`` of the ascents begin at draws of the prior. Once the highest ascent has converged,
    the others get ``patience`` times its steps.
    """
    many = log_joint.is_vectorized and log_joint.cost_per_draw == 1
    near, prior = (ASCENTS.num_near, prior) if many else (ASCENTS.num_near_expensive, ASCENTS.num_prior_expensive)
    around = init_loc + ASCENTS.spread * torch.randn(near, len(init_loc), dtype=init_loc.dtype, device=init_loc.device)
    begins = torch.stack([init_loc, *around, *(draw.to(init_loc) for draw in log_joint.from_prior(prior))])
    return climb(log_joint, begins[begins.isfinite().all(-1)], patience)


def climb(log_joint: Callable[[Any], Tensor], begins: Tensor, patience: float = math.inf) -> list[Tensor]:
    """Points on paths of ascent from given points, as in ``ascents``."""
    looks, points = [], begins
    steps = lbfgs_paths(batched(log_joint), begins.unsqueeze(1), ASCENTS.num_steps, ASCENTS.tolerance, patience)
    for number, ascended in enumerate(steps, 1):
        points = ascended.squeeze(1)
        if number in ASCENTS.candidate_steps:
            looks.append(points)
    return looks if looks and looks[-1] is points else [*looks, points]


def distinct_points(points: Tensor) -> Tensor:
    """Points of ``(R, D)`` without duplicates, since ascents meet at a mode."""
    near = torch.cdist(points, points, p=torch.inf) < ASCENTS.same_point
    return points[~near.tril(-1).any(-1)]


def batched(log_joint: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The target with the signature that :func:`lbfgs_paths` takes: ``(R, 1, D)``, or its parts, to ``(R, 1)``."""

    def target(z: Tensor | Sequence[Tensor]) -> Tensor:
        return log_joint(z.squeeze(1) if isinstance(z, Tensor) else [part.squeeze(1) for part in z]).unsqueeze(1)

    return target
