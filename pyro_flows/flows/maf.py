# SPDX-License-Identifier: Apache-2.0
"""L2. Masked autoregressive flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.iaf import IAF
from pyro_flows.transforms import FlowTransform, Inverse

__all__ = ["MAF"]


@dataclass(frozen=True, kw_only=True)
class MAF(IAF):
    """Masked autoregressive flow (MAF): the inverse of an IAF, for densities of given values.

    One pass to score any value; up to a pass per dimension and layer to draw. Use it inside a model, as a learned
    prior or likelihood of observed data. A guide draws at every step, so ``AutoFlowGuide`` refuses it: use
    ``"iaf"`` there. Takes the hyper-parameters of :class:`IAF`.

    References:
        Papamakarios, Pavlakou, Murray. Masked Autoregressive Flow for Density Estimation. NeurIPS 2017.
        arXiv:1705.07057.
    """

    one_pass_sampling: ClassVar[bool] = False

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        return [Inverse(layer) for layer in super().layers(input_dim, context_dim)]
