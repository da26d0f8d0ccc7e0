# SPDX-License-Identifier: Apache-2.0
"""L8. Axes, line styles that differ in print too, and draws as columns, for all figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pyro_flows._checks import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "STYLES",
    "Columns",
    "Style",
    "as_columns",
    "as_numpy",
    "bulk",
    "check_ax",
    "check_sites",
    "legend_above",
    "new_axes",
    "new_grid",
]

Samples = Mapping[str, Mapping[str, Any]]


class Style(NamedTuple):
    """Color and line style of one set of draws; any two also differ in line style."""

    color: str
    linestyle: Any


# The first is the reference, a gray cloud or area; colors are Okabe and Ito's, dark ones first.
STYLES = (
    Style("0.6", "-"),
    Style("black", "-"),
    Style("#d55e00", "--"),
    Style("#0072b2", ":"),
    Style("#009e73", "-."),
    Style("#cc79a7", (0, (6, 1, 1, 1, 1, 1))),
)


def check_ax(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is Axes of matplotlib, or None."""
    from matplotlib.axes import Axes

    if value is not None and not isinstance(value, Axes):
        raise TypeError(
            f"{owner}: expected {name} to be Axes of matplotlib, but got {shown(value)}. Write "
            "`figure, ax = plt.subplots()`."
        )


