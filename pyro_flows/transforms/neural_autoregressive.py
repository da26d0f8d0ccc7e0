# SPDX-License-Identifier: Apache-2.0
"""L1. The neural autoregressive map (deep sigmoidal flow)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.autoregressive import MaskedAutoregressive

__all__ = ["NeuralAutoregressive"]

# Smallest steepness of a unit, which keeps the map increasing in both tails for any output of the network.
MIN_STEEPNESS = 1e-3
# softplus(STEEPNESS_OFFSET) + MIN_STEEPNESS == 1.
STEEPNESS_OFFSET = math.log(math.expm1(1.0 - MIN_STEEPNESS))
# Initial spread of the units' offsets. Without it, all units would always get the same gradient.
INIT_OFFSET = 0.1


class NeuralAutoregressive(MaskedAutoregressive):
    r"""Autoregressive map of each coordinate by a small monotone network, a mixture of sigmoids, that depends on the
    noise of the coordinates before it (NAF, deep sigmoidal flow):

    .. math::
        y_i = \mathrm{logit} \sum_j w_j \, \sigma(a_j x_i + b_j), \qquad a_j > 0, \quad w_j > 0, \quad
        \sum_j w_j = 1,

    with :math:`a, b, w` outputs of a masked network of :math:`x_{<i}`. It is evaluated as the difference of
    :math:`\log \sum_j w_j \sigma(\cdot)` and :math:`\log \sum_j w_j \sigma(-\cdot)`, so no sigmoid saturates, and its
    tails are straight lines of slope :math:`\min_j a_j`. Pyro's ``NeuralAutoregressive`` is flat beyond 16 in float32,
    and returns the log-determinant of its last input, whatever its arguments.

    Initialized within 0.01 of the identity. Sampling takes one pass; there is no inverse in closed form.

    Args:
        input_dim: Length of the transformed vector, at least 1.
        context_dim: Length of the context vector. 0 means unconditional.
        hidden_dims: Widths of the masked network's hidden layers; raised to ``2 * input_dim`` if smaller.
        num_units: Sigmoids per coordinate, >= 1.
        order: Coordinates from first to last. None means 0 to ``input_dim - 1``.

    References:
        Huang, Krueger, Lacoste, Courville. Neural Autoregressive Flows. ICML 2018. arXiv:1804.00779, eq. (8).
    """

    has_inverse: ClassVar[bool] = False

    @checked(num_units=integer(2))
    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        num_units: int = 8,
        order: Sequence[int] | Tensor | None = None,
    ) -> None:
        offsets = INIT_OFFSET * torch.randn(input_dim, num_units)
        offsets = offsets - offsets.mean(-1, keepdim=True)
        zeros = torch.zeros_like(offsets)
        super().__init__(input_dim, context_dim, torch.cat([zeros, offsets, zeros], -1), hidden_dims, order)
        self.num_units = num_units

    def _univariate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        steepness, offset, weight = params.split(self.num_units, -1)  # (..., D, num_units) each
        steepness = F.softplus(steepness + STEEPNESS_OFFSET) + MIN_STEEPNESS
        log_weight = F.log_softmax(weight, -1)
        inner = torch.addcmul(offset, steepness, x.unsqueeze(-1))
        above, below = F.logsigmoid(inner), F.logsigmoid(-inner)
        log_value = torch.logsumexp(log_weight + above, -1)
        log_rest = torch.logsumexp(log_weight + below, -1)
        # d logit(s) = ds / (s (1 - s)).
        log_slope = torch.logsumexp(log_weight + steepness.log() + above + below, -1) - log_value - log_rest
        return log_value - log_rest, log_slope
