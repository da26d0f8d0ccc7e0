# SPDX-License-Identifier: Apache-2.0
"""The code in the docs runs, and the docs know every family."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch

import pyro_flows
from pyro_flows import diagnostics, flows, plots, transforms
from tests.flows import test_conformance, test_specs

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIALS = sorted((DOCS.parent / "tutorials").glob("*.ipynb"))


def code_blocks(text: str) -> list[str]:
    """The ``code-block:: python`` directives of a page, in order."""
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:[ ]{3}.*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


PAGES = sorted(page.stem for page in DOCS.glob("*.rst") if code_blocks(page.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, restored_registry: None) -> None:
    blocks = code_blocks((DOCS / f"{page}.rst").read_text())
    namespace: dict[str, object] = {"__name__": "docs_example"}
    for block in blocks:
        if "MCMC" in block:  # Takes minutes; test_density.py and test_neutra.py have these lines with fewer draws.
            continue
        source = block.replace("num_steps = 2000", "num_steps = 5")
        exec(compile(source, f"{page}.rst", "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("context_dim", (0, 3))
def test_the_family_of_the_docs_keeps_the_contract(context_dim: int, restored_registry: None) -> None:
    """The file of docs/extending.rst goes through the tests that families of the library go through."""
    block = code_blocks((DOCS / "extending.rst").read_text())[0]
    exec(compile(block, "extending.rst", "exec", dont_inherit=True), {"__name__": "docs_example"})
    name = "sinh_arcsinh"
    test_specs.test_a_family_describes_itself(name)
    test_specs.test_build_checks_sizes(name)
    test_conformance.test_density(name, context_dim, torch.float64, 5)
    test_conformance.test_batch_shapes(name, context_dim, (2, 3))
    test_conformance.test_path_gradient(name, context_dim, 2)
    test_conformance.test_every_parameter_gets_a_gradient(name, context_dim)
    test_conformance.test_context_matters(name)
    test_conformance.test_identity_start(name, context_dim, 5)


def test_quoted_messages_are_those_of_the_library() -> None:
    """Readers search the page of symptoms for the message that they have. Names and numbers are @ here."""
    messages = []
    for path in Path(pyro_flows.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                messages.append("".join(p.value if isinstance(p, ast.Constant) else "@" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    messages = [message.replace("'@'", "@") for message in messages]
    text = " ".join((DOCS / "troubleshooting.rst").read_text().split())
    quotes = re.findall(r'\*"(.+?)"\*', text)
    assert len(quotes) > 10
    for quote in quotes:
        for part in re.sub(r"'\w+'|\d+%?", "@", quote).split(" ... "):
            part = part.removesuffix(" ...")
            assert any(part in message for message in messages), part


def as_built(page: str) -> str:
    """A page with what docs/families.py writes into it."""
    spec = importlib.util.spec_from_file_location("families", DOCS / "families.py")
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    source = [(DOCS / f"{page}.rst").read_text()]
    families.write_families(None, page, source)
    return source[0]


def test_every_family_has_its_row() -> None:
    text = as_built("choosing_a_flow")
    rows = re.findall(r"^   \* - ``(\w+)``\n     - :class:`~pyro_flows\.flows\.(\w+)`", text, re.MULTILINE)
    assert sorted(rows) == [(name, type(flows.get(name)).__name__) for name in flows.names()]


@pytest.mark.parametrize("module", [flows, transforms, diagnostics, plots], ids=lambda m: m.__name__)
def test_everything_public_is_in_the_reference(module) -> None:
    text = as_built(f"api/{module.__name__.removeprefix('pyro_flows.')}")
    documented = re.findall(rf"^\.\. auto\w+:: {re.escape(module.__name__)}\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(module.__all__)


def test_every_name_of_the_package_is_in_the_reference() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. (?:auto\w+|module):: pyro_flows\.(?:\w+\.)*(\w+)$", pages, re.MULTILINE)
    assert set(pyro_flows.__all__) <= set(documented)


def test_every_tutorial_is_listed_with_its_question() -> None:
    page = (DOCS / "tutorials.rst").read_text()
    for stem in (path.stem for path in TUTORIALS):
        assert page.count(f":doc:`tutorials/{stem}`") == page.count(f"   tutorials/{stem}\n") == 1, stem


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_jupyter_opens_the_tutorial(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(json.loads(path.read_text()))
