# SPDX-License-Identifier: Apache-2.0
"""L8. Figures of draws: pairs and marginals of several guides, and posterior predictive intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_flows._checks import checked, integer, optional, shown
from pyro_flows.plots.common import (
    STYLES,
    Columns,
    Samples,
    as_columns,
    as_numpy,
    bulk,
    check_ax,
    check_sites,
    legend_above,
    new_axes,
    new_grid,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["marginals", "pairs", "posterior_predictive"]


@dataclass(frozen=True)
class HistogramSettings:
    """Settings of histograms and contours.

    Attributes:
        num_bins: Bins along each axis.
        shares: Shares of the draws that contours enclose.
        smoothing: Standard deviation of the normal kernel that contours are smoothed by, in bins.
    """

    num_bins: int = 40
    shares: tuple[float, ...] = (0.5, 0.9)
    smoothing: float = 1.5


def _check_probability(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1)."""
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{owner}: expected {name} to be in (0, 1), but got {shown(value)}.")


@checked(sites=optional(check_sites), max_points=integer(1))
def pairs(
    samples: Samples,
    *,
    sites: Sequence[str] | None = None,
    max_points: int = 2000,
    axes: Any = None,
) -> np.ndarray:
    """Scatter plots of all pairs of coordinates: the first set as points, the others as contours.

    Contours enclose 50 % and 90 % of a set's draws, from smoothed histograms. Ranges omit the outermost half percent
    on each side.

    Args:
        samples: Label -> site -> ``(S, *site shape)``; put the reference first. Up to 6 sets.
        sites: Names of sites or of their elements, ``["mu", "theta[0]"]``, 8 coordinates at most; None takes all.
        max_points: Number of points, evenly spaced among the first set's draws, >= 1.
        axes: Array of ``C x C`` Axes; None makes a figure.

    Returns:
        Axes, ``(C, C)``; those above the diagonal are switched off.

    Raises:
        TypeError: If ``samples`` is not a mapping from labels to sites.
        ValueError: If sites are unknown, or sets or coordinates too many.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> draws = {"mu": torch.randn(500), "theta": torch.randn(500, 2)}
        >>> plots.pairs({"reference": draws, "guide": draws}).shape
        (3, 3)
    """
    columns = as_columns("pairs", samples, sites, limit=8)
    count = len(columns.names)
    size = 1.0 + 1.8 * count
    grid = new_grid("pairs", axes, count, count, (size, size), sharex="col")
    for row in range(count):
        for column in range(count):
            ax = grid[row, column]
            if column > row:
                ax.set_axis_off()
            elif column == row:
                _histograms(ax, columns, row)
            else:
                _cloud(ax, columns, column, row, max_points)
            if row == count - 1:
                ax.set_xlabel(columns.names[column])
            elif column <= row:
                ax.tick_params(labelbottom=False)
            if column == 0 and row > 0:
                ax.set_ylabel(columns.names[row])
            elif column < row:
                ax.tick_params(labelleft=False)
    _legend(grid[0, -1] if count > 1 else grid[0, 0], grid[0, 0], columns)
    return grid


@checked(sites=optional(check_sites), num_columns=integer(1))
def marginals(
    samples: Samples, *, sites: Sequence[str] | None = None, num_columns: int = 4, axes: Any = None
) -> np.ndarray:
    """Histogram of each coordinate: the first set as an area, the others as lines over it.

    Args:
        samples: Label -> site -> ``(S, *site shape)``; put the reference first. Up to 6 sets.
        sites: Names of sites or of their elements, 40 coordinates at most; None takes all.
        num_columns: Number of panels side by side, >= 1.
        axes: Array of as many Axes as panels in whole rows; None makes a figure.

    Returns:
        Axes, ``(rows, num_columns)``; the last ones of the last row may be switched off.

    Raises:
        TypeError: If ``samples`` is not a mapping from labels to sites.
        ValueError: If sites are unknown, or sets or coordinates too many.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> plots.marginals({"NUTS": {"mu": torch.randn(500)}, "guide": {"mu": torch.randn(900)}}).shape
        (1, 1)
    """
    columns = as_columns("marginals", samples, sites, limit=40)
    count = len(columns.names)
    width = min(count, num_columns)
    rows = math.ceil(count / width)
    grid = new_grid("marginals", axes, rows, width, (1.0 + 2.4 * width, 0.6 + 2.0 * rows))
    for index, ax in enumerate(grid.flat):
        if index < count:
            _histograms(ax, columns, index)
            ax.set_xlabel(columns.names[index])
        else:
            ax.set_axis_off()
    _legend(grid.flat[count] if grid.size > count else grid.flat[0], grid.flat[0], columns)
    return grid


