# SPDX-License-Identifier: Apache-2.0
"""Files of the formats that this version writes can be read by all later ones."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_flows import AutoFlowGuide
from tests.data.format_3.write import HERE, train
from tests.data.version_0_1_0.guides import DATA, densities, eight_schools


def unpacked(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pt"
    path.write_bytes(gzip.decompress((HERE / f"{name}.pt.gz").read_bytes()))
    return path


@pytest.fixture
def expected() -> Any:
    return torch.load(io.BytesIO(gzip.decompress((HERE / "expected.pt.gz").read_bytes())), weights_only=True)


def test_a_run_goes_on(tmp_path: Path, expected: Any) -> None:
    path = unpacked("run", tmp_path)
    assert torch.load(path, weights_only=True)["state"]["num_steps"] == 7
    _, result = train(path)
    assert result.steps == 12 and result.losses == pytest.approx(expected["losses"], abs=0.01)


def test_a_guide_is_the_same(tmp_path: Path, expected: Any) -> None:
    guide = AutoFlowGuide.load(unpacked("guide", tmp_path), eight_schools, DATA)
    _, log_prob = densities(guide, expected["values"])
    torch.testing.assert_close(log_prob, expected["log_prob"], rtol=1e-5, atol=1e-4)
