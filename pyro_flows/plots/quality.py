# SPDX-License-Identifier: Apache-2.0
"""L8. Figures of a fit: training, importance weights, calibration, and the map of a flow in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows._checks import check_number, check_positive, check_type, checked, integer, optional, shown
from pyro_flows.diagnostics.calibration import Calibration
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.importance.psis import khat_threshold, pareto_smooth
from pyro_flows.plots.common import STYLES, as_numpy, check_ax, check_sites, legend_above, new_axes, new_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["calibration", "flow_grid", "training", "weights"]


@dataclass(frozen=True)
class WeightRanges:
    """Ranges of the axes in a figure of importance weights.

    Attributes:
        max_nats: Log weights further below the largest than this are drawn at this distance: such draws have negligible
            weight, and may be at minus infinity.
        min_half_width: Smallest half-width of an axis, in nats or in mean weights, so that rounding is not magnified.
    """

    max_nats: float = 30.0
    min_half_width: float = 0.01


@checked(gaussian=optional(check_number), log_evidence=optional(check_number), window=optional(integer(1)), ax=check_ax)
def training(
    losses: Any,
    *,
    gaussian: float | None = None,
    log_evidence: float | None = None,
    window: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """ELBO over the steps of training: single steps as a faint line, their running mean, and the log evidence.

    The vertical range is that of the running mean without its first tenth, and of the two lines.

    Args:
        losses: A :class:`~pyro_flows.FitResult`, or negative ELBOs, one per step, as ``svi.step`` returns them; or a
            mapping from labels to several of either, 5 at most.
        gaussian: ELBO of the Gaussian to beat, in nats, as a dashed line.
        log_evidence: Upper bound of every ELBO, in nats, as a solid line.
        window: Number of steps that are averaged, >= 1; None takes a hundredth of them.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes.

    Raises:
        ValueError: If there are no losses, or too many runs.

    Example:
        >>> from pyro_flows import plots
        >>> ax = plots.training([35.0, 33.0, 32.0, 31.9], gaussian=-33.5, log_evidence=-31.3)
        >>> ax.get_ylabel()
        'ELBO (nats)'
    """
    runs = losses if isinstance(losses, Mapping) else {"ELBO": losses}
    if not 1 <= len(runs) < len(STYLES):
        raise ValueError(f"training: expected 1 to {len(STYLES) - 1} runs, but got {len(runs)}.")
    ax = new_axes(ax)
    heights = [line for line in (gaussian, log_evidence) if line is not None]
    for (label, run), style in zip(runs.items(), STYLES[1:]):
        elbo = -as_numpy("training", f"losses of {label!r}", getattr(run, "losses", run))
        if elbo.ndim != 1 or not np.isfinite(elbo).any():
            found = "none" if not elbo.size else "none that is finite" if elbo.ndim == 1 else f"shape {elbo.shape}"
            raise ValueError(
                f"training: expected losses of {label!r}, a list with one number per step, but got {found}. Pass what "
                "svi.step returned, or the result of fit."
            )
        width = min(window or max(1, len(elbo) // 100), len(elbo))
        mean = np.convolve(elbo, np.full(width, 1 / width), mode="valid")
        ax.plot(np.arange(1, len(elbo) + 1), elbo, color=style.color, linewidth=0.4, alpha=0.25)
        steps = np.arange(len(mean)) + (width + 1) / 2  # the middle of each window
        ax.plot(steps, mean, color=style.color, linestyle=style.linestyle, linewidth=1.6, label=label)
        late = mean[len(mean) // 10 :]
        heights += late[np.isfinite(late)].tolist()
    if gaussian is not None:
        ax.axhline(gaussian, color="0.5", linestyle=(0, (5, 3)), linewidth=1.2, label="Gaussian")
    if log_evidence is not None:
        ax.axhline(log_evidence, color="0.5", linestyle="-", linewidth=1.2, label="log evidence")
    if heights:
        low, high = min(heights), max(heights)
        pad = 0.06 * (high - low) or 0.5
        ax.set_ylim(low - pad, high + pad)
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    legend_above(ax, num_columns=3)
    return ax


def weights(log_weights: Any, *, axes: Any = None) -> np.ndarray:
    r"""Importance weights of a guide's draws: their distribution, and their tail with the Pareto fit.

    The left panel is a histogram of log weights relative to their log mean, the estimate of the log evidence, where all
    weights of a perfect guide would be. The right one has, for each of the largest weights, the share of draws with
    at least that weight. On logarithmic axes a Pareto tail is a line of slope :math:`-1 / \hat k`; estimates from the
    weights need :math:`\hat k` below a threshold that depends on the number of draws.

    Args:
        log_weights: A :class:`~pyro_flows.Diagnosis`, or log p(x, z) - log q(z), ``(S,)``, at least 20. Where they
            factorize over items, one item's: ``report.log_weights[:, 0]``.
        axes: Two Axes; None makes a figure.

    Returns:
        Two Axes, ``(2,)``.

    Raises:
        ValueError: If there are too few weights, or one is not a number.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 25(72), 2024.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> plots.weights(torch.randn(1000)).shape
        (2,)
    """
    ranges = WeightRanges()
    raw = as_numpy("weights", "log_weights", getattr(log_weights, "log_weights", log_weights))
    if raw.ndim != 1 or len(raw) < 20 or not raw.max() < np.inf or raw.max() == -np.inf:
        raise ValueError(
            f"weights: expected at least 20 log weights, (S,), none of them NaN or +inf, but got shape {raw.shape}"
            f"{' with some' if raw.ndim == 1 and len(raw) >= 20 else ''}. "
            "Pass diagnose(model, guide, args) or, of many items, one item's: report.log_weights[:, 0]."
        )
    count = len(raw)
    smoothed, khat = pareto_smooth(torch.as_tensor(raw))
    threshold = khat_threshold(count)
    relative = raw - raw.max()
    relative -= math.log(np.exp(relative).mean())
    ess = count / np.square(np.exp(relative)).mean()
    grid = new_grid("weights", axes, 1, 2, (8.5, 3.4))[0]
    left, right = grid
    left.hist(relative.clip(min=relative.max() - ranges.max_nats), bins=50, color="0.75")
    left.axvline(0.0, color="black", linestyle="--", linewidth=1, label="log mean: evidence")
    left.set(xlabel="log weight - log mean weight (nats)", ylabel="draws", title=f"ESS {ess:.0f} of {count}")
    left.legend(frameon=False, fontsize="small")
    low, high = left.get_xlim()
    left.set_xlim(min(low, -ranges.min_half_width), max(high, ranges.min_half_width))

    tail = min(count // 2, max(20, 10 * math.isqrt(count)))
    share = np.arange(1, tail + 1) / count
    largest = np.exp(np.sort(relative)[::-1][:tail])
    right.semilogy(largest, share, ".", color="0.55", markersize=5, label="largest weights")
    fitted = min(tail, math.ceil(min(count / 5, 3 * math.sqrt(count))))
    smooth = np.exp(np.sort(smoothed.numpy())[::-1][:fitted]) * count
    right.semilogy(smooth, share[:fitted], "-", color="black", linewidth=1.5, label="Pareto fit of the tail")
    if largest[-1] > 0 and largest[0] / largest[-1] > 10:  # a shorter axis has no room for logarithmic ticks
        right.set_xscale("log")
    else:
        low, high = right.get_xlim()
        right.set_xlim(min(low, 1 - ranges.min_half_width), max(high, 1 + ranges.min_half_width))
    verdict = "below" if khat < threshold else "not below"
    right.set(
        xlabel="weight / mean weight",
        ylabel="share of draws at or above",
        title=rf"$\hat k$ = {khat:.2f}, {verdict} {threshold:.2f}",
    )
    right.legend(loc="lower left", frameon=False, fontsize="small")
    return grid


@checked(report=partial(check_type, kind=Calibration), sites=optional(check_sites), ax=check_ax)
def calibration(report: Calibration, *, sites: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Calibration plot: distribution functions of the ranks of true values among draws, less that of a uniform.

    A calibrated guide's line stays in the gray band with probability 95 %. Above zero, true values are lower than the
    guide's draws; a wave that first rises and then falls below zero shows a guide that is too narrow.

    Args:
        report: Result of :func:`~pyro_flows.check_calibration`.
        sites: Names of up to 5 sites; None takes the worst. Each coordinate is a line.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes.

    Raises:
        ValueError: If a site is unknown, or there are too many.
    """
    worst = sorted(report.sites, key=lambda name: report.sites[name].p_value)
    names = worst[: len(STYLES) - 1] if sites is None else list(sites)
    unknown = [name for name in names if name not in report.sites]
    if unknown or not 1 <= len(names) < len(STYLES):
        raise ValueError(
            f"calibration: expected 1 to {len(STYLES) - 1} of {', '.join(sorted(report.sites))}, but got {names}."
        )
    ax = new_axes(ax)
    count = len(report.ranks[names[0]])
    band = 1.358 / math.sqrt(count)  # Kolmogorov's 95 % quantile of the largest distance from a line, times sqrt(N)
    ax.axhspan(-band, band, color="0.9", label="95 % of a calibrated guide's")
    ax.axhline(0.0, color="0.5", linewidth=0.8)
    levels = np.linspace(0.0, 1.0, 201)
    for name, style in zip(names, STYLES[1:]):
        for index, column in enumerate(as_numpy("calibration", "ranks", report.ranks[name]).T):
            deviation = np.searchsorted(np.sort(column), levels, side="right") / count - levels
            label = name if index == 0 else None
            ax.plot(levels, deviation, color=style.color, linestyle=style.linestyle, linewidth=1.3, label=label)
    low, high = ax.get_ylim()
    reach = 1.1 * max(-low, high)
    ax.set(xlim=(0, 1), ylim=(-reach, reach), xlabel="rank of the true value", ylabel="share below it, less its rank")
    legend_above(ax, num_columns=3)
    return ax


