# SPDX-License-Identifier: Apache-2.0
"""L4. The warm start of a joint block with leaves: a Gaussian, and regressions of the leaves' conditional posteriors on
the other latents."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flows.models.log_joint import LogJoint, PulledBack, Target
from pyro_flows.posterior.joint import JOINT, JointBlock, item_pairs
from pyro_flows.starts.fixed_draws import antithetic, elbo_of
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian
from pyro_flows.starts.lbfgs import LBFGS
from pyro_flows.starts.leaf_gaussian import LEAF_GAUSSIAN, LeafGaussian, best_leaf_gaussian, diagonal
from pyro_flows.transforms import ConditionalGaussianHead, LeafPreconditioner

__all__ = ["warm_start_leaves"]


@dataclass(frozen=True)
class LeafSettings:
    """Settings of warm starts with leaves.

    Attributes:
        num_prior: Number of ascents from draws of the prior, beside that from the initial location; inside of a head
            that knows priors only the latter.
        num_probes: Number of values of the other latents, even, at which the leaves' prior is compared.
        tolerance: Difference of densities, relative to that of the log joint, which is rounding.
        num_poolings: Largest number of Gaussians inside of a head that knows priors, each of which pools them with the
            conditionals of the one before.
        max_share: Largest share of a conditional's precision that a prior has then.
        num_conditionals: Number of values of the other latents at which the leaves' conditional posteriors are found,
            by a regression's number of unknowns.
        max_conditionals: Largest number of these.
        min_conditionals: Number of these, by the number of unknowns, below which there are no products.
        nodes: Nodes of Gauss-Hermite quadrature with two points, in standard deviations.
        max_ratio: Largest factor between a leaf's conditional precisions.
        ridge: Weight of the penalty of a regression's weights, by the variance of their regressor.
    """

    num_prior: int = 2
    num_probes: int = 4
    tolerance: float = 1e-5
    num_poolings: int = 3
    max_share: float = 0.9
    num_conditionals: float = 2.0
    max_conditionals: int = 2048
    min_conditionals: float = 1.5
    nodes: tuple[float, ...] = (-1.0, 1.0)
    max_ratio: float = 4.0
    ridge: float = 1e-2


SETTINGS = LeafSettings()


def warm_start_leaves(block: JointBlock, log_joint: LogJoint, init_scale: float) -> None:
    """Initialize a block with leaves at a good Gaussian, whose leaves' conditionals then follow the posterior's.

    Where the head knows priors, the Gaussian is inside of it, in coordinates that have no funnels.

    Args:
        block: The block, with a :class:`LeafPreconditioner`.
        log_joint: The target.
        init_scale: Standard deviation of the Gaussian if none is better.

    Raises:
        RuntimeError: If no candidate has a finite ELBO.
    """
    flow, init_loc, num_leaves = block.flow, block.layout.init_loc, block.layout.num_leaves
    head, preconditioner = flow.head, flow.preconditioner
    assert isinstance(preconditioner, LeafPreconditioner)
    flow.adopt_base({})
    target: Target = log_joint
    if isinstance(head, ConditionalGaussianHead):
        target = PulledBack(log_joint, head.forward_and_ladj)
        best = _inside(head, target, init_loc, num_leaves)
    else:
        head.initialize(torch.zeros_like(init_loc), torch.ones_like(init_loc))
        begins = torch.stack([init_loc, *(draw.to(init_loc) for draw in log_joint.from_prior(SETTINGS.num_prior))])
        begins = begins[begins.isfinite().all(-1)]
        own = diagonal(Gaussian(init_loc, torch.full_like(init_loc, init_scale)), num_leaves)
        best = best_leaf_gaussian(target, begins, own, has_funnel=_follows_others(log_joint, init_loc, num_leaves))
    if best.elbo == -math.inf:
        raise RuntimeError(log_joint.without_density(init_loc))
    parts = (part.to(init_loc) for part in (best.loc, best.factor, best.slope, best.scale))
    preconditioner.set(*parts)
    if log_joint.is_vectorized:
        _bend(block, target, preconditioner, best)


@torch.no_grad()
def _follows_others(log_joint: LogJoint, init_loc: Tensor, num_leaves: int) -> bool:
    """Whether the leaves' prior follows other latents, by its density where these move."""
    leaves = log_joint.table.names[-1]
    noise = antithetic(SETTINGS.num_probes, init_loc)
    noise[:, -num_leaves:] = 0.0
    found = log_joint(init_loc + noise).double()
    own = (found - log_joint.without({leaves}, init_loc + noise)).nan_to_num()
    return bool((own - own[0]).abs().max() > SETTINGS.tolerance * (1.0 + found.nan_to_num().abs().max()))


