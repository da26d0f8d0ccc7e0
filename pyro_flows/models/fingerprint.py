# SPDX-License-Identifier: Apache-2.0
"""L2. What tells a model and its data from others: sites, plates, log densities at fixed values, and checksums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from torch import Tensor

from pyro_flows._random import seeded
from pyro_flows.models.traces import Call, run_quietly, sample_nodes

__all__ = ["data_difference", "describe_data", "describe_model", "model_difference"]


@dataclass(frozen=True)
class FingerprintSettings:
    """Effort of fingerprints.

    Attributes:
        max_elements: Tensors with more elements are not read whole: a sum of their bits, and as many elements in equal
            strides.
        tolerance: Largest difference of log densities that rounding, on another machine, may make, relative to them.
    """

    max_elements: int = 2**20
    tolerance: float = 1e-3


SETTINGS = FingerprintSettings()
# Integers by their size in bytes.
WORDS = {dtype.itemsize: dtype for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)}
WRAPPERS = ("Independent", "ExpandedDistribution", "MaskedDistribution")


def describe_model(model: Callable[..., Any], call: Call) -> dict[str, Any]:
    """Sites of a model, as text, and their log densities where the latents are at fixed values.

    Densities tell models apart that differ in a constant, or in data that are not arguments. Those that differ between
    two runs are left out. Torch's global random state is left alone.
    """
    runs = [_sites(model, call), _sites(model, call)]
    same = {name: text for name, (text, _) in runs[0].items()}
    densities = {
        name: value
        for name, (_, value) in runs[0].items()
        if math.isfinite(value) and name in runs[1] and runs[1][name][1] == value
    }
    return {"sites": same, "log_densities": densities}


def model_difference(stored: Mapping[str, Any], found: Mapping[str, Any], *, densities: bool) -> str:
    """How two models differ, as a clause; empty if they do not.

    Args:
        stored: Description of one model.
        found: Description of the other one.
        densities: Whether to compare log densities, too.
    """
    before, now = stored["sites"], found["sites"]
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            texts = [of.get(name, "missing") for of in (before, now)]
            return f"site '{name}' is {texts[0]} there and {texts[1]} here"
    for name, value in stored["log_densities"].items() if densities else ():
        other = found["log_densities"].get(name, math.nan)
        if abs(other - value) > SETTINGS.tolerance * max(1.0, abs(value)):
            return (
                f"the log density of site '{name}' is {value:.6g} there and {other:.6g} here, at the same values of "
                "the latents: its data or a constant of the model have changed"
            )
    return ""


def _sites(model: Callable[..., Any], call: Call) -> dict[str, tuple[str, float]]:
    """Site name -> description and log density; empty if the model can't be run at those values."""
    with seeded(0), pyro.validation_enabled(False):
        try:
            trace = run_quietly(InitMessenger(_fixed_value)(model), call)
        except Exception:  # a model may refuse any values
            return {}
        found = {}
        for name, node in sample_nodes(trace).items():
            try:
                log_density = node["fn"].log_prob(node["value"]) * node["scale"]
                density = float(log_density.double().sum())
            except Exception:  # improper priors, say
                density = math.nan
            found[name] = (_description(node), density)
        return found


def _fixed_value(site: Mapping[str, Any]) -> Tensor:
    try:
        value: Tensor = init_to_feasible(site)
        return value
    except NotImplementedError:  # a discrete site
        return site["fn"].sample()


def _description(node: Mapping[str, Any]) -> str:
    fn = node["fn"]
    while type(fn).__name__ in WRAPPERS:
        fn = fn.base_dist
    plates = [f"'{f.name}' of {f.full_size or f.size}" for f in node["cond_indep_stack"]]
    where = f" in plate {' and '.join(plates)}" if plates else ""
    kind = "observed" if node["is_observed"] else "latent"
    return f"{kind} {type(fn).__name__} of shape {tuple(node['value'].shape)}{where}"


def describe_data(calls: Sequence[Any]) -> dict[str, str]:
    """Name -> shape, dtype and checksum of each argument of some calls, ``(args, kwargs)``."""
    found = {}
    for number, (args, kwargs) in enumerate(calls):
        batch = f" of mini-batch {number}" if len(calls) > 1 else ""
        for name, value in (*((f"args[{i}]", value) for i, value in enumerate(args)), *kwargs.items()):
            found[f"{name}{batch}"] = _describe(value)
    return found


def data_difference(stored: Mapping[str, str], found: Mapping[str, str]) -> str:
    """How two descriptions of data differ, as a clause; empty if they do not."""
    for name in dict.fromkeys((*stored, *found)):
        if stored.get(name) != found.get(name):
            texts = [of.get(name, "missing") for of in (stored, found)]
            return f"{name} is {texts[0]} there and {texts[1]} here"
    return ""


def _describe(value: Any) -> str:
    title = type(value).__name__
    if hasattr(value, "shape"):
        title += f" of shape {tuple(value.shape)}"
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return f"{title} with checksum {digest.hexdigest()[:12]}"


def _parts(value: Any) -> Iterator[bytes]:
    """Bytes by which values are told apart; of other objects than tensors, arrays, numbers and texts, and collections
    of these, only the type."""
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufc":
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield from _tensor_parts(value.detach())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()


def _tensor_parts(value: Tensor) -> Iterator[bytes]:
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.is_complex():
        value = torch.view_as_real(value)
    flat = value.resolve_neg().reshape(-1)
    if len(flat) > SETTINGS.max_elements:
        # Integers add up to the same number in any order, and on any number of threads.
        yield str(int(flat.view(WORDS[flat.element_size()]).sum(dtype=torch.int64))).encode()
        flat = flat[:: -(-len(flat) // SETTINGS.max_elements)]
    yield flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
