# SPDX-License-Identifier: Apache-2.0
"""Programs that ``torchrun`` starts in two processes; the same functions run in one process in the tests.

torchrun --nproc-per-node=2 -m tests.distributed.programs FOLDER NAME ...
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_sample, init_to_value
from pyro.optim import Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_flows import AutoFlowGuide, CompiledSVI, Diagnosis, compare, diagnose, fit, until_converged
from pyro_flows.compiled.graph import LossGraph
from pyro_flows.diagnostics import division
from pyro_flows.distributed import DistributedOptim, broadcast_parameters, disjoint_subsamples
from pyro_flows.distributed.processes import Processes
from pyro_flows.importance.weights import Draws, ImportanceSampler
from pyro_flows.starts import plates
from pyro_flows.training import EstimateSettings, FitProgress, FitSettings, ScheduleSettings, TrainerSettings
from pyro_flows.training.trainer import Trainer
from tests.common import schools

SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ESTIMATES = EstimateSettings(num_runs=4, num_particles=20)
# Two parts of a step, on two processes or on one.
TWO = FitSettings(num_parts=2, estimates=ESTIMATES, checkpoint_interval=0.05, schedule=ScheduleSettings(first_cycle=20))
# Checkpoints of the same run, by one process and by two.
FILES = ("one.pt", "two.pt")
# A checkpoint after each step.
OFTEN = replace(TWO, checkpoint_interval=0.0)
OPTIONS = {"num_steps": 200, "num_particles": 4, "compile": False, "seed": 0, "progress": False, "settings": TWO}


@contextmanager
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def groups(y: Tensor) -> None:
    """Plates that draw their own mini-batches."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", len(y), subsample_size=5) as index:
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])


