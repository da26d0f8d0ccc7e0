# SPDX-License-Identifier: Apache-2.0
"""L1. Heads that draw some coordinates after others, with a Gaussian that is relative to a fixed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads.base import Head, decode_gaussian

__all__ = ["OrderedHead"]


class OrderedHead(Head):
    """Base of heads of latents themselves, whose coordinates are drawn in an order, the free ones first.

    Site approximations may be relative to fixed ones, ``origin``, which are not trained: see :meth:`set_origin`.

    Implementing one: :meth:`draw`, :meth:`noise` and :meth:`draw_with_score` are the maps of a transform, of vectors in
    the order in which coordinates are drawn. The subclass makes the fixed parameter ``origin``, zeros of ``(2, D)`` for
    locations and log-scales, after the trained ones.

    Args:
        order: The coordinates in the order in which they are drawn, ``(D,)``.
        sizes: How many are drawn at once, the free ones first.
    """

    is_outermost: ClassVar[bool] = True  # values are those of the latents

    order: Tensor
    restore: Tensor
    origin: FixedParameter

    def __init__(self, order: Tensor, sizes: Sequence[int]) -> None:
        super().__init__(len(order))
        self.sizes = list(sizes)
        self.count_free = self.sizes[0]
        self.in_order = bool((order == torch.arange(len(order))).all())
        self.register_buffer("order", order)
        self.register_buffer("restore", order.argsort())

    def initialize(self, loc: Tensor, scale: Tensor) -> None:
        super().initialize(loc, scale)
        with torch.no_grad():
            self.origin.zero_()

    @torch.no_grad()
    def set_origin(self) -> None:
        """Make the current site approximations the origin, so that an optimizer's steps are in units of their scales.

        Otherwise steps are in the latents' own units, in which a posterior may be only a thousandth wide.
        """
        loc, scale = self.gaussian()
        self.origin.copy_(torch.stack([loc, scale.log()]))
        super().initialize(torch.zeros_like(loc), torch.ones_like(loc))

    def gaussian(self) -> tuple[Tensor, Tensor]:
        loc, scale, _ = self.decode(self.raw.value, self.origin.detach())
        return loc, scale

    @staticmethod
    def decode(raw: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Locations, scales and log-scales of site approximations, ``(P,)``, from rows of both, ``(2, P)``."""
        loc, scale, log_scale = decode_gaussian(raw)
        unit = origin[1].exp()
        return torch.addcmul(origin[0], unit, loc), scale * unit, log_scale + origin[1]

    def _ordered(self, value: Tensor) -> Tensor:
        return value if self.in_order else value.index_select(-1, self.order)

    def _restored(self, value: Tensor) -> Tensor:
        return value if self.in_order else value.index_select(-1, self.restore)

    def _site_approximations(self) -> tuple[Tensor, Tensor, Tensor]:
        """Locations, scales and log-scales of the coordinates' site approximations, in order."""
        return self.decode(self._ordered(self.raw.value), self._ordered(self.origin.detach()))

    def _away(self, free: Tensor) -> Tensor:
        """Displacement of the free coordinates from the origin, at which a likelihood factor was set."""
        return free - self.origin[0].detach().index_select(0, self.order[: self.count_free])

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values from noise, and the log-determinant."""
        raise NotImplementedError

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`draw`, and its log-determinant."""
        raise NotImplementedError

    def draw_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-determinant and score, as in :meth:`FlowTransform.forward_with_score`."""
        raise NotImplementedError

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.draw(self._ordered(x))
        return self._restored(y), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.noise(self._ordered(y))
        return self._restored(x), ladj

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj, score = self.draw_with_score(self._ordered(x), self._ordered(score))
        return self._restored(y), ladj, self._restored(score)
