# SPDX-License-Identifier: Apache-2.0
"""L5. What a guide refuses: flows that are too slow to draw from, and gradients that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pyro_flows._blame import user_level
from pyro_flows._random import forked
from pyro_flows.flows import FlowSpec
from pyro_flows.models.checks import without_density
from pyro_flows.models.traces import Call
from pyro_flows.posterior.posterior import Posterior

__all__ = ["check_spec", "warn_of_refused"]


def warn_of_refused(
    model: Callable[..., Any], posterior: Posterior, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Warn that the gradient of a draw was not finite, and name the site whose log density is not finite there.

    Args:
        model: The model.
        posterior: The guide's distribution; its filters hold the draw.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
    """
    values = posterior.refused_values()
    try:
        with forked():  # a warning changes no draw of a step
            sites = {} if values is None else without_density(model, values, Call(args, kwargs))
    except Exception:  # the model raises at these values; the warning is about the gradient only
        sites = {}
    cause = f": the log density of {' and '.join(map(repr, sites))} is not finite there" if sites else ""
    warnings.warn(
        f"AutoFlowGuide: the gradient of a draw was not finite{cause}. It counts as zero, so that one such draw costs "
        "one step; this is said once, and `guide.num_refused` goes on counting. If it is many, look at the site's "
        "parameters and data for what overflows, or run the model in float64.",
        UserWarning,
        stacklevel=user_level(),
    )


def check_spec(spec: FlowSpec) -> None:
    """Refuse a family that a guide cannot draw from in one pass.

    Raises:
        NotImplementedError: If it takes a pass per dimension.
    """
    if not spec.one_pass_sampling:
        raise NotImplementedError(
            f"AutoFlowGuide: expected a flow that draws in one pass, but {type(spec).__name__} takes a pass "
            'per dimension, and a guide draws at every step. Use "iaf", the same family in the other direction.'
        )
