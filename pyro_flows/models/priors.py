# SPDX-License-Identifier: Apache-2.0
"""L2. Reading off a model how the priors of its latents follow the latents before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import CorrCholeskyTransform

from pyro_flows.models.layout import Layout
from pyro_flows.models.log_joint import constrain, scored_sites
from pyro_flows.models.sites import Site
from pyro_flows.models.traces import Call
from pyro_flows.transforms import Correlated

__all__ = ["LinearPrior", "read_joint_prior", "read_prior"]


@dataclass(frozen=True)
class ReadingSettings:
    """How priors are read off a model.

    Attributes:
        max_parents: Unconstrained dimension of the latents that a prior may follow: a run of the model for each.
        num_spare_runs: Runs beyond the number of unknowns, by which a linear fit can be seen to fail.
        max_items: Items of a mini-batch that are looked at; enough to see whether the prior differs between items.
        tolerance: Relative error up to which a fit is exact, as rounding in float32 is.
        shift: Standard deviation by which coordinates are moved to see which others notice, in unconstrained space.
    """

    max_parents: int = 200
    num_spare_runs: int = 8
    max_items: int = 16
    tolerance: float = 1e-4
    shift: float = 0.3


READING = ReadingSettings()


@dataclass(frozen=True, eq=False)
class LinearPrior:
    r"""Gaussian priors, in unconstrained space, with location and log-scale that are linear in the given latents.

    Attributes:
        known: Which coordinates of the item's vector have such a prior, ``(n,)``.
        active: Which entries of the given latents matter, ``(A,)``.
        slope: Of locations, then of log-scales, ``(2 n, A)``.
        bias: Likewise, ``(2 n,)``.
        correlated: Those that are marginals of multivariate normals whose correlations are a latent.
        conditionally_independent: Whether those with a known prior are, given all others and the data.
    """

    known: Tensor
    active: Tensor
    slope: Tensor
    bias: Tensor
    correlated: tuple[Correlated, ...] = ()
    conditionally_independent: bool = False

    def __call__(self, parents: Tensor) -> Tensor:
        """Locations and log-scales, ``(..., 2 n)``, from packed given latents, ``(..., G)``."""
        return torch.nn.functional.linear(parents[..., self.active], self.slope, self.bias)

    def dense(self, count: int) -> tuple[Tensor, Tensor]:
        """Slopes in all of ``count`` given latents, ``(2 n, count)``, and biases; zero where nothing is known."""
        rows = self.known.repeat(2)
        slope = self.slope.new_zeros(len(self.bias), count)
        slope[:, self.active] = self.slope
        return slope * rows.unsqueeze(-1), self.bias * rows


class _Done(Exception):
    """Ends a run of the model once the priors of interest were seen."""


class _Watch(Messenger):
    """Sets some latents to given values, draws the rest, and takes down the distributions of those that are wanted."""

    def __init__(self, values: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
        super().__init__()
        self.values = values
        self.found: dict[str, Any] = dict.fromkeys(wanted)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        # Anything else is drawn afresh, though the guide's model comes with a handler that sets it to its start.
        msg["value"] = self.values[msg["name"]] if msg["name"] in self.values else msg["fn"]()
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.found:
            self.found[msg["name"]] = msg["fn"]
            if all(fn is not None for fn in self.found.values()):
                raise _Done


@torch.no_grad()
def read_prior(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    parents: Sequence[Layout],
) -> LinearPrior | None:
    """Find the priors of a block's sites that are Gaussian, and linear in what the block is given.

    Runs the model a few times at random values of the given latents, with everything else drawn afresh. A prior that
    also depends on anything else (a discrete latent, a covariate of the item, a site of the same block) does not come
    out linear, and is left out; so is a prior of another form.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: The block's sites.
        parents: Those of each block that this one is given, the joint block first.

    Returns:
        None if no site has such a prior.
    """
    count = sum(other.latent_dim for other in parents)
    if count > READING.max_parents:
        return None
    rows: list[tuple[Tensor, Tensor]] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for _ in range(count + READING.num_spare_runs):
            packed, values = _random_parents(parents)
            found = _watch(model, args, kwargs, values, layout.names)
            if found is None:
                return None
            rows.append(_row(layout, packed, found))
    return _fit(torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows]), layout.init_loc)


@torch.no_grad()
def read_joint_prior(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> LinearPrior | None:
    """As :func:`read_prior` for the sites of the joint block, each given the others; priors that follow none left out.

    Returns:
        None if no site has such a prior.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    shared: set[tuple[str, str]] = set()
    if layout.latent_dim > READING.max_parents:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for _ in range(layout.latent_dim + READING.num_spare_runs):
            (packed,), values = _random_parents([layout])
            found = _watch(model, args, kwargs, values, layout.names)
            if found is None:
                return None
            gaussians = [_gaussian(site, found[site.name]) for site in layout]
            y = torch.cat([torch.cat([pair[i].reshape(-1) for pair in gaussians]) for i in range(2)])
            rows.append((packed.double(), y.double()))
            pairs = _correlations(layout, found, values)
            shared = pairs if len(rows) == 1 else shared & pairs
            if len(rows) == 2 and not (rows[0][1] != rows[1][1]).logical_and(y.isfinite()).any():
                return None  # no Gaussian prior that follows anything
    prior = _fit(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]), layout.init_loc)
    if prior is None:
        return None
    follows = (prior.slope != 0).any(-1).reshape(2, -1).any(0)
    known = prior.known & follows
    correlated, slices = [], layout.slices
    for name, factor in sorted(shared):
        vectors, size = slices[name], layout[name].shape[-1]
        if known[vectors].all():
            count = (vectors.stop - vectors.start) // size
            correlated.append(Correlated(vectors.start, count, size, slices[factor].start))
    if not known.any():
        return None
    independent = not correlated and _conditionally_independent(
        model, args, kwargs, layout, known.nonzero().squeeze(-1)
    )
    return replace(prior, known=known, correlated=tuple(correlated), conditionally_independent=independent)


