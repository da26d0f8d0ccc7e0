# SPDX-License-Identifier: Apache-2.0
"""A flow of the library Zuko in a guide: ``AutoFlowGuide(model, flow=zuko_flow)``."""

import pyro.distributions as dist
import torch
import zuko
from torch import Tensor
from torch.distributions import constraints


class ZukoTransform(dist.TransformModule):
    """A Zuko flow from noise to latents; Zuko's own direction is from data to noise.

    Args:
        flow: A Zuko flow, such as ``zuko.flows.NSF(dim)``.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: torch.nn.Module) -> None:
        super().__init__()
        self.lazy = flow.transform

    def _call(self, noise: Tensor) -> Tensor:
        return self.lazy().inv(noise)

    def _inverse(self, latents: Tensor) -> Tensor:
        return self.lazy()(latents)

    def log_abs_det_jacobian(self, noise: Tensor, latents: Tensor) -> Tensor:
        return -self.lazy().log_abs_det_jacobian(latents, noise)


def zuko_flow(dim: int) -> ZukoTransform:
    """Spline couplings: ``passes=2`` makes both directions one pass each, and a guide draws at every step."""
    return ZukoTransform(zuko.flows.NSF(dim, transforms=3, hidden_features=(32, 32), passes=2))