def nested(y: Tensor) -> None:
    """Latents of groups, and of their members, whose rows in a table lie apart: a group's are 43 apart."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", y.shape[-1], subsample_size=5) as index:
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        with pyro.plate("members", len(y)):
            x = pyro.sample("x", dist.Normal(theta, 1.0))
            pyro.sample("y", dist.StudentT(4.0, x, 1.0), obs=y[:, index])


def plates_of_nested(y: Tensor) -> list[pyro.plate]:
    groups = pyro.plate("groups", y.shape[-1], subsample_size=5, dim=-1)
    return [groups, pyro.plate("members", len(y), dim=-2)]


def some_groups(index: Tensor, y: Tensor) -> None:
    """Mini-batches that the user passes."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", 41, dim=-1, subsample=index):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def rows(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", 42, subsample_size=len(y), dim=-1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


def end(guide: Any, result: Any = None) -> dict[str, Any]:
    """What the tests compare."""
    found = {"parameters": torch.cat([p.detach().reshape(-1) for p in guide.parameters()])}
    for name in ("steps", "skipped", "reason", "elbo", "elbo_se", "losses") if result is not None else ():
        found[name] = getattr(result, name)
    return found


def fit_schools(folder: Path) -> dict[str, Any]:
    guide = AutoFlowGuide(schools)
    return end(guide, fit(schools, guide, (SCHOOLS,), **OPTIONS))


def fit_recorded(folder: Path) -> dict[str, Any]:
    """In recorded steps."""
    trainer = TrainerSettings(min_steps_to_record=0, min_seconds_to_record=0.0, compile_seconds=1e9)
    settings = FitSettings(num_parts=2, estimates=ESTIMATES, trainer=trainer)
    guide = AutoFlowGuide(schools, "diagonal_normal")
    options = {**OPTIONS, "compile": "auto", "settings": settings, "num_steps": 40}
    return end(guide, fit(schools, guide, (SCHOOLS,), **options))


def fit_groups(folder: Path) -> dict[str, Any]:
    y = 2.0 * normal(41)
    guide = AutoFlowGuide(groups, create_plates=lambda y: pyro.plate("groups", len(y), subsample_size=5))
    return end(guide, fit(groups, guide, (y,), **OPTIONS))


def fit_nested(folder: Path, **options: Any) -> dict[str, Any]:
    """Two tables, in shares of unequal lengths, warm-started in shares, too."""
    y = 2.0 * normal(2 * 43).reshape(2, -1)
    guide = AutoFlowGuide(nested, "diagonal_normal", create_plates=plates_of_nested)

    def look(progress: FitProgress) -> None:
        assert guide.median(y)["x"].shape == (2, 43)  # of all items, also during training

    callback = look if os.environ.get("RANK") == "1" else None
    options = {**OPTIONS, "num_steps": 25, "settings": OFTEN, "callback": callback, **options}
    before, plates.SETTINGS = plates.SETTINGS, replace(plates.SETTINGS, num_global_items=20)  # fewer than in a share
    try:
        return end(guide, fit(nested, guide, (y,), **options))
    finally:
        plates.SETTINGS = before


def fit_without_start(folder: Path) -> dict[str, Any]:
    """The first process refuses a warm start, after all have fitted their items."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    before, plates.warm_start_joint = plates.warm_start_joint, refuse
    try:
        return fit_nested(folder)
    finally:
        plates.warm_start_joint = before


def rows_of_a_start(folder: Path) -> dict[str, Any]:
    """Numbers of rows of all tables and their copies during a warm start."""
    found: set[int] = set()
    fit_items = plates.LocalStart._fit_items

    def look(self: plates.LocalStart, batches: Any) -> None:
        gc.collect()
        tables = [block.items.shape[1] for block in self.posterior.blocks()]
        tensors = [each for each in gc.get_objects() if torch.is_tensor(each) and each.dim() == 2]
        found.update(len(each) for each in tensors if each.shape[1] in tables)  # some are of other matrices
        fit_items(self, batches)

    plates.LocalStart._fit_items = look
    try:
        fit_nested(folder)
    finally:
        plates.LocalStart._fit_items = fit_items
    return {"rows": found}


def fit_resumed(folder: Path) -> dict[str, Any]:
    """From a file that one process has written, in the middle of a cycle; and from one that is written here."""
    held = fit_with_error(copy_of(folder / "one.pt", folder / "two.pt"), 20)
    found = {name: fit_nested(folder, checkpoint=copy_of(folder / name, folder / "run.pt")) for name in FILES}
    return {"held": held, **found}


def copy_of(path: Path, new: Path) -> Path:
    """Copy a file, in the first process."""
    if os.environ.get("RANK", "0") == "0":
        shutil.copy(path, new)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return new


def fit_with_error(path: Path, num_steps: int) -> dict[str, Any]:
    """A run that ends by an error and leaves a file: numbers of rows that it held, and of those that it leaves."""
    found: dict[str, Any] = {}
    step = Trainer._step

    def fail(self: Trainer, rate: float) -> None:
        if self.state.num_steps < num_steps:
            return step(self, rate)
        self.freeze()
        state, tables = self.state, [block.items for block in self.objective.guide.posterior.blocks()]
        points = [self.objective.leaves, state.initial_point, state.window_point, state.point]
        moments = [value for values in state.moments[1] for value in values.values() if torch.is_tensor(value)]
        tensors = [value for value in (*itertools.chain(*points), *moments) if value.dim() == 2]
        found["held"] = Counter(len(value) for value in tensors)
        found["tables"] = tables
        raise FloatingPointError

    Trainer._step = fail
    try:
        fit_nested(path.parent, checkpoint=path)
    except FloatingPointError:
        found["left"] = [(len(table), int(table.isfinite().all(-1).sum())) for table in found.pop("tables")]
    finally:
        Trainer._step = step
    return found


def fit_loader(folder: Path) -> dict[str, Any]:
    """Shuffled mini-batches of 5, of which the last has one item, and the number is odd."""
    data = TensorDataset(torch.arange(41), 2.0 * normal(41))
    guide = AutoFlowGuide(some_groups, create_plates=lambda i, y: pyro.plate("groups", 41, dim=-1, subsample=i))
    return end(
        guide, fit(some_groups, guide, DataLoader(data, batch_size=5, shuffle=True), **{**OPTIONS, "num_steps": 60})
    )


def fit_autoencoder(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1 if folder.name == "alone" else int(os.environ["RANK"]) + 1)  # decoders begin elsewhere
    autoencoder = Autoencoder()
    guide = AutoFlowGuide(autoencoder.model, amortize={"images": nn.Linear(4, 3)})
    x = normal(160).reshape(40, 4)
    result = fit(autoencoder.model, guide, DataLoader(TensorDataset(x), batch_size=10, shuffle=True), **OPTIONS)
    found = end(guide, result)
    found["decoder"] = autoencoder.decoder.weight.detach()
    return found


def fit_with_nan(folder: Path) -> dict[str, Any]:
    """The second process gets a mini-batch with NaN, once in a pass of 21 mini-batches."""
    y = normal(42)
    y[6] = torch.nan
    guide = AutoFlowGuide(rows, "diagonal_normal")
    batches = [(part,) for part in y.split(2)]
    with pyro.validation_enabled(False):
        return end(guide, fit(rows, guide, batches, **{**OPTIONS, "num_steps": 20}))


def fit_own_data(folder: Path) -> dict[str, Any]:
    """Processes have data of their own, in unequal numbers of mini-batches."""
    rank = int(os.environ["RANK"])
    batches = [(part,) for part in normal(42).split(21)[rank].split(3 if rank else 7)]
    guide = AutoFlowGuide(rows, "diagonal_normal")
    return end(guide, fit(rows, guide, batches, **{**OPTIONS, "num_steps": 25}))


def fit_sampler(folder: Path) -> dict[str, Any]:
    data = TensorDataset(normal(42))
    loader = DataLoader(data, batch_size=7, sampler=DistributedSampler(data))
    guide = AutoFlowGuide(rows, "diagonal_normal")
    return end(guide, fit(rows, guide, loader, **{**OPTIONS, "num_steps": 25}))


def fit_interrupted(folder: Path) -> dict[str, Any]:
    """Ctrl-C in the second process only, after the first cycle."""

    def interrupt(progress: FitProgress) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)

    guide = AutoFlowGuide(schools, "diagonal_normal")
    options = {**OPTIONS, "num_steps": None, "callback": interrupt}
    return end(guide, fit(schools, guide, (SCHOOLS,), **options))


def fit_late(folder: Path) -> dict[str, Any]:
    """A limit of time in the second process only, which is over before the first step."""
    limit = 1e-3 if os.environ["RANK"] == "1" else None
    guide = AutoFlowGuide(schools, "diagonal_normal")
    return end(guide, fit(schools, guide, (SCHOOLS,), **{**OPTIONS, "max_seconds": limit}))


def fit_stopped(folder: Path) -> dict[str, Any]:
    """The callback of one process stops all."""
    rank = int(os.environ["RANK"])
    guide = AutoFlowGuide(schools, "diagonal_normal")
    options = {**OPTIONS, "num_steps": None, "callback": lambda progress: rank == 1}
    return end(guide, fit(schools, guide, (SCHOOLS,), **options))


def fit_refused(folder: Path) -> dict[str, Any]:
    """Messages of what does not fit together."""
    rank = int(os.environ["RANK"])
    other = {**OPTIONS, "settings": FitSettings(num_parts=3, estimates=ESTIMATES)}
    guide = AutoFlowGuide(schools, "diagonal_normal")
    calls = {
        "options": lambda: fit(schools, guide, (SCHOOLS,), **{**OPTIONS, "num_steps": rank + 1}),
        "data": lambda: fit(schools, guide, (SCHOOLS + rank,), **OPTIONS),
        "shapes": lambda: fit(
            schools, AutoFlowGuide(schools, "diagonal_normal" if rank else "planar"), (SCHOOLS,), **OPTIONS
        ),
        "parts": lambda: fit(schools, guide, (SCHOOLS,), **other),
        "plate": lambda: fit(groups, AutoNormal(groups), (normal(7),), **OPTIONS),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
    return found


def fit_alone(folder: Path) -> dict[str, Any]:
    """Each process trains by itself."""
    rank = int(os.environ["RANK"])
    guide = AutoFlowGuide(schools, "diagonal_normal")
    options = {**OPTIONS, "num_steps": 5 + rank, "settings": FitSettings(estimates=ESTIMATES), "distributed": False}
    return end(guide, fit(schools, guide, (SCHOOLS,), **options))


def fit_killed(folder: Path) -> dict[str, Any]:
    """The second process is killed twice, and torchrun starts both again."""
    step, restarts, taken = Trainer._step, int(os.environ["TORCHELASTIC_RESTART_COUNT"]), 0

    def take(self: Trainer, rate: float) -> None:
        nonlocal taken
        taken += 1
        if os.environ["RANK"] == "1" and restarts < 2 and taken == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, rate)

    Trainer._step = take
    guide = AutoFlowGuide(schools)
    return end(guide, fit(schools, guide, (SCHOOLS,), checkpoint=folder / "run.pt", **OPTIONS))


def sent_to_first(folder: Path) -> dict[str, Any]:
    return {"found": Processes.of_group("diagnose").to_first({"rank": os.environ["RANK"]})}


def diagnosed(distributed: bool = True, **options: Any) -> Diagnosis:
    """Of a guide that is the same in all processes, near the posterior; its k-hat is far from the limit."""
    torch.manual_seed(0)
    guide = AutoFlowGuide(schools)
    fit(schools, guide, (SCHOOLS,), distributed=False, num_steps=100, compile=False, seed=2, progress=False)
    options = {"seed": 3, "progress": False, "distributed": distributed, **options}
    return diagnose(schools, guide, (SCHOOLS,), **options)


def diagnose_schools(folder: Path) -> dict[str, Any]:
    """In shares of unequal lengths, in chunks."""
    taken = []
    chunks = ImportanceSampler.chunks

    def note(self: ImportanceSampler, num_samples: int, *, progress: bool) -> Iterator[Draws]:
        taken.append(num_samples)
        self.chunk = 300
        return chunks(self, num_samples, progress=progress)

    ImportanceSampler.chunks = note
    try:
        found = [diagnosed(num_samples=2001, search=False) for _ in range(2)]
    finally:
        ImportanceSampler.chunks = chunks
    return {"diagnosis": found[0], "again": found[1], "taken": taken}


def two_modes() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.abs(), 0.1), obs=torch.tensor(1.0))


def diagnose_searched(folder: Path) -> dict[str, Any]:
    """Of a guide that has one of two modes; without a seed."""
    pyro.set_rng_seed(int(os.environ["RANK"]))
    start = init_to_value(values={"z": torch.tensor(1.0)})
    guide = AutoFlowGuide(two_modes, "diagonal_normal", init_loc_fn=start, init_scale=0.1).setup()
    module = sys.modules["pyro_flows.diagnostics.diagnose"]
    measure_drift, moved = module.measure_drift, []

    def note(sampler: ImportanceSampler, draws: Draws, modes: Any) -> Any:
        moved.append(len(draws.log_guide))
        return measure_drift(sampler, draws, modes)

    module.measure_drift = note
    try:
        return {"diagnosis": diagnose(two_modes, guide, progress=False, distributed=True), "moved": moved}
    finally:
        module.measure_drift = measure_drift


def diagnose_subsampled(folder: Path) -> dict[str, Any]:
    """Each chunk is a mini-batch."""
    pyro.set_rng_seed(0)
    y = 2.0 * normal(41)
    guide = AutoFlowGuide(groups, create_plates=lambda y: pyro.plate("groups", len(y), subsample_size=5)).setup(y)
    return {"diagnosis": diagnose(groups, guide, (y,), seed=0, num_samples=1000, distributed=True)}


def diagnose_buffers(folder: Path) -> dict[str, Any]:
    """Running statistics that differ between processes, as after a run of both; and then not."""
    pyro.set_rng_seed(0)
    autoencoder, norm, x = Autoencoder(), nn.BatchNorm1d(4), normal(40).reshape(10, 4)
    guide = AutoFlowGuide(autoencoder.model, amortize={"images": nn.Sequential(norm, nn.Linear(4, 3))}).setup(x)
    norm.eval()
    rank = int(os.environ["RANK"])
    mean = norm.running_mean.clone()
    norm.running_mean.add_(rank)
    options = {"num_samples": 200, "seed": 0, "progress": False, "distributed": True}
    found = {"unlike": diagnose(autoencoder.model, guide, (x,), **options), "moved": norm.running_mean - mean}
    norm.running_mean.copy_(mean)
    return {**found, "alike": diagnose(autoencoder.model, guide, (x,), **options)}


def compare_schools(folder: Path) -> dict[str, Any]:
    pyro.set_rng_seed(0)
    guides = {name: AutoFlowGuide(schools, name).setup(SCHOOLS) for name in ("diagonal_normal", "full_rank_normal")}
    found = compare(schools, guides, (SCHOOLS,), num_samples=400, search=False, seed=0, distributed=True)
    return {"text": str(found), "weights": [row.diagnosis.log_weights for row in found]}


def compare_set_up(folder: Path) -> dict[str, Any]:
    """The second guide is set up after the search and the judgment of the first, where the random state has it."""
    guides = {"first": AutoDiagonalNormal(schools), "second": AutoNormal(schools, init_loc_fn=init_to_sample)}
    found = compare(schools, guides, (SCHOOLS,), num_samples=400, seed=0, progress=False, distributed=True)
    return {"text": str(found)}


def diagnose_refused(folder: Path) -> dict[str, Any]:
    """Messages of what does not fit together, and of errors in one process."""
    rank = int(os.environ["RANK"])

    def fails(y: Tensor, when: bool) -> None:
        if when and rank:
            raise KeyError("here")
        schools(y)

    def unobserved(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def refuses(*_: Any, **__: Any) -> Any:
        raise KeyError("there")

    pyro.set_rng_seed(rank)
    guide = AutoFlowGuide(schools, init_loc_fn=init_to_sample).setup(SCHOOLS)
    pyro.set_rng_seed(0)
    same = AutoFlowGuide(schools).setup(SCHOOLS)
    options = {"distributed": True, "seed": 0, "progress": False}
    module = sys.modules["pyro_flows.diagnostics.diagnose"]
    calls = {
        "options": lambda: diagnose(schools, same, (SCHOOLS,), **options, num_samples=1000 + rank),
        "draws": lambda: diagnose(schools, same, (SCHOOLS,), **{**options, "num_samples": 100}),
        "data": lambda: diagnose(schools, same, (SCHOOLS + rank,), **options),
        "parameters": lambda: diagnose(schools, guide, (SCHOOLS,), **options),
        "one": lambda: diagnose(fails, AutoFlowGuide(fails), (SCHOOLS, True), **options),
        "first": lambda: diagnose(schools, same, (SCHOOLS,), **options),
        "warning": lambda: diagnose(unobserved, AutoFlowGuide(unobserved), (SCHOOLS,), **options),
    }
    found: dict[str, Any] = {}
    before = module.search_regions, division.SETTINGS
    for name, call in calls.items():
        module.search_regions = refuses if name == "first" else before[0]
        division.SETTINGS = replace(before[1], min_draws=51)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "diagnose: no site")
                call()
            found[name] = ("nothing", "")
        except (ValueError, KeyError, RuntimeError, UserWarning) as error:
            found[name] = (type(error).__name__, str(error))
    module.search_regions, division.SETTINGS = before
    return found


def svi(folder: Path, kind: type[SVI] = SVI) -> dict[str, Any]:
    """The loop of a user, as in one process."""
    pyro.set_rng_seed(10)
    guide = AutoNormal(schools, init_loc_fn=init_to_sample)
    steps = kind(schools, guide, DistributedOptim(Adam({"lr": 0.01})), Trace_ELBO())
    losses = [steps.step(SCHOOLS) for _ in range(30)]
    return {**end(guide), "losses": losses}


def svi_broadcast(folder: Path) -> dict[str, Any]:
    """Processes begin elsewhere; the guide has a step limit."""
    pyro.set_rng_seed(10 + int(os.environ["RANK"]))
    guide = AutoFlowGuide(schools, init_loc_fn=init_to_sample)
    steps = SVI(schools, guide, DistributedOptim(Adam({"lr": 0.01})), Trace_ELBO())
    try:
        steps.step(SCHOOLS)
        message = "nothing"
    except RuntimeError as error:
        message = str(error)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(int(os.environ["RANK"]))  # the jump back must not count as a step
    broadcast_parameters(schools, guide, SCHOOLS)
    losses = [steps.step(SCHOOLS) for _ in range(5)]
    return {**end(guide), "losses": losses, "message": message}


def compiled_svi(folder: Path) -> dict[str, Any]:
    """In a recorded step, whose optimizer is outside of it."""

    def refuse(self: LossGraph, args: Any, kwargs: Any, rule: Any = None) -> None:
        assert rule is None
        raise RuntimeError("this test has no compiler")

    compile, LossGraph.compile = LossGraph.compile, refuse
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return svi(folder, CompiledSVI)
    finally:
        LossGraph.compile = compile


def svi_until_converged(folder: Path) -> dict[str, Any]:
    """Both stop after the same step, though their losses differ; and have different items."""
    pyro.set_rng_seed(20)
    seen = set()

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y), subsample_size=5) as index:
            seen.update(index.tolist())
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    model = disjoint_subsamples(model, "rows")
    guide = AutoNormal(model)
    steps = SVI(model, guide, DistributedOptim(Adam({"lr": 0.05})), Trace_ELBO())
    losses = list(until_converged(steps, (normal(40),), progress=False))
    return {**end(guide), "steps": len(losses), "items": seen}


def ddp_recipe(folder: Path) -> dict[str, Any]:
    """docs/recipes/ddp_training.py; the posterior is N(mean of y, 1 / 42)."""
    from tests.test_recipes import recipe

    pyro.set_rng_seed(0)
    data = TensorDataset(3.0 + normal(42))
    loader = DataLoader(data, batch_size=7, sampler=DistributedSampler(data))
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlowGuide(rows, "diagonal_normal")
        losses = recipe("ddp_training").train(rows, guide, loader, num_epochs=60, learning_rate=0.05)
        draws = guide.sample_posterior(2000, data.tensors[0])["mu"]
    return {**end(guide), "losses": losses, "mean": draws.mean() - data.tensors[0].mean(), "sd": draws.std()}


def main(folder: Path, names: list[str]) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=240))
    for name in names:
        pyro.clear_param_store()
        with double_precision():
            found = globals()[name](folder)
        torch.save(found, folder / f"{name}_{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
