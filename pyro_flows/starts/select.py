# SPDX-License-Identifier: Apache-2.0
"""L4. The start of a joint block: the best of what starters find, by ELBO, written into its flow."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from pyro_flows.flows.bases import MixtureBase, StudentTBase
from pyro_flows.models.log_joint import LogJoint, PulledBack, Target
from pyro_flows.posterior.joint import JointBlock
from pyro_flows.starts.base import fit_modes, fit_tails
from pyro_flows.starts.gaussian import (
    FIXED_ROUNDS,
    MANY_ROWS,
    SCORE_DRAWS,
    Gaussian,
    antithetic,
    best_gaussian,
    elbo_of,
    fit_on_fixed_draws,
    refined,
)
from pyro_flows.starts.likelihood import follow_data
from pyro_flows.starts.low_rank import LowRankGaussian, best_low_rank
from pyro_flows.starts.mixture import best_mixture
from pyro_flows.transforms import DiagonalPooling, LowRankAffine, LowRankWhitening, PriorPooling, Whitening

__all__ = ["warm_start"]

# Largest share of the precision that known priors have where a deterministic fit begins.
POOLED_SHARE = 0.9
POOLED_DRAWS = 128
# The same share where priors are of no use.
NO_SHARE = 1e-6
# Rounds of reading off what the data say of coordinates with known priors.
FOLLOW_ROUNDS = 2


def warm_start(block: JointBlock, log_joint: LogJoint, init_scale: float) -> None:
    """Find a good Gaussian for a target and start there; on another base, at what that can do.

    See :func:`best_gaussian`, :func:`best_low_rank`, :func:`best_mixture`, :func:`fit_modes` and :func:`fit_tails`.
    """
    cheap = log_joint.is_vectorized and log_joint.rows < MANY_ROWS
    whitening = block.flow.whitening
    if whitening is not None:
        whitening.reset()
    correlated = isinstance(whitening, Whitening)
    found = best_gaussian(log_joint, block.layout.init_loc, init_scale, correlated=correlated)
    head, base = block.flow.head, block.flow.base
    pooled = -math.inf
    if isinstance(head, DiagonalPooling) and log_joint.rows < MANY_ROWS:
        pooled = _follow(block, log_joint, head, found)
    if isinstance(head, PriorPooling) and log_joint.rows < MANY_ROWS and not pooled > found.elbo:
        pooled = _pool(block, log_joint, head, found)
    low_rank = None
    if _rank(block) and log_joint.rows < MANY_ROWS:
        low_rank = best_low_rank(log_joint, found, _rank(block))
    gaussian = found.elbo if low_rank is None else low_rank.elbo
    if isinstance(base, MixtureBase):
        mixture = best_mixture(log_joint, block.layout.init_loc, len(base.locs), correlated=correlated)
        if mixture is not None and mixture.elbo(log_joint) > max(pooled, gaussian):
            _write(block, mixture.loc, mixture.factor)
            base.set(mixture.locs, mixture.scales, mixture.weights)
            if cheap and block.flow.transform.has_score:
                fit_modes(log_joint, block.flow)
            return
    if low_rank is not None and not pooled > gaussian:
        _write_low_rank(block, low_rank)
    elif not pooled > gaussian:
        _write(block, found.loc, found.factor)
    if isinstance(base, StudentTBase) and cheap:
        fit_tails(log_joint, block.flow)


def _pool(block: JointBlock, log_joint: LogJoint, head: PriorPooling, found: Gaussian) -> float:
    """Let the head's priors have their share, on fixed draws, and correlate what is left; returns the ELBO.

    A Gaussian near a funnel has to choose between its neck and its body; from there training would take long.
    """
    if block.flow.whitening is not None:
        block.flow.whitening.reset()
    push = head.forward_and_ladj
    parameters: list[Tensor] = [*head.raw.parameters(), head.log_share]
    noise = antithetic(SCORE_DRAWS, found.loc)
    best, best_state = -math.inf, None
    for loc, scale in ((found.loc, found.conditional_scale), (block.layout.init_loc, torch.ones_like(found.loc))):
        head.initialize(loc, scale, max_share=POOLED_SHARE)
        if fit_on_fixed_draws(log_joint, push, parameters, loc, POOLED_DRAWS, rounds=1):
            elbo = elbo_of(log_joint, push, noise)
            if elbo > best:
                best, best_state = elbo, copy.deepcopy(head.state_dict())
    if best_state is None:
        return best
    head.load_state_dict(best_state)
    if fit_on_fixed_draws(log_joint, push, parameters, found.loc, POOLED_DRAWS, FIXED_ROUNDS - 1):
        elbo = elbo_of(log_joint, push, noise)
    if elbo > best:
        best = elbo
    else:
        head.load_state_dict(best_state)
    head.settle()
    return _correlate(block, PulledBack(log_joint, push), best)


def _follow(block: JointBlock, log_joint: LogJoint, head: DiagonalPooling, found: Gaussian) -> float:
    """Let the head's own Gaussians be what the data say, and fit one to the other coordinates; returns the ELBO."""
    whitening = block.flow.whitening
    if not isinstance(whitening, Whitening):
        return -math.inf
    pulled = PulledBack(log_joint, head.forward_and_ladj)
    begin = Gaussian(torch.zeros_like(found.loc), torch.ones_like(found.loc))
    free = head.order[: head.count_free]
    center, scale = found.loc, found.conditional_scale
    elbo, best = -math.inf, None
    for _ in range(FOLLOW_ROUNDS):
        if not follow_data(log_joint, head, center, scale):
            break
        gaussian = refined(pulled, begin, free)
        if not gaussian.elbo > elbo:
            break
        elbo = gaussian.elbo
        whitening.set(gaussian.loc, gaussian.factor)
        best = copy.deepcopy(block.flow.state_dict())
        center = head.forward_and_ladj(gaussian.loc)[0]
        scale = head.gaussian()[1] * gaussian.factor.square().sum(-1).sqrt()
    if best is not None:
        block.flow.load_state_dict(best)
    return elbo


