# SPDX-License-Identifier: Apache-2.0
"""L2. Checks of a model, its data and a guide in the model's first run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyro_flows._blame import blame, user_level
from pyro_flows._checks import shown
from pyro_flows._random import forked
from pyro_flows.models.precision import remedy_at
from pyro_flows.models.traces import NO_DENSITY, Call, mini_batches, replay_trace, run_quietly, sample_nodes

__all__ = [
    "check_data",
    "check_guide",
    "check_latents",
    "first_run",
    "outside_support",
    "start_elsewhere",
    "warn_without_data",
    "where_not_finite",
    "without_density",
]

Nodes = Mapping[str, Mapping[str, Any]]


class _SameShapes(Messenger):
    """Refuses latents and mini-batches of other shapes than the model's own, before the model itself fails on them.

    Innermost, so that it sees the indices of a plate before they are replaced.
    """

    def __init__(self, owner: str, names: Iterable[str]) -> None:
        super().__init__()
        self.owner = owner
        self.names = set(names)
        self._items: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            fn, own = msg["fn"], msg["value"]
            self._items[msg["name"]] = (fn.subsample_size or fn.size) if own is None else len(own)

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.names or msg["is_observed"]:
            return
        if site_is_subsample(msg):
            what, expected, found = f"plate '{name}' to have", (self._items[name],), (len(msg["value"]),)
        elif isinstance(msg["fn"], TorchDistributionMixin):
            what, expected, found = f"site '{name}' to have", tuple(msg["fn"].shape()), tuple(msg["value"].shape)
        else:
            return
        if expected != found:
            raise ValueError(
                f"{self.owner}: expected the guide's {what} shape {expected}, as the model's, but got {found}. If "
                "it is another model's guide, or was set up with data of another size, make a new one from this model "
                "and these data: AutoFlowGuide(model). One for data of any size takes amortize={plate: encoder}."
            )


def first_run(
    owner: str,
    model: Callable[..., Any],
    call: Call,
    draws: Iterable[Mapping[str, Any]],
    check: Callable[[Trace], Any] = lambda trace: None,
) -> Trace:
    """Run a model as its user would, at the first of a few draws at which it does not raise.

    Args:
        owner: Name of the caller, for error messages.
        model: The model.
        call: Its arguments.
        draws: Latent site -> value, one or more.
        check: Raises an exception if a trace is invalid.

    Raises:
        TypeError: If the model mixes NumPy arrays among its arguments with latents.
        ValueError: If the draws have other shapes than the model's sites.
        Exception: Any exception of the model or the check; if it raises at all draws, that of the first.
    """
    refused: Exception | None = None
    for values in draws:
        whole = {**values, **call.fixed}
        replayed = poutine.replay(_SameShapes(owner, whole)(model), trace=replay_trace(whole))
        try:
            with torch.no_grad(), poutine.block():
                trace = poutine.trace(replayed).get_trace(*call.args, **call.kwargs)
                check(trace)
            _check_arrays(owner, model, call, values)
            return trace
        except NO_DENSITY as error:
            if refused is None:
                refused = error
                remedy = remedy_at(model, whole, call)
                if remedy and hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"{owner}: {remedy}")
    assert refused is not None
    raise refused


def _check_arrays(owner: str, model: Callable[..., Any], call: Call, values: Mapping[str, Any]) -> None:
    """Run a model of NumPy arrays at latents that require a gradient, which torch refuses to mix with arrays.

    Raises:
        TypeError: If it does so in this model.
    """
    arguments = {**{f"args[{place}]": value for place, value in enumerate(call.args)}, **call.kwargs}
    arrays = [name for name, value in arguments.items() if isinstance(value, np.ndarray)]
    if not arrays:
        return
    leaves = {n: v.detach().requires_grad_() if v.is_floating_point() else v for n, v in values.items()}
    replayed = poutine.replay(model, trace=replay_trace({**leaves, **call.fixed}))
    try:
        with torch.enable_grad(), forked(), poutine.block():
            poutine.trace(replayed).get_trace(*call.args, **call.kwargs)
    except RuntimeError as error:
        if "numpy()" not in str(error):
            raise
        raise TypeError(
            f"{owner}: expected data as tensors, but got a NumPy array in {arrays[0]}, which the model mixes with its "
            "latents. Write torch.as_tensor(x), in the dtype of the model."
        ) from error


def check_guide(owner: str, drawn: Nodes) -> None:
    """Refuse a model that is passed in place of a guide.

    Args:
        owner: Name of the caller, for error messages.
        drawn: The guide's sample sites.

    Raises:
        ValueError: If the guide observes a site.
    """
    for name, node in drawn.items():
        if node["is_observed"] and not (isinstance(node["fn"], dist.Unit) or node["infer"].get("_deterministic")):
            raise ValueError(
                f"{owner}: expected a guide, which observes nothing, but it observes '{name}'. Write the model first, "
                "and the guide second."
            )


def check_latents(owner: str, nodes: Nodes, drawn: Nodes) -> list[str]:
    """Refuse a guide for another model.

    Args:
        owner: Name of the caller, for error messages.
        nodes: The model's sample sites.
        drawn: The guide's sample sites.

    Returns:
        Names of the model's latent sites that are neither drawn by the guide nor enumerated.

    Raises:
        ValueError: If the guide draws none of the model's latent sites, though there are some, or draws others, or
            what the model observes.
    """
    latents = [n for n, node in nodes.items() if not (node["is_observed"] or node["infer"].get("enumerate"))]
    if latents and not set(latents) & set(drawn):
        own = [name for name, node in drawn.items() if not node["infer"].get("is_auxiliary")]
        raise ValueError(
            f"{owner}: expected a guide of this model, whose latent sites are {', '.join(map(repr, latents))}, but the "
            f"guide draws {', '.join(map(repr, own)) or 'none'}. Make a guide from this model: AutoFlowGuide(model)."
        )
    auxiliary = {name for name, node in drawn.items() if node["infer"].get("is_auxiliary") or node["is_observed"]}
    known = [
        name for name, node in drawn.items() if name not in auxiliary and name in nodes and _is_known(nodes[name], node)
    ]
    if known:
        raise ValueError(
            f"{owner}: expected the guide to draw what the model does not observe, but it draws "
            f"{', '.join(map(repr, known))}, which the model observes. If the model is conditioned on it, by "
            "poutine.condition or obs=, make a guide from the conditioned model: AutoFlowGuide(model). If the model "
            "computes it, by pyro.deterministic, leave it out of the guide."
        )
    strange = [name for name in drawn if name not in nodes and name not in auxiliary]
    if strange:
        raise ValueError(
            f"{owner}: expected the guide to draw sites of the model, but it draws {', '.join(map(repr, strange))}, "
            f"which the model, with {', '.join(map(repr, latents))}, has not. If it is another model's guide, make one "
            "from this model; if latent sites are functions of the site, mark it with infer={'is_auxiliary': True} "
            "and write them as Delta sites with the log-determinant."
        )
    return [name for name in latents if name not in drawn]


def _is_known(node: Mapping[str, Any], drawn: Mapping[str, Any]) -> bool:
    """Whether a site of the model is observed, or computed where the guide has more than a point."""
    is_point = node["infer"].get("_deterministic") and isinstance(drawn["fn"], dist.Delta)
    return bool(node["is_observed"] and not is_point)


def check_data(owner: str, trace: Trace) -> None:
    """Compute the log densities of a trace, with errors that name what is wrong about the data.

    Args:
        owner: Name of the caller, for error messages.
        trace: A run of the model.

    Raises:
        TypeError: If an observed value is no tensor.
        ValueError: If an observed value is NaN, infinite or outside the support of its site, and has no density there;
            or, with validation on, if Pyro finds wrong shapes.
    """
    nodes = sample_nodes(trace)
    try:
        trace.compute_log_prob()
    except Exception as error:
        # Pyro goes site by site: the first without a log density is the one at which it raises.
        node = next((node for node in nodes.values() if "log_prob" not in node), None)
        if node is None:
            raise
        if node["is_observed"] and not torch.is_tensor(node["value"]):
            raise TypeError(
                f"{owner}: expected the data of site '{node['name']}' to be a tensor, but got {shown(node['value'])}. "
                "Write torch.as_tensor(y) where they come from."
            ) from error
        words = _wrong_data(node) if isinstance(error, ValueError) else None
        if words is None:
            raise
        raise ValueError(f"{owner}: expected the data of site '{node['name']}' to {words}") from error
    for name, node in nodes.items():
        words = None if node["log_prob"].isfinite().all() else _wrong_data(node)
        if words is not None:
            raise ValueError(f"{owner}: expected the data of site '{name}' to {words}")
    if is_validation_enabled():  # as SVI checks single particles; it checks vectorized ones less
        for node in nodes.values():
            try:
                check_site_shape(node, max_plate_nesting=math.inf)
            except ValueError as error:
                raise ValueError(
                    f"{owner}: expected shapes of the model's sites that fit its plates, but {error}"
                ) from None


def _wrong_data(node: Mapping[str, Any]) -> str | None:
    """Error message for invalid data of a site: what was expected, what was found, and a remedy; None if valid."""
    value, fn, name = node["value"], node["fn"], node["name"]
    if not (node["is_observed"] and torch.is_tensor(value)) or isinstance(fn, dist.Unit):
        return None
    if not value.isfinite().all():
        kind = "NaN" if value.isnan().any() else "infinite"
        wrong = value.isnan() if kind == "NaN" else value.isinf()
        return (
            f"be finite, but got {_first(wrong, value, kind)}. Leave it out; or, if it is a missing value, write "
            f"`with poutine.mask(mask=y.isfinite()): pyro.sample('{name}', ..., obs=y.nan_to_num(posinf=0.0, "
            "neginf=0.0))`, with any number that the site allows in place of 0."
        )
    outside = ~fn.support.check(value)
    if not outside.any():
        return None
    return (
        f"be in the support of its {type(fn).__name__}, {fn.support}, but got {_first(outside, value, 'outside')}. "
        "Correct the data, or take a distribution that has them; or, where latents set the bounds, let the guide start "
        "where these hold: `init_loc_fn=init_to_value(values={...})`."
    )


def _first(wrong: Tensor, value: Tensor, kind: str) -> str:
    """Description of wrong values, such as ``3 of 20 values that are NaN, the first at [7]: nan``."""
    index = wrong.nonzero()[0].tolist()
    first = value[tuple(index)]
    shown = f"{first.item():g}" if first.dim() == 0 else str(first.tolist())
    return f"{int(wrong.sum())} of {wrong.numel()} values that are {kind}, the first at {index}: {shown}"


def warn_without_data(owner: str, nodes: Nodes, call: Call) -> None:
    """Warn that a model observes nothing, although its arguments have tensors.

    Args:
        owner: Name of the caller, for the warning.
        nodes: The model's sample sites.
        call: Its arguments.
    """
    takes_data = any(torch.is_tensor(value) for value in (*call.args, *call.kwargs.values()))
    if not takes_data or any(n["is_observed"] and not n["infer"].get("_deterministic") for n in nodes.values()):
        return
    sizes = {name: node["value"].numel() for name, node in nodes.items() if not node["is_observed"]}
    largest = [name for name, size in sizes.items() if size == max(sizes.values())]
    warnings.warn(
        f"{owner}: no site of the model is observed, so that its posterior is its prior. If "
        f"{' or '.join(map(repr, largest))} is data, write `pyro.sample('{largest[-1]}', ..., obs=...)`.",
        stacklevel=user_level(),
    )


@torch.no_grad()
def without_density(model: Callable[..., Any], values: Mapping[str, Any], call: Call) -> dict[str, float]:
    """Sites whose log density is not finite in a run at a draw, with the first such value of each.

    Raises:
        Exception: Any exception that the model raises there.
    """
    found: dict[str, float] = {}
    with pyro.validation_enabled(False), poutine.block():
        replayed = poutine.replay(model, trace=replay_trace({**values, **call.fixed}))
        trace = poutine.trace(replayed).get_trace(*call.args, **call.kwargs)
        trace.compute_log_prob()
        for name, node in sample_nodes(trace).items():
            wrong = node["log_prob"][~node["log_prob"].isfinite()]
            if wrong.numel():
                found[name] = wrong[0].item()
    return found


def outside_support(model: Callable[..., Any], values: Mapping[str, Any], call: Call) -> list[str]:
    """Latents whose values are outside of the support that they have in a run at a draw, since it follows others."""
    with pyro.validation_enabled(False):
        nodes = sample_nodes(run_quietly(model, call, replay_trace({**values, **call.fixed})))
    return [name for name, node in nodes.items() if name in values and _is_outside(node)]


def _is_outside(node: Mapping[str, Any]) -> bool:
    try:
        return not bool(node["fn"].support.check(node["value"]).all())
    except NotImplementedError:  # a distribution that does not say its support
        return False


def where_not_finite(model: Callable[..., Any], guide: Callable[..., Any], call: Call, num_draws: int) -> str:
    """Sites without a finite log density at one of many draws of a guide, in words; empty if none is found.

    Leaves the random state alone. If the model raises at a draw, names its line instead.
    """
    with forked():
        for _ in range(num_draws):
            try:
                trace = run_quietly(guide, call)
                values = {name: node["value"] for name, node in sample_nodes(trace).items()}
                sites = without_density(model, values, call._replace(fixed=mini_batches(trace)))
            except Exception as error:
                return f"the model raises: {blame(error)}"
            if sites:
                return " and ".join(f"site '{name}' has log density {number}" for name, number in sites.items())
    return ""


def start_elsewhere(owner: str, sites: Mapping[str, float], remedy: str = "") -> str:
    """Error message for an initial location without density; ``sites`` are those of :func:`without_density`, one or
    more, and ``remedy`` is that of :func:`~pyro_flows.models.precision.remedy_at`."""
    found = " and ".join(f"that of site '{name}' is {number}" for name, number in sites.items())
    return f"{owner}: expected the model to have a finite log density where the guide starts, but {found}. " + (
        remedy
        or "Start where it has one, `init_loc_fn=init_to_value(values={...})`, or look at the parameters of "
        f"'{next(iter(sites))}'."
    )
