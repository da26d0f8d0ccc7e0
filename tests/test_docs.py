# SPDX-License-Identifier: Apache-2.0
"""The code in the docs runs, and the docs know every family."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from pyro_flows import diagnostics, flows, plots, transforms

DOCS = Path(__file__).resolve().parents[1] / "docs"


def code_blocks(text: str) -> list[str]:
    """The ``code-block:: python`` directives of a page, in order."""
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:[ ]{3}.*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


@pytest.mark.parametrize("page", ["choosing_a_flow", "diagnostics", "extending", "training"])
def test_code_runs(page: str, restored_registry: None) -> None:
    blocks = code_blocks((DOCS / f"{page}.rst").read_text())
    assert blocks
    namespace: dict[str, object] = {"__name__": "docs_example"}
    for block in blocks:
        if "MCMC" in block:  # Takes minutes; test_density.py and test_neutra.py have these lines with fewer draws.
            continue
        source = block.replace("num_steps = 2000", "num_steps = 5")
        exec(compile(source, f"{page}.rst", "exec", dont_inherit=True), namespace)


def test_every_family_has_its_row() -> None:
    text = (DOCS / "choosing_a_flow.rst").read_text()
    rows = re.findall(r"^   \* - ``(\w+)``\n     - :class:`~pyro_flows\.flows\.(\w+)`", text, re.MULTILINE)
    assert sorted(rows) == [(name, type(flows.get(name)).__name__) for name in flows.names()]


@pytest.mark.parametrize("module", [flows, transforms, diagnostics, plots], ids=lambda m: m.__name__)
def test_everything_public_is_in_the_reference(module) -> None:
    text = (DOCS / "api.rst").read_text()
    documented = re.findall(rf"^\.\. auto\w+:: {re.escape(module.__name__)}\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(module.__all__)
