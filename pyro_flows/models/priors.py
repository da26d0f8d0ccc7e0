# SPDX-License-Identifier: Apache-2.0
"""L2. Reading off a model how the priors of its latents depend on other latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import CorrCholeskyTransform

from pyro_flows._random import seeded
from pyro_flows.models.covariances import RECORDING, ReadCovariance, read_covariances
from pyro_flows.models.layout import Layout
from pyro_flows.models.leaves import are_independent
from pyro_flows.models.sites import Site
from pyro_flows.models.watch import unwrapped, watch
from pyro_flows.transforms import Correlated, Covariance

__all__ = ["LinearPrior", "read_joint_prior", "read_prior"]


@dataclass(frozen=True)
class ReadingSettings:
    """How priors are read off a model.

    Attributes:
        max_parents: Largest unconstrained dimension of a prior's parents; each dimension takes a run of the model.
        max_dim: Largest dimension of a joint block whose priors are read; a head's slopes take memory as its square.
        num_spare_runs: Number of runs beyond the number of unknowns, which show whether a linear fit fails.
        no_prior: Log-scale in place of marginals that are unknown.
        max_items: Number of items of a mini-batch that are used; enough to see whether the prior differs between items.
        tolerance: Relative error below which a fit counts as exact; allows for rounding in float32.
    """

    max_parents: int = 200
    max_dim: int = 2500
    num_spare_runs: int = 8
    no_prior: float = 20.0
    max_items: int = 16
    tolerance: float = 1e-4


READING = ReadingSettings()


@dataclass(frozen=True, eq=False)
class LinearPrior:
    r"""Gaussian priors, in unconstrained space, with location and log-scale that are linear in the parents.

    Attributes:
        known: Mask of the coordinates of the block's vector that have such a prior, ``(n,)``.
        active: Indices of the A entries of the parents that these depend on, ``(A,)``.
        slope: Slopes of the n locations, then of the n log-scales, ``(2 n, A)``.
        bias: Biases of the n locations, then of the n log-scales, ``(2 n,)``.
        correlated: Coordinates that are marginals of multivariate normals whose correlations are a latent.
        covariances: Coordinates whose location and covariance are a function of other latents; slopes and biases are
            those of their marginals, or of a very wide prior.
        conditionally_independent: Whether the coordinates with a known prior are independent given all others and the
            data.
        roots: Mask of the coordinates with a constant Gaussian prior that locations of the known ones follow, and no
            scale, ``(n,)``: the beginning of a random walk; None where no known prior follows another.
    """

    known: Tensor
    active: Tensor
    slope: Tensor
    bias: Tensor
    correlated: tuple[Correlated, ...] = ()
    covariances: tuple[Covariance, ...] = ()
    conditionally_independent: bool = False
    roots: Tensor | None = None

    def __call__(self, parents: Tensor) -> Tensor:
        """Locations and log-scales, ``(..., 2 n)``, from packed parents, ``(..., G)``."""
        return torch.nn.functional.linear(parents[..., self.active], self.slope, self.bias)

    def dense(self, count: int) -> tuple[Tensor, Tensor]:
        """Slopes with respect to all ``count`` entries of the parents, ``(2 n, count)``, and biases, ``(2 n,)``; zero
        for priors that are neither known nor roots."""
        known = self.known if self.roots is None else self.known | self.roots
        rows = known.repeat(2)
        slope = self.slope.new_zeros(len(self.bias), count)
        slope[:, self.active] = self.slope
        return slope * rows.unsqueeze(-1), self.bias * rows


@torch.no_grad()
def read_prior(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    parents: Sequence[Layout],
) -> LinearPrior | None:
    """Find the priors of a block's sites that are Gaussian, and linear in the block's parents.

    Runs the model a few times at random values of the parents, with everything else drawn afresh. A prior that also
    depends on anything else (a discrete latent, a covariate of the item, a site of the same block) does not fit a
    linear function of the parents, and is left out; so is a prior of another form.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the block's sites.
        parents: Layouts of the blocks that this one is conditional on, the joint block first.

    Returns:
        None if no site has such a prior.
    """
    count = sum(other.latent_dim for other in parents)
    if count > READING.max_parents:
        return None
    rows: list[tuple[Tensor, Tensor]] = []
    with seeded(0):
        for _ in range(count + READING.num_spare_runs):
            packed, values = _random_parents(parents)
            found = watch(model, args, kwargs, values, layout.names)
            if found is None:
                return None
            rows.append(_row(layout, packed, found))
    return _fit(torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows]), layout.init_loc)


@torch.no_grad()
def read_joint_prior(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> LinearPrior | None:
    """Find the priors of the joint block's sites that are Gaussian given other sites of the block.

    Those are priors that are linear in these, as for :func:`read_prior`, and multivariate normals.

    Priors that depend on no other site are left out.

    Returns:
        None if no site has such a prior.
    """
    linear = _read_linear(model, args, kwargs, layout)
    taken = () if linear is None else linear.correlated
    names = [name for name, where in layout.slices.items() if where.start not in {group.offset for group in taken}]
    read = read_covariances(model, args, kwargs, layout, names)
    return _with_covariances(linear, read, layout.init_loc) if read else linear


def _with_covariances(linear: LinearPrior | None, read: Sequence[ReadCovariance], like: Tensor) -> LinearPrior | None:
    """Linear priors together with multivariate normals, or without if a head cannot have both.

    The sites that the latter depend on are drawn first, without known priors of their own.
    """
    dim = len(like)
    none = torch.zeros(dim, dtype=torch.bool, device=like.device)
    base = linear
    if base is None:
        base = LinearPrior(none, none.nonzero().squeeze(-1), like.new_zeros(2 * dim, 0), like.new_zeros(2 * dim))
    covariances = tuple(each.covariance for each in read)
    covered, parents = none.clone(), none.clone()
    for each in read:
        covered[each.covariance.rows] = True
        parents |= each.parents
    slope, bias = replace(base, known=base.known & ~parents, roots=None).dense(dim)
    bias[dim:][covered & ~base.known] = READING.no_prior
    depends = slope.unflatten(0, (2, dim)).ne(0.0).any(0)
    known = (base.known | covered) & ~parents & ~(depends[:, covered].any(-1) & ~covered)
    if (parents & covered).any() or depends[known][:, known].any():
        return linear
    if known.sum() > RECORDING.max_dim:
        return linear
    correlated = tuple(group for group in base.correlated if known[group.rows].all())
    everything = torch.arange(dim, device=like.device)
    return LinearPrior(known, everything, slope, bias, correlated, covariances)


def _read_linear(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> LinearPrior | None:
    """Priors that are Gaussian, and linear in other sites of the joint block."""
    rows: list[tuple[Tensor, Tensor]] = []
    shared: set[tuple[str, str]] = set()
    # In many dimensions, leaves are nobody's parents.
    count = layout.latent_dim if layout.latent_dim <= READING.max_parents else layout.num_free
    if count > READING.max_parents or layout.latent_dim > READING.max_dim:
        return None
    with seeded(0):
        for _ in range(count + READING.num_spare_runs):
            (packed,), values = _random_parents([layout])
            found = watch(model, args, kwargs, values, layout.names)
            if found is None:
                return None
            gaussians = [_gaussian(site, found[site.name]) for site in layout]
            y = torch.cat([torch.cat([pair[i].reshape(-1) for pair in gaussians]) for i in range(2)])
            rows.append((packed[:count].double(), y.double()))
            pairs = _correlations(layout, found, values)
            shared = pairs if len(rows) == 1 else shared & pairs
            if len(rows) == 2 and not (rows[0][1] != rows[1][1]).logical_and(y.isfinite()).any():
                return None  # no Gaussian prior depends on another site
    prior = _fit(
        torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]), layout.init_loc, layout.slices.values()
    )
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
    independent = not correlated and are_independent(model, args, kwargs, layout, known.nonzero().squeeze(-1))
    return replace(
        prior,
        known=known,
        correlated=tuple(correlated),
        conditionally_independent=independent,
        roots=_roots(prior, known, follows),
    )


def _roots(prior: LinearPrior, known: Tensor, follows: Tensor) -> Tensor | None:
    """See :attr:`LinearPrior.roots`."""
    slope, _ = replace(prior, known=known).dense(len(known))
    by_loc, by_scale = (slope.unflatten(0, (2, -1)) != 0).any(1)
    return prior.known & ~follows & by_loc & ~by_scale if (by_loc & known).any() else None


def _correlations(layout: Layout, found: Mapping[str, Any], values: Mapping[str, Tensor]) -> set[tuple[str, str]]:
    """Multivariate normal sites, and the sites that are the Cholesky factors of their correlations."""
    bases = {site.name: getattr(site.to_support, "base", None) for site in layout}
    factors = [name for name, base in bases.items() if isinstance(base, CorrCholeskyTransform)]
    pairs = set()
    for site in layout:
        fn = unwrapped(found[site.name])
        if isinstance(fn, dist.MultivariateNormal):
            correlation = fn.scale_tril / fn.stddev.unsqueeze(-1)
            for name in factors:
                if values[name].shape == correlation.shape[-2:] and torch.allclose(
                    correlation, values[name].expand_as(correlation), rtol=READING.tolerance, atol=READING.tolerance
                ):
                    pairs.add((site.name, name))
    return pairs


def _random_parents(parents: Sequence[Layout]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Random values of a block's parents, packed, and by site."""
    drawn: list[Tensor] = []
    values: dict[str, Tensor] = {}
    for layout in parents:
        packed = layout.init_loc + torch.randn_like(layout.init_loc)
        drawn.append(packed)
        values |= {site.name: site.to_support(part) for site, part in layout.split(packed)}
    return drawn, values


