# SPDX-License-Identifier: Apache-2.0
"""L1. Affine couplings whose hidden units respond to given directions at first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_flows._checks import shown
from pyro_flows.transforms.affine_coupling import AffineCouplings

__all__ = ["DirectedCouplings"]

# Standard deviation of a hidden unit's input from standard normal noise: large enough for the unit to bend within the
# bulk of the noise, at a place that its bias gives.
GAIN = 3.0


class DirectedCouplings(AffineCouplings):
    r"""Affine couplings, networks of which begin with units :math:`\mathrm{silu}(3\, a^\top x + b)` along directions a.

    A posterior often differs from a Gaussian along a few hundred directions only, those in which its observations see
    it. Training finds such directions in dozens of dimensions slowly, by noisy gradients; given them, it only has to
    find how far to bend along each. They are trained as all weights are.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        As in :class:`AffineCouplings`.
    """

    @torch.no_grad()
    def point(self, directions: Tensor) -> None:
        """Point the first units of each network along directions; the other units keep their random weights.

        Args:
            directions: Unit vectors, ``(count, input_dim)``; those beyond the width of the first layer are left out.

        Raises:
            ValueError: If the directions have another length.
        """
        if directions.dim() != 2 or directions.shape[-1] != self.input_dim:
            raise ValueError(
                f"{type(self).__name__}: expected directions of shape (count, {self.input_dim}), but got "
                f"{shown(tuple(directions.shape))}. Give each direction as a row."
            )
        weight, bias, *_ = self.packed()
        used = directions[: weight.shape[1]].to(weight)
        pointed = weight[:, : len(used), : self.split_dim]  # a context's weights stay
        pointed.copy_(GAIN * torch.stack([used[:, inputs] for inputs in self._inputs()]))
        bias[:, : len(used)].normal_()

    def _inputs(self) -> Iterator[Tensor]:
        """Coordinates that each network reads, in its order."""
        current = torch.arange(self.input_dim, device=self.final_order.device)
        for order, _ in self._layers():
            if order is not None:
                current = current[order]
            inputs, moved = self._parts(current)
            yield inputs
            current = torch.cat([moved, inputs])
