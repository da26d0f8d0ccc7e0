# SPDX-License-Identifier: Apache-2.0
"""What works on a GPU: one check after the other, and which of them fail.

    python tests/benchmarks/gpu.py [--seconds 180] [--device cuda] [--only "NAME;NAME"] [--log FILE]

Prints a line of JSON for each result at once, and begins nothing new after ``--seconds``. Run by hand, never by pytest;
what a step costs there is measured by ``gpu_speed.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms

import pyro
import pyro.distributions as dist
import torch
from guides import SCHOOLS
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn

from pyro_flows import (
    AutoFlowGuide,
    CompiledSVI,
    VectorizedTrace_ELBO,
    diagnose,
    fit,
    flows,
    importance_resample,
    predict,
    to_inference_data,
)
from pyro_flows.__main__ import model as eight_schools
from pyro_flows.compiled import graph as loss_graph
from pyro_flows.compiled.cuda import CudaGraph
from pyro_flows.distributed.processes import Processes
from pyro_flows.training import FitSettings, ScheduleSettings, WiderSettings
from pyro_flows.training.trainer import TrainerSettings

ROWS, COEFFICIENTS = 10_000, 50
IMAGES, PIXELS, LATENT_DIM, HIDDEN_DIM, CONTEXT_DIM, BATCH = 60_000, 28 * 28, 10, 256, 64, 128
GROUPS, GROUP_BATCH = 1_000_000, 10_000
# A wider flow after few steps.
SOON_WIDER = FitSettings(
    schedule=ScheduleSettings(first_cycle=100, max_steps=100), wider=WiderSettings(first_cycle=200, max_steps=200)
)


class Log:
    """Results, as lines of JSON on the terminal and in a file."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether nothing new may begin."""
        return time.monotonic() > self._end

    def write(self, **values: Any) -> None:
        """One result."""
        line = json.dumps(values)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


def wait(device: str) -> None:
    """Until all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


# Models


def schools(y: Tensor, sd: Tensor, observed: Tensor | None = None) -> None:
    """Eight schools whose priors are on the device of the data, as without a default device."""
    zero = torch.zeros_like(sd[0])
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", len(sd), device=sd.device):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def products(y: Tensor) -> None:
    """Weights of which only the product with their scales is seen."""
    zeros = torch.zeros_like(y)
    with pyro.plate("items", len(y), device=y.device):
        scales = pyro.sample("scales", dist.HalfCauchy(zeros + 1.0))
        weights = pyro.sample("weights", dist.Normal(zeros, 1.0))
        pyro.sample("y", dist.Normal(scales * weights, 3.0), obs=y)


def groups(y: Tensor) -> None:
    """Mini-batches that the plate draws itself."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[0]), 10.0))
    with drawn_groups(y) as index:
        theta = pyro.sample("theta", dist.StudentT(torch.full_like(y[0], 4.0), mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])


def drawn_groups(y: Tensor) -> pyro.plate:
    """The plate of both model and guide."""
    return pyro.plate("groups", len(y), subsample_size=100, device=y.device)


def regression(x: Tensor, y: Tensor) -> None:
    """Logistic, for any outer plate."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
    with pyro.plate("rows", len(y), device=y.device):
        logits = (beta @ x.mT).reshape(*beta.shape[:-2], len(y))
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def regression_data(device: str) -> tuple[Tensor, Tensor]:
    """Two of the coefficients are not zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COEFFICIENTS, generator=generator)
    y = torch.bernoulli((x[:, 0] - x[:, 1]).sigmoid(), generator=generator)
    return x.to(device), y.to(device)