def _row(layout: Layout, parents: Sequence[Tensor], found: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Parents and the Gaussian prior of the first items: ``(items, G)`` and ``(items, 2 n)``; NaN for other priors."""
    gaussians = {site.name: _gaussian(site, found[site.name]) for site in layout}
    y = [layout.pack_unconstrained({name: pair[i] for name, pair in gaussians.items()}) for i in range(2)]
    lead = y[0].shape[:-1]
    x = [part.expand(lead + part.shape[-1:]) for part in parents]
    stacked = torch.cat([part.reshape(-1, part.shape[-1])[: READING.max_items] for part in (*x, *y)], -1).double()
    split = stacked.shape[-1] - 2 * layout.latent_dim
    return stacked[:, :split], stacked[:, split:]


def _gaussian(site: Site, fn: Any) -> tuple[Tensor, Tensor]:
    """Location and log-scale in unconstrained space, in the site's unconstrained shape.

    For a multivariate normal these are the marginals': with a covariance matrix they often depend linearly on other
    latents, unlike its conditionals, and a parametrization relative to them removes the funnel.
    """
    fn = unwrapped(fn)
    if isinstance(fn, dist.LogNormal):
        fn = fn.base_dist
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
    elif isinstance(fn, dist.MultivariateNormal):
        return fn.loc.expand(site.unconstrained_shape), fn.stddev.log().expand(site.unconstrained_shape)
    elif not (isinstance(fn, dist.Normal) and site.is_real):
        nan = torch.full(site.unconstrained_shape, torch.nan, device=site.init_loc.device)
        return nan, nan
    return fn.loc.expand(site.unconstrained_shape), fn.scale.log().expand(site.unconstrained_shape)


def _fit(x: Tensor, y: Tensor, like: Tensor, sites: Iterable[slice] | None = None) -> LinearPrior | None:
    """Linear prior by least squares, for the coordinates that it fits up to rounding.

    With the slices of the block's own sites, in the model's order, it is linear in the sites before each.
    """
    size = y.shape[-1] // 2
    design = torch.cat([x, x.new_ones(len(x), 1)], -1)
    finite = y.isfinite().all(0)
    solution = y.new_zeros(design.shape[-1], 2 * size)
    for site in sites or [slice(size)]:
        rows = torch.arange(2 * size).reshape(2, size)[:, site].flatten()
        before = x.shape[-1] if sites is None else min(site.start, x.shape[-1])
        columns = torch.cat([torch.arange(before), torch.tensor([x.shape[-1]])])
        # On the CPU: GPUs have no driver for designs without full rank.
        sides = design[:, columns].cpu(), y[:, rows].nan_to_num(0.0, 0.0, 0.0).cpu()
        found = torch.linalg.lstsq(*sides, driver="gelsd").solution.to(y)  # (G + 1, 2 n)
        solution[columns.unsqueeze(-1), rows] = found
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
