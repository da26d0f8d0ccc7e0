# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts share: their command line, and tables on the terminal and in ``docs/tables``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["Measure", "Rows", "as_rst", "parser", "run"]

TABLES = Path(__file__).resolve().parents[2] / "docs" / "tables"
Rows = list[list[str]]
# Number of seeds -> header and rows; the docstring is the table's title.
Measure = Callable[[int], tuple[Sequence[str], Rows]]


def as_rst(header: Sequence[str], rows: Rows) -> str:
    """A list-table."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def parser(description: str | None, measures: Mapping[str, Measure], seeds: int) -> argparse.ArgumentParser:
    """The options of :func:`run`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("measures", nargs="*", help=f"some of {', '.join(measures)}; all by default")
    made.add_argument("--seeds", type=int, default=seeds, help="seeds 0 to N-1, or repeats of a timing")
    made.add_argument("--write", action="store_true", help="write docs/tables too")
    return made


def run(measures: Mapping[str, Measure], options: argparse.Namespace, prefix: str = "") -> None:
    """Run the measures that are named, or all, on one thread; ``prefix`` goes before the files' names."""
    torch.set_num_threads(1)
    for name in options.measures or measures:
        measure = measures[name]
        header, rows = measure(options.seeds)
        print(f"\n{name}: {measure.__doc__}\n")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
        if options.write:
            TABLES.mkdir(exist_ok=True)
            (TABLES / f"{prefix}{name}.rst").write_text(as_rst(header, rows))
