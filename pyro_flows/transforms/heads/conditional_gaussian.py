# SPDX-License-Identifier: Apache-2.0
"""L1. Heads of a joint flow over a hierarchy: some coordinates are Gaussian given those before them, with a known prior
that is pooled with an approximation of the likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads.ordered import OrderedHead
from pyro_flows.transforms.heads.pooling import INIT_SHARE, init_share, unpool
from pyro_flows.transforms.networks import powerprop

__all__ = ["ConditionalGaussianHead"]

# Dimension up to which slopes are multiplied as a whole, in one operation.
MAX_WHOLE_DIM = 200


class ConditionalGaussianHead(OrderedHead):
    r"""Base of heads in which pooled coordinates have a known Gaussian prior :math:`N(a(y), e^{2 t(y)})`, with
    :math:`a, t` linear in earlier coordinates, and a site approximation :math:`N(b, s^2)` of the likelihood.

    The other coordinates are free, :math:`y = b + s x`. Subclasses define the product of prior and site approximation,
    with the prior's precision multiplied by :math:`\gamma`:

    - :class:`MultilevelHead`: elementwise, priors of any depth;
    - :class:`DiagonalPrecisionHead`, :class:`FullPrecisionHead`: the site approximation is a likelihood factor, whose
      location is linear in the free coordinates.

    Args:
        known: Which coordinates have a known prior, ``(D,)``.
        slope: Slopes of prior locations, then log-scales, ``(2 D, D)``; zero in rows that are not known. Dependencies
            must be acyclic.
        bias: Intercepts of prior locations, then log-scales, ``(2 D,)``.

    Raises:
        ValueError: If the dependencies have a cycle.
    """

    slope: Tensor
    bias: Tensor

    def __init__(self, known: Tensor, slope: Tensor, bias: Tensor) -> None:
        dim = len(known)
        levels = _levels(known, slope)
        order = torch.cat(levels)
        super().__init__(order, [len(level) for level in levels])
        # Rows and columns in the order in which coordinates are drawn.
        pooled = order[self.count_free :]
        self.register_buffer("slope", slope.unflatten(0, (2, dim))[:, pooled][..., order].contiguous())
        self.register_buffer("bias", bias.unflatten(0, (2, dim))[:, pooled].contiguous())
        self._count_parents()
        self.log_share = nn.Parameter(torch.zeros(dim - self.count_free))
        self.origin = FixedParameter(torch.zeros(2, dim))

    def _count_parents(self) -> None:
        """Find how many coordinates, in order, are parents of others: slopes of the rest, zero, are left out where that
        saves more than it costs."""
        used = self.slope.any(0).any(0).nonzero()
        count = int(used.max()) + 1 if len(used) else 0
        self.num_parents = count if self.input_dim > MAX_WHOLE_DIM else self.input_dim

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count_parents()

    def initialize(self, loc: Tensor, scale: Tensor, max_share: float = INIT_SHARE) -> None:
        """Initialize to a mean-field Gaussian, ``N(loc, diag(scale)^2)``.

        Args:
            loc: Location, ``(D,)``.
            scale: Scale, ``(D,)``.
            max_share: Largest share of the precision that priors have at ``loc``, in (0, 1); the smaller, the closer
                the head is to that Gaussian.
        """
        prior = F.linear(loc[self.order], self.slope.flatten(0, 1), self.bias.flatten())
        prior_loc, prior_log_scale = prior.chunk(2)
        pooled = self.order[self.count_free :]
        log_share = init_share(scale[pooled], prior_log_scale, max_share)
        shared_log_scale = prior_log_scale - 0.5 * powerprop(log_share)
        site_loc, site_log_scale = unpool(loc[pooled], scale[pooled], prior_loc, shared_log_scale)
        super().initialize(loc.index_copy(0, pooled, site_loc), scale.index_copy(0, pooled, site_log_scale.exp()))
        with torch.no_grad():
            self.log_share.copy_(log_share)

    def gaussian_parameters(self) -> Iterator[nn.Parameter]:
        yield from super().gaussian_parameters()
        yield self.log_share

    def prior(self, parents: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Locations and log-scales of the priors of pooled coordinates, some or all, given those drawn before."""
        width = min(parents.shape[-1], self.num_parents)
        slope, bias = self.slope[:, rows, :width], self.bias[:, rows]
        loc, log_scale = F.linear(parents[..., :width], slope.flatten(0, 1), bias.flatten()).chunk(2, -1)
        return loc, log_scale


def _levels(known: Tensor, slope: Tensor) -> list[Tensor]:
    """Coordinates by level: the free ones, those whose priors depend on these only, and so on."""
    depends = (slope.unflatten(0, (2, len(known))) != 0).any(0)  # (D, D): row on column
    done = ~known
    levels = [done.nonzero().squeeze(-1)]
    while not done.all():
        ready = ~done & ~(depends & ~done).any(-1)
        if not ready.any():
            raise ValueError(
                "ConditionalGaussianHead: expected a hierarchy, but the dependencies of the priors have a cycle."
            )
        levels.append(ready.nonzero().squeeze(-1))
        done = done | ready
    return levels
