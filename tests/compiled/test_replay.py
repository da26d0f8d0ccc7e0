# SPDX-License-Identifier: Apache-2.0
"""A function that is replayed gives what it gave, and is called itself wherever a replay would be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_flows.compiled.replay import SETTINGS, Replay

RECORDED = SETTINGS.recorded_call


class Counted:
    """Counts calls of a function."""

    def __init__(self, function: Callable[[Tensor], list[Tensor]]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return self.function(x)


def value_and_gradient(x: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = (x.tanh() * x.roll(1)).sum()
        return [value.detach(), *torch.autograd.grad(value, x)]


def replayed(function: Callable[[Tensor], list[Tensor]], count: int = 2 * RECORDED) -> Counted:
    """Call it so often with different numbers, and compare all results."""
    counted = Counted(function)
    replay = Replay(counted)
    for number in range(count):
        x = torch.full((4,), 0.1 * number) + torch.arange(4)
        before = counted.calls
        found = replay(x)
        spent = counted.calls - before
        for one, other in zip(found, function(x), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
        assert spent <= 2  # the second time to record it
    return counted


def test_values_and_gradients_without_the_function() -> None:
    counted = replayed(value_and_gradient)
    assert counted.calls == RECORDED + 2  # one of them to record, one to compare


def test_parameters_that_move_in_place_are_read() -> None:
    weight = torch.ones(4)
    replay = Replay(lambda: [(2.0 * weight).sum()])
    for _ in range(2 * RECORDED):
        weight += 1.0
        torch.testing.assert_close(replay()[0], (2.0 * weight).sum())


def test_what_changes_by_itself_is_found_out() -> None:
    """A number of Python's is a constant of the graph: the first replay differs from the function."""
    calls = []

    def drifting(x: Tensor) -> list[Tensor]:
        calls.append(None)
        return [x.sum() * len(calls)]

    replay = Replay(drifting)
    for _ in range(2 * RECORDED):
        before = len(calls)
        assert replay(torch.ones(2))[0].item() == 2.0 * (before + 1)


def test_branches_are_not_replayed() -> None:
    counted = replayed(lambda x: [x * 2.0 if x.sum() > 10.0 else x])
    assert counted.calls >= 2 * RECORDED


def test_a_replay_that_raises_is_left_to_the_function() -> None:
    table = torch.arange(4.0)

    def look_up(x: Tensor) -> list[Tensor]:
        try:
            return [table[x.long()]]
        except IndexError:
            return [torch.full((4,), torch.nan)]

    replay = Replay(look_up)
    for _ in range(2 * RECORDED):
        assert torch.equal(replay(torch.ones(4))[0], torch.ones(4))
    assert replay(9.0 * torch.ones(4))[0].isnan().all()
    assert torch.equal(replay(2.0 * torch.ones(4))[0], 2.0 * torch.ones(4))


def test_it_is_not_recorded_where_numbers_are_not_finite() -> None:
    counted = Counted(lambda x: [x / x])
    replay = Replay(counted)
    for _ in range(2 * RECORDED):
        replay(torch.zeros(4))
    assert counted.calls == 2 * RECORDED


@pytest.mark.parametrize("size", [1, 5])
def test_other_shapes_are_the_functions(size: int) -> None:
    counted = Counted(value_and_gradient)
    replay = Replay(counted)
    for _ in range(2 * RECORDED):
        replay(torch.ones(4))
    before = counted.calls
    assert len(replay(torch.ones(size))[1]) == size
    assert counted.calls == before + 1


def test_torchs_generator_is_where_it_would_be_without() -> None:
    replay = Replay(lambda x: [x + torch.randn(4)])
    torch.manual_seed(0)
    found = [replay(torch.zeros(4))[0] for _ in range(RECORDED)]
    torch.manual_seed(0)
    for value in found:
        assert torch.equal(value, torch.randn(4))
