# SPDX-License-Identifier: Apache-2.0
"""README's code runs, prints what README says it prints, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link
    for page in re.findall(r"(?<!\()\bdocs/\w+\.(?:rst|cff)", TEXT):
        assert f"]({page})" in TEXT, page  # a link that is no link


def labels(output: str) -> list[str]:
    """What stands before the first number of each line, or before a bracket."""
    return [re.split(r"\s*[-(\d]", line)[0] for line in output.strip().splitlines()]


@pytest.mark.slow
def test_code_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(python|text)\n(.*?)```", TEXT, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", "text", "python", "text"]
    namespace: dict[str, object] = {"__name__": "readme"}
    pyro.clear_param_store()
    found = ""
    for kind, block in blocks:
        if kind == "python":
            code = block.replace("range(2000)", "range(3)").replace("seed=", "progress=False, seed=")
            exec(compile(code, "README.md", "exec", dont_inherit=True), namespace)
            found = capsys.readouterr().out
        else:
            # The verdict and the advice may differ where rounding does; both are sentences.
            expected = [label for label in labels(block) if len(label.split()) <= 2]
            assert len(expected) >= 3
            assert set(expected) <= set(labels(found)), found
            assert len(found.splitlines()) in range(len(block.splitlines()) - 1, len(block.splitlines()) + 3)
