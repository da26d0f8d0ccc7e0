# SPDX-License-Identifier: Apache-2.0
"""The guides that version 0.1.0 stored, for the code of any version."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_flows import AutoFlowGuide, flows

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
DATA = (Y, SIGMA)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def subsampled(y: Tensor, sigma: Tensor) -> None:
    """Two latents a school, whose plate is seen in parts: a local plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y), subsample_size=4) as index:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        noise = pyro.sample("noise", dist.Gamma(2.0, 0.2))
        pyro.sample("y", dist.Normal(theta, (sigma[index].square() + noise.square()).sqrt()), obs=y[index])


def three_numbers(y: Tensor, sigma: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(2.0, 0.2))
    pyro.sample("y", dist.Normal(loc.sum(), scale).expand([8]).to_event(1), obs=y)


def correlated_schools(y: Tensor, sigma: Tensor) -> None:
    """Effects that the data do not tell apart, with Gaussian priors: pooled by matrices."""
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    a = pyro.sample("a", dist.Normal(0.0, tau).expand([2]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, tau).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal((a[:, None] + b).reshape(-1), 5.0).to_event(1), obs=y[:4])


def random_walk(y: Tensor, sigma: Tensor) -> None:
    """Priors that follow each other."""
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    level = torch.zeros(())
    for i in range(6):
        level = pyro.sample(f"level_{i}", dist.Normal(level, scale))
        pyro.sample(f"y_{i}", dist.Normal(level, sigma[i]), obs=y[i])


def encoder(y: Tensor, sigma: Tensor) -> Tensor:
    """Of each school, for the guide whose plate is amortized."""
    return torch.stack([y / 10.0, sigma / 10.0], -1)


def small(name: str, **options: Any) -> Any:
    """A recipe with narrow networks."""
    spec = type(flows.get(name))
    fields = spec.__dataclass_fields__
    narrow = {"hidden_dims": (4, 4), "coupling_dims": (4, 4), "count_bins": 4, "num_units": 2}
    return flows.get(name, **{key: value for key, value in narrow.items() if key in fields}, **options)


@torch.no_grad()
def densities(guide: Any, values: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Values of five draws, made here if there are none, and their log densities."""
    pyro.set_rng_seed(1)
    try:
        values = guide.sample_posterior(5, *DATA) if values is None else values
        rows = [{name: value[i] for name, value in values.items()} for i in range(5)]
        return values, torch.stack([guide.log_prob(row, *DATA) for row in rows])
    except NotImplementedError:  # a family without inverse knows the densities of its own draws only
        pyro.set_rng_seed(1)
        traces = [poutine.trace(guide).get_trace(*DATA) for _ in range(5)]
        drawn = [trace.nodes["_RETURN"]["value"] for trace in traces]
        values = {name: torch.stack([draw[name] for draw in drawn]) for name in drawn[0]}
        return values, torch.stack([trace.log_prob_sum() for trace in traces])


def _make(model: Callable[..., None], spec: Any, name: str, **options: Any) -> Any:
    return AutoFlowGuide(model, spec, name=name, **options)


FAMILIES = sorted(set(flows.names()) - {"maf"})
# Name -> a guide, which takes its name in the parameter store.
GUIDES: dict[str, Callable[[str], Any]] = {
    "eight schools": partial(_make, eight_schools, small("auto")),
    "local plate": partial(_make, subsampled, small("auto")),
    "amortized plate": partial(_make, eight_schools, small("auto"), amortize={"schools": encoder}),
    "matrices": partial(_make, correlated_schools, small("auto")),
    "random walk": partial(_make, random_walk, small("auto")),
    "low-rank head, local": partial(_make, subsampled, small("realnvp", head="low_rank")),
    "iaf, local": partial(_make, subsampled, small("iaf")),
    "householder, local": partial(_make, subsampled, small("householder")),
    **{f"{base} base": partial(_make, three_numbers, small("auto", base=base)) for base in ("student_t", "mixture")},
    **{name: partial(_make, three_numbers, small(name)) for name in FAMILIES},
}
# Those whose parameters in Pyro's store are kept too, in this file.
STORED = {"eight schools": "eight_schools.store", "local plate": "local_plate.store"}
