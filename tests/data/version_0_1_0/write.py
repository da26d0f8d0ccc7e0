# SPDX-License-Identifier: Apache-2.0
"""Writes the files beside it, with the code of version 0.1.0: ``git worktree add old 2ab4057``, then
``PYTHONPATH=old:. python tests/data/version_0_1_0/write.py``. Widths are small, to keep files small.

``guides.pt.gz`` holds, by name, a guide's ``state_dict``, values of its latents and their log densities under it; the
two stores hold the parameters of the guides of the same name; ``run.pt`` is the checkpoint of a run of ``fit`` that was
cut off in its second cycle, and ``"run"`` has values and densities of the guide at that point.
"""

from __future__ import annotations

import gzip
import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_flows import AutoFlowGuide, fit
from tests.data.version_0_1_0.guides import DATA, GUIDES, STORED, densities, eight_schools, small

HERE = Path(__file__).parent


@torch.no_grad()
def moved(guide: Any) -> Any:
    """The guide somewhere else than at its start, where most layers are the identity."""
    for index, parameter in enumerate(guide.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.add_(0.2 * noise.to(parameter))
    return guide


def write_guides() -> dict[str, Any]:
    written = {}
    for name, make in GUIDES.items():
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = moved(make("stored").setup(*DATA))
        values, log_prob = densities(guide)
        written[name] = {"state_dict": guide.state_dict(), "values": values, "log_prob": log_prob}
        if name in STORED:
            guide(*DATA)  # which puts its parameters into the store
            pyro.get_param_store().save(str(HERE / STORED[name]))
    return written


class Stopped(Exception):
    """Ends a run as the end of its process does."""


def write_checkpoint() -> dict[str, Any]:
    from pyro_flows.inference import checkpoint

    checkpoint.EVERY = 0.0
    runs = 0

    def model(*data: Tensor) -> None:
        nonlocal runs
        runs += 1
        if runs > 700:
            raise Stopped
        eight_schools(*data)

    pyro.clear_param_store()
    torch.manual_seed(0)
    path = HERE / "run.pt"
    path.unlink(missing_ok=True)
    guide = AutoFlowGuide(model, small("auto"))
    with suppress(Stopped):
        fit(model, guide, DATA, seed=0, progress=False, compile=False, checkpoint=path)
    values, log_prob = densities(guide)  # which is where it was when the file was written
    return {"values": values, "log_prob": log_prob}


if __name__ == "__main__":
    file = io.BytesIO()
    torch.save({**write_guides(), "run": write_checkpoint()}, file)
    # Zeros fill much of torch's files.
    (HERE / "guides.pt.gz").write_bytes(gzip.compress(file.getvalue(), mtime=0))