def _conditionally_independent(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    coordinates: Tensor,
) -> bool:
    """Whether some coordinates are independent of each other given all others and the data.

    Moves half of them and looks at the gradient of the log joint in the other half, for so many halves that each two
    coordinates are in different ones at least once: as many gradients as their number has binary digits. A model that
    can't be looked at in this way counts as one in which they are not.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: The sites of the joint block.
        coordinates: Which ones, as indices, ``(P,)``.
    """

    def gradient(packed: Tensor) -> Tensor:
        packed = packed.detach().requires_grad_()
        torch.default_generator.manual_seed(0)
        values, parts = constrain(layout.split(packed))
        parts += [node["log_prob"] for node in scored_sites(model, values, Call(args, kwargs))]
        (found,) = torch.autograd.grad(torch.stack([part.sum() for part in parts]).sum(), packed)
        return found[coordinates]

    number = torch.arange(len(coordinates), device=coordinates.device)
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        init_loc = layout.init_loc
        center, shift = init_loc + READING.shift * torch.randn_like(init_loc), READING.shift * torch.randn(len(number))
        try:
            before = gradient(center)
            for digit in range((len(number) - 1).bit_length()):
                moved = (number >> digit) % 2 == 1
                after = gradient(center.index_add(0, coordinates, moved * shift.to(center)))
                if not ((after - before).abs() <= READING.tolerance * (1.0 + before.abs()))[~moved].all():
                    return False
        except Exception:  # as in _watch
            return False
    return True


def _correlations(layout: Layout, found: Mapping[str, Any], values: Mapping[str, Tensor]) -> set[tuple[str, str]]:
    """Multivariate normal sites, and the sites that are the Cholesky factors of their correlations."""
    bases = {site.name: getattr(site.to_support, "base", None) for site in layout}
    factors = [name for name, base in bases.items() if isinstance(base, CorrCholeskyTransform)]
    pairs = set()
    for site in layout:
        fn = _unwrapped(found[site.name])
        if isinstance(fn, dist.MultivariateNormal):
            correlation = fn.scale_tril / fn.stddev.unsqueeze(-1)
            for name in factors:
                if values[name].shape == correlation.shape[-2:] and torch.allclose(
                    correlation, values[name].expand_as(correlation), rtol=READING.tolerance, atol=READING.tolerance
                ):
                    pairs.add((site.name, name))
    return pairs


