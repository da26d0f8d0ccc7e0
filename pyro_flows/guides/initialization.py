# SPDX-License-Identifier: Apache-2.0
"""L5. The default initialization of a guide."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_flows._checks import check_mapping, checked
from pyro_flows._random import forked
from pyro_flows.models.latents import checked_init, hide_from_guide, log_density
from pyro_flows.transforms.representable import unconstrained_limits

__all__ = ["better_start", "init_to_prior_median"]

Init = Callable[[dict[str, Any]], Any]
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class MedianSettings:
    """Constants of initialization at the prior's median.

    Attributes:
        probabilities: Probabilities of the quartiles.
        max_central_half: Distance of the quartiles in unconstrained space above which a prior is uninformative: a
            factor of 20,000 for a positive site.
        num_draws: Number of draws for the quartiles of priors without a quantile function, of the form 4 n - 1.
    """

    probabilities: tuple[float, float, float] = (0.25, 0.5, 0.75)
    max_central_half: float = 10.0
    num_draws: int = 15

    @property
    def places(self) -> list[int]:
        """Indices of the quartiles among the sorted draws."""
        return [round(p * (self.num_draws + 1)) - 1 for p in self.probabilities]


@dataclass(frozen=True)
class StartSettings:
    """Constants of the choice between two initializations.

    Attributes:
        max_groups: Largest number of groups of sites, each of which is initialized in one of two ways.
        widths: Scales of the Gaussians around a start, in units of the guide's first one.
    """

    max_groups: int = 16
    widths: tuple[float, ...] = (1.0, 0.2)


MEDIAN, START = MedianSettings(), StartSettings()


@checked(site=check_mapping)
def init_to_prior_median(site: dict[str, Any]) -> Tensor:
    """Initialize at the prior's exact median where its quantile function is known, else at the median of 15 draws.

    Pyro always takes the median of 15 draws, whose standard error is a third of the prior's standard deviation. In a
    hierarchy, that scatters the members of a group around their parent, which the guide must first unlearn.

    Three kinds of sites are initialized at zero in unconstrained space: bounded sites with an uninformative prior, such
    as ``Gamma(0.001, 0.001)``, whose median is below the smallest floating-point number; sites with a multivariate
    prior; and sites with an improper prior, which ``AutoNormal`` does not initialize.

    Args:
        site: A site of a Pyro trace.

    Returns:
        A value on the site's support.
    """
    fn = site["fn"]
    while hasattr(fn, "base_dist") and hasattr(fn, "reinterpreted_batch_ndims"):
        fn = fn.base_dist  # to_event() does not change quantiles
    if isinstance(fn, dist.ImproperUniform):
        to_support = biject_to(fn.support)
        start: Tensor = to_support(torch.zeros(to_support.inverse_shape(fn.shape())))
        start._pyro_custom_init = False  # type: ignore[attr-defined]  # as Pyro marks its own
        return start
    if fn.event_shape:
        feasible: Tensor = init_to_feasible(site)
        return feasible
    to_support = biject_to(fn.support)
    low, median, high = _quartiles(fn)
    usable = median.isfinite() & fn.support.check(median)
    if fn.support is not constraints.real:
        # Quartiles outside the range of floating point are all clamped to its smallest or largest number.
        unconstrained = to_support.inv(median)
        is_number = unconstrained == unconstrained.clamp(*unconstrained_limits(median.dtype))
        usable &= is_number & ((to_support.inv(high) - to_support.inv(low)).abs() < MEDIAN.max_central_half)
    value = torch.where(usable, median, to_support(torch.zeros_like(median))).detach()
    value._pyro_custom_init = False  # type: ignore[attr-defined]
    return value


def _quartiles(fn: Any) -> Tensor:
    """Quartiles of a prior, ``(3, *batch_shape)``."""
    try:
        return torch.stack([fn.icdf(torch.tensor(p)).expand(fn.batch_shape) for p in MEDIAN.probabilities])
    except (NotImplementedError, ValueError, AttributeError):
        draws = fn.sample((MEDIAN.num_draws,))
        return draws.sort(0).values[MEDIAN.places]


def better_start(model: Callable[..., Any], scale: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Init:
    """The default ``init_loc_fn`` for one model: each site at its prior's median or where ``AutoNormal`` starts,
    whichever gives the first guide the higher ELBO.

    Neither is the better one for all sites: a prior's median is far from the data where the prior is vague, and zero in
    unconstrained space is where the prior is informative. The ELBO and not the density at the start is compared, since
    the latter is highest where a scale is next to zero, in which all draws miss; and that of the better one of two
    Gaussians, since the first guide may be too wide, as training finds out soon. From the better start as a whole,
    groups of sites switch in the model's order where that raises the ELBO, of two antithetic draws.

    Args:
        model: The model.
        scale: Standard deviation of the first guide in unconstrained space.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
    """
    inits = (init_to_prior_median, init_to_feasible)
    with forked():
        traces = [_trace(InitMessenger(checked_init(init))(model), args, kwargs) for init in inits]
        if not all(traces) or traces[0].keys() != traces[1].keys():
            return init_to_prior_median  # its error, if it has one, is the user's to see
        starts = [{name: biject_to(site["fn"].support).inv(site["value"]) for name, site in t.items()} for t in traces]
        noise = {name: scale * torch.randn_like(value) for name, value in starts[0].items()}
    num_latents = sum(float(site["scale"]) * starts[0][name].numel() for name, site in traces[0].items())

    def mean_log_joint(choice: Mapping[str, int], width: float) -> float:
        values = {name: starts[index][name] for name, index in choice.items()}
        signs = (width, -width) if width else (0.0,)
        draws = ({name: value + sign * noise[name] for name, value in values.items()} for sign in signs)
        densities = [log_density(InitMessenger(partial(_init_to_draw, draw))(model), args, kwargs) for draw in draws]
        return math.fsum(densities) / len(signs)

    def elbo(choice: Mapping[str, int]) -> float:
        """Of the better width, up to the entropy of the first guide."""
        return max(mean_log_joint(choice, width) + num_latents * math.log(width) for width in START.widths)

    whole = [dict.fromkeys(starts[0], index) for index in range(len(inits))]
    score: Callable[[Mapping[str, int]], float] = elbo
    found = [elbo(choice) for choice in whole]
    if not any(map(math.isfinite, found)):  # no draw has a density, but a start may have
        score = partial(mean_log_joint, width=0.0)
        found = [score(choice) for choice in whole]
    highest = max(found)
    choice = whole[found.index(highest)]
    names = list(choice)
    for group in torch.arange(len(names)).tensor_split(min(len(names), START.max_groups)):
        other = {**choice, **{names[place]: 1 - choice[names[place]] for place in group.tolist()}}
        if (value := score(other)) > highest:
            choice, highest = other, value
    if choice in whole:
        return inits[whole.index(choice)]
    return partial(_init_to_draw, {name: starts[index][name] for name, index in choice.items()})


def _trace(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The latent sites of a run; none if it raises."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
        except Exception:
            return {}
    return {name: site for name, site in trace.nodes.items() if not hide_from_guide(site)}


def _init_to_draw(draw: Values, site: dict[str, Any]) -> Tensor | None:
    """A site's value from unconstrained ones; None, for a draw of its prior, where a handler makes others of it."""
    value = draw.get(site["name"])
    if value is None:
        return None
    constrained = biject_to(site["fn"].support)(value)
    constrained._pyro_custom_init = False
    return constrained