class Effects:
    """Random effects of many groups, in mini-batches."""

    def __init__(self, count: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = (2.0 + 1.2 * torch.randn(count, generator=generator)).to(device)

    def model(self, index: Tensor) -> None:
        """theta ~ N(mu, tau), y ~ N(theta, 1)."""
        zero = torch.zeros_like(self.y[0])
        mu = pyro.sample("mu", dist.Normal(zero, 10.0))
        tau = pyro.sample("tau", dist.LogNormal(zero, 1.0))
        with pyro.plate("groups", len(self.y), subsample=index):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=self.y[index])

    def plates(self, index: Tensor) -> pyro.plate:
        """The guide's."""
        return pyro.plate("groups", len(self.y), subsample=index)

    def batches(self, size: int) -> list[tuple[Tensor]]:
        """Shuffled once."""
        return [(part,) for part in torch.randperm(len(self.y), device=self.y.device).split(size)]


class Images:
    """A variational autoencoder of simulated binary images: a random linear decoder's."""

    def __init__(self, count: int, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            logits = 2.0 * torch.randn(count, LATENT_DIM) @ torch.randn(LATENT_DIM, PIXELS)
            self.x = torch.bernoulli(logits.sigmoid())
            self.decoder = self._network(LATENT_DIM, PIXELS)
            self.encoder = nn.Sequential(self._network(PIXELS, CONTEXT_DIM), nn.LayerNorm(CONTEXT_DIM))

    @staticmethod
    def _network(size_in: int, size_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(size_in, HIDDEN_DIM), nn.SiLU(), nn.Linear(HIDDEN_DIM, size_out))

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), x ~ Bernoulli(decoder(z))."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1, device=x.device):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self) -> AutoFlowGuide:
        """With the encoder."""
        return AutoFlowGuide(self.model, amortize={"data": self.encoder})

    def batches(self) -> list[tuple[Tensor]]:
        """All of one shape."""
        return [(part,) for part in self.x.split(BATCH) if len(part) == BATCH]


def school_data(device: str) -> tuple[Tensor, Tensor]:
    """Effects and their standard errors."""
    sd, y = (value.to(device, copy=True) for value in SCHOOLS)
    return y, sd


# Checks


def on_device(values: Any, device: str) -> None:
    """Refuse tensors elsewhere."""
    for name, value in dict(values).items():
        assert value.device.type == device, f"{name} is on {value.device}"


def check_family(family: str, device: str) -> str:
    """Steps of SVI, draws and densities of one family."""
    args = school_data(device)
    guide = AutoFlowGuide(schools, flow=family)
    svi = SVI(schools, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=8))
    losses = [svi.step(*args) for _ in range(5)]
    assert all(map(torch.isfinite, torch.tensor(losses))), losses
    on_device(guide.named_parameters(), device)
    on_device(guide.named_buffers(), device)
    draws = guide.sample_posterior(10, *args)
    on_device(draws, device)
    if not flows.get(family).has_inverse:
        return f"loss {losses[-1]:.2f}"
    density = guide.log_prob(draws, *args)
    assert density.shape == (10,) and density.isfinite().all() and density.device.type == device
    return f"loss {losses[-1]:.2f}"


def differ(one: list[float], other: list[float]) -> str:
    """How two runs of losses differ: by rounding, such as that of atomic sums; or by other noise, from some step on."""
    apart = [abs(a - b) / (1.0 + abs(b)) for a, b in zip(one, other, strict=True)]
    first = next((step for step, value in enumerate(apart) if value), None)
    if first is None:
        return "equal"
    return f"differ from step {first} on, by {apart[first]:.1g}, at most by {max(apart):.1g}"


