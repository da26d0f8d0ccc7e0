# SPDX-License-Identifier: Apache-2.0
"""L4. The directions in which a posterior may differ from a Gaussian: those in which its observations see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows._random import seeded
from pyro_flows.models.log_joint import PulledBack

__all__ = ["observed_directions"]


@dataclass(frozen=True)
class DirectionSettings:
    """Settings of the directions of observations.

    Attributes:
        num_points: Number of points at which gradients are taken, the largest of which counts: an observation that is
            explained well at one has none there.
        step: Step of central differences, in units of the noise.
        max_entries: Largest number of gradients' entries; of more observations, evenly spaced ones are looked at.
        min_length: Smallest length of a gradient, relative to the longest.
        max_count: Largest number of directions.
    """

    num_points: int = 4
    step: float = 0.5
    max_entries: int = 2**23
    min_length: float = 1e-4
    max_count: int = 256


DIRECTIONS = DirectionSettings()


@torch.no_grad()
def observed_directions(log_joint: PulledBack, like: Tensor) -> Tensor:
    r"""Unit vectors along the gradients of the observations' log likelihoods, those of the longest ones first.

    The log likelihood of a generalized linear model is a sum of ridge functions, :math:`\sum_n \ell_n(a_n^\top z)`, and
    so is that of a latent Gaussian that is seen through nonlinear links. All that is not Gaussian is in the directions
    :math:`a_n` then, which are those of the gradients, wherever they are taken.

    Args:
        log_joint: The log joint in the coordinates in which directions are wanted, where standard normal noise is close
            to the posterior.
        like: A tensor of shape ``(D,)``, with the dtype and device of the draws.

    Returns:
        Directions, ``(count, D)``; none where no log likelihood depends on the draws.
    """
    dim = len(like)
    step = DIRECTIONS.step * torch.eye(dim, dtype=like.dtype, device=like.device)
    with seeded(0):
        points = torch.randn(DIRECTIONS.num_points, dim, dtype=like.dtype, device=like.device)
    points[0] = 0.0
    number = sum(term.numel() for term in log_joint.observed(points[:1]))
    if not number:
        return like.new_zeros(0, dim)
    stride = -(-number * dim // DIRECTIONS.max_entries)
    most = max(1, DIRECTIONS.max_entries // number)  # draws in a run
    found = like.new_zeros(len(range(0, number, stride)), dim)
    for point in points:
        around = torch.cat([point + step, point - step])
        runs = [_by_observation(log_joint, draws)[:, ::stride] for draws in around.split(most)]
        above, below = torch.cat(runs).mT.chunk(2, -1)
        slopes = (above - below).to(like)
        slopes[~slopes.isfinite().all(-1)] = 0.0  # beyond the edge of the support
        is_longer = slopes.norm(dim=-1, keepdim=True) > found.norm(dim=-1, keepdim=True)
        found = torch.where(is_longer, slopes, found)
    lengths, order = found.norm(dim=-1).sort(descending=True)
    is_seen = lengths > DIRECTIONS.min_length * lengths[:1]
    return F.normalize(found[order[is_seen][: DIRECTIONS.max_count]], dim=-1)


def _by_observation(log_joint: PulledBack, draws: Tensor) -> Tensor:
    """Log likelihoods at ``(S, D)`` draws, ``(S, number of observations)``."""
    return torch.cat([term.reshape(len(draws), -1) for term in log_joint.observed(draws)], -1)
