# SPDX-License-Identifier: Apache-2.0
"""L8. Figures of image models: reconstructions, samples of the prior, and walks through latent space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows._checks import check_callable, check_sizes, checked, integer, optional, shown
from pyro_flows.plots.common import as_numpy, check_ax

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["latent_traversal", "prior_samples", "reconstructions"]

Decoder = Callable[[Tensor], Tensor]


def _check_limits(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a pair of different numbers."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_pair or not all(isinstance(limit, (int, float)) and math.isfinite(limit) for limit in value):
        raise ValueError(f"{owner}: expected {name} to be two numbers, such as (0.0, 1.0), but got {shown(value)}.")
    if not value[0] < value[1]:
        raise ValueError(f"{owner}: expected {name} to be an increasing pair of numbers, but got {value}.")


def _check_image_shape(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is ``(height, width)`` or ``(height, width, 3)``."""
    check_sizes(owner, name, value)
    if not (len(value) == 2 or (len(value) == 3 and value[2] == 3)):
        raise ValueError(f"{owner}: expected {name} to be (height, width) or (height, width, 3), but got {value}.")


def _check_latents(owner: str, name: str, value: Any, rank: int) -> None:
    """Raise TypeError unless ``value`` is a tensor; ValueError unless it has as many dimensions."""
    if not torch.is_tensor(value):
        raise TypeError(f"{owner}: expected {name} to be a tensor, but got {shown(value)}.")
    shape, remedy = ("(N, latent_dim)", "z.unsqueeze(0)") if rank == 2 else ("(latent_dim,)", "z[0]")
    if value.dim() != rank or not value.numel():
        raise ValueError(f"{owner}: expected {name} of shape {shape}, but got {tuple(value.shape)}. Pass {remedy}.")