def _correlate(block: JointBlock, pulled: Target, elbo: float) -> float:
    """Set the whitening inside the head to the best Gaussian there, if it is better; returns the ELBO."""
    whitening = block.flow.whitening
    zeros, ones = torch.zeros_like(block.layout.init_loc), torch.ones_like(block.layout.init_loc)
    if isinstance(whitening, Whitening):
        gaussian = refined(pulled, Gaussian(zeros, ones))
        if gaussian.elbo > elbo:
            whitening.set(gaussian.loc, gaussian.factor)
            return gaussian.elbo
    elif isinstance(whitening, LowRankWhitening):
        low_rank = best_low_rank(pulled, Gaussian(zeros, ones), _rank(block))
        if low_rank is not None and low_rank.elbo > elbo:
            whitening.set(low_rank.loc, low_rank.scale, low_rank.directions, low_rank.stretch)
            return low_rank.elbo
    return elbo


@torch.no_grad()
def _write(block: JointBlock, loc: Tensor, factor: Tensor) -> None:
    r"""Start at :math:`N(m, L L^\top)`; the layers below the head are taken to be the identity.

    Args:
        loc: ``m``, ``(latent_dim,)``.
        factor: ``L``, lower triangular with a positive diagonal; or its diagonal, if the flow holds no ``L``.
    """
    head, whitening = block.flow.head, block.flow.whitening
    if not isinstance(whitening, Whitening):
        head.initialize(loc, factor)
        return
    factor = factor if factor.dim() == 2 else factor.diag()
    if isinstance(head, PriorPooling):
        scale = factor.square().sum(-1).sqrt()
        whitening.set(torch.zeros_like(loc), factor / scale.unsqueeze(-1))
        head.initialize(loc, scale, max_share=NO_SHARE)
        head.settle()
    else:
        whitening.set(loc, factor)
        head.initialize(torch.zeros_like(loc), torch.ones_like(loc))


def _write_low_rank(block: JointBlock, found: LowRankGaussian) -> None:
    """As :func:`_write`."""
    head, whitening = block.flow.head, block.flow.whitening
    zeros, ones = torch.zeros_like(found.loc), torch.ones_like(found.loc)
    if isinstance(whitening, LowRankWhitening) and isinstance(head, PriorPooling):
        whitening.set(zeros, ones, found.directions, found.stretch)
        head.initialize(found.loc, found.scale, max_share=NO_SHARE)
        head.settle()
    elif isinstance(whitening, LowRankWhitening):
        whitening.set(found.loc, found.scale, found.directions, found.stretch)
        head.initialize(zeros, ones)
    else:
        assert isinstance(head, LowRankAffine)
        head.initialize(found.loc, found.scale)
        head.set_directions(found.directions, found.stretch)


def _rank(block: JointBlock) -> int:
    """How many correlated directions a warm start may have where it cannot have all; 0 for none."""
    whitening, head = block.flow.whitening, block.flow.head
    if isinstance(whitening, LowRankWhitening):
        return whitening.rank
    return head.rank if whitening is None and isinstance(head, LowRankAffine) else 0