def check_run(device: str) -> str:
    """fit, and all that follows it; save, load, and resume from a checkpoint."""
    args = school_data(device)
    guide = AutoFlowGuide(schools)
    short = {"num_steps": 200, "seed": 0, "progress": False}
    result = fit(schools, guide, args, **short)
    same = fit(schools, AutoFlowGuide(schools), args, **short)
    said = [f"a second run: {differ(result.losses, same.losses)}"]
    assert abs(result.elbo - same.elbo) < 0.1, (result.elbo, same.elbo, said)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [fit(schools, AutoFlowGuide(schools), args, **short).losses for _ in range(2)]
        said.append(f"by deterministic algorithms: {differ(*runs)}")
    finally:
        torch.use_deterministic_algorithms(False)
    print(diagnose(schools, guide, args, seed=0, progress=False))
    resampled = importance_resample(schools, guide, 100, args, seed=0)
    on_device(resampled, device)
    predict(schools, guide, (None, args[1]), num_samples=100, seed=0)
    to_inference_data(schools, guide, args, num_samples=100, seed=0)
    guide.quantiles([0.1, 0.5], *args)
    with tempfile.TemporaryDirectory() as folder:
        guide.save(f"{folder}/guide")
        loaded = AutoFlowGuide.load(f"{folder}/guide", schools, args)
        at = guide.median(*args)
        assert loaded.log_prob(at, *args) == guide.log_prob(at, *args)
        moved = AutoFlowGuide.load(f"{folder}/guide", schools, school_data("cpu"))
        on_device(moved.named_parameters(), "cpu")
        there = {name: value.cpu() for name, value in at.items()}
        difference = moved.log_prob(there, *school_data("cpu")) - guide.log_prob(at, *args).cpu()
        assert difference.abs() < 1e-3, difference
        moved.save(f"{folder}/moved")
        AutoFlowGuide.load(f"{folder}/moved", schools, args).log_prob(at, *args)
        file, other = Path(folder, "run"), Path(folder, "other")
        fit(schools, AutoFlowGuide(schools), args, checkpoint=file, **short | {"num_steps": 50})
        shutil.copy(file, other)
        longer = [fit(schools, AutoFlowGuide(schools), args, checkpoint=p, **short) for p in (file, other)]
        said.append(f"from one checkpoint: {differ(longer[0].losses, longer[1].losses)}")
        assert abs(longer[0].elbo - longer[1].elbo) < 0.1, said
    return f"elbo {result.elbo:.3f} +/- {result.elbo_se:.3f}; {'; '.join(said)}"


def check_default_device(device: str) -> str:
    """A model whose priors are Python numbers, and a wider flow with couplings within items, under
    ``torch.set_default_device``."""
    torch.set_default_device(device)
    try:
        args = tuple(value.to(device) for value in SCHOOLS)
        guide = AutoFlowGuide(eight_schools)
        result = fit(eight_schools, guide, args, num_steps=100, seed=0, progress=False)
        str(diagnose(eight_schools, guide, args, seed=0, progress=False))
        importance_resample(eight_schools, guide, 100, args, seed=0)
        predict(eight_schools, guide, (args[0],), num_samples=100, seed=0)
        to_inference_data(eight_schools, guide, args, num_samples=100, seed=0)
        svi = CompiledSVI(eight_schools, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=8))
        svi.run(20, *args)
        wide = AutoFlowGuide(products)
        wider = fit(products, wide, args[1:], target_gap=1e-9, seed=0, progress=False, settings=SOON_WIDER)
        assert wider.widening is not None and not wide.posterior.can_widen, wider
        on_device(wide.named_parameters(), device)
        on_device(wide.named_buffers(), device)
    finally:
        torch.set_default_device("cpu")
    return f"elbo {result.elbo:.3f}; {wider.widening}"


