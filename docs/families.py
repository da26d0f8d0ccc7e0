# SPDX-License-Identifier: Apache-2.0
"""What the pages say of every registered family, written from the families' classes when the docs are built.

The comments ``.. family-table`` and ``.. family-classes`` of a page are where their table and their reference go.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from pyro_flows import flows
from pyro_flows.flows import FlowSpec

# Two tables, each of which fits a page: column -> width. The first column of both is the name.
USE = {"Name": 20, "Spec": 21, "Best for": 24, "Dimension": 11, "Cost of a draw": 16, "Inverse": 8}
NATURE = {"Name": 20, "Tails (unconstrained space)": 26, "Parameters": 18, "Exact start": 8, "Reference": 28}
# Where parameters are counted.
SIZES = (10, 100)


def family_table() -> str:
    """Two ``list-table`` with a row for each family, by name: when to take it, and what it is."""
    lines = []
    for columns in (USE, NATURE):
        lines += [".. list-table::", "   :header-rows: 1", f"   :widths: {' '.join(map(str, columns.values()))}", ""]
        for cells in ({column: column for column in columns}, *map(row, flows.names())):
            for index, column in enumerate(columns):
                lines.append(f"   {'  -' if index else '* -'} {cells[column]}".rstrip())
        lines.append("")
    return "\n".join(lines)


def family_classes() -> str:
    """An ``autoclass`` for each family, under its name and what it is best for."""
    blocks = []
    for name in flows.names():
        spec = flows.get(name)
        blocks.append(f'``"{name}"``: {spec.best_for}.')
        blocks.append(f".. autoclass:: pyro_flows.flows.{type(spec).__name__}\n   :show-inheritance:")
    return "\n\n".join(blocks) + "\n"


def row(name: str) -> dict[str, str]:
    """The cells of a family, by column."""
    spec = flows.get(name)
    largest = " and up" if spec.practical_dim is None else f" to about {_spaced(spec.practical_dim)}"
    counts = " and ".join(_rounded(_count_parameters(spec, size)) for size in SIZES)
    return {
        "Name": f"``{name}``",
        "Spec": f":class:`~pyro_flows.flows.{type(spec).__name__}`",
        "Best for": spec.best_for,
        "Dimension": f"{spec.min_dim}{largest}",
        "Cost of a draw": spec.draw_cost,
        "Inverse": _inverse(spec),
        "Tails (unconstrained space)": spec.tails,
        "Parameters": f"{spec.parameters}; {counts}",
        "Exact start": "yes" if spec.identity_start else "near",
        "Reference": "; ".join(references(type(spec))),
    }


def references(spec_class: type[FlowSpec]) -> list[str]:
    """The papers that a class names, as "Ko, Domke 2025, arXiv:2505.24243"."""
    _, _, text = (inspect.cleandoc(spec_class.__doc__ or "")).partition("References:\n")
    found = []
    for entry in re.split(r"\n\s*\n", text):
        entry = " ".join(entry.split())
        if not entry:
            continue
        authors = entry.split(". ")[0].split(", ")
        who = ", ".join(authors) if len(authors) <= 2 else f"{authors[0]} et al."
        (year,) = re.findall(r"\b((?:19|20)\d\d)\.(?: |$)", entry)
        arxiv = re.search(r"arXiv:\d+\.\d+", entry)
        found.append(f"{who} {year}" + (f", {arxiv[0]}" if arxiv else ""))
    return found


def _inverse(spec: FlowSpec) -> str:
    if not spec.has_inverse:
        return "no"
    return "yes" if spec.build(max(2, spec.min_dim)).transform.one_pass_inverse else "D passes"


def _count_parameters(spec: FlowSpec, input_dim: int) -> int:
    return sum(parameter.numel() for parameter in spec.build(input_dim).parameters())


def _rounded(count: int) -> str:
    """Three digits, from a million two."""
    return f"{count / 1e6:.1f} million" if count >= 999_500 else _spaced(int(float(f"{count:.3g}")))


def _spaced(count: int) -> str:
    return f"{count:,}".replace(",", " ") if count >= 10_000 else str(count)


def write_families(app: Any, page: str, source: list[str]) -> None:
    """Sphinx's hook on a page that it has read."""
    for marker, write in ((".. family-table\n", family_table), (".. family-classes\n", family_classes)):
        if marker in source[0]:
            source[0] = source[0].replace(marker, write() + "\n")


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", write_families)
    return {"parallel_read_safe": True}