@torch.no_grad()
def _inside(head: ConditionalGaussianHead, target: PulledBack, init_loc: Tensor, num_leaves: int) -> LeafGaussian:
    """The best Gaussian inside of a head, which pools the priors that it knows with the conditionals found before."""
    zeros, loc, scale = torch.zeros_like(init_loc), init_loc, torch.ones_like(init_loc)
    unit = diagonal(Gaussian(zeros, torch.ones_like(zeros)), num_leaves)
    best, state = unit, copy.deepcopy(head.state_dict())
    for _ in range(SETTINGS.num_poolings):
        head.initialize(loc, scale, max_share=SETTINGS.max_share)
        head.set_origin()
        found = best_leaf_gaussian(target, zeros.unsqueeze(0), unit)
        if not found.elbo > best.elbo + LEAF_GAUSSIAN.newton_gain:
            break
        best, state = found, copy.deepcopy(head.state_dict())
        point = found.loc.to(init_loc)
        loc = head.forward_and_ladj(point)[0]
        scale = found.conditional_scale.to(init_loc) * _own_slopes(head, point, num_leaves)
    head.load_state_dict(state)
    return best


def _own_slopes(head: ConditionalGaussianHead, point: Tensor, num_leaves: int) -> Tensor:
    """Derivative of each of a head's coordinates in its own noise, by differences, ``(D,)``."""
    free = len(point) - num_leaves
    moves = torch.eye(free + 1, len(point), dtype=point.dtype, device=point.device)
    moves[free, free:] = 1.0  # all leaves at once, which do not depend on each other
    moved = head.forward_and_ladj(point + LBFGS.difference * moves)[0] - head.forward_and_ladj(point)[0]
    return torch.cat([moved[:free, :free].diagonal(), moved[free, free:]]) / LBFGS.difference


@torch.no_grad()
def _bend(block: JointBlock, log_joint: Target, preconditioner: LeafPreconditioner, start: LeafGaussian) -> None:
    """Regress the leaves' conditional locations and log-scales on the noise of the other latents, and skew them; each
    undone unless the ELBO increases, and not done where the model has no second derivatives.

    Given the others, each leaf has a posterior of its own, whose best normal is found for all leaves at once.
    """
    like, free = block.layout.init_loc, len(start.factor)
    left, right = _factors(block, preconditioner, start)
    count = 1 + free + len(left)
    num_draws = min(int(SETTINGS.num_conditionals * count), SETTINGS.max_conditionals) // 2 * 2
    if num_draws < SETTINGS.min_conditionals * count:
        left, right = left[:0], right[:0]
    noise = antithetic(num_draws, like)[:, :free]
    try:
        found = [_conditionals(log_joint, start, some) for some in noise.split(log_joint.chunk)]
    except RuntimeError:
        return
    shift, log_ratio, skew = (torch.cat(parts) for parts in zip(*found, strict=True))
    noise = noise.double()
    linear = torch.cat([torch.ones_like(noise[:, :1]), noise], -1)
    products = (noise @ left.mT) * (noise @ right.mT)
    bent = _regression(torch.cat([linear, products], -1), shift)
    scales = _regression(linear, log_ratio)
    padding = preconditioner.num_products - len(left)
    left, right = (F.pad(part, (0, 0, 0, padding)) for part in (left, right))
    check = antithetic(GAUSSIAN.num_elbo_draws, like)

    def keep_if_better(change: Callable[[], None]) -> None:
        before = {k: v.clone() for k, v in preconditioner.state_dict().items()}
        was = elbo_of(log_joint, preconditioner.forward_and_ladj, check)
        change()
        if not elbo_of(log_joint, preconditioner.forward_and_ladj, check) > was:
            preconditioner.load_state_dict(before)

    keep_if_better(
        lambda: preconditioner.bend_leaves(
            start.loc[free:] + bent[0],
            start.slope + bent[1 : 1 + free].mT,
            start.scale * scales[0].exp(),
            scales[1:].mT,
            left,
            right,
            F.pad(bent[1 + free :].mT, (0, padding)),
        )
    )
    keep_if_better(lambda: preconditioner.skew_leaves(skew.mean(0)))


