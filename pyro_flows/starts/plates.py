# SPDX-License-Identifier: Apache-2.0
"""L4. The warm start of a guide with local latents: a Newton-like fit of every item, then a Gaussian of the globals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_flows._random import forked, random_state, set_random_state
from pyro_flows.distributed.plates import PlateShare
from pyro_flows.distributed.shards import Shards
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.log_joint import LogJoint, constrain, joined, scored_sites
from pyro_flows.models.traces import NO_DENSITY, by_draw, sample_nodes
from pyro_flows.posterior.mini_batches import Arguments, MakePlates, MiniBatch, Watch, mini_batches
from pyro_flows.posterior.plate import LocalBlock
from pyro_flows.posterior.posterior import Latents, Posterior
from pyro_flows.starts.fixed_draws import antithetic, elbo_of
from pyro_flows.starts.lbfgs import lbfgs_paths, local_factor
from pyro_flows.starts.select import warm_start_joint
from pyro_flows.starts.undo import undone_by_errors

__all__ = ["warm_start"]

OWNER = "AutoFlowGuide.warm_start"


@dataclass(frozen=True)
class PlateSettings:
    """Settings of the warm start of local latents.

    Attributes:
        num_steps: Largest number of steps of an item's ascent.
        tolerance: Gain in nats below which an ascent has converged.
        max_item_dim: Items with more latents than this are not initialized, since each latent adds a row to a Hessian.
        max_calls: Largest number of mini-batches in one pass over the items.
        num_global_items: Globals are fitted to enough mini-batches for this number of items.
        max_global_calls: Largest number of mini-batches that globals are fitted to.
        num_elbo_draws: Draws by which ELBOs of the globals are compared.
        num_probes: Draws by which ways of running the model are compared.
        noise: Standard deviation of these draws, in unconstrained space.
    """

    num_steps: int = 45
    tolerance: float = 1e-5
    max_item_dim: int = 50
    max_calls: int = 1000
    num_global_items: int = 1000
    max_global_calls: int = 10
    num_elbo_draws: int = 32
    num_probes: int = 3
    noise: float = 0.1


SETTINGS = PlateSettings()


def warm_start(
    model: Callable[..., Any],
    posterior: Posterior,
    calls: Sequence[Arguments],
    make_plates: MakePlates,
    init_scale: float,
    watch: Watch,
    shards: Shards,
) -> None:
    """Warm start of a guide; see ``AutoFlowGuide.warm_start_on``.

    Args:
        model: The model.
        posterior: The guide's distribution, as built.
        calls: Arguments of one or many mini-batches; only the first is used if no latents are local.
        make_plates: Makes the guide's plates for given arguments.
        init_scale: Initial standard deviation of the globals.
        watch: Wraps a pass over the mini-batches, for a progress bar.
        shards: Shares of the items. Processes each fit the items of their own, where all shares have many.

    Raises:
        NotImplementedError: As :class:`LocalStart`; then, and after any other error, the guide is as before, but for
            rows of other processes' items where these are fitted in shares.
    """
    if not any(True for _ in posterior.blocks()):
        joint = posterior.only_block
        with undone_by_errors(posterior):
            warm_start_joint(joint, LogJoint(model, joint.inner_layout, *calls[0]), init_scale)
        posterior.look_again()
    elif len(calls) > 1 or not shards.covers(posterior.blocks(), SETTINGS.num_global_items):
        LocalStart(model, posterior, calls, make_plates, init_scale, Shards()).run(watch)
    else:
        start = LocalStart(model, posterior, calls, make_plates, init_scale, shards)
        refusal: NotImplementedError | None = None
        with shards.divided():
            try:
                start.run(watch)
            except NotImplementedError as error:  # in all processes, which go on with all rows
                refusal = error
        set_random_state(shards.processes.broadcast(random_state()))
        if refusal is not None:
            raise refusal


class LocalStart:
    """Fits every item to its data, given the globals; then the globals, given the items.

    An item's site approximation is an approximation of its likelihood: mode and curvature of its log density, less the
    prior that the head pools it with. For a Gaussian likelihood this is exact, whatever the globals; the ELBO with such
    items is then the marginal density of the globals, whose best Gaussian is found as in a model without plates.

    Args:
        model: The model.
        posterior: The guide's distribution, as built.
        calls: Arguments of one or many mini-batches.
        make_plates: Makes the guide's plates for given arguments.
        init_scale: Initial standard deviation of the globals.
        shards: Shares of the items, of which those of this process are fitted here. The globals are fitted by the first
            process, to the first share.

    Raises:
        NotImplementedError: If a plate is amortized, or the model also has enumerated sites.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Posterior,
        calls: Sequence[Arguments],
        make_plates: MakePlates,
        init_scale: float,
        shards: Shards,
    ) -> None:
        for block in posterior.blocks():
            if block.items is None:
                plates = " and ".join(f"'{name}'" for name in block.layout.plate_names)
                raise NotImplementedError(
                    f"{OWNER}: expected plates without encoders, but {plates} has one. "
                    "Train the guide as it is: its items cannot start anywhere but where the encoder puts them."
                )
        self.model = model
        self.posterior = posterior
        self.init_scale = init_scale
        self.calls = calls
        self.make_plates = make_plates
        self.shards = shards
        first = next(self.batches())
        draws = [self.values(self.locations(first, SETTINGS.noise)) for _ in range(SETTINGS.num_probes)]
        probe = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        self.batched = BatchedModel(OWNER, model, first.call, probe)
        if self.batched.enumerated:
            raise NotImplementedError(
                f"{OWNER}: expected a model with local latents to have no enumerated sites, but "
                f"'{self.batched.enumerated[0]}' is one. Train the guide as it is."
            )

    def batches(self) -> Iterator[MiniBatch]:
        """All mini-batches of the arguments; of the shares of this process, one after the other, if there are any."""
        shares: list[PlateShare | None] = [*self.shards.shares] or [None]
        for share in shares:
            owned = None if share is None else share.items_of
            parts = itertools.chain.from_iterable(mini_batches(one, self.make_plates, owned) for one in self.calls)
            yield from itertools.islice(parts, SETTINGS.max_calls)

    @torch.no_grad()
    def run(self, watch: Watch) -> None:
        """Initialize the guide; leaves it unchanged unless its ELBO improves, and if an error ends it.

        Args:
            watch: Wraps a pass over the mini-batches, for a progress bar.
        """
        with undone_by_errors(self.posterior) as before:
            if not self._improves(watch):
                self.posterior.load_state_dict(before)

    def _improves(self, watch: Watch) -> bool:
        """Initialize the guide; returns whether its ELBO improves."""
        posterior, first = self.posterior, self.shards.processes.first
        chosen: list[MiniBatch] = []
        for batch in itertools.islice(self.batches(), SETTINGS.max_global_calls):
            chosen.append(batch)
            if sum(self.num_items(batch) for batch in chosen) >= SETTINGS.num_global_items:
                break
        marginal = MarginalLogJoint(self, chosen)
        was = first(lambda: self._elbo(marginal))
        self._fit_items(watch(self.batches(), "items"))
        joint = posterior.joint
        if joint is not None:
            first(lambda: warm_start_joint(joint, marginal, self.init_scale))
            self._share_globals()
            self._fit_items(watch(self.batches(), "items again"))
        return first(lambda: self._elbo(marginal)) > was

    def _share_globals(self) -> None:
        """Take what the first process has, of all but the tables."""
        if not self.shards.blocks:
            return
        tables = {name for name, p in self.posterior.named_parameters() if p in self.shards}
        state = self.posterior.state_dict()
        # Objects are pickled: on the CPU, since a tensor of another process's GPU would be put onto that one here.
        own = {name: value.cpu() for name, value in state.items() if name not in tables}
        found = self.shards.processes.broadcast(own)
        self.posterior.load_state_dict({**state, **found})

    def num_items(self, batch: MiniBatch) -> int:
        """Number of items of the largest block in a mini-batch."""
        return max(
            math.prod(len(batch.indices[name]) for name in block.layout.plate_names)
            for block in self.posterior.blocks()
        )

    def _elbo(self, marginal: MarginalLogJoint) -> float:
        """The ELBO by the items' noise and its mirror image, which reduces the variance of the comparison."""
        joint, total = self.posterior.joint, 0.0
        for _ in range(2):
            if joint is None:
                total += float(marginal(torch.zeros(1, 0)))
            else:
                push = joint.flow.transform.forward_and_ladj
                total += elbo_of(marginal, push, antithetic(SETTINGS.num_elbo_draws, joint.layout.init_loc))
            marginal.mirror()
        return total / 2

    def locations(self, batch: MiniBatch, scale: float = 0.0) -> Latents:
        """Packed latents at zero noise, or at noise of standard deviation ``scale``."""
        posterior, latents = self.posterior, Latents()
        if posterior.joint is not None:
            mean = posterior.joint.flow.base_dist.mean
            latents[()], _ = posterior.joint.flow.transform.forward_and_ladj(mean + scale * torch.randn_like(mean))
        for block in posterior.blocks():
            location, _ = self.push(block, batch, latents, None)
            latents[block.layout.plate_names] = location + scale * torch.randn_like(location)
        return latents

    def push(
        self, block: LocalBlock, batch: MiniBatch, latents: Latents, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A block's packed latents and log-determinant, from noise, ``lead + (n,)``; None means zero.

        By the head alone: the layers before it are assumed to be the identity, as they are at initialization.
        """
        posterior = self.posterior
        items = block.item_context(batch.indices, {})
        context = block.context(items, latents, posterior.joint, posterior.parents(block)).join()
        shape = (*context.shape[:-1], block.layout.latent_dim)
        noise = context.new_zeros(shape) if noise is None else noise.expand(shape)
        return block.head.forward_and_ladj(noise, context)

    def values(self, latents: Latents) -> dict[str, Tensor]:
        """Values of all latent sites, from packed ones."""
        return constrain(self.posterior.split(latents))[0]

    def _fit_items(self, batches: Iterable[MiniBatch]) -> None:
        """One pass over the data for all blocks without children; the parents of others are fixed at their location."""
        parents = {name for block in self.posterior.blocks() for name in block.parent_names}
        fitted = [
            _Items(self, block)
            for block in self.posterior.blocks()
            if block.layout.plate_names not in parents and block.layout.latent_dim <= SETTINGS.max_item_dim
        ]
        # The same random state afterwards, whatever the number of mini-batches of this process.
        with forked() if self.shards.shares else nullcontext():
            for batch in batches:
                latents = self.locations(batch)
                values = self.values(latents)
                for items in fitted:
                    items.fit(batch, latents, values)
        for items in fitted:
            items.set()


class _Items:
    """Modes and scales of a block's items, collected batch by batch."""

    def __init__(self, owner: LocalStart, block: LocalBlock) -> None:
        assert block.items is not None
        self.owner = owner
        self.block = block
        like, count, size = block.items, len(block.items), block.layout.latent_dim
        self.loc, self.scale = like.new_full((2, count, size), math.nan)
        self.prior = None if block.prior is None else like.new_zeros(count, 2 * size)

    def fit(self, batch: MiniBatch, latents: Latents, values: Mapping[str, Tensor]) -> None:
        """Maximize the log densities of a mini-batch's items, all at once."""
        block, posterior = self.block, self.owner.posterior
        start = latents[block.layout.plate_names]
        log_density = _item_log_density(self.owner.model, block, batch, values, start.shape[:-1])
        begin = start.reshape(-1, 1, start.shape[-1])
        with pyro.validation_enabled(False):
            try:
                *_, point = (begin, *lbfgs_paths(log_density, begin, SETTINGS.num_steps, tolerance=SETTINGS.tolerance))
                factor = local_factor(log_density, point).squeeze(1)
            except NO_DENSITY:
                return
        rows = block.layout.flat_index(batch.indices, block.owned).reshape(-1).to(self.loc.device)
        self.loc[rows] = point.squeeze(1)
        # Conditional scales, for heads of independent coordinates.
        self.scale[rows] = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).rsqrt().to(self.scale)
        if self.prior is not None:
            prior = block.known_prior(latents, posterior.joint, posterior.parents(block))
            self.prior[rows] = prior.expand(*start.shape[:-1], -1).reshape(len(rows), -1)

    def set(self) -> None:
        """Write modes and scales into the block; items that were not visited get the average."""
        seen, mean = (self.loc.isfinite() & self.scale.isfinite()).all(-1), self.owner.shards.mean
        loc = mean(self.loc[seen])
        if not loc.isfinite().all():  # none of them was fitted
            return
        self.loc[~seen], self.scale[~seen] = loc, mean(self.scale[seen].log()).exp()
        if self.prior is not None:
            self.prior[~seen] = mean(self.prior[seen])
        self.block.initialize_items(self.loc, self.scale, self.prior, mean)


