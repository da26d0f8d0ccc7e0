# SPDX-License-Identifier: Apache-2.0
"""L4. The warm start of a joint block: of several initializations, the one with the highest ELBO is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows import Flow
from pyro_flows.flows.bases import Base, MixtureBase, StudentTBase
from pyro_flows.models.field import field_of
from pyro_flows.models.linear_predictors import read_linear_predictor
from pyro_flows.models.log_joint import LogJoint, PulledBack, Target
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.state_chains import read_state_chain
from pyro_flows.posterior.joint import JOINT, JointBlock
from pyro_flows.starts.ascents import ascents
from pyro_flows.starts.base import fit_modes, fit_tails
from pyro_flows.starts.field_gaussian import FIELD_GAUSSIAN, field_gaussian
from pyro_flows.starts.fixed_draws import FIXED_DRAWS, antithetic, elbo_of, fit_on_fixed_draws
from pyro_flows.starts.gaussian import GAUSSIAN, Gaussian, best_gaussian, refined
from pyro_flows.starts.leaves import warm_start_leaves
from pyro_flows.starts.likelihood import LIKELIHOOD, affordable_draws, fit_likelihood, fit_skew, seen_coordinates
from pyro_flows.starts.linear_predictors import fit_factors, skew_factors
from pyro_flows.starts.low_rank import LowRankGaussian, best_low_rank
from pyro_flows.starts.mixture import best_mixture, modes_above
from pyro_flows.starts.state_chains import ChainTarget, Others, laplace_gaussian
from pyro_flows.transforms import (
    ChainHead,
    ConditionalGaussianHead,
    FullPrecisionHead,
    FullRankPreconditioner,
    LinearMixedHead,
    LinearPredictorHead,
    LowRankAffine,
    LowRankPreconditioner,
    Preconditioner,
)

__all__ = ["warm_start_joint"]


@dataclass(frozen=True)
class SelectSettings:
    """Settings of warm starts that combine priors which the head knows with the likelihood.

    Attributes:
        max_share: Largest share of the precision that known priors have where a deterministic fit begins.
        num_fixed_draws: Number of fixed draws of that fit.
        no_share: The priors' share if they are not used.
        num_rounds: Largest number of fits of the likelihood factor of coordinates with known priors, the first one
            at a point.
        num_rounds_expensive: The same where observations are so many that these are fits to fewer draws: steps of
            training gain what is left sooner.
        min_gain_of_modes: Gain in nats below which a guide does not take a mixture by itself.
        poor_gap: Half the variance of log weights, in nats, above which the start of a field or a chain is a poor one.
    """

    max_share: float = 0.9
    num_fixed_draws: int = 128
    no_share: float = 1e-6
    num_rounds: int = 4
    num_rounds_expensive: int = 2
    min_gain_of_modes: float = 0.02
    poor_gap: float = 5.0


SETTINGS = SelectSettings()


class Start(NamedTuple):
    """A candidate initialization.

    Attributes:
        elbo: Estimate of its ELBO.
        state: The flow's ``state_dict``.
        share: Share of the mass of the largest of its modes.
    """

    elbo: float
    state: dict[str, Any]
    share: float = 1.0


def warm_start_joint(block: JointBlock, log_joint: LogJoint, init_scale: float) -> None:
    """Initialize a block at a good Gaussian for a target; with another base, at a fit of that base.

    ``log_joint`` is in the coordinates of ``block.inner_layout``. See :func:`best_gaussian`, ``best_low_rank``,
    :func:`best_mixture`, :func:`fit_modes` and :func:`fit_tails`.
    """
    flow = block.flow
    if block.layout.num_leaves:
        warm_start_leaves(block, log_joint, init_scale)
        return
    flow.adopt_base({})
    if flow.preconditioner is not None:
        flow.preconditioner.reset()
    init_loc = block.inner_layout.init_loc
    if _begins_in_chain(flow, log_joint) or _begins_in_field(flow, log_joint, init_loc):
        return
    paths = ascents(log_joint, init_loc)
    found = best_gaussian(log_joint, init_loc, init_scale, correlated=_is_correlated(flow), paths=paths)
    pooled = _from_priors(block, log_joint, found)
    gaussian = _from_gaussian(flow, log_joint, found)
    mixture = _from_modes(block, log_joint, paths[-1], found)
    best = gaussian if mixture is None or gaussian.elbo > mixture.elbo else mixture
    # What a start at one of several modes lacks, training does not bring back.
    if pooled is not None and pooled.elbo + math.log(best.share) > best.elbo:
        best = pooled
    flow.load_state_dict(best.state)
    if log_joint.is_vectorized and log_joint.cost_per_draw < GAUSSIAN.expensive:
        if isinstance(flow.base, StudentTBase):
            fit_tails(_of_latents(block, log_joint), flow)
        elif best is mixture and flow.transform.has_score:
            fit_modes(_of_latents(block, log_joint), flow)


def _of_latents(block: JointBlock, log_joint: LogJoint) -> LogJoint:
    """The log joint in the coordinates of the whole flow's draws, rather than its head's."""
    batched = log_joint.batched
    return log_joint if block.inner_layout is block.layout else LogJoint(batched.model, block.layout, *batched.call[:2])


def _begins_in_field(flow: Flow, log_joint: LogJoint, begin: Tensor) -> bool:
    """Initialize a flow at the Gaussian of a field and its hyperparameters, if it has them, and that is a good one."""
    field = field_of(log_joint.sizes)
    is_plain = type(flow.base) is Base and not flow.head.is_outermost and _is_correlated(flow)
    if field is None or not is_plain or not log_joint.is_vectorized or log_joint.cost_per_draw > 1:
        return False
    for begin_scale in FIELD_GAUSSIAN.begin_scales:
        found = field_gaussian(log_joint, begin, field, begin_scale)
        if found is not None and found.log_weight_variance / 2 < SETTINGS.poor_gap:
            _write(flow, found)
            return True
    return False


def _begins_in_chain(flow: Flow, log_joint: LogJoint) -> bool:
    """Initialize a flow at the conditional of a chain of states and a Gaussian of the others, if it has them."""
    head = flow.head
    is_plain = isinstance(head, ChainHead) and type(flow.base) is Base
    if not is_plain or not log_joint.is_vectorized or log_joint.cost_per_draw > 1:
        return False
    assert isinstance(head, ChainHead)
    read = read_state_chain(_recorder(log_joint))
    if read is None or read.chain.rows != head.chain.rows:  # the data are others now
        return False
    fits = partial(fit_factors, log_joint, head, read.likelihood), partial(skew_factors, head, read.likelihood)
    others = Others(ChainTarget(read, log_joint), head)
    try:
        found = laplace_gaussian(read, log_joint, head)
        start = None if found is None else _from_factors(flow, log_joint, head, found, others.best_gaussian, *fits)
    except RuntimeError:  # operations without second derivatives
        return False
    if start is None:
        return False
    flow.load_state_dict(start.state)
    noise = antithetic(GAUSSIAN.num_elbo_draws, log_joint.table.init_loc)
    draws, ladj = flow.transform.forward_and_ladj(noise)
    weights = (log_joint(draws) + ladj).double() + 0.5 * noise.double().square().sum(-1)
    return bool(weights.var() / 2 < SETTINGS.poor_gap)  # not NaN


def _recorder(log_joint: LogJoint) -> RunRecorder:
    batched = log_joint.batched
    return RunRecorder(batched.model, *batched.call[:2], log_joint.table)


def _start(elbo: float, flow: Flow) -> Start:
    """The flow's current state as a candidate."""
    return Start(elbo, copy.deepcopy(flow.state_dict()))


