# SPDX-License-Identifier: Apache-2.0
"""L1. Small networks inside transforms. Their outputs are initialized to zero, so that a transform's free parameters
alone determine its initial value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "HEAD_SLOPE",
    "POWERPROP_SLOPE",
    "CenteredNetwork",
    "ContextParameters",
    "Packed",
    "centered",
    "inverse_powerprop",
    "paced",
    "powerprop",
    "reference_noise",
    "with_reference",
]


# Inputs of conditioners are in units of their marginal scale. Beyond this many units a draw is an outlier, which
# should not produce even larger outliers downstream.
INPUT_BOUND = 5.0
# Draws of N(0, I) over which a network is centered; half of them mirror the other half.
COUNT_REFERENCE = 16
# Derivative of powerprop at zero.
POWERPROP_SLOPE = 0.1
# The same in last layers whose inputs are already divided by their number.
HEAD_SLOPE = 0.3


def powerprop(weight: Tensor, slope: float = POWERPROP_SLOPE) -> Tensor:
    r"""Powerpropagation, :math:`w (|w| + s)`, for weights by which coordinates depend on each other.

    Adam moves each weight by the learning rate from the first step on, so a thousand useless weights add as much noise
    as ten that matter. While the posterior is still far away they all move towards it and overshoot, and one extreme
    draw then dominates Adam's second moments for the rest of the run. Here the effective step of a weight is
    proportional to its size, and ``slope`` times the learning rate at zero.

    Args:
        weight: Weights before the reparameterization, of any shape.
        slope: Derivative at zero, > 0.

    References:
        Schwarz, Jayakumar, Pascanu, Latham, Teh. Powerpropagation: a sparsity inducing weight reparameterisation.
        NeurIPS 2021. arXiv:2110.00296, eq. (1) with alpha = 2; the slope keeps zero from being a fixed point.
    """
    return weight * (weight.abs() + slope)


def paced(weight: Tensor, slope: float = POWERPROP_SLOPE) -> Tensor:
    """:func:`powerprop`, for weights whose pace should not depend on whether the optimizer forgets a gradient's size.

    By the chain rule, the slope enters a step of ``SGD`` twice, so that a weight at zero would move a hundredth as far
    as the Gaussian's location. Here the gradient is that of the value, and the slope enters once, as with ``Adam``. It
    is a direction of ascent, not a derivative: not for methods that search along a line.
    """
    still = weight.detach()
    return powerprop(still, slope) + (weight - still)


def inverse_powerprop(value: Tensor, slope: float = POWERPROP_SLOPE) -> Tensor:
    """The inverse of :func:`powerprop`."""
    return 2.0 * value / (slope + torch.sqrt(slope**2 + 4.0 * value.abs()))


def reference_noise(input_dim: int) -> Tensor:
    """Antithetic standard normal draws, ``(COUNT_REFERENCE, input_dim)``."""
    half = torch.randn(COUNT_REFERENCE // 2, input_dim)
    return torch.cat([half, -half])


def with_reference(x: Tensor, reference: Tensor) -> Tensor:
    """Rows of inputs appended to those of the reference: one pass of small layers for both costs half of two passes."""
    return torch.cat([reference, x.reshape(-1, x.shape[-1])])


def centered(hidden: Tensor, batch_shape: torch.Size) -> Tensor:
    """Rows of :func:`with_reference` after a network, less their mean over the reference."""
    center, rows = hidden.tensor_split([COUNT_REFERENCE])
    return (rows - center.mean(0)).reshape(*batch_shape, hidden.shape[-1])


class Packed(nn.Module):
    """Trained tensors that are concatenated to one parameter.

    The cost of an optimizer's step is per parameter: Pyro makes a torch optimizer for each.

    Shape:
        - output: Views of the parameter, one for each of ``parts`` and of its shape.

    Args:
        parts: Initial values, of one dtype; may be empty tensors.
        units: For each part, the change of an entry that changes by one the value which the entry stands for, > 0;
            None for ones. Trust regions are in these units (:class:`~pyro_flows.posterior.step_limit.StepLimit`).

    Attributes:
        unit: The unit of each entry, of the shape of ``flat``; None for ones.
    """

    unit: Tensor | None

    def __init__(self, parts: Sequence[Tensor], units: Sequence[float] | None = None) -> None:
        super().__init__()
        self.shapes = [part.shape for part in parts]
        self.flat = nn.Parameter(torch.cat([part.flatten() for part in parts]))
        unit = None if units is None else [torch.full((p.numel(),), u) for p, u in zip(parts, units, strict=True)]
        self.register_buffer("unit", None if unit is None else torch.cat(unit), persistent=False)

    def forward(self) -> list[Tensor]:
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class CenteredNetwork(nn.Module):
    r"""A SiLU multilayer perceptron less its mean over standard normal inputs; initialized to zero.

    Location and scale that do not depend on the input are left to the affine head. Without centering, every network in
    a flow learns them as well, in the same direction, and the first steps overshoot jointly: far from the posterior
    all gradients agree, and Adam moves each weight by the learning rate. For the same reason the last layer is scaled
    by :math:`1/\sqrt{H}`, and its weights go through :func:`powerprop`.

    Args:
        input_dim: Length of the input.
        hidden_dims: Widths of the hidden layers, at least one.
        output_dim: Length of the output.
    """

    reference: Tensor

    def __init__(self, input_dim: int, hidden_dims: Sequence[int], output_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_hidden_layers(input_dim, hidden_dims))
        self.head = nn.Linear(hidden_dims[-1], output_dim, bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("reference", reference_noise(input_dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = with_reference(x.clamp(-INPUT_BOUND, INPUT_BOUND), self.reference)
        hidden = centered(self.trunk(rows), x.shape[:-1])
        return F.linear(hidden / math.sqrt(hidden.shape[-1]), powerprop(self.head.weight))


def _hidden_layers(input_dim: int, hidden_dims: Sequence[int]) -> Iterator[nn.Module]:
    for size_in, size_out in pairwise([input_dim, *hidden_dims]):
        yield nn.Linear(size_in, size_out)
        yield nn.SiLU()


class ContextParameters(nn.Module):
    """A free tensor, plus a SiLU network of the context where there is one.

    It allows one class for conditional and unconditional transforms. The network's output is initialized to zero. In
    layers that refine an affine head, its last hidden layer is scaled by :math:`1/H` and its last weights go through
    :func:`powerprop`, as in couplings: Adam moves each weight by the learning rate, so a sum over H of them moves H
    times as fast, and knots of a spline that move by 1 in a step give outliers in the tails.

    Shape:
        - context: ``(..., context_dim)`` or None.
        - output: ``(..., *init.shape)``, or ``init.shape`` without a context.

    Args:
        init: Initial value, for every context.
        context_dim: Length of the context. 0 means that :meth:`forward` returns the free tensor itself.
        hidden_dims: Widths of the network's hidden layers, at least one.
        refines: Whether the layer refines others; false in an affine head.
    """

    def __init__(
        self, init: Tensor, context_dim: int = 0, hidden_dims: Sequence[int] = (64,), *, refines: bool = True
    ) -> None:
        super().__init__()
        self.value = nn.Parameter(init.clone())
        self.refines = refines
        self.trunk: nn.Sequential | None = None
        self.head: nn.Linear | None = None
        if context_dim:
            self.trunk = nn.Sequential(*_hidden_layers(context_dim, hidden_dims))
            self.head = nn.Linear(hidden_dims[-1], math.prod(init.shape))
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, context: Tensor | None = None) -> Tensor:
        if self.trunk is None or self.head is None:
            return self.value
        assert context is not None
        hidden = self.trunk(context)
        if self.refines:
            weight, bias = (powerprop(p, HEAD_SLOPE) for p in (self.head.weight, self.head.bias))
            by_context = F.linear(hidden / hidden.shape[-1], weight, bias)
        else:
            by_context = self.head(hidden)
        return self.value + by_context.reshape(context.shape[:-1] + self.value.shape)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Overwrite the free tensor, which is the initial value."""
        self.value.copy_(value)