@checked(extent=check_positive, num_lines=integer(2), ax=check_ax)
@torch.no_grad()
def flow_grid(
    flow: Flow | AutoFlowGuide | Callable[[Tensor], Tensor],
    *,
    context: Tensor | None = None,
    extent: float = 3.0,
    num_lines: int = 25,
    ax: Axes | None = None,
) -> Axes:
    """The image of a square grid of noise under a flow in two dimensions.

    Circles of radius 1, 2 and so on in noise, which hold 39 %, 86 % and 99 % of normal noise, are drawn over it.

    Args:
        flow: A guide with two latent numbers, a flow, or any map from ``(N, 2)`` to ``(N, 2)``.
        context: One context, ``(context_dim,)``, for a flow that takes one.
        extent: Half-width of the grid, in standard deviations of noise, > 0.
        num_lines: Number of lines in each direction, >= 2.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes, in the guide's unconstrained space.

    Raises:
        ValueError: If the flow is not over two dimensions.

    Example:
        >>> from pyro_flows import flows, plots
        >>> ax = plots.flow_grid(flows.get("iaf").build(2), num_lines=11)
        >>> len(ax.collections)  # lines along each axis, and circles
        3
    """
    from matplotlib.collections import LineCollection

    transform, labels = _two_dimensional(flow, context)
    along = torch.linspace(-extent, extent, 201)
    across = torch.linspace(-extent, extent, num_lines)
    fixed, moving = torch.meshgrid(across, along, indexing="ij")
    angle = torch.linspace(0, 2 * math.pi, 201)
    radius = torch.arange(1.0, math.floor(extent) + 1).unsqueeze(-1)
    ax = new_axes(ax)
    for lines, color, width, style, label in (
        (torch.stack([moving, fixed], -1), "0.35", 0.6, "-", "first coordinate of noise varies"),
        (torch.stack([fixed, moving], -1), "0.65", 0.6, "-", "second coordinate varies"),
        (torch.stack([radius * angle.cos(), radius * angle.sin()], -1), "black", 1.6, "--", "1, 2, ... sd of noise"),
    ):
        if len(lines):
            image = as_numpy("flow_grid", "the flow's values", transform(lines.reshape(-1, 2)))
            if image.shape != (lines.shape[0] * lines.shape[1], 2):
                raise ValueError(f"flow_grid: expected flow to map (N, 2) to (N, 2), but got shape {image.shape}.")
            image = image.reshape(lines.shape)
            ax.add_collection(
                LineCollection(list(image), colors=color, linewidths=width, linestyles=style, label=label)
            )
    ax.autoscale_view()
    ax.set(xlabel=labels[0], ylabel=labels[1])
    legend_above(ax, num_columns=2)
    return ax


