# SPDX-License-Identifier: Apache-2.0
"""L8. Groups of NumPy arrays as the container of the installed version of ArviZ."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from pyro_flows._checks import shown

__all__ = ["Groups", "Variables", "container", "to_container"]

# Name -> names of dimensions, array.
Variables = Mapping[str, tuple[tuple[str, ...], np.ndarray]]
# Group -> its variables.
Groups = Mapping[str, Variables]


def container(owner: str) -> Callable[[Mapping[str, Any]], Any]:
    """The function that makes the container of the installed version of ArviZ: of 0.x if there is one; of 1.x, for
    which arviz-base alone is enough.

    Raises:
        ImportError: If there is no ArviZ.
    """
    arviz = _imported("arviz")
    if arviz is not None and int(arviz.__version__.split(".")[0]) < 1:
        return _inference_data
    if arviz is not None or _imported("arviz_base") is not None:
        return _data_tree
    raise ImportError(f'{owner}: expected ArviZ, but found none. Type: pip install "pyro-flows[arviz]"')


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _inference_data(datasets: Mapping[str, Any]) -> Any:
    """``arviz.InferenceData``, of ArviZ 0.x."""
    import arviz

    return arviz.InferenceData(**datasets)


def _data_tree(datasets: Mapping[str, Any]) -> Any:
    """``xarray.DataTree``, of ArviZ 1.x."""
    import xarray

    return xarray.DataTree.from_dict(datasets)


def to_container(
    owner: str,
    make: Callable[[Mapping[str, Any]], Any],
    groups: Groups,
    indices: Mapping[str, np.ndarray],
    coords: Mapping[str, Sequence[Any]],
) -> Any:
    """Arrays in the container that ``make`` makes; groups without variables are left out.

    Args:
        owner: Name of the caller, for error messages.
        make: What :func:`container` returns.
        groups: The arrays.
        indices: Dimension -> its labels, where it is of their length; others are counted from 0.
        coords: Dimension -> labels of the user, where it is of their length.

    Raises:
        ValueError: If no dimension has the name and length of the user's labels.
    """
    import xarray

    sizes: dict[str, dict[str, int]] = {}
    for group, variables in groups.items():
        if variables:
            pairs = [zip(dims, array.shape, strict=True) for dims, array in variables.values()]
            sizes[group] = {dim: size for pair in pairs for dim, size in pair}
    for dim, labels in coords.items():
        found = [own[dim] for own in sizes.values() if dim in own]
        count = len(labels) if isinstance(labels, Sized) and not isinstance(labels, str) else None
        if count not in found:
            names = dict.fromkeys(dim for own in sizes.values() for dim in own)
            expected = f"{found[0]} labels" if found else f"labels of {', '.join(map(repr, names))}"
            came = shown(labels) if count is None else f"{count} labels"
            raise ValueError(f"{owner}: expected coords[{dim!r}] to be {expected}, but got {came}.")
    labels_of: dict[str, Any] = {**indices, **coords}
    datasets = {}
    for group, own in sizes.items():
        fits = {dim: dim in labels_of and len(labels_of[dim]) == size for dim, size in own.items()}
        index = {dim: labels_of[dim] if fits[dim] else np.arange(size) for dim, size in own.items()}
        datasets[group] = xarray.Dataset(groups[group], coords=index, attrs={"inference_library": "pyro_flows"})
    return make(datasets)
