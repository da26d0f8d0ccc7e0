# SPDX-License-Identifier: Apache-2.0
"""A variational autoencoder of the 8x8 digits: what a flow behind the encoder brings.

    python tests/benchmarks/vae.py [fixed] [joint] [--seeds 5] [--write]

Needs scikit-learn, whose bundled digits are the data: 1500 to train on, 297 to test. A pixel is black with the
probability that its grey level says, drawn afresh in training and once for evaluation. Both encoders have the same
network, steps and learning rate. Run by hand, never by pytest. Numbers are means over seeds +/- standard errors, in
nats per image. ``--write`` also puts the tables in ``docs/tables``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import CosineAnnealingLR
from sklearn.datasets import load_digits
from tables import Measure, Rows, parser, run
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide

ENCODERS = {"Gaussian": "diagonal_normal", "flow": "auto"}
LATENT_DIM, CONTEXT_DIM, HIDDEN_DIM = 4, 32, 64
BATCH_SIZE, LR = 100, 5e-3
NUM_STEPS, NUM_REFINE = 2000, 400
NUM_IMAGES = 100  # of the train and of the test images, for the split of the gap
NUM_DRAWS = 5000
Model = Callable[[Tensor], None]


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of the train images; binary images to evaluate on, train and test."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.tensor(load_digits().data / 16, dtype=torch.get_default_dtype())
    grey = grey[torch.randperm(len(grey), generator=generator)]
    binary = torch.bernoulli(grey, generator=generator)
    return grey[:1500], binary[:1500], binary[1500:]


def network(input_dim: int, output_dim: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(input_dim, HIDDEN_DIM),
        nn.SiLU(),
        nn.Linear(HIDDEN_DIM, HIDDEN_DIM),
        nn.SiLU(),
        nn.Linear(HIDDEN_DIM, output_dim),
    )


class Encoder(nn.Sequential):
    """Image -> context of unit scale."""

    def __init__(self) -> None:
        super().__init__(*network(64, CONTEXT_DIM), nn.LayerNorm(CONTEXT_DIM))


class Table(nn.Module):
    """A free context for each of a few images, in place of an encoder."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows


def make_model(decoder: nn.Module, *, frozen: bool = False) -> Model:
    """The generative model; a frozen decoder is not told to Pyro, so it is not trained."""

    def model(x: Tensor) -> None:
        if not frozen:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=x)

    return model


def make_guide(model: Model, flow: str, encoder: nn.Module, x: Tensor) -> AutoFlowGuide:
    """The guide, set up."""
    return AutoFlowGuide(model, flow=flow, amortize={"data": encoder}).setup(x)


def train(model: Model, guide: AutoFlowGuide, grey: Tensor) -> None:
    """Plain SVI on mini-batches, binarised afresh; the same for every guide."""
    optim = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, "T_max": NUM_STEPS})
    svi = SVI(model, guide, optim, Trace_ELBO(max_plate_nesting=1))
    for _ in range(NUM_STEPS):
        svi.step(torch.bernoulli(grey[torch.randperm(len(grey))[:BATCH_SIZE]]))
        optim.step()


@cache  # the Gaussian encoder's decoder is also the fixed one
def fit_jointly(flow: str, seed: int) -> tuple[nn.Module, AutoFlowGuide]:
    """Decoder and encoder, trained together."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    decoder = network(LATENT_DIM, 64)
    model = make_model(decoder)
    grey = digits()[0]
    guide = make_guide(model, flow, Encoder(), torch.bernoulli(grey[:BATCH_SIZE]))
    train(model, guide, grey)
    return decoder.requires_grad_(False), guide


def refine(model: Model, guide: AutoFlowGuide, encoder: Encoder, flow: str, x: Tensor) -> AutoFlowGuide:
    """The same family with a context for each image, and weights, trained on these images alone."""
    pyro.clear_param_store()
    refined = make_guide(model, flow, Table(encoder(x).detach()), x)
    refined.load_state_dict(guide.state_dict(), strict=False)  # all but the encoder's
    optim = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, "T_max": NUM_REFINE})
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, refined, optim, elbo)
    for _ in range(NUM_REFINE):
        svi.step(x)
        optim.step()
    return refined


def draw(model: Model, guide: AutoFlowGuide, x: Tensor, num_draws: int) -> tuple[Tensor, ...]:
    """z, log p(x|z), log p(z), log q(z|x) for each draw and image."""
    with pyro.plate("draws", num_draws, dim=-2):
        guide_trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    nodes = model_trace.nodes
    log_q = guide_trace.nodes[latent_name(guide_trace)]["log_prob"]
    return nodes["z"]["value"], nodes["x"]["log_prob"], nodes["z"]["log_prob"], log_q


def latent_name(trace: poutine.Trace) -> str:
    """The guide's own site, which holds the density; here z itself, since z is real."""
    return next(name for name, node in trace.nodes.items() if node.get("infer", {}).get("is_auxiliary"))