def _is_correlated(flow: Flow) -> bool:
    """Whether a flow can represent a Gaussian with any covariance."""
    return isinstance(flow.preconditioner, FullRankPreconditioner)


def _rank(flow: Flow) -> int:
    """Number of correlated directions of a flow that cannot represent every covariance; 0 for none."""
    if isinstance(flow.preconditioner, LowRankPreconditioner):
        return flow.preconditioner.rank
    return flow.head.rank if flow.preconditioner is None and isinstance(flow.head, LowRankAffine) else 0


def _from_gaussian(flow: Flow, log_joint: LogJoint, found: Gaussian) -> Start:
    """The best Gaussian; with a low-rank correlation if the flow supports only that, and the ELBO clearly gains."""
    best: Gaussian | LowRankGaussian | None = None
    # A full covariance may be out of reach by Newton's method, where draws are run one by one, say.
    is_large = _is_correlated(flow) and len(found.loc) > GAUSSIAN.max_hessian_dim
    rank = JOINT.rank if is_large else _rank(flow)
    if rank and found.factor.dim() == 1 and log_joint.cost_per_draw < GAUSSIAN.expensive:
        best = best_low_rank(log_joint, found, rank)
    best = found if best is None else best
    if isinstance(best, LowRankGaussian) and _is_correlated(flow):
        best = best.dense()
    _write(flow, best)
    return _start(best.elbo, flow)


