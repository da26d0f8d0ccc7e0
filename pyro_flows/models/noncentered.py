# SPDX-License-Identifier: Apache-2.0
"""L2. Finding effects that a model writes as location plus scale times a standard normal latent, and the coordinates in
which they are latents themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows._random import seed_all, seeded
from pyro_flows.models.layout import Layout
from pyro_flows.models.leaves import are_independent
from pyro_flows.models.log_joint import constrain, joined, scored_sites
from pyro_flows.models.priors import LinearPrior
from pyro_flows.models.sites import Site
from pyro_flows.models.traces import Call
from pyro_flows.models.watch import unwrapped, watch
from pyro_flows.transforms import NonCentering

__all__ = ["CenteredLayout", "with_effects"]


@dataclass(frozen=True)
class EffectSettings:
    """How effects are found.

    Attributes:
        max_dim: Largest number of latents.
        num_points: Number of points at which gradients are compared.
        spread: Standard deviation of these about the initial location, in unconstrained space.
        tolerance: Relative error below which a gradient counts as that of an effect's location or scale; allows for
            rounding in float32.
    """

    max_dim: int = 200
    num_points: int = 4
    spread: float = 0.5
    tolerance: float = 1e-3


EFFECTS = EffectSettings()


class CenteredLayout(Layout):
    """A layout whose packed vectors have effects in place of the standard normal latents by which a model writes them.

    Args:
        layout: The layout of the latents.
        noncentering: The map from vectors with effects to those with the latents.
    """

    def __init__(self, layout: Layout, noncentering: NonCentering) -> None:
        super().__init__(layout.sites, layout.plates)
        self._noncentering = noncentering

    @property
    def init_loc(self) -> Tensor:
        return self._noncentering.inverse_and_ladj(super().init_loc)[0]

    def unpack(self, packed: Tensor | Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        latents, ladj = self._noncentering.forward_and_ladj(joined(packed))
        values, log_det = super().unpack(latents)
        return values, log_det + ladj

    def pack(self, values: Mapping[str, Any], rank: int | None = None) -> tuple[Tensor, Tensor]:
        latents, log_det = super().pack(values, rank)
        packed, ladj = self._noncentering.inverse_and_ladj(latents)
        return packed, log_det + ladj


@torch.no_grad()
def with_effects(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    prior: LinearPrior | None,
    max_dependent: int,
) -> tuple[LinearPrior, NonCentering] | None:
    r"""Find the latents z with a standard normal prior that the data see as an effect :math:`a + e^t z` only, with a
    location and a log-scale that are sums of other latents: non-centered parametrizations.

    The density of the data is unchanged where :math:`t` grows and z shrinks: its derivative with respect to :math:`t`
    is z times that with respect to z, and the one with respect to :math:`a` is :math:`e^{-t}` times that. Latents with
    such derivatives, up to a factor, are found by least squares over a few random points. None of this is assumed by a
    flow over the effects, which is a change of coordinates.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the joint block's sites.
        prior: Priors that are known without effects.
        max_dependent: Largest number of coordinates with known priors, those of effects among them, that the data may
            correlate.

    Returns:
        The known priors in coordinates that have the effects in place of z, and the map from these to the latents; None
        if there are no such effects, or they are too many, or a head cannot have both kinds of priors.
    """
    is_other = prior is not None and (prior.covariances or prior.correlated or prior.roots is not None)
    if layout.plates or layout.latent_dim > EFFECTS.max_dim or is_other:
        return None
    with seeded(0), pyro.validation_enabled(False):
        scales = _standard_scales(model, args, kwargs, layout)
        found = _slopes(model, args, kwargs, layout, list(scales)) if scales else None
    if found is None:
        return None
    slope, names = found
    dim, like = layout.latent_dim, layout.init_loc
    rows = torch.cat([torch.arange(dim)[layout.slices[name]] for name in names]).to(like.device)
    is_effect = torch.zeros(dim, dtype=torch.bool, device=like.device)
    is_effect[rows] = True
    known = is_effect if prior is None else is_effect | prior.known
    dense, bias = (like.new_zeros(2 * dim, dim), like.new_zeros(2 * dim)) if prior is None else prior.dense(dim)
    if dense[:, is_effect].any() or slope[:, known & ~is_effect].any():  # effects are outermost, and of free latents
        return None
    independent = are_independent(model, args, kwargs, layout, known.nonzero().squeeze(-1))
    if not independent and known.sum() > max_dependent:
        return None
    dense[torch.cat([rows, dim + rows])] = slope
    bias[dim + rows] = torch.cat([scales[name].reshape(-1) for name in names]).log().to(like)
    everything = torch.arange(dim, device=like.device)
    merged = LinearPrior(known, everything, dense, bias, conditionally_independent=independent)
    return merged, NonCentering(rows, slope)


def _standard_scales(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> dict[str, Tensor]:
    """Scales of the sites of several coordinates whose prior is normal about zero with a constant scale."""
    seen: list[dict[str, Any]] = []
    for _ in range(2):
        packed = layout.init_loc + torch.randn_like(layout.init_loc)
        found = watch(model, args, kwargs, layout.unpack(packed)[0], layout.names)
        if found is None:
            return {}
        seen.append(found)
    scales = {}
    for site in layout:
        one, other = (unwrapped(found[site.name]) for found in seen)
        if not (site.is_real and site.unconstrained_shape.numel() > 1):
            continue
        if type(one) is type(other) is dist.Normal and not one.loc.any() and torch.equal(one.scale, other.scale):
            scales[site.name] = one.scale.expand(site.unconstrained_shape)
    return scales


def _slopes(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    candidates: Sequence[str],
) -> tuple[Tensor, list[str]] | None:
    """Slopes of the locations, then of the log-scales, of the sites that stand for effects, ``(2 P, D)``; and names."""
    noise = torch.randn(EFFECTS.num_points, layout.latent_dim).to(layout.init_loc)
    points = layout.init_loc + EFFECTS.spread * noise
    try:
        gradients = torch.stack([_gradient(model, args, kwargs, layout, point) for point in points]).cpu()
    except Exception:  # models raise in many ways
        return None
    if not gradients.isfinite().all():
        return None
    points, slices = points.cpu(), layout.slices
    z = {name: points[:, slices[name]].double() for name in candidates}
    to_z = {name: gradients[:, slices[name]] for name in candidates}
    log_scale = {name: torch.zeros_like(value) for name, value in z.items()}
    slopes = {name: torch.zeros(2, value.shape[-1], layout.latent_dim) for name, value in z.items()}
    scaled: set[str] = set()
    parents = [site for site in layout if site.name not in z]
    for index in (1, 0):  # log-scales first, which derivatives with respect to locations depend on
        for parent in parents:
            maps = {name: found for name in z if (found := _elements(parent, layout[name])) is not None}
            if index == 0:
                maps = {name: found for name, found in maps.items() if name in scaled}
            if (index == 0 and parent.name in scaled) or not maps:
                continue
            where = slices[parent.name]
            columns = []
            for name, elements in maps.items():
                each = to_z[name] * (z[name] if index else (-log_scale[name]).exp())
                sums = each.new_zeros(len(each), where.stop - where.start)
                columns.append(sums.index_add(1, elements, each).flatten())
            weights = _exact(torch.stack(columns, -1), gradients[:, where].flatten())
            if weights is None:
                continue
            for weight, (name, elements) in zip(weights.tolist(), maps.items(), strict=True):
                if abs(weight) < EFFECTS.tolerance:
                    continue
                slopes[name][index, torch.arange(len(elements)), where.start + elements] = weight
                if index:
                    log_scale[name] = log_scale[name] + weight * points[:, where].double()[:, elements]
                    scaled |= {name, parent.name}
    names = [name for name in candidates if name in scaled]
    if not names:
        return None
    return torch.cat([slopes[name] for name in names], 1).flatten(0, 1).to(layout.init_loc), names


def _gradient(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout, point: Tensor
) -> Tensor:
    """Gradient of the log density of the data, ``(D,)``, in float64."""
    with torch.enable_grad():
        packed = point.clone().requires_grad_()
        seed_all(0)
        values, _ = constrain(layout.split(packed))
        nodes = scored_sites(model, values, Call(args, kwargs))
        terms = [node["log_prob"].sum() for node in nodes if node["name"] not in layout.names]
        (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), packed)
    return gradient.double()


def _elements(parent: Site, child: Site) -> Tensor | None:
    """For each coordinate of a site the one of another that Pyro's broadcasting would pair it with; None if it
    can't."""
    shape, wanted = parent.unconstrained_shape, child.unconstrained_shape
    numbers = torch.arange(shape.numel()).reshape((1,) if shape.numel() == 1 else shape)
    try:
        return numbers.expand(wanted).reshape(-1)
    except RuntimeError:
        return None


def _exact(columns: Tensor, target: Tensor) -> Tensor | None:
    """Weights of columns, ``(N, C)``, that sum to a target, ``(N,)``; None if there are none, or it vanishes."""
    size = target.abs().max()
    if not size > 0.0:
        return None
    weights = torch.linalg.lstsq(columns, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    error = (columns @ weights - target).abs().max()
    return weights if error <= EFFECTS.tolerance * size else None