def score(guide: AutoFlowGuide, x: Tensor, z: Tensor) -> Tensor:
    """log q(z|x) of given values, for each draw and image."""
    name = latent_name(poutine.trace(guide).get_trace(x))
    with pyro.plate("draws", len(z), dim=-2):
        trace = poutine.trace(poutine.condition(guide, data={name: z})).get_trace(x)
    trace.compute_log_prob()
    log_q: Tensor = trace.nodes[name]["log_prob"]
    return log_q


@torch.no_grad()
def evaluate(
    model: Model, guides: Mapping[str, AutoFlowGuide], x: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """log p(x) of each image, and for each guide E_q[log p(x|z)] and KL(q(z|x) || p(z)).

    Importance sampling from the equal mixture of the guides, ``NUM_DRAWS`` draws in all.
    """
    chunk = 500
    weights: list[Tensor] = []
    terms: dict[str, list[Tensor]] = {name: [] for name in guides}
    for _ in range(NUM_DRAWS // chunk // len(guides)):
        for name, guide in guides.items():
            z, log_x, log_z, log_q = draw(model, guide, x, chunk)
            terms[name].append(torch.stack([log_x, log_q - log_z]).mean(1))
            densities = torch.stack([log_q if g is guide else score(g, x, z) for g in guides.values()])
            weights.append(log_x + log_z - densities.logsumexp(0) + math.log(len(guides)))
    all_weights = torch.cat(weights)
    log_evidence = all_weights.logsumexp(0) - math.log(len(all_weights))
    means = {name: torch.stack(parts).mean(0) for name, parts in terms.items()}
    return log_evidence, {name: (reconstruction, kl) for name, (reconstruction, kl) in means.items()}


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{sign}.3f} ± {error:.3f}"


def measure_fixed(seeds: int) -> tuple[Sequence[str], Rows]:
    """One decoder, trained with a Gaussian encoder; both encoders trained for it. Gap log p(x) - ELBO and its split."""
    grey, *sets = digits()
    images = dict(zip(("train", "test"), (binary[:NUM_IMAGES] for binary in sets), strict=True))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {(i, e): [] for i in images for e in ENCODERS}
    for seed in range(seeds):
        model = make_model(fit_jointly(ENCODERS["Gaussian"], seed)[0], frozen=True)
        encoders, guides = {}, {}
        for name, flow in ENCODERS.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(1000 + seed)
            encoders[name] = Encoder()
            guides[name] = make_guide(model, flow, encoders[name], torch.bernoulli(grey[:BATCH_SIZE]))
            train(model, guides[name], grey)
        for images_name, x in images.items():
            log_evidence, terms = evaluate(model, guides, x)
            for name, flow in ENCODERS.items():
                refined = refine(model, guides[name], encoders[name], flow, x)
                with torch.no_grad():
                    _, log_x, log_z, log_q = draw(model, refined, x, 1000)
                approximation = (log_evidence - (log_x + log_z - log_q).mean(0)).mean().item()
                gap = (log_evidence - terms[name][0] + terms[name][1]).mean().item()
                found[images_name, name].append((gap, approximation))
        print(f"seed {seed}", {" ".join(key): values[-1] for key, values in found.items()}, flush=True)
    rows = []
    for (images_name, name), values in found.items():
        base = found[images_name, "Gaussian"]
        ratios = [gap / other for (gap, _), (other, _) in zip(values, base, strict=True)]
        gaps, approximations = zip(*values, strict=True)
        amortizations = [gap - approximation for gap, approximation in values]
        cells = [spread(cell) for cell in (gaps, approximations, amortizations)]
        rows.append([images_name, name, *cells, spread(ratios) if name != "Gaussian" else "1"])
    return ("images", "encoder", "gap", "approximation gap", "amortization gap", "gap / Gaussian's"), rows


def measure_joint(seeds: int) -> tuple[Sequence[str], Rows]:
    """Decoder and encoder trained together; the test images."""
    x = digits()[2]
    found: dict[str, list[list[float]]] = {name: [] for name in ENCODERS}
    for seed in range(seeds):
        for name, flow in ENCODERS.items():
            decoder, guide = fit_jointly(flow, seed)
            log_evidence, terms = evaluate(make_model(decoder, frozen=True), {name: guide}, x)
            reconstruction, kl = terms[name]
            elbo = reconstruction - kl
            columns = (log_evidence, elbo, reconstruction, kl, log_evidence - elbo)
            found[name].append([column.mean().item() for column in columns])
        print(f"seed {seed}", {name: values[-1] for name, values in found.items()}, flush=True)
    rows = [[name, *map(spread, zip(*values, strict=True))] for name, values in found.items()]
    pairs = zip(found["flow"], found["Gaussian"], strict=True)
    differences = [[a - b for a, b in zip(flow, gaussian, strict=True)] for flow, gaussian in pairs]
    rows.append(["flow less Gaussian", *(spread(column, "+") for column in zip(*differences, strict=True))])
    return ("encoder", "log p(x)", "ELBO", "E_q[log p(x|z)]", "KL(q || p(z))", "gap"), rows


MEASURES: dict[str, Measure] = {"fixed": measure_fixed, "joint": measure_joint}


if __name__ == "__main__":
    run(MEASURES, parser(__doc__, MEASURES, 5).parse_args(), prefix="vae_")