def check_fit_kinds(device: str) -> str:
    """Steps of ``fit`` that are eager, recorded and compiled: the same ELBO, and not one kind for another."""
    args, graph = school_data(device), loss_graph.LossGraph
    never_compiled = FitSettings(
        trainer=TrainerSettings(min_steps_to_record=1, min_seconds_to_record=0.0, compile_seconds=1e9)
    )
    kinds: dict[str, dict[str, Any]] = {
        "eager": {"compile": False},
        "recorded": {"compile": "auto", "settings": never_compiled},
        "compiled": {"compile": True},
    }
    elbos, runs = {}, {}
    for kind, options in kinds.items():
        made: list[Any] = []

        def kept(self: Any, *args: Any, how: Any, made: list[Any] = made) -> None:
            how(self, *args)
            made.append(self._run)

        with (
            patch.object(graph, "script", partialmethod(kept, how=graph.script)),
            patch.object(graph, "compile", partialmethod(kept, how=graph.compile)),
        ):
            begin = time.perf_counter()
            found = fit(schools, AutoFlowGuide(schools), args, num_steps=400, seed=0, progress=False, **options)
        elbos[kind] = found.elbo
        runs[kind] = f"{time.perf_counter() - begin:.1f} s, {[type(run).__name__ for run in made]}"
        assert bool(made) == (kind != "eager"), runs
        assert device != "cuda" or all(isinstance(run, CudaGraph) for run in made), runs
    assert max(elbos.values()) - min(elbos.values()) < 0.1, elbos
    return f"{elbos}; {runs}"


def was_captured(svi: Any, device: str) -> None:
    """Refuse steps that are not one CUDA graph."""
    assert svi._graphs and not svi._is_eager, "eager steps"
    assert device != "cuda" or isinstance(svi._graphs[0]._run, CudaGraph), f"steps by {svi._graphs[0]._run}"


def check_compiled(device: str, make_optim: Callable[[], Any] = lambda: Adam({"lr": 0.01})) -> str:
    """CompiledSVI against SVI from the same noise, in float64."""
    args, values, times = [value.double() for value in school_data(device)], [], {}
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoFlowGuide(schools)
        svi = kind(schools, guide, make_optim(), VectorizedTrace_ELBO(num_particles=16))
        first = time.perf_counter()
        losses = [svi.step(*args)]
        begin = time.perf_counter()
        losses += [svi.step(*args) for _ in range(50)]
        losses += svi.run(50, *args) if kind is CompiledSVI else [svi.step(*args) for _ in range(50)]
        wait(device)
        times[kind.__name__] = f"first {begin - first:.1f} s, then {10 * (time.perf_counter() - begin):.3f} ms"
        guide.step_limit.apply()  # as at its next call
        values.append((losses, torch.cat([p.detach().flatten() for p in guide.parameters()])))
    was_captured(svi, device)
    (losses, point), (others, other) = values
    apart = (point - other).norm() / point.norm()
    assert apart < 1e-5, f"parameters differ by {apart:.2g}, losses {differ(losses, others)}; {times}"
    return f"parameters differ by {apart:.1g}; {times}"


def check_compiled_data(device: str) -> str:
    """New data of the same shape, and data that change in place, are seen by the captured graph."""
    y, sd = school_data(device)
    guide = AutoFlowGuide(schools)
    svi = CompiledSVI(schools, guide, Adam({"lr": 1e-9}), VectorizedTrace_ELBO(num_particles=512))
    base = statistics.fmean(svi.step(y, sd) for _ in range(20))
    other = statistics.fmean(svi.step(y + 100.0, sd) for _ in range(20))
    was_captured(svi, device)
    y.add_(100.0)
    in_place = statistics.fmean(svi.step(y, sd) for _ in range(20))
    assert other > base + 50 and abs(other - in_place) < 0.1 * other, (base, other, in_place)
    return f"{base:.1f}, {other:.1f}, {in_place:.1f}"


def check_mini_batches(device: str) -> str:
    """Local latents in mini-batches: fit with sparse tables, and CompiledSVI."""
    effects = Effects(2000, device)
    guide = AutoFlowGuide(effects.model, create_plates=effects.plates)
    result = fit(effects.model, guide, effects.batches(200), num_steps=100, seed=0, progress=False)
    svi = CompiledSVI(effects.model, guide, Adam({"lr": 1e-3}), VectorizedTrace_ELBO(num_particles=4))
    for (index,) in effects.batches(200):
        svi.step(index)
    on_device(guide.named_parameters(), device)
    return f"elbo {result.elbo:.1f}"


