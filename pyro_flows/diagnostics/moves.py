# SPDX-License-Identifier: Apache-2.0
"""L7. Tests by Hamiltonian Monte Carlo: moves that leave the posterior as it is also leave a good guide's draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_flows.diagnostics.evidence import Evidence
from pyro_flows.diagnostics.modes import Modes
from pyro_flows.diagnostics.shape import robust_shape
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.importance.weights import Draws, ImportanceSampler
from pyro_flows.starts.lbfgs import value_and_gradient

__all__ = ["Drift", "MoveSettings", "Reach", "ReachSettings", "measure_drift", "measure_reach"]


@dataclass(frozen=True)
class MoveSettings:
    """Settings of the moves.

    Attributes:
        num_draws: Largest number of draws of the guide that are moved, each once.
        min_draws: Smallest such number; with fewer there is no test.
        max_elements: Largest number of values in the runs of the model for one step of all of them, if there are more
            than ``min_draws``.
        step_size: Leapfrog step in units of the guide's standard deviations, times d^(-1/4): the step at which the
            acceptance rate neither vanishes nor nears one as the dimension d grows.
        shortest: Each draw's step is multiplied by a number between this and 1, since the posterior's scale may vary.
        path_length: Length of a path: a quarter of the period of a normal whose scale is the guide's, after which a
            position is independent of the initial one.
        tail: Share of the draws in each tail of a coordinate, in which as many should come as go.
        min_in_tail: Smallest number of draws there.
        false_alarms: Probability that a guide which is the posterior is said to drift.
        good_acceptance: Share of accepted moves below which they are made anew with half the step.
        num_halvings: Largest number of times.
        min_acceptance: Share of the moves that has to be accepted in the end; if fewer are, there is no test.
    """

    num_draws: int = 4000
    min_draws: int = 400
    max_elements: int = 2**19
    step_size: float = 1.2
    shortest: float = 0.5
    path_length: float = 0.5 * math.pi
    tail: float = 0.01
    min_in_tail: int = 20
    false_alarms: float = 1e-3
    good_acceptance: float = 0.3
    num_halvings: int = 4
    min_acceptance: float = 0.05

    def first_step(self, dim: int) -> float:
        """The longest leapfrog step that is tried in so many dimensions."""
        return self.step_size * dim**-0.25


@dataclass(frozen=True)
class ReachSettings:
    """Settings of the moves by which mass beyond a guide's reach is measured.

    Attributes:
        moves: Settings of each. More are accepted than of a single one, since the ends of a ridge matter, where it may
            be at its narrowest.
        num_rounds: Number of moves of each draw.
        ratio: A point is beyond the guide's reach where its density is less than that of the posterior by this factor.
        min_z_score: Standard errors by which the mass there must differ from zero.
        max_values: Largest number of values in all runs of the model together; bounds time, and how narrow a ridge may
            be.
        max_dim: Largest dimension; above, matrices of that size may make runs dear whose values are few.
    """

    moves: MoveSettings = MoveSettings(num_draws=2000, good_acceptance=0.9, num_halvings=6)
    num_rounds: int = 8
    ratio: float = 10.0
    min_z_score: float = 4.0
    max_values: int = 2**27
    max_dim: int = 24

    def halvings(self, dim: int, elements: int) -> int:
        """How often a step may be halved, so that enough draws are affordable, each of which has so many values;
        negative if they never are."""
        num_steps = self.max_values // (self.num_rounds * self.moves.min_draws * max(elements, 1))
        first = self.moves.first_step(dim)
        affordable = math.log2(max(num_steps, 0.1) * first / self.moves.path_length)
        return min(self.moves.num_halvings, math.floor(affordable))


class Drift(NamedTuple):
    """Most significant change of the draws by a move: of a mean, a mean distance from the median, or a tail's share.

    Attributes:
        z_score: The change in its standard errors.
        critical: z-score above which it is significant, given the number of coordinates.
    """

    z_score: float
    critical: float

    @property
    def is_significant(self) -> bool:
        """Whether the draws are not the posterior's, near where they are."""
        return self.z_score > self.critical


