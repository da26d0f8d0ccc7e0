# SPDX-License-Identifier: Apache-2.0
"""Figures of the speed benchmarks: the lines of a table, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING

from tables import TABLES, Measure, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = TABLES.parent / "figures"
# Whose lines have which colour (Okabe and Ito's) and dashes, by the beginning of their labels; guides differ by marker.
STYLES = {
    "Pyro": ("0.55", "--"),
    "NumPyro": ("#0072b2", ":"),
    "SVI": ("#cc79a7", "-."),
    "CompiledSVI": ("#d55e00", "-"),
    "fit": ("#009e73", "-"),
}
MARKERS = {
    "AutoNormal": "o",
    "AutoIAFNormal": "s",
    "AutoNormalizingFlow": "^",
    "AutoBNAFNormal": "v",
    "AutoFlowGuide": "D",
}


def with_figure(name: str, measure: Measure, title: str) -> Measure:
    """The same measure, which also writes ``docs/figures``."""

    @wraps(measure)
    def measured(repeats: int) -> tuple[Sequence[str], Rows]:
        header, rows = measure(repeats)
        save_lines(name, title, header, rows)
        return header, rows

    return measured


def as_number(cell: str) -> float | None:
    """What a cell says, if that is a number and nothing else."""
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def save_lines(name: str, title: str, header: Sequence[str], rows: Rows) -> None:
    """Each row's numbers over those of the header; a panel for each number of particles that rows end with."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, Rows] = {}
    for row in rows:
        label, _, particles = row[0].partition(" x ")
        panels.setdefault(particles, []).append([label, *row[1:]])
    columns = [place for place, cell in enumerate(header) if as_number(cell) is not None]
    size = (6.5 + 3.0 * (len(panels) - 1), 4.4)
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, (particles, lines) in zip(grid[0], panels.items(), strict=True):
        draw_lines(axes, lines, {place: as_number(header[place]) for place in columns})
        axes.set_xticks([as_number(header[place]) for place in columns], [header[place] for place in columns])
        axes.set(xlabel=title, title=f"particles: {particles}" if particles else None)
    grid[0, 0].set_ylabel("milliseconds a step")
    grid[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    # The same numbers give the same file; text stays text.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(FIGURES / f"speed_{name}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_lines(axes: Axes, rows: Rows, columns: Mapping[int, float | None]) -> None:
    """Lines of a panel: cells that are numbers, over what stands for their columns."""
    axes.set(xscale="log", yscale="log")
    for label, *cells in rows:
        points = [(x, y) for place, x in columns.items() if (y := as_number(cells[place - 1])) is not None]
        if points:
            by, guide = label.split()[:2]
            color, line = STYLES[by]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=MARKERS[guide], ms=5, label=label)
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