def check_encoder(device: str) -> str:
    """A VAE: eager and compiled steps, and fit."""
    images = Images(1024, device)
    guide = images.guide()
    svi = CompiledSVI(images.model, guide, Adam({"lr": 1e-3}), Trace_ELBO(max_plate_nesting=1))
    losses = [svi.step(*batch) for batch in images.batches() * 5]
    assert losses[-1] < losses[0], losses
    fit(images.model, images.guide(), images.batches(), num_steps=20, seed=0, progress=False)
    return f"loss {losses[0]:.0f} to {losses[-1]:.0f}"


def check_wider(device: str) -> str:
    """A flow that becomes wider in ``fit``, by compiled steps, with couplings within items; saved and loaded."""
    y, _ = school_data(device)
    guide = AutoFlowGuide(products)
    result = fit(products, guide, (y,), target_gap=1e-9, compile=True, seed=0, progress=False, settings=SOON_WIDER)
    assert result.widening is not None and not guide.posterior.can_widen, result
    on_device(guide.named_parameters(), device)
    on_device(guide.named_buffers(), device)
    with tempfile.TemporaryDirectory() as folder:
        guide.save(f"{folder}/guide")
        loaded = AutoFlowGuide.load(f"{folder}/guide", products, (y,))
    at = guide.median(y)
    assert loaded.log_prob(at, y) == guide.log_prob(at, y)
    return str(result.widening)


