# SPDX-License-Identifier: Apache-2.0
"""The main job: eight schools, AutoNormal against AutoFlowGuide, by plain SVI. ``python -m pyro_flows --help``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_median
from pyro.optim import CosineAnnealingLR
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows import AutoFlowGuide, flows, plots
from pyro_flows.diagnostics import log_weights

# Rubin (1981), "Estimation in parallel randomized experiments": effects of coaching and their standard errors.
Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
# log p(y), by integrating the Gaussian part exactly and tau by quadrature (relative error 1e-12).
LOG_EVIDENCE = -31.3113473523

NUM_PARTICLES = 16
LEARNING_RATE = 0.02
EVALUATION_DRAWS = 20_000


@dataclass(frozen=True)
class Row:
    """One guide's line of the table, and its draws for the figure."""

    name: str
    elbo: float
    std_error: float
    seconds: float
    draws: dict[str, Tensor]


def model(sigma: Tensor, y: Tensor | None = None) -> None:
    """Eight schools, centred: the hierarchy whose posterior is a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fit(name: str, guide: AutoGuide, args: Sequence[Tensor], num_steps: int) -> Row:
    """Train a guide by SVI, as in any Pyro program, and evaluate it on fresh draws."""
    optim = CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": LEARNING_RATE}, "T_max": num_steps, "eta_min": 0.0}
    )
    elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True)
    svi = SVI(model, guide, optim, elbo)
    start = time.perf_counter()
    bar = tqdm(range(num_steps), desc=f"{name:>14}", mininterval=0.5)
    smooth = None
    for step in bar:
        loss = svi.step(*args)
        optim.step()
        smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
        if step % 50 == 0:
            bar.set_postfix_str(f"ELBO {-smooth:8.3f}")
    seconds = time.perf_counter() - start
    mean, std_error, draws = evaluate(guide, args)
    return Row(name, mean, std_error, seconds, draws)


def evaluate(
    guide: AutoGuide, args: Sequence[Tensor], num_draws: int = EVALUATION_DRAWS
) -> tuple[float, float, dict[str, Tensor]]:
    """ELBO, its standard error, and the draws that they come from."""
    weights, draws = log_weights(model, guide, num_draws, tuple(args))
    return weights.mean().item(), weights.std().item() / num_draws**0.5, draws


def table(rows: Sequence[Row]) -> str:
    """The rows as people read them."""
    lines = [f"{'guide':>14}  {'ELBO':>18}  {'gap to log evidence':>19}  {'seconds':>7}"]
    for row in rows:
        elbo = f"{row.elbo:.3f} +/- {row.std_error:.3f}"
        lines.append(f"{row.name:>14}  {elbo:>18}  {LOG_EVIDENCE - row.elbo:>19.3f}  {row.seconds:>7.1f}")
    return "\n".join(lines)


def save_figure(rows: Sequence[Row], path: Path) -> None:
    """The guides' draws of mu and log tau over each other; the last one's, the best, as points."""
    draws = {
        f"{row.name}: gap {LOG_EVIDENCE - row.elbo:.2f} nat": {"mu": row.draws["mu"], "log tau": row.draws["tau"].log()}
        for row in reversed(rows)
    }
    plots.pairs(draws)[0, 0].figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, fit both guides, print the table, save the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_flows",
        description="Fit eight schools with AutoNormal and with AutoFlowGuide by plain SVI, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_positive, default=1200, help="SVI steps for each guide")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--flow", choices=flows.names(), default="auto", metavar="NAME",
                        help="flow family: " + ", ".join(flows.names()))  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("eight_schools.png"), help="where to save the figure")
    options = parser.parse_args(argv)
    if not options.out.resolve().parent.is_dir():
        parser.error(f"--out: expected a file in an existing folder, but got {options.out}")

    args = (torch.tensor(SIGMA), torch.tensor(Y))
    guides: dict[str, Callable[[], AutoGuide]] = {
        "AutoNormal": lambda: AutoNormal(model, init_loc_fn=init_to_median),
        "AutoFlowGuide": lambda: AutoFlowGuide(model, flow=options.flow),
    }
    rows = []
    for name, make in guides.items():
        pyro.set_rng_seed(options.seed)
        rows.append(fit(name, make(), args, options.steps))
    print(f"\nEight schools, centred; {options.steps} steps x {NUM_PARTICLES} particles; exact log evidence "
          f"{LOG_EVIDENCE:.4f}\n")  # fmt: skip
    print(table(rows))
    save_figure(rows, options.out)
    print(f"\nmu against log tau: {options.out}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, but got {value}")
    return value


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small lose more to a second thread than they gain
    main()