def _from_modes(block: JointBlock, log_joint: LogJoint, ends: Tensor, best: Gaussian) -> Start | None:
    """A mixture with a component on each mode, if there are several; without a mixture base only if the end points of
    the Gaussian's ascents, ``(R, D)``, have seen several."""
    flow, base = block.flow, block.flow.base
    if not (isinstance(base, MixtureBase) or (flow.chooses_base and len(modes_above(log_joint, ends, best.elbo)) > 1)):
        return None
    count = len(base.locs) if isinstance(base, MixtureBase) else None
    init_loc, correlated = block.inner_layout.init_loc, _is_correlated(flow)
    found = best_mixture(log_joint, init_loc, count, correlated=correlated, elbo=best.elbo)
    if found is None:
        return None
    _write(flow, Gaussian(found.loc, found.factor))
    if count is None:
        flow.adopt_base({"base.logits": found.weights.shape})
    assert isinstance(flow.base, MixtureBase)
    flow.base.set(found.locs, found.scales, found.weights)
    elbo = found.elbo(log_joint) - (SETTINGS.min_gain_of_modes if count is None else 0.0)
    return _start(elbo, flow)._replace(share=found.weights.max().item())


def _from_priors(block: JointBlock, log_joint: LogJoint, found: Gaussian) -> Start | None:
    """The priors that the head knows, pooled with likelihood factors; None if it knows none."""
    head = block.flow.head
    if not isinstance(head, ConditionalGaussianHead) or log_joint.cost_per_draw >= GAUSSIAN.expensive:
        return None
    start = _from_likelihood(block.flow, log_joint, head, found) if isinstance(head, LinearMixedHead) else None
    return start if start is not None and start.elbo > found.elbo else _from_shares(block, log_joint, head, found)


def _from_likelihood(flow: Flow, log_joint: LogJoint, head: LinearMixedHead, found: Gaussian) -> Start | None:
    """Set the head's likelihood factor from the log joint, and fit a Gaussian to the other coordinates."""
    if not isinstance(flow.preconditioner, FullRankPreconditioner):
        return None
    pulled, zeros = PulledBack(log_joint, head.forward_and_ladj), torch.zeros_like(found.loc)
    begin, free = Gaussian(zeros, torch.ones_like(zeros)), head.order[: head.count_free]
    fits = _fits_of_factors(log_joint, head, found.loc)
    return _from_factors(flow, log_joint, head, found, partial(refined, pulled, begin, free), *fits)


def _from_factors(
    flow: Flow,
    log_joint: LogJoint,
    head: LinearMixedHead | ChainHead,
    found: Gaussian,
    fit_others: Callable[[], Gaussian | LowRankGaussian],
    fit_factor: Callable[..., bool],
    skew_factor: Callable[[Tensor], bool] | None,
) -> Start | None:
    """Fit likelihood factors, and a Gaussian of the other coordinates in the head's noise, in turn; then skew the
    factors."""
    assert flow.preconditioner is not None
    center, scale = found.loc, found.conditional_scale
    best: Start | None = None
    is_expensive = affordable_draws(log_joint, center) < LIKELIHOOD.num_draws
    for index in range(SETTINGS.num_rounds_expensive if is_expensive else SETTINGS.num_rounds):
        if not fit_factor(center, scale, by_draws=index > 0):
            break
        gaussian = fit_others()
        was = -math.inf if best is None else best.elbo
        if not gaussian.elbo > was:
            break
        _set(flow.preconditioner, gaussian)
        best = _start(gaussian.elbo, flow)
        if not gaussian.elbo > was + GAUSSIAN.newton_gain:
            break
        center = head.forward_and_ladj(gaussian.loc)[0]
        scale = head.gaussian()[1] * gaussian.marginal_scale
    if best is None or skew_factor is None:
        return best
    flow.load_state_dict(best.state)
    push, noise = flow.transform.forward_and_ladj, antithetic(GAUSSIAN.num_elbo_draws, center)
    before = elbo_of(log_joint, push, noise)
    if not skew_factor(head.forward_and_ladj(flow.preconditioner.loc)[0]):
        return best
    gain = elbo_of(log_joint, push, noise) - before
    return _start(best.elbo + gain, flow) if gain > LIKELIHOOD.min_gain_of_skew else best


def _fits_of_factors(
    log_joint: LogJoint, head: LinearMixedHead, center: Tensor
) -> tuple[Callable[..., bool], Callable[[Tensor], bool] | None]:
    """How a head's likelihood factor is set, and skewed, if it can be."""
    if isinstance(head, LinearPredictorHead):
        read = read_linear_predictor(_recorder(log_joint))
        if read is None or read.for_head(center).num != head.predictor.num:  # the data are others now
            return lambda *_, **__: False, None
        return partial(fit_factors, log_joint, head, read.likelihood), partial(skew_factors, head, read.likelihood)
    fit_factor = partial(fit_likelihood, log_joint, head, seen=seen_coordinates(log_joint, head, center))
    return fit_factor, partial(fit_skew, log_joint, head) if isinstance(head, FullPrecisionHead) else None