def check_sites(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a list of names."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(site, str) for site in value):
        raise TypeError(f"{owner}: expected {name} to be a list of names, such as ['mu'], but got {shown(value)}.")


def new_axes(ax: Axes | None) -> Axes:
    """The given Axes, or that of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")[1]


def new_grid(
    owner: str, axes: Any, rows: int, columns: int, figsize: tuple[float, float], **options: Any
) -> np.ndarray:
    """The given array of Axes as ``(rows, columns)``, or that of a new figure.

    Raises:
        ValueError: If the array has another number of Axes.
    """
    if axes is None:
        from matplotlib import pyplot as plt

        return plt.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained", **options)[1]
    grid = np.asarray(axes, dtype=object)
    for one in grid.flat:
        check_ax(owner, "axes", one if one is not None else "None")
    if grid.size != rows * columns:
        raise ValueError(
            f"{owner}: expected {rows} x {columns} Axes, but got {grid.size}. "
            f"Write `figure, axes = plt.subplots({rows}, {columns})`."
        )
    return grid.reshape(rows, columns)


def as_numpy(owner: str, name: str, value: Any) -> np.ndarray:
    """A tensor, an array or a list as an array of float64.

    Raises:
        TypeError: If it is none of these; names the function and its argument.
    """
    try:
        return torch.as_tensor(value).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{owner}: expected {name} to be a tensor, an array or a list of numbers, but got {shown(value)}."
        ) from None


class Columns(NamedTuple):
    """Sets of draws as columns.

    Attributes:
        names: ``mu``, ``theta[0]`` and so on, C of them.
        sets: Label -> ``(S, C)``; S may differ.
        ranges: Ranges that contain nearly all draws of all sets, ``(C, 2)``.
    """

    names: list[str]
    sets: dict[str, np.ndarray]
    ranges: np.ndarray


def as_columns(owner: str, samples: Samples, sites: Sequence[str] | None, limit: int) -> Columns:
    """Draws of sites as columns.

    Args:
        owner: Name of the public function, for errors.
        samples: Label -> site -> ``(S, *site shape)``.
        sites: Names of sites, or of their elements, in order; None takes all that the first set has.
        limit: Largest number of columns.

    Raises:
        TypeError: If ``samples`` is not a mapping from labels to sites.
        ValueError: If there are no draws, too many sets or columns, or a set lacks a site.
    """
    if not isinstance(samples, Mapping):
        raise TypeError(
            f"{owner}: expected samples to be draws of sites by label, but got {shown(samples)}. "
            'Write {"guide": guide.sample_posterior(1000)}, for example.'
        )
    if not 1 <= len(samples) <= len(STYLES):
        raise ValueError(f"{owner}: expected 1 to {len(STYLES)} sets of draws, but got {len(samples)}.")
    tables = {}
    for label, draws in samples.items():
        if not isinstance(draws, Mapping):
            raise TypeError(
                f"{owner}: expected draws of sites under {label!r}, but got a {type(draws).__name__}. "
                'Write {"guide": guide.sample_posterior(1000)}, for example.'
            )
        tables[label] = {name: _table(owner, f"draws of {name!r} in {label!r}", value) for name, value in draws.items()}
    first = next(iter(tables.values()))
    names = [name for site in sites or first for name in _elements(owner, site, first)]
    if not 1 <= len(names) <= limit:
        raise ValueError(
            f"{owner}: expected 1 to {limit} columns, but got {len(names)}. "
            f"Name those you want, for example sites={names[: min(limit, 3)]}."
        )
    sets = {
        label: _stack(owner, label, [_column(owner, name, label, t) for name in names]) for label, t in tables.items()
    }
    for label, table in sets.items():
        for name, column in zip(names, table.T, strict=True):
            if not np.isfinite(column).any():
                raise ValueError(
                    f"{owner}: expected draws of {name!r} in {label!r}, but none of {len(column)} is finite."
                )
    ranges = np.array([[bulk(table[:, i]) for table in sets.values()] for i in range(len(names))])  # (C, sets, 2)
    return Columns(names, sets, np.stack([ranges[..., 0].min(1), ranges[..., 1].max(1)], 1))


def _table(owner: str, name: str, value: Any) -> np.ndarray:
    """Draws as an array, ``(S, *site shape)``."""
    table = as_numpy(owner, name, value)
    if table.ndim == 0 or not len(table):
        raise ValueError(f"{owner}: expected {name} to have shape (S, *site shape), but got {table.shape}.")
    return table


def _stack(owner: str, label: str, columns: Sequence[np.ndarray]) -> np.ndarray:
    """Columns of equal length as a table."""
    lengths = sorted({len(column) for column in columns})
    if len(lengths) > 1:
        raise ValueError(f"{owner}: expected as many draws of each site in {label!r}, but got {lengths}.")
    return np.stack(columns, 1)


def bulk(values: np.ndarray) -> tuple[float, float]:
    """Range of all but the outermost half percent on each side, plus a margin of a tenth of it on each side."""
    low, high = np.quantile(values[np.isfinite(values)], [0.005, 0.995])
    pad = 0.1 * (high - low) or 0.5
    return float(low - pad), float(high + pad)


def legend_above(ax: Axes, num_columns: int) -> None:
    """A legend above the Axes, where it covers nothing."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        ncols=num_columns,
        frameon=False,
        fontsize="small",
    )


def _elements(owner: str, name: str, table: Mapping[str, np.ndarray]) -> list[str]:
    """The columns that a name stands for."""
    if name not in table:
        if name.partition("[")[0] in table and name.endswith("]"):
            return [name]
        raise ValueError(f"{owner}: expected sites among {', '.join(map(repr, table))}, but got {name!r}.")
    shape = table[name].shape[1:]
    if math.prod(shape) == 1:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in itertools.product(*map(range, shape))]


def _column(owner: str, name: str, label: str, table: Mapping[str, np.ndarray]) -> np.ndarray:
    site, _, index = name.partition("[")
    try:
        if name in table:
            return table[name].reshape(len(table[name]))
        element = tuple(int(number) for number in index.rstrip("]").split(","))
        return np.moveaxis(table[site], 0, -1)[element].reshape(len(table[site]))
    except (KeyError, IndexError, ValueError):
        raise ValueError(
            f"{owner}: expected one number a draw of {name!r} in {label!r}, but it has "
            f"{ {key: value.shape for key, value in table.items()} }."
        ) from None