def _unwrapped(fn: Any) -> Any:
    """A distribution without what only changes its shape or its weight."""
    while isinstance(fn, (dist.Independent, dist.torch_distribution.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _watch(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> dict[str, Any] | None:
    """Distributions of sites in a run at given values; None if the model does not bear these values."""
    watch = _Watch(values, wanted)
    try:
        with poutine.block(), watch:
            model(*args, **kwargs)
    except _Done:
        pass
    except Exception:  # whatever a model does at values it never meant to see, its priors are merely not known
        return None
    return watch.found


def _random_parents(parents: Sequence[Layout]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Random packed values of what a block is given, and the same by site."""
    drawn: list[Tensor] = []
    values: dict[str, Tensor] = {}
    for layout in parents:
        packed = layout.init_loc + torch.randn_like(layout.init_loc)
        drawn.append(packed)
        values |= {site.name: site.to_support(part) for site, part in layout.split(packed)}
    return drawn, values


def _row(layout: Layout, parents: Sequence[Tensor], found: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Given latents and the Gaussian of the first items: ``(items, G)`` and ``(items, 2 n)``; NaN for another prior."""
    gaussians = {site.name: _gaussian(site, found[site.name]) for site in layout}
    y = [layout.pack_unconstrained({name: pair[i] for name, pair in gaussians.items()}) for i in range(2)]
    lead = y[0].shape[:-1]
    x = [part.expand(lead + part.shape[-1:]) for part in parents]
    stacked = torch.cat([part.reshape(-1, part.shape[-1])[: READING.max_items] for part in (*x, *y)], -1).double()
    split = stacked.shape[-1] - 2 * layout.latent_dim
    return stacked[:, :split], stacked[:, split:]


def _gaussian(site: Site, fn: Any) -> tuple[Tensor, Tensor]:
    """Location and log-scale in unconstrained space, in the site's unconstrained shape.

    Of a multivariate normal these are the marginals': with a matrix of covariances they often follow other latents
    linearly, unlike its conditionals, and pooling with them is what takes the funnel away.
    """
    fn = _unwrapped(fn)
    if isinstance(fn, dist.LogNormal):
        fn = fn.base_dist
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
    elif isinstance(fn, dist.MultivariateNormal):
        return fn.loc.expand(site.unconstrained_shape), fn.stddev.log().expand(site.unconstrained_shape)
    elif not (isinstance(fn, dist.Normal) and site.is_real):
        nan = torch.full(site.unconstrained_shape, torch.nan)
        return nan, nan
    return fn.loc.expand(site.unconstrained_shape), fn.scale.log().expand(site.unconstrained_shape)


def _fit(x: Tensor, y: Tensor, like: Tensor) -> LinearPrior | None:
    """Least squares; keeps the coordinates that it fits to rounding."""
    size = y.shape[-1] // 2
    design = torch.cat([x, x.new_ones(len(x), 1)], -1)
    finite = y.isfinite().all(0)
    solution = torch.linalg.lstsq(design, y.nan_to_num(0.0, 0.0, 0.0), driver="gelsd").solution  # (G + 1, 2 n)
    error = (design @ solution - y).abs().amax(0) / (1.0 + y.abs().amax(0))
    exact = finite & (error < READING.tolerance)
    known = exact[:size] & exact[size:]
    if not known.any():
        return None
    solution = torch.where(known.repeat(2), solution, 0.0)
    solution = torch.where(solution.abs() < READING.tolerance, 0.0, solution)
    active = (solution[:-1] != 0).any(-1).nonzero().squeeze(-1)
    return LinearPrior(
        known=known.to(like.device),
        active=active.to(like.device),
        slope=solution[active].mT.to(like).contiguous(),
        bias=solution[-1].to(like).contiguous(),
    )
