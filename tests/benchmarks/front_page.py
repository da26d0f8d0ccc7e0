# SPDX-License-Identifier: Apache-2.0
"""The picture and the table of the front page: eight schools, exactly and by guides that one loop trains.

    OMP_NUM_THREADS=1 python tests/benchmarks/front_page.py [picture] [table] [--steps 6000] [--seeds 3]

``picture`` writes ``docs/figures/front_page.png``, in a minute. ``table`` prints README's, with each guide at the best
of three learning rates by its first seed, and says how much of the gap the second half of the steps closed, so that one
can see who has converged; a quarter of an hour.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import CosineAnnealingLR

from pyro_flows import AutoFlowGuide
from pyro_flows.__main__ import LOG_EVIDENCE, SIGMA, Settings, Y, exact_posterior, model
from pyro_flows.diagnostics import log_weights

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "front_page.png"
DEFAULT = Settings()
RATES = (0.005, 0.02, 0.05)
GUIDES: dict[str, Callable[..., AutoGuide]] = {
    "`AutoNormal`": AutoNormal,
    "`AutoMultivariateNormal`": AutoMultivariateNormal,
    "`AutoIAFNormal`, 2 layers": partial(AutoIAFNormal, num_transforms=2),
    "`AutoFlowGuide`": AutoFlowGuide,
}
ARGS = (torch.tensor(SIGMA), torch.tensor(Y))


def train(guide: AutoGuide, num_steps: int, learning_rate: float) -> None:
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": learning_rate}, "T_max": num_steps}
    optim = CosineAnnealingLR(schedule)
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=DEFAULT.num_particles, vectorize_particles=True))
    for _ in range(num_steps):
        svi.step(*ARGS)
        optim.step()


def gap_of(guide: AutoGuide) -> float:
    """Nats short of the log evidence, by 100,000 draws."""
    means = [log_weights(model, guide, DEFAULT.num_samples, ARGS)[0].mean().item() for _ in range(5)]
    return LOG_EVIDENCE - statistics.fmean(means)


def gap(make: Callable[..., AutoGuide], num_steps: int, learning_rate: float, seed: int) -> float:
    """That of a guide trained afresh."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make(model)
    train(guide, num_steps, learning_rate)
    return gap_of(guide)


def table(num_steps: int, seeds: int) -> None:
    print(
        "| guide | gap in nats: median (range) | learning rate | closed by the second half of the steps |",
        "|---|---|---|---|",
        sep="\n",
    )
    for name, make in GUIDES.items():
        first = {rate: gap(make, num_steps, rate, 0) for rate in RATES}
        best = min(first, key=lambda rate: first[rate])
        gaps = [first[best], *(gap(make, num_steps, best, seed) for seed in range(1, seeds))]
        later = gap(make, num_steps // 2, best, 0) - first[best]
        spread = f"{statistics.median(gaps):.3f} ({min(gaps):.3f} to {max(gaps):.3f})"
        print(f"| {name} | {spread} | {best:g} | {later:.3f} |", flush=True)


def picture() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pyro.set_rng_seed(0)
    exact = exact_posterior(*ARGS, DEFAULT.num_samples)
    panels = {"posterior\nby quadrature": (exact["mu"], exact["log tau"])}
    for guide in (AutoNormal(model), AutoFlowGuide(model)):
        train(guide, DEFAULT.num_steps, DEFAULT.learning_rate)
        weights, values = log_weights(model, guide, DEFAULT.num_samples, ARGS)
        short = LOG_EVIDENCE - weights.mean().item()
        name = f"{type(guide).__name__}(model)\n{short:.3f} nats short"
        panels[name] = (values["mu"].flatten(), values["tau"].flatten().log())
        print(name)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True, layout="constrained")
    for ax, (name, (mu, log_tau)) in zip(axes, panels.items(), strict=True):
        ax.hexbin(
            mu, log_tau, gridsize=45, extent=(-10, 18, -4, 4.5), bins="log", cmap="Blues", mincnt=1, linewidths=0.1
        )
        ax.set(title=name, xlabel="mu", xlim=(-10, 18), ylim=(-4, 4.5))
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("log tau")
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("picture", "table"), default=["picture", "table"])
    parser.add_argument("--steps", type=int, default=6000, help="of each guide in the table")
    parser.add_argument("--seeds", type=int, default=3, help="of the table")
    options = parser.parse_args()
    if "picture" in options.what:
        picture()
    if "table" in options.what:
        table(options.steps, options.seeds)
