# SPDX-License-Identifier: Apache-2.0
"""The objectives of ``fit`` on posteriors that a guide can't follow: tails, correlations, modes; all have evidence 1.

    python tests/benchmarks/objectives.py [--seeds 3] [--write]

Run by hand, never by pytest; a quarter of an hour. ``--write`` puts the table in ``docs/tables``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from tables import Measure, Rows, parser, run
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit

NUM_DRAWS = 100_000
OBJECTIVES = ("elbo", "importance_weighted", "forward_kl")


def posterior(target: Any, dim: int) -> Callable[[], None]:
    """A model with this posterior, whose prior says nothing about it."""
    prior = dist.Normal(torch.zeros(dim), 30.0).to_event(1)

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.factor("target", target(z) - prior.log_prob(z))

    return model


def student_t(df: float, dim: int) -> Callable[[Tensor], Tensor]:
    return dist.MultivariateStudentT(torch.tensor(df), torch.zeros(dim), torch.eye(dim)).log_prob


def correlated(dim: int, correlation: float) -> Callable[[Tensor], Tensor]:
    covariance = (1.0 - correlation) * torch.eye(dim) + correlation
    return dist.MultivariateNormal(torch.zeros(dim), covariance).log_prob


def two_modes(distance: float) -> Callable[[Tensor], Tensor]:
    parts = dist.Normal(torch.tensor([-0.5, 0.5]) * distance, 1.0)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)
    return lambda z: mixture.log_prob(z.squeeze(-1))


# Name -> log density, dimension, flow, and half the width of the central 90 % of a coordinate.
TARGETS: dict[str, tuple[Callable[[Tensor], Tensor], int, str, float]] = {
    "Student-t, 2 degrees of freedom, 1-D": (student_t(2.0, 1), 1, "diagonal_normal", 2.920),
    "Student-t, 2 degrees of freedom, 1-D; a flow": (student_t(2.0, 1), 1, "auto", 2.920),
    "Student-t, 5 degrees of freedom, 10-D": (student_t(5.0, 10), 10, "diagonal_normal", 2.015),
    "normal, correlations 0.9, 3-D": (correlated(3, 0.9), 3, "diagonal_normal", 1.645),
    "normal, correlations 0.9, 10-D": (correlated(10, 0.9), 10, "diagonal_normal", 1.645),
    "two modes, 6 standard deviations apart": (two_modes(6.0), 1, "diagonal_normal", 4.216),
    "two modes, 6 standard deviations apart; a flow": (two_modes(6.0), 1, "auto", 4.216),
}


def objectives(seeds: int) -> tuple[Sequence[str], Rows]:
    """Gap, k-hat, effective draws of 2000 and width of the central 90 %: medians over seeds."""
    rows = []
    for name, (target, dim, flow, width) in TARGETS.items():
        model = posterior(target, dim)
        for objective in OBJECTIVES:
            found = []
            for seed in range(seeds):
                guide = AutoFlowGuide(model, flow=flow)
                result = fit(model, guide, objective=objective, seed=seed, progress=False)
                assert result.diagnosis is not None
                pyro.set_rng_seed(seed)
                low, high = guide.sample_posterior(NUM_DRAWS)["z"][:, 0].quantile(torch.tensor([0.05, 0.95])).tolist()
                ess = result.diagnosis.ess
                found.append((-result.elbo, result.khat, ess, (high - low) / (2 * width)))
            gap, khat, ess, relative = (statistics.median(column) for column in zip(*found, strict=True))
            cells = [f"{gap:.2f}", f"{khat:.2f}", f"{ess:.0f}", f"{relative:.2f}"]
            rows.append([name, f'``"{flow}"``', f'``"{objective}"``', *cells])
            print(*rows[-1], flush=True)
    return ["posterior", "flow", "objective", "gap, nats", "k-hat", "effective draws", "width / exact"], rows


MEASURES: dict[str, Measure] = {"objectives": objectives}

if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, seeds=3).parse_args())
