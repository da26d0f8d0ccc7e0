# SPDX-License-Identifier: Apache-2.0
"""Sums over enumerated sites are those of brute force."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_flows.models.batching import ENUMERATED, BatchedModel
from pyro_flows.models.enumeration import enumerated_sites
from pyro_flows.models.traces import Call, by_draw, sample_nodes

Y = torch.tensor([0.3, -1.2, 0.9])
SIZES = {"regime": 2, "kind": 3, "sign": 2}


def model(y: Tensor, by_index: bool) -> None:
    """One enumerated site outside of the plate and two in it, the second given the first."""
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    regime = pyro.sample("regime", dist.Bernoulli(0.4))
    with pyro.plate("data", len(y)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        sign = pyro.sample("sign", dist.Bernoulli(0.1 + 0.2 * kind))
        mean = locs[kind] if by_index else ((kind.unsqueeze(-1) == torch.arange(3)) * locs).sum(-1)
        pyro.sample("y", dist.Normal(mean * (2.0 * sign - 1.0) + regime, 0.7), obs=y)


def brute_force(values: Tensor) -> Tensor:
    """Log joint of one draw, by all states: of the regime, and of each item's kind and sign."""
    per_regime = []
    for regime in range(2):
        total = torch.zeros(())
        for item in range(len(Y)):
            states = []
            for kind, sign in itertools.product(range(3), range(2)):
                given = {"locs": values, "regime": torch.tensor(float(regime))}
                given |= {"kind": torch.full((3,), kind), "sign": torch.full((3,), float(sign))}
                trace = poutine.trace(poutine.condition(model, data=given)).get_trace(Y, True)
                trace.compute_log_prob()
                states.append(sum(trace.nodes[name]["log_prob"][item] for name in ("kind", "sign", "y")))
            total = total + torch.stack(states).logsumexp(0)
        per_regime.append(total + dist.Bernoulli(0.4).log_prob(torch.tensor(float(regime))))
    return torch.stack(per_regime).logsumexp(0) + dist.Normal(0.0, 1.0).log_prob(values).sum()


@pytest.mark.parametrize("by_index", [False, True], ids=["plate", "vmap"])
def test_two_sites_in_a_plate_and_one_outside(by_index: bool) -> None:
    enumerated = config_enumerate(model)
    batched = BatchedModel("test", enumerated, Call((Y, by_index), {}), {"locs": torch.randn(3, 3)})
    assert batched.is_vectorized and batched.is_mapped == by_index
    assert set(batched.enumerated) == set(SIZES)
    values = torch.randn(4, 3)
    nodes = sample_nodes(batched({"locs": values}))
    found = torch.stack([by_draw(node["log_prob"]) for node in nodes.values()]).sum(0)
    torch.testing.assert_close(found, torch.stack([brute_force(row) for row in values]))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("by_index", [False, True], ids=["plate", "vmap"])
def test_sums_stay_apart_by_item_where_nothing_joins_them(by_index: bool, dim: int) -> None:
    """What item a term belongs to is kept: its dimension is in Pyro's place."""

    @config_enumerate
    def apart(y: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(Y), dim=dim):
            which = pyro.sample("which", dist.Bernoulli(0.3)).long()
            mean = locs[which] if by_index else torch.where(which == 1, locs[..., 1], locs[..., 0])
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    y = Y.reshape(-1, *(1,) * (-1 - dim))
    batched = BatchedModel("test", apart, Call((y,), {}), {"locs": torch.randn(3, 2)})
    assert batched.is_vectorized and batched.is_mapped == by_index
    values = torch.randn(4, 2)
    (term,) = (n["log_prob"] for name, n in sample_nodes(batched({"locs": values})).items() if ENUMERATED in name)
    parts = dist.Normal(values.unsqueeze(1), 0.5).log_prob(Y.unsqueeze(-1)) + torch.tensor([0.7, 0.3]).log()
    torch.testing.assert_close(term, parts.logsumexp(-1).reshape(4, *y.shape))


def test_which_sites_are_enumerated() -> None:
    trace = poutine.trace(config_enumerate(model)).get_trace(Y, True)
    assert enumerated_sites(sample_nodes(trace)) == dict.fromkeys(SIZES, "parallel")
    assert enumerated_sites(sample_nodes(poutine.trace(model).get_trace(Y, True))) == {}
