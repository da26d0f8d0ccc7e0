# SPDX-License-Identifier: Apache-2.0
"""What is special to the elementwise spline."""

from __future__ import annotations

import torch

from pyro_flows.transforms import Spline
from pyro_flows.transforms.spline import _before, _quadrature


def test_a_first_use_for_inference_leaves_training_alone() -> None:
    """Constants that are made in inference mode can't be a part of a graph; they were kept nevertheless."""
    for made in (_quadrature, _before):
        made.cache_clear()
    spline = Spline(2)
    with torch.inference_mode():
        spline.forward_and_ladj(torch.randn(3, 2))
    y, ladj = spline.forward_and_ladj(torch.randn(3, 2))
    (y.sum() + ladj.sum()).backward()
