# SPDX-License-Identifier: Apache-2.0
"""Real posteriors with reference draws: how close each guide comes, by defaults.

    python tests/benchmarks/posteriors.py FOLDER [--only NAME ...] [--guides NAME ...] [--seeds 1]
        [--numpyro | --as-written] [--write]

FOLDER is a Python package with ``names()`` and ``load_posterior(name)``, whose result has ``model``, ``data`` (keyword
arguments), ``to_reference(samples)``, ``mean`` and ``sd`` by parameter. ``AutoFlowGuide`` is trained by ``fit`` with
nothing set; its peers by plain SVI, 2000 steps of 16 particles, Adam at 0.01 with decay. ``--numpyro`` adds NumPyro's
guides, by 5000 steps, for the models of which numpyro_guides.py has a twin, and makes a table of these alone.
``--as-written`` runs each model twice and makes a table of both: as it is, written to broadcast, and through
``as_written(model)`` of the package's module of that name, which refuses particles as models do that are written for
one draw; there, peers draw their particles one after the other. With several seeds, cells are medians, and the worst in
brackets. Run by hand, never by pytest.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from guides import GUIDES
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from tables import TABLES, as_rst

from pyro_flows import fit
from pyro_flows.diagnostics import log_weights
from pyro_flows.diagnostics.evidence import estimate_evidence

HEADER = (
    "posterior",
    "guide",
    "ELBO",
    "log evidence",
    "gap",
    "k-hat",
    "ESS / S",
    "worst mean error, sds",
    "worst log sd ratio",
    "CPU seconds",
)
# Forms of a model, in the order in which they are run: seconds are compared with the first's.
BROADCASTING, AS_WRITTEN = "broadcasting", "as written"


class Score(NamedTuple):
    """One run; the columns after the names."""

    elbo: float
    log_evidence: float
    gap: float
    khat: float
    ess: float
    mean_error: float
    log_sd_ratio: float
    seconds: float


# Which of several values is the worst; the largest elsewhere.
WORST: dict[str, Callable[[Sequence[float]], float]] = {"ess": min}


def score(posterior: Any, guide: AutoGuide, count: int, seconds: float) -> tuple[Score, dict[str, tuple[float, float]]]:
    """Evidence and importance weights; by parameter, signed error of the mean in reference sds and log sd ratio."""
    weights, samples = log_weights(posterior.model, guide, count, kwargs=posterior.data)
    return summarize(posterior, weights, samples, seconds)


def summarize(
    posterior: Any, weights: torch.Tensor, samples: Any, seconds: float
) -> tuple[Score, dict[str, tuple[float, float]]]:
    """See :func:`score`."""
    found = estimate_evidence(weights.unsqueeze(-1))
    elbo, log_evidence = weights.mean().item(), found.log_evidence.item()
    errors = moment_errors(posterior, samples)
    mean_error, log_sd_ratio = (max(abs(pair[i]) for pair in errors.values()) for i in (0, 1))
    khat, ess = found.khat.item(), found.ess.item() / len(weights)
    return Score(elbo, log_evidence, log_evidence - elbo, khat, ess, mean_error, log_sd_ratio, seconds), errors


def moment_errors(posterior: Any, samples: Any) -> dict[str, tuple[float, float]]:
    """By parameter: signed error of the mean, in reference sds, and log ratio of sds."""
    errors = {}
    for name, draws in posterior.to_reference(samples).items():
        if name in posterior.mean:
            error = (float(draws.mean()) - posterior.mean[name]) / posterior.sd[name]
            errors[name] = (error, math.log(float(draws.std()) / posterior.sd[name]))
    return errors


def spread(scores: Sequence[Score]) -> list[str]:
    """A cell a column: the median over seeds, and of what can be good or bad the worst."""
    cells = []
    for name, column in zip(Score._fields, zip(*scores, strict=True), strict=True):
        worst = "" if len(scores) == 1 or name in ("elbo", "log_evidence") else f" ({WORST.get(name, max)(column):.3f})"
        cells.append(f"{statistics.median(column):.3f}{worst}")
    return cells


def train(name: str, posterior: Any, seed: int, *, vectorize: bool = True) -> tuple[AutoGuide, float]:
    """A trained guide, and CPU seconds; ``vectorize`` is for the peers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = GUIDES[name](posterior.model)
    begin = time.process_time()  # one thread: wall time on a core of its own
    if name == "AutoFlowGuide":
        print(fit(posterior.model, guide, kwargs=posterior.data, progress=sys.stderr.isatty()), flush=True)
    else:
        schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.01 ** (1 / 2000)}
        optim = pyro.optim.ExponentialLR(schedule)
        svi = SVI(posterior.model, guide, optim, Trace_ELBO(num_particles=16, vectorize_particles=vectorize))
        for _ in range(2000):
            svi.step(**posterior.data)
            optim.step()
    return guide, time.process_time() - begin