def measure_drift(
    sampler: ImportanceSampler, draws: Draws, modes: Modes | None = None, settings: MoveSettings = MoveSettings()
) -> Drift | None:
    """Move draws of the guide by Hamiltonian Monte Carlo, once, and measure whether they drift.

    Importance weights are blind to what lies beyond the guide's support. The moves are not: they cross the border, and
    where draws are the posterior's, as many go as come. Changes are averaged over acceptance and rejection (Rao and
    Blackwell), and weighted, so that errors that weights correct do not count.

    Args:
        sampler: Sampler of the model and the guide.
        draws: S draws of the guide.
        modes: The posterior's modes, so that steps are as wide as one is, and changes those within one; None for one.
        settings: Settings of the moves.

    Returns:
        None if there are too few draws, or moves are hardly ever accepted.
    """
    affordable = max(settings.max_elements // max(sampler.structure.elements, 1), settings.min_draws)
    packed = sampler.structure.pack(draws.values)[: min(settings.num_draws, affordable)]
    if len(packed) < settings.min_draws:
        return None
    weights = draws.log_weights[: len(packed)].log_softmax(0).exp().to(packed.device) * len(packed)
    start = packed.double()
    within = (lambda z: z) if modes is None else modes.within
    inner = within(start)
    middle, scale, factor = robust_shape(inner)
    position, accepted, _ = _accepted_moves(sampler, start, factor, packed.dtype, settings)
    if accepted.mean() < settings.min_acceptance:
        return None
    before, after = ((x - middle) / scale for x in (inner, within(position)))
    share = max(settings.tail, settings.min_in_tail / len(start))
    low, high = before.quantile(torch.tensor([share, 1.0 - share]).to(start), 0)
    functions = (lambda x: x, torch.abs, lambda x: (x < low).to(x), lambda x: (x > high).to(x))
    changes = torch.stack([f(after) - f(before) for f in functions], -1).nan_to_num(0.0, 0.0, 0.0)
    changes = (weights * accepted)[..., None, None] * changes  # (S, N, d, 4)
    z_scores = changes.mean(0) / changes.std(0) * math.sqrt(len(changes))
    quantile = torch.tensor(0.5 * settings.false_alarms / z_scores.numel(), dtype=torch.double)
    critical = -torch.distributions.Normal(0.0, 1.0).icdf(quantile).item()
    return Drift(z_scores.abs().nan_to_num(0.0, posinf=0.0).max().item(), critical)


class Reach(NamedTuple):
    """Posterior mass that moves carry to where the guide hardly draws, a lower bound of the mass there.

    Attributes:
        beyond: This mass, relative to that which the guide's weights account for.
        error: Its standard error.
        is_significant: Whether it is not noise.
    """

    beyond: float
    error: float
    is_significant: bool

    def correct(self, own: Evidence) -> Evidence:
        """Add the mass to an evidence, unless that accounts for more already.

        Args:
            own: Estimates by the guide's weights, with the modes that a search found.
        """
        if not self.is_significant:
            return own
        whole = own.log_evidence + torch.log1p(-own.missing) + math.log1p(self.beyond)
        missing = own.missing.clamp_min(self.beyond / (1.0 + self.beyond))
        error = torch.hypot(own.error, own.error.new_tensor(self.error / (1.0 + self.beyond)))
        more = whole > own.log_evidence
        return own._replace(
            log_evidence=torch.where(more, whole, own.log_evidence),
            error=torch.where(more, error, own.error),
            missing=missing,
        )


def measure_reach(
    sampler: ImportanceSampler, guide: Any, draws: Draws, settings: ReachSettings = ReachSettings()
) -> Reach | None:
    r"""Move draws of the guide a few times, and measure how many come to where its density is far too low.

    A guide that covers a part A of a ridge has constant weights, and its flow, however wide its noise, leads nowhere
    else. The moves follow the ridge. They satisfy detailed balance, and so do several of them, K, so that

    .. math::
        \int_A p(z)\, K(z, A^c)\, dz = \int_{A^c} p(z)\, K(z, A)\, dz \le p(A^c):

    what leaves A, if draws there are weighted by their importance, is at most what is missing.

    Args:
        sampler: Sampler of the model and the guide.
        guide: The guide.
        draws: S draws of the guide.
        settings: Settings of the moves.

    Returns:
        None if the guide's density is unknown elsewhere, there are several items, too few draws or too many dimensions,
        or moves would cost too much.
    """
    structure = sampler.structure
    if not isinstance(guide, AutoFlowGuide) or structure.num_items > 1 or structure.subsampled:
        return None
    dim, elements = structure.item_dim, structure.elements
    moves = replace(settings.moves, num_halvings=settings.halvings(dim, elements))
    packed = structure.pack(draws.values)
    is_affordable = moves.num_halvings >= 0 and dim <= settings.max_dim and sampler.score.is_vectorized
    if len(packed) < moves.min_draws or not is_affordable:
        return None
    call = sampler.score.model.call

    def is_beyond(position: Tensor) -> Tensor:
        found = []
        for part in position.to(packed.dtype).split(sampler.chunk):
            values, _ = structure.unpack(part)
            log_weights = sampler.score(values).log_joint.sum(-1) - guide.log_prob(values, *call.args, **call.kwargs)
            found.append(log_weights.double() - log_evidence > math.log(settings.ratio))
        return torch.cat(found).double()

    log_evidence = draws.log_weights.logsumexp(0).item() - math.log(len(packed))
    start = packed.double()
    _, _, factor = robust_shape(start)
    _, _, step_size = _accepted_moves(sampler, start[: moves.min_draws], factor, packed.dtype, moves)
    costs = settings.num_rounds * math.ceil(moves.path_length / step_size) * max(elements, 1)
    count = min(moves.num_draws, max(settings.max_values // costs, moves.min_draws), len(start))
    start, log_weights = start[:count], draws.log_weights[:count, 0].to(start.device)
    try:
        change = -is_beyond(start)
    except NotImplementedError:  # a flow without an inverse
        return None
    position = start
    for _ in range(settings.num_rounds):
        before = position
        position, accepted = _moved(sampler, before, factor, step_size, packed.dtype, moves)
        accepted = accepted.squeeze(-1)
        is_moved = torch.rand(count).to(accepted) < accepted
        position = torch.where(is_moved[:, None, None], position, before)
    change = (log_weights - log_evidence).exp() * (change + is_beyond(position))
    beyond, error = change.mean().item(), change.std().item() / math.sqrt(count)
    return Reach(beyond, error, beyond > settings.min_z_score * error)


def _accepted_moves(
    sampler: ImportanceSampler, start: Tensor, factor: Tensor, dtype: torch.dtype, settings: MoveSettings
) -> tuple[Tensor, Tensor, float]:
    """As :func:`_moved`, with the first step, of those halved again and again, of which enough are accepted; and it."""
    step_size = settings.first_step(start.shape[-1])
    for index in range(settings.num_halvings + 1):
        step_size *= 0.5 if index else 1.0
        position, accepted = _moved(sampler, start, factor, step_size, dtype, settings)
        if accepted.mean() >= settings.good_acceptance:
            break
    return position, accepted, step_size


def _moved(
    sampler: ImportanceSampler,
    start: Tensor,
    factor: Tensor,
    step_size: float,
    dtype: torch.dtype,
    settings: MoveSettings,
) -> tuple[Tensor, Tensor]:
    """Ends of paths, ``(S, N, d)``, and with what probabilities they are accepted, ``(S, N)``."""
    num_steps = math.ceil(settings.path_length / step_size)
    shortened = settings.shortest + (1.0 - settings.shortest) * torch.rand(len(start), 1, 1)
    step = (settings.path_length / num_steps * shortened).to(start)
    momentum = torch.randn(start.shape).to(start)
    kinetic = 0.5 * momentum.square().sum(-1)
    position = start
    with pyro.validation_enabled(False):
        value, force = _value_and_force(sampler, position, factor, dtype)
        energy = kinetic - value
        for _ in range(num_steps):
            momentum = momentum + 0.5 * step * force
            position = position + step * (factor @ momentum.unsqueeze(-1)).squeeze(-1)
            value, force = _value_and_force(sampler, position, factor, dtype)
            momentum = momentum + 0.5 * step * force
    return position, (energy - 0.5 * momentum.square().sum(-1) + value).clamp_max(0.0).exp().nan_to_num(0.0)


def _value_and_force(
    sampler: ImportanceSampler, position: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log joint, and its gradient in coordinates in which the guide's covariance is the identity."""
    values, gradients = [], []
    for part in position.split(sampler.chunk):
        value, gradient = value_and_gradient(sampler.log_joint, part.to(dtype))
        values.append(value)
        gradients.append(gradient.double())
    return torch.cat(values), (factor.mT @ torch.cat(gradients).unsqueeze(-1)).squeeze(-1)
