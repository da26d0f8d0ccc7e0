# SPDX-License-Identifier: Apache-2.0
"""L3. What is said of gradients that are not finite, which guides leave out: once, with the site to blame."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.guides.posterior import Posterior

__all__ = ["warn_of_refused"]


def warn_of_refused(
    model: Callable[..., Any], posterior: Posterior, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Say that the gradient of a draw was not finite, and which site's log density is not where it was drawn.

    Args:
        model: The model.
        posterior: The guide's distribution; its filters hold the draw.
        args: The model's arguments.
        kwargs: Likewise.
    """
    values = posterior.refused_values()
    sites = [] if values is None else _without_density(model, values, args, kwargs)
    cause = f": the log density of {' and '.join(map(repr, sites))} is not finite there" if sites else ""
    warnings.warn(
        f"AutoFlowGuide: the gradient of a draw was not finite{cause}. It counts as zero, so that one such draw costs "
        "one step; this is said once, and `guide.num_refused` goes on counting. If it is many, look at the site's "
        "parameters and data for what overflows, or run the model in float64.",
        UserWarning,
        stacklevel=3,
    )


@torch.no_grad()
def _without_density(
    model: Callable[..., Any], values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """Sites whose log density is not finite in a run at these values; none if the model does not run there."""
    found = []
    with pyro.validation_enabled(False), poutine.block():
        try:
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            for name, node in trace.nodes.items():
                is_site = node["type"] == "sample" and not site_is_subsample(node)
                if is_site and not node["fn"].log_prob(node["value"]).isfinite().all():
                    found.append(name)
        except Exception:  # what a model does at such values is no news; that the gradient was not finite is
            pass
    return found
