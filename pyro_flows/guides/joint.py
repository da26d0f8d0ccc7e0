# SPDX-License-Identifier: Apache-2.0
"""L3. The joint block: one flow over all the global latent sites."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_flows.flows import Flow, FlowDistribution, FlowSpec
from pyro_flows.flows.bases import MixtureBase, StudentTBase
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.guides.base_start import fit_modes, fit_tails
from pyro_flows.guides.conditional_start import follow_data
from pyro_flows.guides.low_rank_start import RANK, LowRankGaussian, best_low_rank
from pyro_flows.guides.mixture_start import best_mixture
from pyro_flows.guides.warm_start import (
    MANY_ROWS,
    SCORE_DRAWS,
    Gaussian,
    antithetic,
    best_gaussian,
    elbo_of,
    fit_on_fixed_draws,
    refined,
)
from pyro_flows.models.layout import Layout
from pyro_flows.models.log_joint import LogJoint, PulledBack, Target
from pyro_flows.models.priors import LinearPrior
from pyro_flows.transforms import (
    DiagonalPooling,
    FixedAffine,
    LowRankAffine,
    LowRankWhitening,
    MatrixPooling,
    PriorPooling,
    Whitening,
)

__all__ = ["JointBlock", "build_reproducibly"]

# Largest share of the precision that known priors have where a deterministic fit begins.
POOLED_SHARE = 0.9
POOLED_DRAWS = 128
# The same share where priors are of no use.
NO_SHARE = 1e-6
# Coordinates with known priors that are pooled by matrices, at most; rounds of reading off what the data say of them.
MATRIX_DIM = 64
FOLLOW_ROUNDS = 2
# Above this dimension warm starts have a few correlated directions only.
WHITENING_DIM = 300
# Above this one none at all.
CORRELATED_DIM = 20_000


def build_reproducibly(build: Callable[[], Flow]) -> Flow:
    """Build a flow whose buffers (random permutations, say) are the same each time.

    Pyro's parameter store keeps no buffers, so parameters that are taken from a store must mean what they meant.
    """
    flow = build()
    if any(True for _ in flow.buffers()):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.default_generator.manual_seed(0)
            for buffer, fixed in zip(flow.buffers(), build().buffers(), strict=True):
                buffer.copy_(fixed)
    return flow


def _whitening(dim: int) -> FixedAffine | None:
    """What a warm start can set; memory grows linearly above a few hundred dimensions."""
    if dim > CORRELATED_DIM:
        return None
    if dim > WHITENING_DIM:
        return LowRankWhitening(dim, RANK)
    return Whitening(dim) if dim > 1 else None


def _pooling(prior: LinearPrior, dim: int) -> PriorPooling:
    """The head that knows a prior: the exact one for linear mixed models, if few priors are known and follow no others,
    with matrices where it takes them."""
    slope, bias = prior.dense(dim)
    chained = (slope[:, prior.known] != 0).any()
    if chained or prior.known.sum() > MATRIX_DIM:
        return PriorPooling(prior.known, slope, bias)
    if prior.apart:
        return DiagonalPooling(prior.known, slope, bias)
    return MatrixPooling(prior.known, slope, bias, prior.correlated)


class JointBlock(nn.Module):
    """A flow over the packed unconstrained values of several sites.

    Starts at ``N(init_loc, init_scale^2)`` in unconstrained space (families with an identity start), in the dtype and
    on the device of the model's own trace.

    Args:
        layout: The sites.
        spec: Recipe of the flow; told the sites' sizes, in order.
        init_scale: Standard deviation at the start, > 0.
        prior: Priors that follow others of the sites, for families that make use of them.
    """

    def __init__(
        self,
        layout: Layout,
        spec: FlowSpec,
        init_scale: float,
        *,
        prior: LinearPrior | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        sizes = [size for size in layout.sizes if size]
        pooling = None if prior is None else _pooling(prior, layout.latent_dim)
        whitening = _whitening(layout.latent_dim)
        flow = build_reproducibly(lambda: spec.build_joint(sizes, pooling=pooling, whitening=whitening))
        init_loc = layout.init_loc
        self.flow = flow.to(dtype=init_loc.dtype, device=init_loc.device)
        self.flow.head.initialize(init_loc, torch.full_like(init_loc, init_scale))
        self.gradient_filter = GradientFilter(layout.latent_dim).to(init_loc)

    @torch.no_grad()
    def start(self, loc: Tensor, factor: Tensor) -> None:
        """Start at :math:`N(m, L L^\top)`; the layers below the head are taken to be the identity.

        Args:
            loc: ``m``, ``(latent_dim,)``.
            factor: ``L``, lower triangular with a positive diagonal; or its diagonal, if the flow holds no ``L``.
        """
        head, whitening = self.flow.head, self.flow.whitening
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

    def _start_low_rank(self, found: LowRankGaussian) -> None:
        """As :meth:`start`."""
        head, whitening = self.flow.head, self.flow.whitening
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

    @property
    def _low_rank(self) -> int:
        """How many correlated directions a warm start may have where it cannot have all; 0 for none."""
        whitening, head = self.flow.whitening, self.flow.head
        if isinstance(whitening, LowRankWhitening):
            return whitening.rank
        return head.rank if whitening is None and isinstance(head, LowRankAffine) else 0

    def warm_start(self, log_joint: LogJoint, init_scale: float) -> None:
        """Find a good Gaussian for a target and start there; on another base, at what that can do.

        See :func:`best_gaussian`, :func:`best_low_rank`, :func:`best_mixture`, :func:`fit_modes` and :func:`fit_tails`.
        """
        cheap = log_joint.is_vectorized and log_joint.rows < MANY_ROWS
        whitening = self.flow.whitening
        if whitening is not None:
            whitening.reset()
        correlated = isinstance(whitening, Whitening)
        found = best_gaussian(log_joint, self.layout.init_loc, init_scale, correlated=correlated)
        head, base = self.flow.head, self.flow.base
        pooled = -math.inf
        if isinstance(head, DiagonalPooling) and log_joint.rows < MANY_ROWS:
            pooled = self._follow(log_joint, head, found)
        if isinstance(head, PriorPooling) and log_joint.rows < MANY_ROWS and not pooled > found.elbo:
            pooled = self._pool(log_joint, head, found)
        low_rank = None
        if self._low_rank and log_joint.rows < MANY_ROWS:
            low_rank = best_low_rank(log_joint, found, self._low_rank)
        gaussian = found.elbo if low_rank is None else low_rank.elbo
        if isinstance(base, MixtureBase):
            mixture = best_mixture(log_joint, self.layout.init_loc, len(base.locs), correlated=correlated)
            if mixture is not None and mixture.elbo(log_joint) > max(pooled, gaussian):
                self.start(mixture.loc, mixture.factor)
                base.set(mixture.locs, mixture.scales, mixture.weights)
                if cheap and self.flow.transform.has_score:
                    fit_modes(log_joint, self.flow)
                return
        if low_rank is not None and not pooled > gaussian:
            self._start_low_rank(low_rank)
        elif not pooled > gaussian:
            self.start(found.loc, found.factor)
        if isinstance(base, StudentTBase) and cheap:
            fit_tails(log_joint, self.flow)

    def _pool(self, log_joint: LogJoint, head: PriorPooling, found: Gaussian) -> float:
        """Let the head's priors have their share, on fixed draws, and correlate what is left; returns the ELBO.

        A Gaussian near a funnel has to choose between its neck and its body; from there training would take long.
        """
        if self.flow.whitening is not None:
            self.flow.whitening.reset()
        push = head.forward_and_ladj
        parameters: list[Tensor] = [*head.raw.parameters(), head.log_share]
        noise = antithetic(SCORE_DRAWS, found.loc)
        best, best_state = -math.inf, None
        for loc, scale in ((found.loc, found.conditional_scale), (self.layout.init_loc, torch.ones_like(found.loc))):
            head.initialize(loc, scale, max_share=POOLED_SHARE)
            if fit_on_fixed_draws(log_joint, push, parameters, loc, POOLED_DRAWS):
                elbo = elbo_of(log_joint, push, noise)
                if elbo > best:
                    best, best_state = elbo, copy.deepcopy(head.state_dict())
        if best_state is None:
            return best
        head.load_state_dict(best_state)
        head.settle()
        return self._correlate(PulledBack(log_joint, push), best)

    def _follow(self, log_joint: LogJoint, head: DiagonalPooling, found: Gaussian) -> float:
        """Let the head's own Gaussians be what the data say, and fit one to the other coordinates; returns the ELBO."""
        whitening = self.flow.whitening
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
            best = copy.deepcopy(self.flow.state_dict())
            center = head.forward_and_ladj(gaussian.loc)[0]
            scale = head.gaussian()[1] * gaussian.factor.square().sum(-1).sqrt()
        if best is not None:
            self.flow.load_state_dict(best)
        return elbo

    def _correlate(self, pulled: Target, elbo: float) -> float:
        """Set the whitening inside the head to the best Gaussian there, if it is better; returns the ELBO."""
        whitening = self.flow.whitening
        zeros, ones = torch.zeros_like(self.layout.init_loc), torch.ones_like(self.layout.init_loc)
        if isinstance(whitening, Whitening):
            gaussian = refined(pulled, Gaussian(zeros, ones))
            if gaussian.elbo > elbo:
                whitening.set(gaussian.loc, gaussian.factor)
                return gaussian.elbo
        elif isinstance(whitening, LowRankWhitening):
            low_rank = best_low_rank(pulled, Gaussian(zeros, ones), self._low_rank)
            if low_rank is not None and low_rank.elbo > elbo:
                whitening.set(low_rank.loc, low_rank.scale, low_rank.directions, low_rank.stretch)
                return low_rank.elbo
        return elbo

    def distribution(self, *, path_gradient: bool, filtered: bool = False) -> FlowDistribution:
        """The distribution of the packed vector; ``filtered``: with the filter of the gradients of its draws."""
        gradient_filter = self.gradient_filter if filtered else None
        distribution: FlowDistribution = self.flow(path_gradient=path_gradient, gradient_filter=gradient_filter)
        return distribution

    def standardize(self, packed: Tensor) -> Tensor:
        """Packed values as input for those who condition on them."""
        return self.flow.standardize(packed)