def _factors(block: JointBlock, preconditioner: LeafPreconditioner, start: LeafGaussian) -> tuple[Tensor, Tensor]:
    """Factors of products, ``(H, F)`` each: standardized coordinates of the same item, and each coordinate with the
    directions that leaves follow most.

    Where the log joint is a sum over items, its second derivatives are within an item; those of a leaf's location are
    so too, but for products with its own derivative.
    """
    rows = F.normalize(start.factor, dim=-1)
    if not preconditioner.num_products:
        return rows[:0], rows[:0]
    pairs = item_pairs(block.layout).to(rows.device)
    followed = start.slope / start.scale.unsqueeze(-1)
    principal = torch.linalg.eigh(followed.mT @ followed).eigenvectors.mT.flip(0)[: JOINT.num_principal]
    left = [rows[pairs[:, 0]], rows.repeat(len(principal), 1)]
    right = [rows[pairs[:, 1]], principal.repeat_interleave(len(rows), 0)]
    return torch.cat(left), torch.cat(right)


def _conditionals(log_joint: Target, start: LeafGaussian, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Locations and log-scales of the normals closest to the leaves' conditional posteriors, less those of the
    Gaussian's conditionals, and skewness, ``(S, P)`` each, given noise of the others, ``(S, F)``.

    There the mean gradient is zero, and minus the mean curvature the precision. One step of that fixed point from the
    Gaussian's conditionals is close enough. Skewness is a third of the mean third derivative, from curvatures at both
    nodes, in units of the normals' scales.

    Raises:
        RuntimeError: If the target has no second derivative.
    """
    num_leaves = len(start.scale)
    whole = F.pad(noise, (0, num_leaves))
    free, loc = start.push(whole).split([noise.shape[-1], num_leaves], -1)
    loc, scale = loc.double(), start.scale
    found = [_leaf_derivatives(log_joint, free, (loc + node * scale).to(free)) for node in SETTINGS.nodes]
    gradients, curvatures = (torch.stack(parts) for parts in zip(*found, strict=True))
    # In units of the Gaussian's.
    gradient, curvature = gradients.mean(0) * scale, curvatures * scale.square()
    precision = (-curvature.mean(0)).clamp(1.0 / SETTINGS.max_ratio, SETTINGS.max_ratio)
    third = (curvature[-1] - curvature[0]) / (SETTINGS.nodes[-1] - SETTINGS.nodes[0])
    return scale * (gradient / precision).clamp(-1.0, 1.0), -0.5 * precision.log(), third / precision.pow(1.5) / 3.0


@torch.enable_grad()
def _leaf_derivatives(log_joint: Target, free: Tensor, leaves: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives with respect to each leaf, ``(S, P)``; zero where they are not finite."""
    leaves = leaves.detach().requires_grad_()
    value = log_joint(torch.cat([free, leaves], -1)).sum()
    (gradient,) = torch.autograd.grad(value, leaves, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), leaves)
    return tuple(part.detach().double().nan_to_num(0.0, 0.0, 0.0) for part in (gradient, curvature))  # type: ignore[return-value]


def _regression(design: Tensor, values: Tensor) -> Tensor:
    """Least squares with a small penalty, ``(regressors, P)``."""
    gram = design.mT @ design
    return torch.linalg.solve(gram + SETTINGS.ridge * gram.diagonal().diag(), design.mT @ values)
