# SPDX-License-Identifier: Apache-2.0
"""Couplings that begin with units along given directions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pyro_flows.transforms import DirectedCouplings


class Recorded(DirectedCouplings):
    """Keeps what the hidden units of each network receive."""

    def _condition(self, a: Tensor, layer: Sequence[Tensor], context: Tensor | None) -> Tensor:
        weight, bias, *_ = layer
        self.received.append(a @ weight.mT + bias)
        return super()._condition(a, layer, context)


@pytest.mark.parametrize("num_parts", [2, 3])
def test_units_respond_along_the_directions(num_parts: int) -> None:
    torch.manual_seed(0)
    couplings = Recorded(6, num_transforms=7, hidden_dims=(8,), num_parts=num_parts)
    directions = torch.nn.functional.normalize(torch.randn(5, 6), dim=-1)
    couplings.point(directions)
    couplings.received = []
    couplings(torch.cat([torch.zeros(1, 6), torch.eye(6)]))  # the identity, as long as it is not trained
    assert len(couplings.received) == 7
    times_read = torch.zeros(6)
    for at in couplings.received:
        response = (at[1:] - at[:1])[:, :5]  # of each unit to each coordinate
        is_read = response.abs().sum(-1) > 0
        times_read += is_read
        assert is_read.sum() == couplings.split_dim
        torch.testing.assert_close(response[is_read], 3.0 * directions.mT[is_read], atol=1e-5, rtol=1e-5)
    assert (times_read > 0).all()


def test_no_more_directions_than_units() -> None:
    couplings = DirectedCouplings(3, num_transforms=1, hidden_dims=(4,))
    before = [part.clone() for part in couplings.packed()]
    couplings.point(torch.eye(3)[:2])
    changed = [(new != old).any(-1) for new, old in zip(couplings.packed()[:2], before[:2], strict=True)]
    assert changed[0].tolist() == [[True, True, False, False]]
    couplings.point(torch.eye(3).repeat(3, 1))  # nine


def test_directions_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"shape \(count, 3\), but got \(2, 4\)"):
        DirectedCouplings(3).point(torch.eye(4)[:2])
