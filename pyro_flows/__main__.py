# SPDX-License-Identifier: Apache-2.0
"""The main job: eight schools, AutoNormal against AutoFlowGuide, by plain SVI. ``python -m pyro_flows --help``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_median
from pyro.optim import CosineAnnealingLR
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows import AutoFlowGuide, compare, flows, plots

# Rubin (1981), "Estimation in parallel randomized experiments": effects of coaching and their standard errors.
Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
# log p(y), by integrating the Gaussian part exactly and tau by quadrature (relative error 1e-12).
LOG_EVIDENCE = -31.3113473523


@dataclass(frozen=True)
class Settings:
    """How both guides are trained and compared.

    Attributes:
        num_steps: Steps of SVI for each guide.
        num_particles: Draws a step.
        learning_rate: Of Adam, in the first step; it falls to zero by a cosine.
        num_samples: Draws of each guide that they are compared by.
    """

    num_steps: int = 3000  # AutoNormal has converged then: four times as many, at 0.02, end at the same gap
    num_particles: int = 16
    learning_rate: float = 0.05
    num_samples: int = 20_000


def model(sigma: Tensor, y: Tensor | None = None) -> None:
    """Eight schools, centered: the hierarchy whose posterior is a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def exact_posterior(sigma: Tensor, y: Tensor, num_draws: int) -> dict[str, Tensor]:
    """Draws of mu and log tau by quadrature over log tau, given which all else is Gaussian; each ``(num_draws,)``."""
    log_tau = torch.linspace(-9.0, 5.0, 20_001, dtype=torch.double)
    variance = log_tau.exp().square()[:, None] + sigma.double().square()  # of each school's y, given mu and tau
    precision = variance.reciprocal().sum(-1) + 1 / 5.0**2
    loc = (y / variance).sum(-1) / precision
    log_likelihood = -0.5 * (variance.log() + y**2 / variance).sum(-1) + 0.5 * (loc**2 * precision - precision.log())
    prior = torch.distributions.HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau
    picked = torch.multinomial((log_likelihood + prior).softmax(0), num_draws, replacement=True)
    return {"mu": torch.normal(loc[picked], precision[picked].rsqrt()), "log tau": log_tau[picked]}


def train(name: str, guide: AutoGuide, args: Sequence[Tensor], settings: Settings) -> None:
    """Train a guide by SVI, as in any Pyro program."""
    schedule: dict[str, Any] = {"optimizer": torch.optim.Adam, "optim_args": {"lr": settings.learning_rate}}
    optim = CosineAnnealingLR({**schedule, "T_max": settings.num_steps, "eta_min": 0.0})
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=settings.num_particles, vectorize_particles=True))
    smooth = None
    bar = tqdm(range(settings.num_steps), desc=f"{name:>14}", mininterval=0.5)
    for step in bar:
        loss = svi.step(*args)
        optim.step()
        smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
        if step % 50 == 0:
            bar.set_postfix_str(f"ELBO {-smooth:8.3f}")


def save_figure(
    guides: Mapping[str, AutoGuide], gaps: Mapping[str, float], args: tuple[Tensor, ...], path: Path, num_draws: int
) -> None:
    """Draws of mu and log tau: those of the posterior as points, those of the guides as contours."""
    draws = {"exact posterior": exact_posterior(args[0], args[1], num_draws)}
    with torch.no_grad():
        for name, guide in guides.items():
            values = Predictive(model, guide=guide, num_samples=num_draws, return_sites=["mu", "tau"], parallel=True)(
                *args
            )
            label = f"{name}: gap {gaps[name]:.2f} nat"
            draws[label] = {"mu": values["mu"].flatten(), "log tau": values["tau"].flatten().log()}
    plots.pairs(draws)[0, 0].figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    """Parse the command line, train both guides, print their comparison, save the figure."""
    settings = settings or Settings()
    parser = argparse.ArgumentParser(
        prog="python -m pyro_flows",
        description="Fit eight schools with AutoNormal and with AutoFlowGuide by plain SVI, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=partial(_integer, low=1), default=settings.num_steps, help="SVI steps for each guide"
    )
    parser.add_argument("--seed", type=partial(_integer, low=0, high=2**32 - 1), default=0,
                        help="seed of all random numbers")  # fmt: skip
    families = [name for name in flows.names() if flows.get(name).one_pass_sampling]
    parser.add_argument("--flow", choices=families, default="auto", metavar="NAME",
                        help="flow family: " + ", ".join(families))  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("eight_schools.png"), help="where to save the figure")
    options = parser.parse_args(argv)
    if not options.out.resolve().parent.is_dir() or options.out.is_dir():
        parser.error(f"--out: expected a file in an existing folder, but got {options.out}")
    from matplotlib.backend_bases import FigureCanvasBase

    if options.out.suffix[1:] not in (formats := FigureCanvasBase.get_supported_filetypes()):
        parser.error(f"--out: expected a file that ends in one of .{', .'.join(formats)}, but got {options.out}")
    settings = replace(settings, num_steps=options.steps)

    args = (torch.tensor(SIGMA), torch.tensor(Y))
    guides: dict[str, AutoGuide] = {
        "AutoNormal": AutoNormal(model, init_loc_fn=init_to_median),
        "AutoFlowGuide": AutoFlowGuide(model, flow=options.flow),
    }
    for name, guide in guides.items():
        pyro.set_rng_seed(options.seed)
        train(name, guide, args, settings)
    comparison = compare(model, guides, args, num_samples=settings.num_samples, seed=options.seed)
    print(f"\nEight schools, centered; {settings.num_steps} steps x {settings.num_particles} particles\n")
    print(comparison)
    print(f"Exact log evidence, by quadrature: {LOG_EVIDENCE:.4f}")
    gaps = {row.name: LOG_EVIDENCE - row.diagnosis.elbo for row in comparison}
    save_figure(guides, gaps, args, options.out, settings.num_samples)
    print(f"\nmu against log tau, beside the exact posterior: {options.out}")


def _integer(text: str, low: int, high: int | None = None) -> int:
    wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
    if not text.strip().lstrip("-").isdecimal() or int(text) < low or (high is not None and int(text) > high):
        raise argparse.ArgumentTypeError(f"expected an integer {wanted}, but got {text!r}")
    return int(text)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small lose more to a second thread than they gain
    main()
