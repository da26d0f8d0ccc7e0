# SPDX-License-Identifier: Apache-2.0
"""The picture of the docs' front page: eight schools, exactly and by two guides that one loop trains.

``OMP_NUM_THREADS=1 python tests/benchmarks/front_page.py`` writes ``docs/figures/front_page.png``, in a minute.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.optim import CosineAnnealingLR
from torch import Tensor

from pyro_flows import AutoFlowGuide
from pyro_flows.__main__ import LOG_EVIDENCE, SIGMA, Y, model
from pyro_flows.diagnostics import log_weights

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "front_page.png"
NUM_STEPS, NUM_PARTICLES, LEARNING_RATE = 3000, 16, 0.05  # AutoNormal's gap at 12,000 steps of 0.02 is the same
NUM_DRAWS = 20_000


def exact(sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of mu and log tau, by quadrature over log tau; given tau all else is Gaussian."""
    log_tau = torch.linspace(-9.0, 5.0, 20_001, dtype=torch.double)
    variance = log_tau.exp().square()[:, None] + sigma.double().square()  # of each school's y, given mu and tau
    precision = variance.reciprocal().sum(-1) + 1 / 5.0**2
    loc = (y / variance).sum(-1) / precision
    log_likelihood = -0.5 * (variance.log() + y**2 / variance).sum(-1) + 0.5 * (loc**2 * precision - precision.log())
    prior = torch.distributions.HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau
    picked = torch.multinomial((log_likelihood + prior).softmax(0), NUM_DRAWS, replacement=True)
    return torch.normal(loc[picked], precision[picked].rsqrt()), log_tau[picked]


def train(guide: AutoGuide, args: tuple[Tensor, Tensor]) -> None:
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LEARNING_RATE}, "T_max": NUM_STEPS}
    optim = CosineAnnealingLR(schedule)
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True))
    for _ in range(NUM_STEPS):
        svi.step(*args)
        optim.step()


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    args = (torch.tensor(SIGMA), torch.tensor(Y))
    pyro.set_rng_seed(0)
    panels = {"posterior\nby quadrature": exact(*args)}
    for guide in (AutoNormal(model), AutoFlowGuide(model)):
        train(guide, args)
        weights, values = log_weights(model, guide, NUM_DRAWS, args)
        gap = LOG_EVIDENCE - weights.mean().item()
        name = f"{type(guide).__name__}(model)\n{gap:.3f} nats short"
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
    main()