def check_processes(device: str, backend: str) -> str:
    """Processes on one card: two by gloo, or one by NCCL, which takes one process a card."""
    count = 2 if backend == "gloo" else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    done = subprocess.run(
        [*command, "--device", device, "--process", backend], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout.strip()


def one_of_processes(device: str, backend: str) -> None:
    """What each of them does; the first one prints how its results compare with those of a process by itself."""
    torch.distributed.init_process_group(backend)
    said = [check_messages(device)] if backend == "nccl" else []
    said += fit_together(device, Several(1) if backend == "nccl" else 2)
    if torch.distributed.get_rank() == 0:
        print("; ".join(said))
    torch.distributed.destroy_process_group()


class Several(int):
    """Number of processes that send each other messages even if there is one."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def check_messages(device: str) -> str:
    """Each kind of message, from tensors on the GPU and on the CPU."""
    processes = Processes("check_messages", size=Several(1))
    for where in (device, "cpu"):
        values = torch.arange(6.0, device=where).reshape(3, 2)
        sparse = torch.sparse_coo_tensor(torch.tensor([[1, 2]], device=where), values[1:], (5, 2)).coalesce()
        for found, expected in (
            (processes.sum(values), values),
            (processes.sum_sparse(sparse).to_dense(), sparse.to_dense()),
            (processes.gather(values)[0], values),
            (processes.to_first(values)[0], values),
            (processes.broadcast(values), values),
        ):
            assert torch.equal(found, expected) and found.device == values.device, (where, found)
        processes.share([values])
        assert processes.each(lambda: 1) == processes.first(lambda: 1) == 1
    return "messages as sent"


def fit_together(device: str, count: int) -> list[str]:
    """How far parameters are from those of a process by itself."""
    effects = Effects(2000, device)
    options: dict[str, Any] = {"num_steps": 30, "seed": 0, "progress": False, "compile": False}
    parts = FitSettings(num_parts=2)
    said = []
    for name, model, make, args in (
        ("particles", schools, lambda: AutoFlowGuide(schools), school_data(device)),
        ("tables", groups, lambda: AutoFlowGuide(groups, create_plates=drawn_groups), (effects.y,)),
    ):
        points = []
        for distributed in (True, False):
            pyro.clear_param_store()
            guide = make()
            with patch.object(torch.distributed, "get_world_size", lambda: count):
                result = fit(model, guide, args, distributed=distributed, settings=parts, **options)
            points.append(torch.cat([p.detach().flatten() for p in guide.parameters()]).cpu())
        together, alone = points
        apart = ((together - alone).norm() / alone.norm()).item()
        assert apart < 1e-3, (name, apart)
        said.append(f"{name}: apart by {apart:.1g}, elbo {result.elbo:.2f}")
    return said


def check_memory(device: str) -> str:
    """Memory does not grow in a thousand steps, eager and captured."""
    args, found = school_data(device), []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        svi = kind(schools, AutoFlowGuide(schools), Adam({"lr": 1e-3}), VectorizedTrace_ELBO(num_particles=16))
        for number in range(1000 if kind is CompiledSVI else 300):
            svi.step(*args)
            if number in (50, 299, 999):
                found.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
    first, last, compiled_first, *_, compiled_last = found
    assert last <= first + 2**16 and compiled_last <= compiled_first + 2**16, found
    return f"{found} bytes"


def every_check() -> dict[str, Callable[[str], str]]:
    """By name."""
    checks: dict[str, Callable[[str], str]] = {
        "compiled, Adam in the graph": check_compiled,
        "compiled, SGD outside": partial(check_compiled, make_optim=lambda: pyro.optim.SGD({"lr": 1e-5})),
        "compiled, AdamW outside": partial(check_compiled, make_optim=lambda: pyro.optim.AdamW({"lr": 0.01})),
        "compiled, ClippedAdam in the graph": partial(
            check_compiled, make_optim=lambda: ClippedAdam({"lr": 0.01, "lrd": 0.999, "clip_norm": 5.0})
        ),
        "compiled, new data": check_compiled_data,
        "fit and all that follows": check_run,
        "default device": check_default_device,
        "fit, recorded and compiled": check_fit_kinds,
        "mini-batches": check_mini_batches,
        "encoder": check_encoder,
        "memory": check_memory,
        "wider flow": check_wider,
        "processes, gloo": partial(check_processes, backend="gloo"),
        "processes, NCCL": partial(check_processes, backend="nccl"),
    }
    return checks | {f"family {name}": partial(check_family, name) for name in flows.names() if name != "maf"}


def run_checks(log: Log, device: str, only: str) -> None:
    """All checks, each of which may fail by itself."""
    for name, check in every_check().items():
        if not any(part in name for part in only.split(";")):
            continue
        if log.is_over:
            log.write(check=name, result="not run")
            continue
        pyro.clear_param_store()
        torch.manual_seed(0)
        begin, heard = time.perf_counter(), []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                said = check(device)
            result = "ok"
            heard = [str(each.message)[:300] for each in caught if issubclass(each.category, UserWarning)]
        except BaseException as error:  # an assertion, or what a GPU raises
            said, result = "\n".join(traceback.format_exc().splitlines()[-15:]), f"FAILED: {type(error).__name__}"
            if isinstance(error, KeyboardInterrupt):
                raise
        seconds = round(time.perf_counter() - begin, 1)
        log.write(check=name, result=result, seconds=seconds, said=said, warnings=sorted(set(heard))[:4])


def explain_failures() -> None:
    """Show why a graph could not be compiled or captured; the library goes on without."""

    def shown(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception:
                traceback.print_exc()
                raise

        return call

    loss_graph.to_machine_code = shown(loss_graph.to_machine_code)
    CudaGraph.__init__ = shown(CudaGraph.__init__)  # type: ignore[method-assign]


def main() -> None:
    """Run what is named."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=180.0, help="after which nothing new begins")
    made.add_argument("--device", default="cuda")
    made.add_argument("--only", default="", help="checks whose name has one of these in it")
    made.add_argument("--log", type=Path, help="file that results are added to")
    made.add_argument("--process", metavar="BACKEND", help="be one of the processes of a check")
    options = made.parse_args()
    if options.process:
        one_of_processes(options.device, options.process)
        return
    explain_failures()
    run_checks(Log(options.log, options.seconds), options.device, options.only)


if __name__ == "__main__":
    main()