def _from_shares(
    block: JointBlock, log_joint: LogJoint, head: ConditionalGaussianHead, found: Gaussian
) -> Start | None:
    """Fit the head, with the shares of its priors, on fixed draws, and correlate the remaining noise.

    A Gaussian near a funnel has to choose between its neck and its body, and training from there is slow.
    """
    flow = block.flow
    if flow.preconditioner is not None:
        flow.preconditioner.reset()
    push = head.forward_and_ladj
    parameters: list[Tensor] = [*head.raw.parameters(), head.log_share]
    noise = antithetic(GAUSSIAN.num_elbo_draws, found.loc)
    best = Start(-math.inf, flow.state_dict())

    def better(best: Start, rounds: int) -> Start:
        if fit_on_fixed_draws(log_joint, push, parameters, found.loc, SETTINGS.num_fixed_draws, rounds):
            elbo = elbo_of(log_joint, push, noise)
            return _start(elbo, flow) if elbo > best.elbo else best
        return best

    init_loc = block.inner_layout.init_loc
    for loc, scale in ((found.loc, found.conditional_scale), (init_loc, torch.ones_like(found.loc))):
        head.initialize(loc, scale, max_share=SETTINGS.max_share)
        best = better(best, 1)
    if best.elbo == -math.inf:
        return None
    flow.load_state_dict(best.state)
    best = better(best, FIXED_DRAWS.num_rounds - 1)
    flow.load_state_dict(best.state)
    head.set_origin()
    inside = _inside(flow, PulledBack(log_joint, push), found.loc)
    if inside is None or not inside.elbo > best.elbo:
        return _start(best.elbo, flow)
    _set(flow.preconditioner, inside)
    return _start(inside.elbo, flow)


def _inside(flow: Flow, pulled: Target, like: Tensor) -> Gaussian | LowRankGaussian | None:
    """The best Gaussian inside of the head that the preconditioner can represent; None if there is none."""
    begin = Gaussian(torch.zeros_like(like), torch.ones_like(like))
    if _is_correlated(flow):
        return refined(pulled, begin)
    return best_low_rank(pulled, begin, _rank(flow)) if _rank(flow) else None


@torch.no_grad()
def _write(flow: Flow, found: Gaussian | LowRankGaussian) -> None:
    """Initialize a flow at a Gaussian; the layers before the head are assumed to be the identity.

    The preconditioner represents it all, or only its correlations if it is inside of the head.
    """
    head = flow.head
    zeros, ones = torch.zeros_like(found.loc), torch.ones_like(found.loc)
    if flow.preconditioner is None or (isinstance(found, Gaussian) and not _is_correlated(flow)):
        _write_into_head(flow, found)
    elif head.is_outermost:
        assert isinstance(head, (ConditionalGaussianHead, ChainHead))
        if isinstance(found, Gaussian):
            scale = _matrix(found).square().sum(-1).sqrt()
            _set(flow.preconditioner, Gaussian(zeros, _matrix(found) / scale.unsqueeze(-1)))
        else:
            scale = found.scale
            _set(flow.preconditioner, replace(found, loc=zeros, scale=ones))
        head.initialize(found.loc, scale, max_share=SETTINGS.no_share)
        head.set_origin()
    else:
        _set(flow.preconditioner, found)
        head.initialize(zeros, ones)


def _write_into_head(flow: Flow, found: Gaussian | LowRankGaussian) -> None:
    """Initialize a flow at a Gaussian that the head can represent by itself."""
    if isinstance(found, Gaussian):
        flow.head.initialize(found.loc, found.factor)
    else:
        assert isinstance(flow.head, LowRankAffine)
        flow.head.initialize(found.loc, found.scale)
        flow.head.set_directions(found.directions, found.stretch)


def _set(preconditioner: Preconditioner | None, found: Gaussian | LowRankGaussian) -> None:
    """Set a preconditioner to the map of a Gaussian."""
    if isinstance(found, Gaussian):
        assert isinstance(preconditioner, FullRankPreconditioner)
        preconditioner.set(found.loc, _matrix(found))
    else:
        assert isinstance(preconditioner, LowRankPreconditioner)
        preconditioner.set(found.loc, found.scale, found.directions, found.stretch)


def _matrix(found: Gaussian) -> Tensor:
    """The factor of the covariance as a matrix, ``(D, D)``."""
    return found.factor if found.factor.dim() == 2 else found.factor.diag()
