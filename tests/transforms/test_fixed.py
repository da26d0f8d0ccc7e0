# SPDX-License-Identifier: Apache-2.0
"""Parameters that training leaves as they are stay that, wherever a module goes."""

from __future__ import annotations

import copy
import io

import torch

from pyro_flows.transforms import FixedParameter, FullRankPreconditioner


def test_a_fixed_parameter_stays_one() -> None:
    module = FullRankPreconditioner(3)
    module.set(torch.randn(3), torch.eye(3) + torch.ones(3, 3).tril(-1))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = FullRankPreconditioner(3)
    fresh.load_state_dict(module.state_dict())
    copies = [copy.deepcopy(module), torch.load(buffer, weights_only=False), fresh, copy.deepcopy(module).double()]
    for other in copies:
        assert [type(parameter) for parameter in other.parameters()] == [FixedParameter, FixedParameter]
        torch.testing.assert_close(other.factor.detach().float(), module.factor.detach())
        assert other.factor is not module.factor


def test_shared_ones_are_copied_once() -> None:
    parameter = FixedParameter(torch.ones(2))
    one, other = copy.deepcopy([parameter, parameter])
    assert one is other and one is not parameter


def test_training_leaves_it() -> None:
    module = FullRankPreconditioner(2)
    module.set(torch.ones(2), 2.0 * torch.eye(2))
    x = torch.randn(5, 2, requires_grad=True)
    module.forward_and_ladj(x)[0].sum().backward()
    assert x.grad is not None and all(parameter.grad is None for parameter in module.parameters())
