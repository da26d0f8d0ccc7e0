# SPDX-License-Identifier: Apache-2.0
"""How torch's compiler is called; what it makes is tested in test_svi.py."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._inductor import codecache as typed_codecache
from torch._inductor import sizevars
from torch.utils._sympy.functions import FloorDiv

from pyro_flows.compiled import inductor
from pyro_flows.compiled.inductor import COMPILER, PATCHES, _side_by_side, _unfuse, _where_needed
from pyro_flows.compiled.tracer import trace_operations

codecache: Any = typed_codecache
BUILD = next(patch for patch in PATCHES if patch.replacement is _side_by_side)


class Builder:
    """As inductor's, for a file that takes a function to build."""

    def __init__(self, path: Path, build: object) -> None:
        self.path = path
        self.function = build

    def get_target_file_path(self) -> str:
        return str(self.path)

    def build(self) -> None:
        assert callable(self.function)
        self.function()
        self.path.touch()


def test_parts_of_a_library_are_compiled_at_once_and_then_linked(tmp_path: Path) -> None:
    """One after another they take twice as long, with one of two cores idle."""
    both = threading.Barrier(2, timeout=10.0)  # which neither passes alone
    parts = [Builder(tmp_path / name, both.wait) for name in ("main.o", "optimized.o")]

    def link() -> None:
        assert all(part.path.exists() for part in parts)

    library = Builder(tmp_path / "main.so", link)
    original = codecache._worker_compile_cpp
    with BUILD.applied():
        codecache._worker_compile_cpp(str(tmp_path / "lock"), (*parts, library))
    assert library.path.exists()
    assert codecache._worker_compile_cpp is original


def test_a_failing_part_is_reported(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    library = Builder(tmp_path / "main.so", lambda: None)
    with pytest.raises(RuntimeError, match="no compiler"), BUILD.applied():
        codecache._worker_compile_cpp(str(tmp_path / "lock"), (Builder(tmp_path / "main.o", fail), library))
    assert not library.path.exists()


def test_a_version_of_torch_that_builds_otherwise_does_as_it_does() -> None:
    calls: list[tuple[Any, ...]] = []
    _side_by_side(lambda *given: calls.append(given))("lock", "builder", "input", "output")
    assert calls == [("lock", "builder", "input", "output")]


def test_only_indices_with_divisions_are_simplified() -> None:
    """``sympy.simplify`` of the others, which leaves them as they are, took a tenth of the time of compiling."""
    x, y = sympy.symbols("x y", integer=True, nonnegative=True)
    simplified = []

    def spy(index: Any, *others: Any) -> Any:
        simplified.append(index)
        return sizevars.simplify_index_in_vec_range(index, *others)

    simplify = _where_needed(spy)
    linear = 32 * x + y + 5
    assert simplify(linear, y, 16) is linear
    assert sizevars.simplify_index_in_vec_range(linear, y, 16) == linear
    divided = 64 * x + FloorDiv(y, 16)
    assert simplify(divided, y, 16) == sizevars.simplify_index_in_vec_range(divided, y, 16) != divided
    assert simplified == [divided]


def test_sums_are_taken_out_of_small_products_alone() -> None:
    def function(small: Tensor, large: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.addmm(small, small, factor),
            torch.addmm(large, large, factor),
            torch.addmm(small, small, factor, beta=2),
        )

    values = torch.randn(16, 8), torch.randn(COMPILER.max_unfused, 8), torch.randn(8, 8)
    graph = trace_operations(function, values)[0]
    expected = function(*values)
    _unfuse(graph)
    assert all(torch.allclose(*pair) for pair in zip(graph(*values), expected, strict=True))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.mm.default) == 1
    assert targets.count(torch.ops.aten.addmm.default) == 2


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
@pytest.mark.parametrize("missing", ["patch", "function"])
def test_each_patch_can_do_without(
    missing: str, patch: inductor.Patch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another version of torch may not have what is replaced, and nothing but time is lost."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if missing == "patch":
        monkeypatch.setattr(inductor, "PATCHES", tuple(other for other in PATCHES if other is not patch))
    else:
        renamed = replace(patch, name=patch.name + "_of_another_version")
        monkeypatch.setattr(inductor, "PATCHES", tuple(renamed if other is patch else other for other in PATCHES))
    values = [torch.randn(7, 5), torch.randn(5)]
    graph, _ = trace_operations(lambda x, y: [(x * y).tanh().sum(-1), x @ y], values)
    found = inductor.to_machine_code(graph, values)(*values)
    for one, other in zip(found, graph(*values), strict=True):
        torch.testing.assert_close(one, other)
