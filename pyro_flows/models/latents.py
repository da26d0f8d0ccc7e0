# SPDX-License-Identifier: Apache-2.0
"""L2. The trace of a model's latent sites on which a guide is built, and checks of sites that it cannot handle."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to

from pyro_flows._checks import shown
from pyro_flows._random import forked
from pyro_flows.models.sites import full_size
from pyro_flows.models.traces import as_indices, nesting_of, replay_trace, sample_nodes

__all__ = ["checked_init", "hide_from_guide", "log_density", "trace_latents"]

OWNER = "AutoFlowGuide"
# Distributions whose support is the circle, though torch declares the real line.
CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


def hide_from_guide(site: dict[str, Any]) -> bool:
    """Whether the guide has no part in a site: not a sample, observed, a subsample, or enumerated by the ELBO."""
    return (
        site["type"] != "sample"
        or site["is_observed"]
        or site_is_subsample(site)
        or bool(site["infer"].get("enumerate"))
    )


def checked_init(init_loc_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an ``init_loc_fn`` so that it is called for the guide's own sites only and its errors name a remedy."""

    @functools.wraps(init_loc_fn)
    def init(site: dict[str, Any]) -> Any:
        if bool(site["infer"].get("enumerate")):
            return site["fn"].sample()
        with _remedies(site["name"]), helpful_support_errors(site):
            value = init_loc_fn(site)
        shape = tuple(site["fn"].shape())
        if value is not None and not (torch.is_tensor(value) and tuple(value.shape) == shape):
            raise ValueError(
                f"{OWNER}: expected init_loc_fn to return a tensor of shape {shape} for site '{site['name']}', but got "
                f"{shown(value)}. Return torch.full({shape}, ...), or take init_to_value(values={{...}})."
            )
        if value is not None and not value.isfinite().all():
            raise _wrong_start(site, value)
        return value

    return init


@torch.no_grad()
def trace_latents(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Mapping[str, pyro.plate] | None = None,
) -> Trace:
    """Run the model once and return the trace of its latent sites; refuses sites that the guide can't handle.

    The run is hidden from active handlers (particles, replays) and has no gradients, so that the trace holds no
    autograd graph and can be copied and pickled.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        given: The plates that the user creates for the guide, by name.

    Raises:
        RuntimeError: If there are no latents.
        ValueError: If a site is discrete and not enumerated, spherical, circular, or masked in part, or its initial
            value is not inside its support; if it is in a plate whose indices the guide would not know.
        NotImplementedError: If a site is in a sequential plate.
        Exception: Any exception that the model raises.
    """
    chosen = _ChosenItems()
    hidden = poutine.block(chosen(model), hide_fn=hide_from_guide)
    trace = poutine.block(poutine.trace(hidden).get_trace)(*args, **kwargs)
    trace.remove_node("_INPUT")
    trace.remove_node("_RETURN")
    given = given or {}
    strange = [plate for plate in given if plate not in chosen.known]
    if strange:
        known = ", ".join(map(repr, chosen.known)) or "none"
        raise ValueError(
            f"{OWNER}: expected create_plates to return plates of the model, {known}, but got '{strange[0]}'. Give it "
            "the model's name."
        )
    unknown = chosen.plates - set(given)
    for name, site in trace.iter_stochastic_nodes():
        _check_plates(name, site, unknown, given)
        _check_support(name, site)
        _check_mask(name, site)
        _check_start(site)
        _detach(site["fn"])
    if not any(site["value"].numel() for _, site in trace.iter_stochastic_nodes()):
        raise RuntimeError(
            f"{OWNER} found no latent variables; Use an empty guide instead, such as "
            "`guide = lambda *args, **kwargs: None`."
        )
    return trace


