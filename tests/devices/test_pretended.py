# SPDX-License-Identifier: Apache-2.0
"""All that a guide is used for stays on the model's device. A GPU is only pretended: tensors there are the CPU's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flows import (
    AutoFlowGuide,
    VectorizedTrace_ELBO,
    diagnose,
    fit,
    flows,
    importance_resample,
    predict,
)
from pyro_flows.diagnostics.division import Division
from pyro_flows.importance.resample import ResampleSettings
from pyro_flows.posterior.plate import LocalBlock
from pyro_flows.training.estimates import EstimateSettings
from pyro_flows.training.settings import FitSettings
from pyro_flows.transforms import DiagonalPrecisionHead, FullPrecisionHead
from pyro_flows.transforms.heads.affine import AffineHead
from tests.devices.pretended import MixedDevicesError, pretended_gpu

FAMILIES = [name for name in flows.names() if flows.get(name).one_pass_sampling]
ROWS, COLUMNS = torch.arange(12) // 3, torch.arange(12) % 3
GROUPS, BATCH = 12, 6
# Few draws of ELBO estimates: each operation takes many times as long as without pretending.
FEW = FitSettings(estimates=EstimateSettings(num_runs=2, num_particles=50, max_batches=2))


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pretended_gpu(monkeypatch):
        yield


def on_gpu(values: Tensor) -> Tensor:
    return values.to("cuda")


def schools(sd: Tensor, y: Tensor | None = None) -> None:
    """A hierarchy: the prior of each effect is known, given the others."""
    zero = torch.zeros_like(sd[0])
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", len(sd), device=sd.device):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def crossed(sd: Tensor, y: Tensor | None = None) -> None:
    """The data tell sums of effects, which are dependent a posteriori."""
    zero = torch.zeros_like(sd[0])
    spread = pyro.sample("spread", dist.HalfNormal(zero + 2.0))
    with pyro.plate("rows", 4, device=sd.device):
        row = pyro.sample("row", dist.Normal(zero, spread))
    with pyro.plate("columns", 3, device=sd.device):
        column = pyro.sample("column", dist.Normal(zero, spread))
    with pyro.plate("data", 12, device=sd.device):
        pyro.sample("y", dist.Normal(row[..., ROWS] + column[..., COLUMNS], sd), obs=y)


def slopes(sd: Tensor, y: Tensor | None = None) -> None:
    """Vectors whose prior is multivariate, with correlations that are latent."""
    ones = torch.ones_like(sd[:2])
    tau = pyro.sample("tau", dist.HalfNormal(ones).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, ones[0]))
    with pyro.plate("groups", 3, device=sd.device):
        slope = pyro.sample("slope", dist.MultivariateNormal(0.0 * ones, scale_tril=tau.unsqueeze(-1) * factor))
    with pyro.plate("data", 12, device=sd.device):
        of_row = slope[..., COLUMNS, :]
        pyro.sample("y", dist.Normal(of_row[..., 0] + sd * of_row[..., 1], sd), obs=y)


def data() -> tuple[Tensor, Tensor]:
    """Standard errors, and values."""
    return on_gpu(1.0 + torch.arange(12.0) / 10), on_gpu(torch.arange(12.0).sin())


def all_on_gpu(values: Any) -> None:
    assert {name for name, value in dict(values).items() if not value.is_cuda} == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    sd, y = (value[:3] for value in data())
    guide = AutoFlowGuide(schools, flow=family)
    svi = SVI(schools, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=4))
    for _ in range(2):
        svi.step(sd, y)
    all_on_gpu(guide.named_parameters())
    all_on_gpu(guide.named_buffers())
    draws = guide.sample_posterior(5, sd, y)
    all_on_gpu(draws)
    if flows.get(family).has_inverse:
        assert guide.log_prob(draws, sd, y).is_cuda


@pytest.mark.parametrize(
    ("model", "head"), [(schools, DiagonalPrecisionHead), (crossed, FullPrecisionHead), (slopes, FullPrecisionHead)]
)
def test_joint_guide(model: Callable[..., None], head: type[nn.Module]) -> None:
    """A warm start, steps, estimates of the ELBO, and the first verdict; or a step of SVI."""
    guide, args = AutoFlowGuide(model), data()
    if model is slopes:  # whose warm start takes ten seconds here, and is by the same code as that of `crossed`
        SVI(model, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=4)).step(*args)
    else:
        fit(model, guide, args, num_steps=3, seed=0, progress=False, settings=FEW)
    assert isinstance(guide.posterior.only_block.flow.head, head)
    all_on_gpu(guide.named_parameters())
    all_on_gpu(guide.named_buffers())
    draws = guide.sample_posterior(5, *args)
    all_on_gpu(draws)
    assert guide.log_prob(draws, *args).is_cuda


def test_lost_modes_are_sent_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since each process may have a GPU of its own, where a guide can start from them then."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z.abs(), 0.1), obs=y)

    sent: list[Any] = []
    first = Division.first

    def note(self: Division, work: Callable[[], Any]) -> Any:
        sent.append(first(self, work))
        return sent[-1]

    monkeypatch.setattr(Division, "first", note)
    y = on_gpu(torch.tensor(1.0))
    start = init_to_value(values={"z": y})
    guide = AutoFlowGuide(model, "diagonal_normal", init_loc_fn=start, init_scale=0.1).setup(y)
    (lost,) = diagnose(model, guide, (y,), num_samples=500, seed=0, progress=False).lost
    assert not sent[-1].lost[0].values["z"].is_cuda
    all_on_gpu(lost.values)
    AutoFlowGuide(model, init_loc_fn=init_to_value(values=lost.values)).setup(y)


@pytest.mark.filterwarnings("ignore:importance_resample")
def test_what_a_guide_is_used_for() -> None:
    guide, (sd, y) = AutoFlowGuide(schools), data()
    guide(sd, y)
    str(diagnose(schools, guide, (sd, y), num_samples=100, seed=0, progress=False))
    lenient = ResampleSettings(max_khat=math.inf)
    all_on_gpu(importance_resample(schools, guide, 5, (sd, y), num_draws=500, seed=0, progress=False, settings=lenient))
    predict(schools, guide, (sd,), num_samples=5, seed=0, progress=False)  # returns draws in the CPU's memory
    all_on_gpu(guide.median(sd, y))
    all_on_gpu(guide.quantiles([0.1, 0.9], sd, y))


def test_file(tmp_path: Path) -> None:
    """Written on a GPU, read there and on a CPU, and the other way round."""
    args = data()
    guide = AutoFlowGuide(schools)
    guide(*args)
    guide.save(tmp_path / "guide")
    loaded = AutoFlowGuide.load(tmp_path / "guide", schools, args)
    all_on_gpu(loaded.named_parameters())
    there = tuple(value.cpu() for value in args)
    moved = AutoFlowGuide.load(tmp_path / "guide", schools, there)
    assert not any(value.is_cuda for _, value in moved.named_parameters())
    moved.save(tmp_path / "moved")
    back = AutoFlowGuide.load(tmp_path / "moved", schools, args)
    at = guide.median(*args)
    expected = guide.log_prob(at, *args)
    assert back.log_prob(at, *args) == expected == loaded.log_prob(at, *args)
    assert moved.log_prob({name: value.cpu() for name, value in at.items()}, *there) == expected.cpu()


class Effects:
    """Groups in mini-batches; the model gets their indices."""

    def __init__(self) -> None:
        self.y = on_gpu(torch.arange(float(GROUPS)).sin())

    def model(self, index: Tensor) -> None:
        zero = torch.zeros_like(self.y[0])
        mu = pyro.sample("mu", dist.Normal(zero, 10.0))
        tau = pyro.sample("tau", dist.LogNormal(zero, 1.0))
        with pyro.plate("groups", GROUPS, subsample=index):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=self.y[index])

    def plates(self, index: Tensor) -> pyro.plate:
        return pyro.plate("groups", GROUPS, subsample=index)


def test_mini_batches() -> None:
    effects = Effects()
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
    batches = [(part,) for part in torch.arange(GROUPS, device="cuda").split(BATCH)]
    fit(effects.model, guide, batches, num_steps=4, seed=0, progress=False, settings=FEW)
    svi = SVI(effects.model, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=4))
    svi.step(*batches[1])
    all_on_gpu(guide.named_parameters())
    all_on_gpu(guide.named_buffers())
    draws = guide.sample_posterior(5, *batches[0])
    all_on_gpu(draws)
    assert guide.log_prob(draws, *batches[0]).is_cuda


def test_a_default_device_does_not_move_a_mini_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices on the CPU would have each step wait for the GPU, which can't be captured."""
    seen: list[Tensor] = []

    def item_context(self: LocalBlock, indices: Any, rows: Any, *, original: Any = LocalBlock.item_context) -> Any:
        seen.extend(indices.values())
        return original(self, indices, rows)

    monkeypatch.setattr(LocalBlock, "item_context", item_context)
    effects = Effects()
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
    index = torch.arange(BATCH, device="cuda")
    torch.set_default_device("cpu")
    try:
        SVI(effects.model, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=4)).step(index)
    finally:
        torch.set_default_device(None)
    assert seen
    assert all(value.is_cuda for value in seen)


def test_encoder() -> None:
    encoder, decoder = nn.Linear(3, 4).to("cuda"), nn.Linear(2, 3).to("cuda")

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1, device=x.device):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    x = torch.randn(12, 3, device="cuda")
    guide = AutoFlowGuide(model, amortize={"data": encoder})
    fit(model, guide, [(part,) for part in x.split(4)], num_steps=4, seed=0, progress=False, settings=FEW)
    svi = SVI(model, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=2))
    svi.step(x)
    all_on_gpu(guide.named_parameters())
    draws = guide.sample_posterior(5, x)
    all_on_gpu(draws)
    assert guide.log_prob(draws, x).is_cuda
    diagnose(model, guide, (x[:4],), num_samples=100, seed=0, progress=False)


def test_a_tensor_of_the_cpu_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests rely on."""
    gaussian = AffineHead._gaussian

    def planted(self: AffineHead, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loc, scale, log_scale = gaussian(self, context)
        return loc + torch.zeros(self.input_dim), scale, log_scale

    monkeypatch.setattr(AffineHead, "_gaussian", planted)
    with pytest.raises(MixedDevicesError):
        AutoFlowGuide(schools, "iaf")(*data())
