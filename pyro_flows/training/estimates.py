# SPDX-License-Identifier: Apache-2.0
"""L7. Monte Carlo estimates of an ELBO: from how many draws, and their differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pyro_flows._checks import Settings

__all__ = ["Estimate", "EstimateSettings"]


@dataclass(frozen=True)
class EstimateSettings(Settings):
    """Number of draws of ELBO estimates.

    Attributes:
        num_runs: Number of runs of an estimate, >= 2; its standard error is that of their mean. With mini-batches, one
            run for each mini-batch of a pass if these are more.
        num_particles: Number of draws per run, >= 2. With ``num_runs`` this makes 10,000 draws, for a standard error of
            0.005 nats where log weights have a standard deviation of half a nat.
        min_runs: Smallest number of runs where each is the mean over several processes, so that their standard error is
            known, >= 2; or ``num_runs``, if that is smaller.
        max_values: Largest number of runs times particles times the size of the largest latent site; bounds time.
        max_evaluated: The same of all values, latent and observed; bounds time, by a few seconds.
        max_at_once: Largest number of values in a run, which is split where there are more: with nothing left in a
            processor's caches, each takes twice as long.
        num_sequential_runs: Number of runs, of a single draw each, of a model that can't be run at many draws at once.
        max_batches: Largest number of mini-batches of a pass that estimates go through.
        max_elements: Largest number of elements of the tensors of these mini-batches, which are kept in memory; 128 MiB
            in float32.
        num_tail_draws: Number of draws from which the tail of importance weights is estimated, at which k-hat has a
            standard error of about 0.1.
        num_gap_draws: Number of draws by which a gap is compared first.
        max_rounded_gap: Gap in nats up to which it is not asked how much of it is rounding.
        gap_errors: Number of standard errors by which it has to be larger or smaller then.
        max_khat: k-hat below which the tail is light: one such standard error below 0.7, the bound of Vehtari, Simpson,
            Gelman, Yao, Gabry. Pareto smoothed importance sampling. JMLR 25(72), 2024.
    """

    num_runs: int = 20
    num_particles: int = 500
    min_runs: int = 10
    max_values: int = 2**18
    max_evaluated: int = 2**27
    max_at_once: int = 2**20
    num_sequential_runs: int = 200
    max_batches: int = 200
    max_elements: int = 2**25
    num_tail_draws: int = 10_000
    num_gap_draws: int = 1000
    max_rounded_gap: float = 0.02
    gap_errors: float = 3.0
    max_khat: float = 0.6

    def shape(self, runs: int, parts: int, num_items: int, num_values: int) -> tuple[int, int]:
        """Number of runs of an estimate, a multiple of ``runs``, and of particles in each.

        Args:
            runs: Number of runs at least.
            parts: Number of parts of the data, over which the value of a run is averaged.
            num_items: Size of the largest latent site.
            num_values: Number of latent and observed values.
        """
        affordable = min(self.max_values // num_items, self.max_evaluated // num_values) // (runs * parts)
        particles = max(2, min(self.num_particles, affordable))
        pieces = min(-(-particles * num_values // self.max_at_once), particles // 2)
        return runs * pieces, particles // pieces

    def affordable_draws(self, num_values: int) -> int:
        """Number of draws from which the tail is estimated, each of which has so many values."""
        return min(self.num_tail_draws, max(self.num_gap_draws, self.max_evaluated // num_values))


class Estimate(NamedTuple):
    """A Monte Carlo estimate of an ELBO: mean, its standard error, the variance of one draw, and the values of runs.

    A run at whose draws the model raises is NaN, and left out of the mean.
    """

    mean: float
    error: float
    variance: float
    values: Tensor

    def gain_over(self, other: Estimate) -> tuple[float, float]:
        """Difference of the means and its standard error, with paired runs, which may share noise or mini-batches."""
        difference = self.values - other.values
        difference = difference[difference.isfinite()]
        if not (math.isfinite(self.mean) and math.isfinite(other.mean) and len(difference)):
            return self.mean - other.mean, math.inf
        error = (difference.var() / len(difference)).sqrt().item()
        return difference.mean().item(), error if math.isfinite(error) else math.inf
