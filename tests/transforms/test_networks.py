# SPDX-License-Identifier: Apache-2.0
"""How fast what coordinates do to one another may grow."""

from __future__ import annotations

import torch

from pyro_flows.transforms import AffineCouplings, FlowTransform, SiteOrderedAffine
from pyro_flows.transforms.networks import Packed, inverse_powerprop, powerprop
from tests.common import trained


def log_scale_after_one_step(transform: FlowTransform) -> float:
    """Largest log-determinant at typical inputs after one step of Adam at 0.01, all gradients of one sign."""
    x = torch.randn(100, 4)
    optim = torch.optim.Adam(transform.parameters(), lr=0.01)
    transform.forward_and_ladj(x.abs())[1].sum().neg().backward()
    optim.step()
    with torch.no_grad():
        return transform.forward_and_ladj(x)[1].abs().max().item()


def test_conditioners_leave_zero_slowly() -> None:
    """It grew by the learning rate times the input from the first step on: 0.15 and 0.04 here. With one particle all
    layers then overshot together, and one draw in forty steps had a loss of a million."""
    assert log_scale_after_one_step(SiteOrderedAffine(4, block_sizes=(1, 3))) < 0.03
    assert log_scale_after_one_step(AffineCouplings(4, num_transforms=2)) < 0.03


def test_blocks_that_follow_few_numbers_need_no_low_rank() -> None:
    """500 groups that follow two numbers had a factor of rank 16: eight times the parameters of all their slopes."""
    for block_sizes, shape in (((1, 1, 500), (3 * 501, 2)), ((20, 20, 20), (3 * 40, 16))):
        transform = SiteOrderedAffine(sum(block_sizes), block_sizes=block_sizes, rank=16)
        _, _, _, _, linear, *_ = transform.packed()
        assert linear.shape == shape


def test_packed_tensors_are_one_parameter() -> None:
    """An eager step costs by the parameter: couplings had six, and the site-ordered map nine."""
    parts = [torch.randn(2, 3), torch.zeros(0), torch.randn(4)]
    packed = Packed(parts)
    for view, part in zip(packed(), parts, strict=True):
        assert torch.equal(view, part)
    packed()[2].sum().backward()
    assert torch.equal(packed.flat.grad, torch.cat([torch.zeros(6), torch.ones(4)]))
    for transform in (
        AffineCouplings(4),
        SiteOrderedAffine(4, block_sizes=(1, 3)),
        SiteOrderedAffine(1, block_sizes=(1,)),
    ):
        assert len(trained(transform)) == 1


def test_eased_weights_and_their_inverse() -> None:
    value = torch.linspace(-2.0, 2.0, 101, dtype=torch.double)
    torch.testing.assert_close(powerprop(inverse_powerprop(value)), value)
    torch.testing.assert_close(inverse_powerprop(powerprop(value)), value)
    slope = torch.autograd.functional.jacobian(powerprop, torch.zeros(1))
    torch.testing.assert_close(slope, torch.full((1, 1), 0.1))