def _item_log_density(
    model: Callable[..., Any], block: LocalBlock, batch: MiniBatch, values: Mapping[str, Tensor], lead: torch.Size
) -> Callable[[Tensor], Tensor]:
    """Each item's part of the log joint, ``(N, 1, n)`` to ``(N, 1)``, with everything else as in ``values``."""
    layout = block.layout
    # Undo the scale that a subsampled plate applies to the terms of its items.
    scale = batch.scale(layout)

    def per_item(term: Tensor) -> Tensor:
        return term.expand(torch.broadcast_shapes(term.shape, lead)).sum_to_size(lead)

    def log_density(z: Tensor) -> Tensor:
        own, ladjs = constrain(layout.split(z.reshape(*lead, z.shape[-1])))
        total = torch.zeros(lead, dtype=z.dtype, device=z.device)
        for ladj in ladjs:
            total = total + per_item(ladj)
        for node in scored_sites(model, {**values, **own}, batch.call):
            if {frame.name for frame in node["cond_indep_stack"]}.issuperset(layout.plate_names):
                total = total + per_item(node["log_prob"].to(z.dtype)) / scale
        return total.reshape(-1, 1)

    return log_density


class MarginalLogJoint(LogJoint):
    """The ELBO given the globals: log p(x, local latents | globals) less the log density of the local ones, drawn with
    fixed noise, plus the globals' log prior. Where each item's conditional is exact, that is log p(x, globals).

    Args:
        owner: The warm start whose items are drawn.
        batches: Mini-batches over which the density is averaged.
    """

    def __init__(self, owner: LocalStart, batches: Sequence[MiniBatch]) -> None:
        self.owner = owner
        self.batches = batches
        self.noise = [
            {name: torch.randn_like(location) for name, location in owner.locations(batch).items()} for batch in batches
        ]
        self.cost_per_draw = max(map(owner.num_items, batches)) * len(batches)
        self.batched = owner.batched
        if owner.posterior.joint is not None:
            self.table = owner.posterior.joint.layout

    @property
    def sizes(self) -> Sequence[int]:
        """A single part, since local latents depend on all globals."""
        return (sum(self.table.sizes),)

    def mirror(self) -> None:
        """Negate the noise."""
        self.noise = [{name: -eps for name, eps in noise.items()} for noise in self.noise]

    def __call__(self, draws: Tensor | Sequence[Tensor]) -> Tensor:
        """Log density of packed globals, ``(S, D)`` or their parts, to ``(S,)``; differentiable."""
        draws = joined(draws)
        posterior, share = self.owner.posterior, 1.0 / len(self.batches)
        lead = draws.reshape(len(draws), *(1,) * self.batched.nesting, draws.shape[-1])
        parts = []
        if posterior.joint is not None:
            parts += constrain(posterior.joint.layout.split(lead))[1]
        for batch, noise in zip(self.batches, self.noise, strict=True):
            latents: Latents = {} if posterior.joint is None else {(): lead}
            for block in posterior.blocks():
                plates = block.layout.plate_names
                eps = noise[plates]
                latents[plates], ladj = self.owner.push(block, batch, latents, eps)
                _, ladjs = constrain(block.layout.split(latents[plates]))
                log_q = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1) - ladj
                parts += [term * (batch.scale(block.layout) * share) for term in (*ladjs, -log_q)]
            values = self.owner.values(latents)
            rows = {name: self.batched.rows(name, value, len(draws)) for name, value in values.items()}
            nodes = sample_nodes(self.batched(rows, batch.call))
            parts += [node["log_prob"].to(draws) * share for node in nodes.values()]
        return torch.stack([self._by_draw(part, len(draws)) for part in parts]).sum(0)

    def _by_draw(self, term: Tensor, count: int) -> Tensor:
        """Sum over all dimensions but that of the draws, if any."""
        if term.dim() > self.batched.nesting:
            return by_draw(term).expand(count)
        return term.sum().expand(count)
