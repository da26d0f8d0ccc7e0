# SPDX-License-Identifier: Apache-2.0
"""L1. Affine couplings (RealNVP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows._checks import checked, integer
from pyro_flows.transforms.coupling import Couplings

__all__ = ["AffineCouplings"]


class AffineCouplings(Couplings):
    r"""A stack of affine couplings: :math:`y_b = x_b \odot e^{s(x_a)} + t(x_a)`, :math:`y_a = x_a`.

    Log-scales are bounded by :math:`c \tanh(\cdot / c)`; Pyro clamps them, with a gradient that is not that
    of the value. Initialized to the identity.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector, at least 2.
        context_dim: Length of the context vector. 0 means unconditional.
        num_transforms: Number of couplings; at least 1.
        hidden_dims: Widths of each network's hidden layers.
        log_scale_bound: Largest absolute log-scale of one coupling, > 0.
        num_parts: Number of parts that are transformed in turn; see :class:`~pyro_flows.transforms.coupling.Couplings`.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017. arXiv:1605.08803, eq. (7)-(8).
    """

    @checked(input_dim=integer(2), num_transforms=integer(1), num_parts=integer(2))
    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        num_transforms: int = 4,
        hidden_dims: Sequence[int] = (64, 64),
        log_scale_bound: float = 1.0,
        num_parts: int = 2,
    ) -> None:
        super().__init__(
            input_dim,
            context_dim,
            num_transforms=num_transforms,
            hidden_dims=hidden_dims,
            count_raw=2,
            num_parts=num_parts,
        )
        self.log_scale_bound = log_scale_bound

    def _shift_log_scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = raw.chunk(2, -1)
        if self.log_scale_bound == 1.0:  # the default, with two operations fewer
            return shift, torch.tanh(log_scale)
        return shift, self.log_scale_bound * torch.tanh(log_scale / self.log_scale_bound)

    def _map(self, b: Tensor, raw: Tensor, *, with_slope: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        shift, log_scale = self._shift_log_scale(raw)
        return torch.addcmul(shift, b, log_scale.exp()), log_scale, None  # the slope does not depend on b

    def _unmap(self, b: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_log_scale(raw)
        return (b - shift) * (-log_scale).exp(), -log_scale