@checked(interval=_check_probability, ax=check_ax)
def posterior_predictive(
    draws: Any, observed: Any, *, x: Any = None, interval: float = 0.9, ax: Axes | None = None
) -> Axes:
    """Posterior predictive intervals of each datum: thick lines for 50 %, thin lines for ``interval``.

    Args:
        draws: New data given draws of the latents, ``(S, *data shape)``.
        observed: The data.
        x: Covariate of the data, of the same shape; None means their index.
        interval: Probability of the thin intervals, in (0, 1).
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes; its legend shows the number of data inside the intervals.

    Raises:
        ValueError: If shapes do not fit, or the probability is out of range.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> ax = plots.posterior_predictive(torch.randn(1000, 8), torch.zeros(8))
        >>> ax.get_legend().get_texts()[-1].get_text()
        'data, 8 of 8 inside 90 %'
    """
    draws = as_numpy("posterior_predictive", "draws", draws)
    observed = as_numpy("posterior_predictive", "observed", observed)
    if not draws.size or draws.shape[1:] != observed.shape:
        raise ValueError(
            f"posterior_predictive: expected draws of shape (S, *{observed.shape}), but got {draws.shape}. "
            "Pass the draws of the observed site, such as `Predictive(...)(...)['y']`."
        )
    if not np.isfinite(draws).all():
        raise ValueError("posterior_predictive: expected draws to be finite, but got some that are NaN or infinite.")
    position = np.arange(observed.size) if x is None else as_numpy("posterior_predictive", "x", x).reshape(-1)
    if position.shape != (observed.size,):
        raise ValueError(f"posterior_predictive: expected {observed.size} values of x, but got {position.size}.")
    draws, observed = draws.reshape(len(draws), -1), observed.reshape(-1)
    levels = [(1 - interval) / 2, 0.25, 0.5, 0.75, (1 + interval) / 2]
    low, lower, middle, upper, high = np.quantile(draws, levels, axis=0)
    ax = new_axes(ax)
    ax.vlines(position, low, high, color="0.6", linewidth=1.2, label=f"{100 * interval:g} % of new data")
    ax.vlines(position, lower, upper, color="0.6", linewidth=4, label="50 % of new data")
    ax.plot(position, middle, "_", color="0.3", markersize=7, label="median of new data")
    inside = int(((observed >= low) & (observed <= high)).sum())
    label = f"data, {inside} of {observed.size} inside {100 * interval:g} %"
    ax.plot(position, observed, "o", color="black", markersize=4.5, markerfacecolor="white", label=label)
    legend_above(ax, num_columns=2)
    ax.set(xlabel="index of the datum" if x is None else "x", ylabel="value")
    return ax


def _histograms(ax: Axes, columns: Columns, index: int, settings: HistogramSettings = HistogramSettings()) -> None:
    """One coordinate of every set, as densities over all of its draws, those outside of the range included."""
    for number, ((label, table), style) in enumerate(zip(columns.sets.items(), STYLES)):
        values = table[:, index]
        edges = np.linspace(*bulk(values), settings.num_bins + 1)
        density = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
        if number == 0:
            ax.stairs(density, edges, fill=True, color="0.75", label=label)
        else:
            ax.stairs(density, edges, color=style.color, linestyle=style.linestyle, linewidth=1.4, label=label)
    ax.set(xlim=columns.ranges[index], yticks=[])
    ax.spines[["left", "top", "right"]].set_visible(False)


def _cloud(
    ax: Axes,
    columns: Columns,
    column: int,
    row: int,
    max_points: int,
    settings: HistogramSettings = HistogramSettings(),
) -> None:
    """Two coordinates: points of the first set, contours of the others."""
    for number, (table, style) in enumerate(zip(columns.sets.values(), STYLES)):
        x, y = table[:, column], table[:, row]
        if number == 0:
            step = math.ceil(len(x) / max_points)
            ax.plot(x[::step], y[::step], ".", color=style.color, markersize=2.5, rasterized=True, zorder=1)
            continue
        centers, density = _smooth_histogram(x, y, settings)
        levels = _levels(density, settings.shares)
        if levels:
            ax.contour(*centers, density.T, levels, colors=style.color, linestyles=[style.linestyle], linewidths=1.2)
    ax.set(xlim=columns.ranges[column], ylim=columns.ranges[row])


def _smooth_histogram(x: np.ndarray, y: np.ndarray, settings: HistogramSettings) -> tuple[list[np.ndarray], np.ndarray]:
    """Centers of the bins along each axis, and shares of the draws, ``(num_bins, num_bins)``."""
    density, *edges = np.histogram2d(x, y, settings.num_bins, [bulk(x), bulk(y)])
    offsets = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (offsets / settings.smoothing) ** 2)
    for axis in (0, 1):
        density = np.apply_along_axis(np.convolve, axis, density, kernel / kernel.sum(), mode="same")
    return [(edge[1:] + edge[:-1]) / 2 for edge in edges], density / len(x)


def _levels(density: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Density levels that enclose given shares of the draws, ascending and distinct, as contours require."""
    ordered = np.sort(density, axis=None)[::-1]
    places = np.searchsorted(ordered.cumsum(), shares).clip(max=len(ordered) - 1)
    return sorted({level for level in ordered[places].tolist() if level > 0})


def _legend(ax: Axes, drawn: Axes, columns: Columns) -> None:
    """Labels of the sets, in a free panel if there is one."""
    if len(columns.sets) > 1:
        place: Any = "upper right" if ax is not drawn else "best"
        handles, labels = drawn.get_legend_handles_labels()
        ax.legend(handles, labels, loc=place, frameon=False, fontsize="small")