def run(options: argparse.Namespace, package: Any, peers: Any, title: str, name: str, form: str) -> list[Score]:
    """Scores of a guide on one form of a posterior, by seed; NaN where it raises."""
    scores = []
    for seed in range(options.seeds):
        posterior = package.load_posterior(title)
        if form == AS_WRITTEN:
            module = importlib.import_module(f"{package.__name__}.as_written")
            posterior = replace(posterior, model=module.as_written(posterior.model))
        label = f"{title}, {name}, {form}, seed {seed}"
        try:
            if name not in GUIDES:
                scores.append(summarize(posterior, *peers.run(title, name, posterior, options.draws, seed))[0])
                continue
            guide, seconds = train(name, posterior, seed, vectorize=form == BROADCASTING)
            scores.append(score(posterior, guide, options.draws, seconds)[0])
            print(f"{label}: " + "  ".join(spread(scores[-1:])), flush=True)
        except (ValueError, RuntimeError) as error:
            print(f"{label}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            scores.append(Score(*(math.nan,) * len(Score._fields)))
    return scores


def main() -> None:
    """Run, print a line each, and write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--only", nargs="*", help="names of posteriors; all by default")
    made.add_argument("--guides", nargs="*", default=list(GUIDES), choices=list(GUIDES))
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--draws", type=int, default=20_000)
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--numpyro", action="store_true", help="NumPyro's guides too; posteriors_numpyro.rst")
    kinds.add_argument("--as-written", action="store_true", help="for one draw too; posteriors_as_written.rst")
    made.add_argument("--write", action="store_true", help="write the table in docs/tables: posteriors.rst by default")
    options = made.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(options.folder.resolve().parent))
    package = importlib.import_module(options.folder.resolve().name)
    peers: Any = importlib.import_module("numpyro_guides") if options.numpyro else None
    rows = []
    for title in options.only or (list(peers.TWINS) if peers else package.names()):
        extra = list(peers.GUIDES) if peers and title in peers.TWINS else []
        for name in options.guides + extra:
            first: list[Score] = []
            for form in (BROADCASTING, AS_WRITTEN) if options.as_written else (BROADCASTING,):
                scores = run(options, package, peers, title, name, form)
                first = first or scores
                rows.append([title, name, *spread(scores)])
                if options.as_written:
                    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(scores, first, strict=True))
                    rows[-1] = [title, name, form, *spread(scores), f"{ratio:.2f}"]
                print("  ".join(rows[-1]), flush=True)
    header = (*HEADER[:2], "model", *HEADER[2:], "CPU seconds, x broadcasting") if options.as_written else HEADER
    suffix = "_numpyro" if options.numpyro else "_as_written" if options.as_written else ""
    if options.write:
        (TABLES / f"posteriors{suffix}.rst").write_text(as_rst(header, rows))


if __name__ == "__main__":
    main()
