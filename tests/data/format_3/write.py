# SPDX-License-Identifier: Apache-2.0
"""Writes the files beside it: ``PYTHONPATH=. python tests/data/format_3/write.py``, at the commit that added them.

``run.pt.gz`` is the checkpoint of a run of ``fit`` that was cut off after 7 of 12 steps, in format 3; ``guide.pt.gz`` a
guide that was saved, in format 1; ``expected.pt.gz`` has the losses of the whole run, and values of the guide's latents
with their log densities.
"""

from __future__ import annotations

import gzip
import io
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_flows import AutoFlowGuide, fit
from pyro_flows.training import EstimateSettings, FitSettings
from pyro_flows.training.trainer import Trainer
from tests.data.version_0_1_0.guides import DATA, densities, eight_schools, small

HERE = Path(__file__).parent
SETTINGS = FitSettings(checkpoint_interval=0.0, estimates=EstimateSettings(num_runs=2, num_particles=20))


class Stopped(Exception):
    """Ends a run as the end of its process does."""


def train(path: Path | None, stop: int = 0) -> tuple[Any, Any]:
    """The guide, and the result of the run."""
    step, taken = Trainer._step, 0

    def counted(self: Trainer, rate: float) -> None:
        nonlocal taken
        if taken == stop > 0:
            raise Stopped
        taken += 1
        step(self, rate)

    pyro.clear_param_store()
    guide = AutoFlowGuide(eight_schools, small("realnvp"))
    Trainer._step = counted  # type: ignore[method-assign]
    try:
        result = fit(eight_schools, guide, DATA, num_steps=12, num_particles=4, seed=0, progress=False,
                     checkpoint=path, settings=SETTINGS)  # fmt: skip
    finally:
        Trainer._step = step  # type: ignore[method-assign]
    return guide, result


def write(name: str, data: bytes) -> None:
    (HERE / f"{name}.pt.gz").write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        with suppress(Stopped):
            train(path, stop=7)
        write("run", path.read_bytes())
        guide, result = train(None)
        guide.save(path)
        write("guide", path.read_bytes())
        values, log_prob = densities(guide)
        file = io.BytesIO()
        torch.save({"losses": list(result.losses), "values": values, "log_prob": log_prob}, file)
        write("expected", file.getvalue())
