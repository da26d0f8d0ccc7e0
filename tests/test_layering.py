# SPDX-License-Identifier: Apache-2.0
"""A module imports from lower layers only, and never from the package root."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_flows"
# From design.md; the longest matching prefix counts.
LAYERS = {
    "_blame": 0,
    "_checks": 0,
    "transforms": 1,
    "flows": 2,
    "models": 2,
    "guides": 3,
    "inference": 4,
    "diagnostics": 4,
    "export": 5,
    "plots": 5,
    "__init__": 6,
    "__main__": 7,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    return LAYERS[module.split(".")[0]]


def imports(path: Path) -> list[str]:
    """Names of our own modules that a file imports, without the leading package name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [node.module or ""]
            if node.module == "pyro_flows":
                names = [f"pyro_flows.{a.name}" for a in node.names]
        found += [name.removeprefix("pyro_flows").lstrip(".") for name in names if name.split(".")[0] == "pyro_flows"]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for name in imports(path):
        if layer(here) < 6:
            assert name, f"{here} imports the package root"
            assert layer(name) <= layer(here), f"{here} imports {name} from a higher layer"
            siblings = {here.split(".")[0], name.split(".")[0]}
            assert siblings != {"flows", "models"}, "only guides/ knows both flows and models"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_is_one_screenful_of_one_concept(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)), "a module says what lives in it"
    assert text.count("\n") <= 400
