# SPDX-License-Identifier: Apache-2.0
"""A module imports from lower layers only, and never from the package root."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_flows"
# From the lowest to the highest.
LAYERS = {
    "_blame": 0,
    "_checks": 0,
    "compiled": 1,
    "transforms": 1,
    "flows": 2,
    "models": 2,
    "posterior": 3,
    "starts": 4,
    "guides": 5,
    "importance": 6,
    "training": 7,
    "diagnostics": 7,
    "export": 8,
    "plots": 8,
    "__init__": 9,
    "__main__": 10,
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
        if layer(here) < LAYERS["__init__"]:
            assert name, f"{here} imports the package root"
            assert layer(name) <= layer(here), f"{here} imports {name} from a higher layer"
            siblings = {here.split(".")[0], name.split(".")[0]}
            assert siblings != {"flows", "models"}, "posterior/ is the first to know both flows and models"
            assert siblings != {"compiled", "transforms"}, "compiled/ is a library of its own"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_is_one_screenful_of_one_concept(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)), "a module says what lives in it"
    assert text.count("\n") <= 400