@torch.no_grad()
def log_density(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Log joint density of a run of a model in unconstrained space, hidden from active handlers; -inf if not finite.

    Enumerated sites are summed out. Restores the random state, so that a plate that draws its items draws the same ones
    at each call. If the model raises, returns -inf, and leaves the error to the run that follows.
    """
    with forked(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
            total = _log_density(model, trace, args, kwargs)
        except Exception:
            return -math.inf
    return total if math.isfinite(total) else -math.inf


def _log_density(model: Callable[..., Any], trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    samples = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"]}
    latents = {name: site for name, site in samples.items() if not hide_from_guide(site)}
    if any(site["infer"].get("enumerate") for site in samples.values()):
        items = {name: site["value"] for name, site in samples.items() if site_is_subsample(site)}
        given = poutine.condition(model, data={name: site["value"] for name, site in latents.items()})
        given = poutine.replay(given, trace=replay_trace(items))
        # Told the number of plates' dimensions, it does not run the model once more and print that it guessed.
        loss = TraceEnum_ELBO(max_plate_nesting=nesting_of(sample_nodes(trace).values())).loss
        total = -float(poutine.block(loss)(given, lambda *args, **kwargs: None, *args, **kwargs))
    else:
        total = float(trace.log_prob_sum())
    for site in latents.values():
        to_support = biject_to(site["fn"].support)
        unconstrained = to_support.inv(site["value"])
        total += float(to_support.log_abs_det_jacobian(unconstrained, site["value"]).sum())
    return total


def _check_plates(name: str, site: dict[str, Any], unknown: set[str], given: Mapping[str, pyro.plate]) -> None:
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise NotImplementedError(
                f"{OWNER} does not support sequential pyro.plate, but site '{name}' is in the sequential plate "
                f"'{frame.name}'. Write `with pyro.plate('{frame.name}', {frame.size}):` instead of iterating over "
                "it, or use a Python range and name each site by its index."
            )
        dim = given[frame.name].dim if frame.name in given else None
        if dim not in (None, frame.dim):
            raise ValueError(
                f"{OWNER}: expected create_plates to return plate '{frame.name}' with dim {frame.dim}, the model's, "
                f"but got {dim}. Write dim={frame.dim}."
            )
        # The guide would draw other indices, which would replace the model's own (Pyro's issue 3468).
        if frame.name in unknown:
            raise ValueError(
                f"{OWNER}: expected the guide to be told which items are at hand, but latent site '{name}' is in the "
                f"plate '{frame.name}', which the model gives indices of its own ({frame.size} of {full_size(frame)}). "
                f"Write {OWNER}(model, create_plates=lambda idx: pyro.plate('{frame.name}', {full_size(frame)}, "
                f"dim={frame.dim}, subsample=idx)), where the lambda takes the model's arguments."
            )


class _ChosenItems(Messenger):
    """Records all plates, and those whose indices the model chooses itself, unless these are all items in order."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: set[str] = set()
        self.known: dict[str, None] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.known[msg["name"]] = None
        if not site_is_subsample(msg) or msg["value"] is None:
            return
        if as_indices(msg["value"]).tolist() != list(range(msg["fn"].size)):
            self.plates.add(msg["name"])


def _check_mask(name: str, site: dict[str, Any]) -> None:
    masks, fn = [site["mask"]], site["fn"]
    while hasattr(fn, "base_dist"):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    partly = [mask for mask in masks if torch.is_tensor(mask) and mask.dim() and not mask.all()]
    if not partly:  # a mask over all of a site makes its prior flat, which is proper with enough data
        return
    stem = name.removesuffix("_unobserved")
    remedy = (
        f"Leave missing values out, which changes no other site's posterior: `with poutine.mask(mask=mask): "
        f"pyro.sample('{stem}', ..., obs=y)`. Or draw them alone, `pyro.sample('{stem}_missing', ...)`, in a plate of "
        "their number."
        if stem != name
        else "Draw the others alone, in a plate of their number."
    )
    raise ValueError(
        f"{OWNER}: expected latent site '{name}' to have a density in all its entries, but {int((~partly[0]).sum())} "
        f"of {partly[0].numel()} are masked: nothing would keep the guide's spread there from growing. {remedy}"
    )


def _detach(fn: torch.distributions.Distribution) -> None:
    """Detach a distribution from the model's parameters, whose weak references to one another cannot be pickled."""
    for name, value in vars(fn).items():
        if isinstance(value, torch.Tensor):
            vars(fn)[name] = value.detach()
        elif isinstance(value, torch.distributions.Distribution):
            _detach(value)


def _check_start(site: dict[str, Any]) -> None:
    value = site["value"]
    if not value.is_floating_point() or not biject_to(site["fn"].support).inv(value).isfinite().all():
        raise _wrong_start(site, value)


def _wrong_start(site: Mapping[str, Any], value: torch.Tensor) -> ValueError:
    name = site["name"]
    return ValueError(
        f"{OWNER}: expected latent site '{name}' to start at finite floating-point numbers inside its support "
        f"{site['fn'].support}, but got {value}. Pass an init_loc_fn that gives such a value, for example "
        f"`init_to_value(values={{'{name}': ...}})`."
    )


def _check_support(name: str, site: dict[str, Any]) -> None:
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, CIRCULAR):
        fn = fn.base_dist
    if isinstance(fn, CIRCULAR):
        raise ValueError(
            f"{OWNER}: expected latent site '{name}' to live on a line, but {type(fn).__name__} lives on a circle, "
            "where a flow on the line has no proper density. Use a projected normal instead: write "
            f"`v = pyro.sample('{name}', dist.ProjectedNormal(concentration * "
            "torch.stack([loc.cos(), loc.sin()], -1)))` "
            f"with `poutine.reparam(model, config={{'{name}': ProjectedNormalReparam()}})`, and take the angle by "
            "`torch.atan2(v[..., 1], v[..., 0])`."
        )
    with _remedies(name), helpful_support_errors(site):
        biject_to(site["fn"].support)


@contextmanager
def _remedies(name: str) -> Iterator[None]:
    """Add a remedy for this guide to Pyro's message, which names the site and the cause."""
    try:
        yield
    except ValueError as error:
        if "cannot handle discrete" in str(error):
            raise ValueError(
                f"{error} With {OWNER} the shortest way is to mark it: `model = config_enumerate(model)` or "
                f"`pyro.sample('{name}', ..., infer={{'enumerate': 'parallel'}})`, and to train with "
                f"TraceEnum_ELBO; {OWNER} then leaves it out by itself. If '{name}' is data, pass them as obs=."
            ) from None
        raise
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{OWNER}: expected latent site '{name}' to have a support that biject_to knows, but got another "
            f"({error}). Reparameterise the site with poutine.reparam, or transform it in the model."
        ) from None
