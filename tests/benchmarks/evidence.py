# SPDX-License-Identifier: Apache-2.0
"""How well the guide knows a normalizing constant that is known exactly.

    python tests/benchmarks/evidence.py [funnel10] [--seeds 3] [--write]

Run by hand, never by pytest. ``--write`` puts the table in ``docs/tables``.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import pyro
from never_worse import funnel
from tables import Measure, Rows, parser, run

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.diagnostics import log_weights
from pyro_flows.diagnostics.evidence import estimate_evidence

REPEATS, SAMPLES = 100, 2000


def measure_funnel10(seeds: int) -> tuple[Sequence[str], Rows]:
    """Neal's funnel in 10-D, log evidence 0: error of the estimate from 2000 importance samples, over 100 repeats."""
    model = partial(funnel, 10)
    rows = []
    for seed in range(seeds):
        pyro.clear_param_store()
        guide = AutoFlowGuide(model)
        result = fit(model, guide, seed=seed, progress=sys.stderr.isatty())
        print(result, flush=True)
        pyro.set_rng_seed(seed)
        weights = log_weights(model, guide, REPEATS * SAMPLES)[0]
        errors = (weights.view(REPEATS, SAMPLES).logsumexp(-1) - math.log(SAMPLES)).abs().tolist()
        found = estimate_evidence(weights.unsqueeze(-1))
        rows.append(
            [
                str(seed),
                f"{statistics.mean(errors):.1e} +/- {statistics.stdev(errors) / math.sqrt(REPEATS):.0e}",
                f"{max(errors):.1e}",
                f"{-weights.mean().item():.1e}",
                f"{found.khat.item():.2f}",
                f"{found.ess.item() / len(weights):.4f}",
                f"{result.seconds:.0f}",
            ]
        )
    header = ("seed", "mean error, nats", "largest", "gap, nats", "k-hat", "ESS / S", "seconds")
    return header, rows


MEASURES: dict[str, Measure] = {"funnel10": measure_funnel10}


if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, 3).parse_args())