def _two_dimensional(flow: Any, context: Tensor | None) -> tuple[Callable[[Tensor], Tensor], tuple[str, str]]:
    """The map, and names of the output coordinates."""
    labels = ("first coordinate", "second coordinate")
    dim = 2
    if isinstance(flow, AutoFlowGuide):
        transform: Any = flow.get_transform()
        dim = flow.latent_dim
        layout = flow.posterior.only_block.layout
        sizes = zip(layout.names, layout.sizes, strict=True)
        names = [name if size == 1 else f"{name}[{i}]" for name, size in sizes for i in range(size)]
        labels = (f"unconstrained {names[0]}", f"unconstrained {names[-1]}")
        like = next(flow.parameters())
    elif isinstance(flow, Flow):
        transform = flow(context).transforms[0]
        dim = flow.input_dim
        like = next(flow.parameters())
    elif callable(flow):
        transform, like = flow, torch.zeros(())
    else:
        raise TypeError(f"flow_grid: expected flow to be a guide, a flow or a function, but got {shown(flow)}.")
    if dim != 2:
        raise ValueError(
            f"flow_grid: expected a flow over two dimensions, but got one over {dim}. For a pair of coordinates of its "
            "draws, write plots.pairs({'guide': guide.sample_posterior(1000)}, sites=[...])."
        )
    return lambda noise: transform(noise.to(like)), labels
