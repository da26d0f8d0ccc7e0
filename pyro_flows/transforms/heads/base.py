# SPDX-License-Identifier: Apache-2.0
"""L1. The interface of heads, the outermost trained map of a flow."""

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
    """Base of the outermost trained map of a flow, which is the Gaussian that a guide is initialized to.

    Location and scale are parametrized as in ``AutoNormal``, so that the same optimizers and learning rates suit both.
    They are functions of the context if there is one. A head implements the maps of a :class:`FlowTransform`, and
    overrides those of the following methods that differ from a diagonal Gaussian's.
    """

    # Whether values are those of the latents themselves, so that a preconditioner has its place inside.
    is_outermost: ClassVar[bool] = False
    # Whether coordinates are correlated by priors that follow each other.
    is_chained = False
    # Number of directions in which a warm start correlates the noise of the rest; None for any.
    max_rank: int | None = None
    # The parts of the context, where it has several: layers below the head see its network input only.
    context_layout: ContextLayout | None = None

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        standard = encode_gaussian(torch.zeros(input_dim), torch.ones(input_dim))
        self.raw = ContextParameters(standard, context_dim, refines=False)

    def initialize(self, loc: Tensor, scale: Tensor) -> None:
        """Set the initial Gaussian, before any training: ``N(loc, diag(scale)^2)``, each ``(input_dim,)``."""
        self.raw.set(encode_gaussian(loc, scale))

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Location and scale at average context, each ``(input_dim,)``."""
        loc, scale, _ = decode_gaussian(self.raw.value)
        return loc, scale

    def standardize(self, y: Tensor) -> Tensor:
        r"""Values as input of flows that condition on them: :math:`(y - m) / \sqrt{1 + \sigma^2}` at average context.

        Unconstrained values usually have natural units of order one. Where the posterior is much narrower, as it is for
        the parent of many items, the response to a value in units of its own scale would have to be tiny.
        """
        loc, scale = self.gaussian()
        return (y - loc) * torch.rsqrt(1.0 + scale.square())

    def gaussian_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the Gaussian itself, which are trained with the user's learning rate."""
        return self.raw.parameters()

    @property
    def factored_entries(self) -> int:
        """Number of entries of the matrices that are factorized for each draw."""
        return 0
