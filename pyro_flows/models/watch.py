# SPDX-License-Identifier: Apache-2.0
"""L2. Running a model up to some of its latent sites, to see their priors at given values of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["is_plain", "unwrapped", "watch"]


class _Done(Exception):
    """Raised to end a run of the model once all requested priors were seen."""


class _Watch(Messenger):
    """Sets some latents to given values, draws the rest, and records the distributions of the requested sites."""

    def __init__(self, values: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
        super().__init__()
        self.values = values
        self.found: dict[str, Any] = dict.fromkeys(wanted)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        # All others are drawn afresh, although a handler of the guide's model would set them to their initial values.
        msg["value"] = self.values[msg["name"]] if msg["name"] in self.values else msg["fn"]()
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.found:
            self.found[msg["name"]] = msg["fn"]
            if all(fn is not None for fn in self.found.values()):
                raise _Done


def unwrapped(fn: Any) -> Any:
    """Base distribution, without wrappers that only change its shape or its weight."""
    while isinstance(fn, (dist.Independent, dist.torch_distribution.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def is_plain(node: Mapping[str, Any]) -> bool:
    """Whether the density of a sample site is neither scaled nor masked."""
    fn = node["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            return False
        fn = fn.base_dist
    return node["mask"] is None and bool(node["scale"] == 1.0)


def watch(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> dict[str, Any] | None:
    """Distributions of sites in a run at given values; None if the model raises at these values."""
    watch = _Watch(values, wanted)
    try:
        with poutine.block(), watch:
            model(*args, **kwargs)
    except _Done:
        pass
    except Exception:  # a model may raise anything at unlikely values; its priors are then unknown
        return None
    return watch.found
