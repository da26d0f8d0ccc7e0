# SPDX-License-Identifier: Apache-2.0
"""L1. The contract of heads: what a flow, its start and its neighbors ask of the outermost trained map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.context import ContextLayout
from pyro_flows.transforms.networks import ContextParameters

__all__ = ["Head", "decode_gaussian", "encode_gaussian"]


def decode_gaussian(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Location, scale and log-scale from rows (location, inverse softplus of the scale), as ``AutoNormal`` stores them.

    Shape:
        - raw: ``(..., 2, D)``.
    """
    loc, raw_scale = raw.unbind(-2)
    scale = F.softplus(raw_scale)
    return loc, scale, scale.log()


def encode_gaussian(loc: Tensor, scale: Tensor) -> Tensor:
    """The inverse of :func:`decode_gaussian`, ``(..., 2, D)``."""
    return torch.stack([loc, scale + (-torch.expm1(-scale)).log()], -2)


class Head(FlowTransform):
    """Base of the outermost trained map of a flow, which is the Gaussian that a guide starts at.

    Location and scale are parametrized as in ``AutoNormal``, so that whatever optimizer and rate train that train this.
    They are functions of the context where there is one. A head implements the maps of a :class:`FlowTransform`, and
    whatever of the following is different from a diagonal Gaussian's.
    """

    # Whether values are those of the latents themselves, so that a preconditioner has its place inside.
    is_outermost: ClassVar[bool] = False
    # The parts of the context, where it has several: layers below the head see its network input only.
    context_layout: ContextLayout | None = None

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        standard = encode_gaussian(torch.zeros(input_dim), torch.ones(input_dim))
        self.raw = ContextParameters(standard, context_dim, refines=False)

    def initialize(self, loc: Tensor, scale: Tensor) -> None:
        """Set the Gaussian that the head is before any training: ``N(loc, diag(scale)^2)``, each ``(input_dim,)``."""
        self.raw.set(encode_gaussian(loc, scale))

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Location and scale at average context, each ``(input_dim,)``."""
        loc, scale, _ = decode_gaussian(self.raw.value)
        return loc, scale

    def standardize(self, y: Tensor) -> Tensor:
        r"""Values as input for those who condition on them: :math:`(y - m) / \sqrt{1 + \sigma^2}` at average context.

        Unconstrained values mostly come in natural units of order one. Where the posterior is narrower than that, as
        it is for the parent of many items, their response to a standardized value would have to be minute.
        """
        loc, scale = self.gaussian()
        return (y - loc) * torch.rsqrt(1.0 + scale.square())

    def gaussian_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the Gaussian itself, which move as far as the user's optimizer says."""
        return self.raw.parameters()

    @property
    def factored_entries(self) -> int:
        """Entries of the matrices that have to be factored for each draw."""
        return 0
