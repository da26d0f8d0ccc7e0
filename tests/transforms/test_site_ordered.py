# SPDX-License-Identifier: Apache-2.0
"""The model-ordered map, drawn block by block and scored in parallel, against plain loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.transforms import SiteOrderedAffine
from pyro_flows.transforms.networks import INPUT_BOUND, powerprop
from tests.common import randomize_parameters


def naive(transform: SiteOrderedAffine, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """One vector, ``(D,)``, and its log-determinant, from the trained numbers; the context may have length 0."""
    log_scale, below, *conditioners = transform.packed()
    free, entries = powerprop(log_scale), powerprop(below)
    y, ladj = x.new_zeros(0), free.sum()
    number = 0  # of the block, among those that are conditional on something
    done = 0  # entries of triangular factors
    for size in transform.block_sizes:
        here = slice(len(y), len(y) + size)
        factor = torch.eye(size, dtype=x.dtype)
        if size > 1:
            factor = factor + entries[done : done + size**2].reshape(size, size).tril(-1)
            done += size**2
        noise = free[here].exp() * (factor @ x[here])
        parents = torch.cat([context, y])
        if len(parents):
            loc, shift, log_scale = conditional(transform, conditioners, number, size, parents)
            y = torch.cat([y, loc + log_scale.exp() * (noise + shift)])
            ladj = ladj + log_scale.sum()
            number += 1
        else:
            y = noise
    return y, ladj


def conditional(
    transform: SiteOrderedAffine, conditioners: list[Tensor], number: int, size: int, parents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Location, shift and log-scale of one block from its parents' values: linear, and a network in the last two."""
    heads, free_shift, linear, project, *layers = conditioners
    before, width = sum(transform.sizes[:number]), len(parents)

    def network(values: Tensor) -> Tensor:
        first, bias = layers[0][number][:, :width], layers[1][number]
        hidden = F.silu(first @ values + bias)
        for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
            hidden = F.silu(weight[number] @ hidden + bias[number])
        return hidden

    center = torch.stack([network(noise[:width]) for noise in transform.reference]).mean(0)
    head = powerprop(heads[2 * before : 2 * (before + size)]) / math.sqrt(heads.shape[-1])
    bent = head @ (network(parents.clamp(-INPUT_BOUND, INPUT_BOUND)) - center)
    slope = powerprop(linear[3 * before : 3 * (before + size)])
    if transform.rank is None:
        straight = slope[:, :width] @ parents
    else:
        rows = slice(number * transform.rank, (number + 1) * transform.rank)
        straight = slope @ (project[rows, :width] @ parents)
    loc, shift, log_scale = straight.split(size)
    shift, log_scale = shift + bent[:size] + free_shift[before : before + size], log_scale + bent[size:]
    bound = transform.log_scale_bound
    return loc, shift, bound * torch.tanh(log_scale / bound)


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("hidden_dims", [(6,), (6, 5)])
@pytest.mark.parametrize("block_sizes", [(1, 2, 3), (3, 1, 1, 2), (4,)])
def test_both_forms_are_the_definition(
    block_sizes: tuple[int, ...], hidden_dims: tuple[int, ...], rank: int | None, context_dim: int
) -> None:
    dim = sum(block_sizes)
    transform = SiteOrderedAffine(dim, context_dim, block_sizes=block_sizes, hidden_dims=hidden_dims, rank=rank)
    transform = transform.double()
    randomize_parameters(transform, 0.7)
    x, context = 3.0 * torch.randn(5, dim).double(), torch.randn(5, context_dim).double()
    pairs = [naive(transform, *row) for row in zip(x, context, strict=True)]
    expected, ladj = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    around = context if context_dim else None
    for found, right in zip(transform.forward_and_ladj(x, around), (expected, ladj), strict=True):
        torch.testing.assert_close(found, right)
    for found, right in zip(transform.inverse_and_ladj(expected, around), (x, -ladj), strict=True):
        torch.testing.assert_close(found, right)