@checked(image_shape=optional(_check_image_shape), limits=_check_limits, ax=check_ax)
def reconstructions(
    images: Any,
    reconstructed: Any,
    *,
    image_shape: tuple[int, ...] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Images above their reconstructions, one column for each image.

    Args:
        images: ``(N, *image)``.
        reconstructed: ``(N, *image)``, or ``(R, N, *image)`` for one row per draw of z; or a mapping from labels to
            several of either.
        image_shape: ``(height, width)`` or ``(height, width, 3)``; None reads ``image`` as that, as
            ``(channels, height, width)``, or as a square written in one dimension.
        limits: Values of white and of black, or of dark and bright with three colors.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> ax = plots.reconstructions(torch.rand(5, 64), {"flow": torch.rand(3, 5, 64)})
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['data', 'flow 1', 'flow 2', 'flow 3']
    """
    images = as_numpy("reconstructions", "images", images)
    if images.ndim < 2 or not images.size:
        raise ValueError(f"reconstructions: expected images of shape (N, *image), but got {images.shape}.")
    rows = {"data": images}
    sets = reconstructed if isinstance(reconstructed, Mapping) else {"draw": reconstructed}
    for label, values in sets.items():
        values = as_numpy("reconstructions", f"reconstructed {label!r}", values)
        if values.shape not in (images.shape, (len(values), *images.shape)):
            raise ValueError(
                f"reconstructions: expected {label!r} to have shape {images.shape} or (R, *{images.shape}), but got "
                f"{values.shape}."
            )
        if values.shape == images.shape:
            rows[label] = values
        else:
            rows |= {f"{label} {number}": draw for number, draw in enumerate(values, start=1)}
    tiles = _tiles("reconstructions", np.stack(list(rows.values())), image_shape, lead=2)
    return _mosaic(tiles, limits, ax, rows=list(rows))


@checked(
    decode=check_callable,
    z=partial(_check_latents, rank=2),
    num_columns=integer(1),
    image_shape=optional(_check_image_shape),
    limits=_check_limits,
    ax=check_ax,
)
@torch.no_grad()
def prior_samples(
    decode: Decoder,
    z: Tensor,
    *,
    num_columns: int = 12,
    image_shape: tuple[int, ...] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Mean images of draws from the prior.

    Args:
        decode: Latents ``(N, latent_dim)`` -> mean images ``(N, *image)``.
        z: Draws from the prior, ``(N, latent_dim)``, such as ``torch.randn(48, latent_dim)``.
        num_columns: Number of images side by side, >= 1.
        image_shape: As in :func:`reconstructions`.
        limits: As in :func:`reconstructions`.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> ax = plots.prior_samples(torch.nn.Linear(2, 64), torch.randn(24, 2))
        >>> ax.images[0].get_array().shape  # two rows of twelve squares, with gaps
        (19, 109)
    """
    tiles = _tiles("prior_samples", _decoded("prior_samples", decode, z), image_shape)
    width = min(num_columns, len(tiles))
    missing = -len(tiles) % width
    tiles = np.concatenate([tiles, np.full((missing, *tiles.shape[1:]), np.nan)])
    return _mosaic(tiles.reshape(-1, width, *tiles.shape[1:]), limits, ax)


@checked(
    decode=check_callable,
    z=partial(_check_latents, rank=1),
    image_shape=optional(_check_image_shape),
    limits=_check_limits,
    ax=check_ax,
)
@torch.no_grad()
def latent_traversal(
    decode: Decoder,
    z: Tensor,
    *,
    dims: Sequence[int] | None = None,
    values: Sequence[float] | Tensor | None = None,
    image_shape: tuple[int, ...] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Decoded images along one latent dimension at a time, one row for each.

    Args:
        decode: Latents ``(N, latent_dim)`` -> mean images ``(N, *image)``.
        z: Latents through which all lines pass, ``(latent_dim,)``.
        dims: Dimensions to vary; None takes the first ten.
        values: Values of the varied dimension; None takes eleven from -2.5 to 2.5.
        image_shape: As in :func:`reconstructions`.
        limits: As in :func:`reconstructions`.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes; each column is labeled by the value of the latent.

    Raises:
        ValueError: If shapes do not fit, or a dimension is out of range.

    Example:
        >>> import torch
        >>> from pyro_flows import plots
        >>> ax = plots.latent_traversal(torch.nn.Linear(3, 64), torch.zeros(3), dims=[0, 2])
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['z[0]', 'z[2]']
    """
    dims = list(range(min(10, len(z)))) if dims is None else dims
    if (
        not isinstance(dims, (list, tuple))
        or not dims
        or not all(type(dim) is int and 0 <= dim < len(z) for dim in dims)
    ):
        raise ValueError(f"latent_traversal: expected dims in [0, {len(z) - 1}], but got {shown(dims)}.")
    found = as_numpy("latent_traversal", "values", torch.linspace(-2.5, 2.5, 11) if values is None else values)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"latent_traversal: expected values to be a list of numbers, but got {shown(values)}.")
    steps = torch.as_tensor(found).to(z)
    points = z.repeat(len(dims), len(steps), 1)
    for row, dim in enumerate(dims):
        points[row, :, dim] = steps
    tiles = _tiles("latent_traversal", _decoded("latent_traversal", decode, points.flatten(0, 1)), image_shape)
    tiles = tiles.reshape(len(dims), len(steps), *tiles.shape[1:])
    names = [f"z[{dim}]" for dim in dims]
    return _mosaic(tiles, limits, ax, rows=names, columns=[f"{step:g}" for step in steps.tolist()])


def _decoded(owner: str, decode: Decoder, z: Tensor) -> np.ndarray:
    """Images of latents, ``(N, *image)``."""
    images = as_numpy(owner, "the result of decode", decode(z))
    if images.ndim < 2 or len(images) != len(z):
        raise ValueError(
            f"{owner}: expected decode to return images of shape ({len(z)}, *image), but got {images.shape}. Let it "
            "take (N, latent_dim)."
        )
    return images


def _tiles(owner: str, images: np.ndarray, image_shape: tuple[int, ...] | None, lead: int = 1) -> np.ndarray:
    """``(*lead, *image)`` to ``(*lead, height, width)`` or ``(*lead, height, width, 3)``."""
    image = images.shape[lead:]
    side = math.isqrt(math.prod(image))
    if image_shape is not None and math.prod(image_shape) == math.prod(image):
        return images.reshape(*images.shape[:lead], *image_shape)
    if image_shape is None and len(image) == 1 and side * side == image[0]:
        return images.reshape(*images.shape[:lead], side, side)
    if image_shape is None and (len(image) == 2 or (len(image) == 3 and image[2] == 3)):
        return images
    if image_shape is None and len(image) == 3 and image[0] == 1:
        return images.squeeze(lead)
    if image_shape is None and len(image) == 3 and image[0] == 3:
        return np.moveaxis(images, lead, -1)
    raise ValueError(
        f"{owner}: expected images that fit image_shape {image_shape}, but each has shape {image}. "
        "Write image_shape=(height, width)."
    )


def _mosaic(
    tiles: np.ndarray,
    limits: tuple[float, float],
    ax: Axes | None,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Axes:
    """``(rows, columns, height, width)`` or ``(..., 3)`` as one picture with gaps of a pixel."""
    num_rows, num_columns, height, width = tiles.shape[:4]
    colors = tiles.shape[4:]
    picture = np.full((num_rows * (height + 1) + 1, num_columns * (width + 1) + 1, *colors), np.nan)
    for row in range(num_rows):
        for column in range(num_columns):
            top, left = row * (height + 1) + 1, column * (width + 1) + 1
            picture[top : top + height, left : left + width] = tiles[row, column]
    if ax is None:
        from matplotlib import pyplot as plt

        size = (1.2 + 0.75 * num_columns, 0.4 + 0.75 * num_rows * height / width)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    if colors:
        low, high = limits
        ax.imshow(np.nan_to_num(((picture - low) / (high - low)).clip(0, 1), nan=1.0))
    else:
        ax.imshow(picture, cmap="gray_r", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_yticks([(height + 1) * (row + 0.5) for row in range(len(rows))], rows)
    ax.set_xticks([(width + 1) * (column + 0.5) for column in range(len(columns))], columns)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
