# SPDX-License-Identifier: Apache-2.0
"""A module imports from lower layers only, and never from the package root."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyro_flows.flows.bases import Base, BaseSpec
from pyro_flows.flows.noise import CenteredStudentT, DiagonalNormalMixture, StandardNormal
from pyro_flows.transforms import Head, Preconditioner

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_flows"
# From the lowest to the highest.
LAYERS = {
    "_blame": 0,
    "_checks": 0,
    "_files": 0,
    "_memory": 0,
    "_random": 0,
    "_recording": 0,
    "_storage": 0,
    "_threads": 0,
    "compiled": 1,
    "transforms": 1,
    "flows": 2,
    "models": 2,
    "distributed": 3,
    "posterior": 3,
    "starts": 4,
    "guides": 5,
    "importance": 6,
    "training": 7,
    "diagnostics": 7,
    "export": 8,
    "plots": 8,
    "prediction": 8,
    "__init__": 9,
    "__main__": 10,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    return LAYERS[module.split(".")[0]]


def file(path: Path) -> str:
    """A module's path inside the package."""
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    """A module's name inside the package."""
    return file(path).removesuffix(".py").replace("/", ".")


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


@pytest.mark.parametrize("path", MODULES, ids=file)
def test_imports_point_down(path):
    here = module_name(path)
    for name in imports(path):
        if layer(here) < LAYERS["__init__"]:
            assert name, f"{here} imports the package root"
            assert layer(name) <= layer(here), f"{here} imports {name} from a higher layer"
            siblings = {here.split(".")[0], name.split(".")[0]}
            assert siblings != {"flows", "models"}, "posterior/ is the first to know both flows and models"


def test_what_compiles_steps_is_a_library_of_its_own():
    """So that it serves any Pyro model and guide, and can be offered to Pyro."""
    own = {"compiled", "_blame", "_checks", "_random", "_recording", "_threads"}
    for path in (PACKAGE / "compiled").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= own, path.name


def test_private_parts_of_torch_are_touched_in_one_place():
    """What a new version of torch may break is in ``compiled/``, but for functions that torch documents
    (``torch._foreach_add_`` and its like), and for those that have no public twin."""
    without_twin = {
        ("models/memory.py", "torch._C._functorch.is_functorch_wrapped_tensor"),  # has it no memory of its own?
        ("models/solves.py", "torch._C._will_engine_execute_node"),  # does a backward pass need this derivative?
        ("flows/bases.py", "torch._standard_gamma"),  # the one sampler of gammas that takes a generator
        ("transforms/adapter.py", "torch.distributions.transforms._InverseTransform"),  # how an inverse is known
        ("transforms/base.py", "torch._C._functorch.is_functorch_wrapped_tensor"),  # is it vmap's?
    }
    private = re.compile(r"torch\.(\w+\.)*_(?!foreach_)")
    found = {(file(path), name) for path in MODULES for name in _dotted_names(path) if private.match(name)}
    assert {(where, name) for where, name in found if not where.startswith("compiled/")} == without_twin


def test_only_starts_look_at_what_heads_and_bases_are():
    """Everyone else asks them by a method or an attribute, so that a new head or base is one new class. What reads
    files of 0.1.0 knows the classes of that time."""
    kinds = (Head, Preconditioner, Base, BaseSpec, StandardNormal, CenteredStudentT, DiagonalNormalMixture)
    modules = [sys.modules[name] for name in sorted(sys.modules) if name.startswith("pyro_flows.")]
    classes = {thing for module in modules for thing in vars(module).values() if inspect.isclass(thing)}
    home = {thing.__name__: thing.__module__ for thing in classes if issubclass(thing, kinds)}
    assert {"ConditionalGaussianHead", "FullRankPreconditioner", "MixtureBase", "StudentT"} <= home.keys()
    for path in MODULES:
        here = f"pyro_flows.{module_name(path)}"
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type")):
                continue
            asked = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & home.keys()
            others = {name for name in asked if home[name] != here}  # a class's own file may tell it apart
            allowed = here.startswith("pyro_flows.starts.") or here == "pyro_flows.flows.version_0_1_0"
            assert not others or allowed, f"{here}, line {node.lineno}: {others}"


def test_models_run_in_few_places():
    """How a model runs (many draws at once, in plates, without validation) is decided once, in ``models/``; guides look
    at it when they are set up, and the compiled step runs what it records."""
    programs = {"model", "_model", "guide", "_guide"}
    elsewhere = {
        "training/elbo.py",  # an ELBO: Pyro's base class has it run the guide, with gradients
    }
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] in ("models", "guides", "compiled") or file(path) in elsewhere:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = ast.unparse(called).rpartition(".")[2] if isinstance(called, ast.Attribute | ast.Name) else ""
            handled = isinstance(called, ast.Call) and ast.unparse(called.func).startswith("poutine.")
            traced = isinstance(node, ast.Attribute) and node.attr == "get_trace"
            assert not (traced or handled or name in programs), f"{file(path)}, line {node.lineno}: {ast.unparse(node)}"


def test_what_can_be_tuned_is_in_a_settings_dataclass():
    """So that a reader finds it with its unit and reason, and a test can change it.

    Numbers in a map or in noise are part of its definition: with others, stored parameters would mean something else.
    Those of the demo are its data, those of files their format.
    """
    definitions = (
        "transforms/",
        "flows/noise.py",
        "flows/bases.py",
        "flows/version_0_1_0.py",
        "training/checkpoint.py",
        "_files.py",
        "__main__.py",
    )
    for path in MODULES:
        if file(path).startswith(definitions):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                numbers = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant) and _is_number(n.value)]
                is_table = isinstance(node.value, ast.Tuple) and any(isinstance(n, ast.Call) for n in node.value.elts)
                assert not numbers or is_table, f"{file(path)}, line {node.lineno}: {ast.unparse(node)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1, -1)


def _dotted_names(path: Path) -> Iterator[str]:
    """Whole names with a dot in them, as they are imported or written."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
            while isinstance(node, ast.Attribute):
                node = node.value
        stack += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", MODULES, ids=file)
def test_every_file_is_one_screenful_of_one_concept(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)), "a module says what lives in it"
    assert text.count("\n") <= 400
