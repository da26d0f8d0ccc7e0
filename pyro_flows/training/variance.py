# SPDX-License-Identifier: Apache-2.0
"""L7. What reduces the variance of a step's gradients, in the guide's draws."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_flows.flows import FlowDistribution

__all__ = ["VarianceReduction"]


class VarianceReduction(Messenger):
    """Variance reduction of gradients: the particles' noise is a Latin hypercube sample, and a control variate removes
    noise that all particles of a mini-batch share."""

    def __init__(self, *, centered: bool) -> None:
        super().__init__()
        self.centered = centered

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], FlowDistribution):
            msg["fn"] = msg["fn"].stratified()
            if self.centered:
                msg["fn"] = msg["fn"].centered()
