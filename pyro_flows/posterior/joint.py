# SPDX-License-Identifier: Apache-2.0
"""L3. The joint block: one flow over all the global latent sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_flows._random import seeded
from pyro_flows.flows import FlowDistribution, FlowSpec
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.models.field import field_of
from pyro_flows.models.layout import Layout
from pyro_flows.models.leaves import are_leaves, possible_leaves
from pyro_flows.models.linear_predictors import read_linear_predictor
from pyro_flows.models.noncentered import CenteredLayout, with_effects
from pyro_flows.models.priors import LinearPrior, read_joint_prior
from pyro_flows.models.recorded_run import RunRecorder
from pyro_flows.models.state_chains import read_state_chain
from pyro_flows.transforms import (
    ChainHead,
    ConditionalGaussianHead,
    CovarianceHead,
    DiagonalPrecisionHead,
    DirectedCouplings,
    FlowTransform,
    FullPrecisionHead,
    FullRankPreconditioner,
    Head,
    Leading,
    LeafPreconditioner,
    LinearPredictorHead,
    LowRankPreconditioner,
    MultilevelHead,
    NonCentering,
    Preconditioner,
)

__all__ = ["JOINT", "JointBlock", "build_reproducibly", "item_pairs", "make_joint_block"]

Built = TypeVar("Built", bound=nn.Module)


@dataclass(frozen=True)
class JointSettings:
    """Dimensions that decide on the parts of a joint flow.

    Attributes:
        max_precision_dim: Largest number of coordinates with known priors for a head with a precision matrix.
        max_full_rank_dim: Dimension above which the preconditioner is of low rank where the head knows priors.
        max_plain_full_rank_dim: The same where it knows none, so that all correlations are the preconditioner's.
        rank: Rank of that preconditioner, and of a start in place of a full covariance that cannot be fitted.
        max_correlated_dim: Dimension above which there is no preconditioner.
        max_bends: Largest number of weights of a preconditioner's products for leaves.
        num_principal: Number of directions that each free coordinate is multiplied by in these.
    """

    max_precision_dim: int = 64
    max_full_rank_dim: int = 300
    max_plain_full_rank_dim: int = 2000
    rank: int = 20
    max_correlated_dim: int = 20_000
    max_bends: int = 4_000_000
    num_principal: int = 2


JOINT = JointSettings()


def build_reproducibly(build: Callable[[], Built]) -> Built:
    """Build a flow, or layers, whose buffers (random permutations, say) are the same each time.

    Pyro's parameter store does not save buffers, and stored parameters are valid only with the same buffers.
    """
    built = build()
    if any(True for _ in built.buffers()):
        with seeded(0), torch.device("cpu"), torch.no_grad():
            for buffer, fixed in zip(built.buffers(), build().buffers(), strict=True):
                buffer.copy_(fixed)
    return built


def _preconditioner(layout: Layout, head: Head | None) -> Preconditioner | None:
    """The preconditioner, which a warm start sets; its memory is linear in the dimension above some thousand."""
    dim, knows_priors = layout.latent_dim, head is not None
    if head is not None and head.max_rank is not None:
        return LowRankPreconditioner(dim, head.max_rank)
    if layout.num_leaves:
        count = len(item_pairs(layout)) + min(JOINT.num_principal, layout.num_free) * layout.num_free
        return LeafPreconditioner(dim, layout.num_leaves, count if count * layout.num_leaves <= JOINT.max_bends else 0)
    if dim > JOINT.max_correlated_dim:
        return None
    has_field = not knows_priors and field_of(layout.sizes) is not None
    if dim > (JOINT.max_full_rank_dim if knows_priors else JOINT.max_plain_full_rank_dim) and not has_field:
        return LowRankPreconditioner(dim, JOINT.rank)
    return FullRankPreconditioner(dim) if dim > 1 else None


def item_pairs(layout: Layout) -> Tensor:
    """Pairs of free coordinates of the same item, each coordinate with itself included, ``(count, 2)``."""
    free = layout.num_free
    related = torch.eye(free, dtype=torch.bool)
    for kind in layout.items():
        for own in kind[(kind < free).all(-1)]:
            related[own.unsqueeze(-1), own] = True
    return related.triu().nonzero()


def _conditional_head(prior: LinearPrior, dim: int) -> ConditionalGaussianHead:
    """The head for a known prior: a Gaussian with a precision matrix, exact for linear mixed models and random walks,
    if few priors are known and no scale depends on them, or some are multivariate normals; a diagonal one if they are
    conditionally independent."""
    slope, bias = prior.dense(dim)
    known = prior.known if prior.roots is None else prior.known | prior.roots
    if prior.covariances:
        return CovarianceHead(known, slope, bias, prior.correlated, prior.covariances)
    if slope[dim:, known].any() or known.sum() > JOINT.max_precision_dim:
        return MultilevelHead(prior.known, *replace(prior, roots=None).dense(dim))
    if prior.conditionally_independent and prior.roots is None:
        return DiagonalPrecisionHead(known, slope, bias)
    return FullPrecisionHead(known, slope, bias, prior.correlated)


def _blocks(sizes: Sequence[int], head: Head | None) -> list[int]:
    """Sizes of the blocks of a model-ordered flow: the sites, with the links of a chain, which the head correlates, in
    one block with their neighbors, since a draw takes one step per block."""
    if head is None or not head.is_chained:
        return list(sizes)
    pooled = torch.zeros(head.input_dim, dtype=torch.bool)
    pooled[head.order[head.count_free :]] = True
    blocks: list[int] = []
    joins = False
    for site in pooled.split(list(sizes)):
        if joins and site.all():
            blocks[-1] += len(site)
        else:
            blocks.append(len(site))
        joins = bool(site.all())
    return blocks


def make_joint_block(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    spec: FlowSpec,
    init_scale: float,
    *,
    may_have_leaves: bool,
) -> JointBlock:
    """A joint block that makes use of what its family can: priors that are read off the model, and leaves.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Layout of the sites, in the order of the model.
        spec: Recipe of the flow.
        init_scale: Initial standard deviation in unconstrained space, > 0.
        may_have_leaves: Whether no other block follows this one.
    """
    is_plain = spec.knows_leaves and spec.head == "diagonal" and spec.base == "normal"
    leaves = possible_leaves(layout) if is_plain and may_have_leaves else None
    has_leaves = leaves is not None and are_leaves(model, args, kwargs, layout, leaves)
    prior = None
    if spec.knows_priors:
        ordered = layout if leaves is None or not has_leaves else layout.with_leaves(leaves)
        prior = read_joint_prior(model, args, kwargs, ordered)
        if has_leaves and prior is not None and (prior.covariances or prior.correlated):
            # Correlations of the others are worth more; and no head has both.
            has_leaves, prior = False, read_joint_prior(model, args, kwargs, layout)
    effects = None
    if spec.knows_priors and spec.head == "diagonal" and may_have_leaves and not has_leaves:
        effects = with_effects(model, args, kwargs, layout, prior, JOINT.max_precision_dim)
    predictor: Callable[[int], Head] | None = None
    if spec.knows_priors and spec.head == "diagonal" and may_have_leaves and not has_leaves:
        recorder = RunRecorder(model, args, kwargs, layout)
        chain = read_state_chain(recorder)
        read = read_linear_predictor(recorder) if chain is None and prior is None else None
        # Effects are followed by their scales alone.
        is_chain = chain is not None and (effects is None or chain.turns(recorder.points))
        if chain is not None and is_chain and _is_better(chain.chain.rows, prior):
            predictor, effects = partial(ChainHead, chain=chain.chain), None
        elif read is not None and (read.turns or effects is None):
            predictor, effects = partial(LinearPredictorHead, predictor=read.for_head(layout.init_loc)), None
    return JointBlock(
        layout,
        spec,
        init_scale,
        prior=prior,
        effects=effects,
        predictor=predictor,
        leaves=leaves,
        has_leaves=has_leaves,
    )


def _is_better(states: slice, prior: LinearPrior | None) -> bool:
    """Whether a chain of states is worth more than known priors: all of these are its own, and not all states have one.
    Otherwise the heads of these start closer to the posterior where there is no warm start."""
    if prior is None:
        return True
    known = prior.known if prior.roots is None else prior.known | prior.roots
    count = states.stop - states.start
    return bool(known[states].sum() == known.sum() < count)


class Layers(nn.Module):
    """Layers by the index of the one that follows."""

    def __init__(self, by_index: dict[int, FlowTransform]) -> None:
        super().__init__()
        self.by_index = by_index
        self.all = nn.ModuleList(by_index.values())


class JointBlock(nn.Module):
    """A flow over the packed unconstrained values of several sites.

    Initialized to ``N(init_loc, init_scale^2)`` in unconstrained space (for families that are initialized to the
    identity), in the dtype and on the device of the model's own trace.

    Args:
        layout: Layout of the sites.
        spec: Recipe of the flow; gets the sites' sizes, in order.
        init_scale: Initial standard deviation in unconstrained space, > 0.
        prior: Priors that depend on other sites of the block, for families that make use of them.
        effects: The same with effects in place of standard normal latents, and the map to these; they are in use unless
            a state is loaded that knows nothing of them.
        predictor: From a dimension to a head that knows what the data see of standard normal latents; in use unless a
            state knows nothing of it.
        leaves: Name of the site whose coordinates may be leaves.
        has_leaves: Whether they are, which the block can change with a state that it loads. The site comes last in
            ``layout`` then.

    Attributes:
        layout: Layout of the flow's draws.
        inner_layout: Layout of the head's coordinates: the same, or with effects in place of standard normal latents.
    """

    def __init__(
        self,
        layout: Layout,
        spec: FlowSpec,
        init_scale: float,
        *,
        prior: LinearPrior | None = None,
        effects: tuple[LinearPrior, NonCentering] | None = None,
        predictor: Callable[[int], Head] | None = None,
        leaves: str | None = None,
        has_leaves: bool = False,
    ) -> None:
        super().__init__()
        self._layers: tuple[Layers, ...] = ()  # in a tuple, since they are the flow's
        self._layouts = (layout, None if leaves is None else layout.with_leaves(leaves))
        # A recipe that is none of ours may be a function that can't be pickled.
        self._knows_more = effects is not None or predictor is not None
        is_kept = spec.can_widen_to(layout.latent_dim) or leaves is not None or self._knows_more
        self._spec = spec if is_kept else None
        self._init_scale = init_scale
        self._prior_without_effects = prior
        if effects is None:
            self._build(spec, self._layouts[has_leaves], prior, predictor=predictor)
        else:
            self._build(spec, layout, *effects)
        self.gradient_filter = GradientFilter(layout.latent_dim).to(layout.init_loc)

    def _build(
        self,
        spec: FlowSpec,
        layout: Layout | None,
        prior: LinearPrior | None,
        noncentering: NonCentering | None = None,
        predictor: Callable[[int], Head] | None = None,
    ) -> None:
        """Make the flow over a layout."""
        assert layout is not None
        self.layout = layout
        self.inner_layout = layout if noncentering is None else CenteredLayout(layout, noncentering)
        init_loc = self.inner_layout.init_loc
        with init_loc.device:
            head: Head | None = None if prior is None else _conditional_head(prior, layout.latent_dim)
            if predictor is not None:
                head = predictor(layout.latent_dim)
            sizes = _blocks([size for size in layout.sizes if size], head)
            preconditioner = _preconditioner(layout, head)
            flow = build_reproducibly(
                lambda: spec.build_joint(
                    sizes,
                    head=head,
                    preconditioner=preconditioner,
                    has_leaves=layout.num_leaves > 0,
                    outermost=noncentering,
                )
            )
        self.flow = flow.to(dtype=init_loc.dtype, device=init_loc.device)
        scale = torch.full_like(init_loc, self._init_scale)
        if noncentering is not None:
            log_scale = noncentering.location_and_log_scale(init_loc)[1]
            scale[noncentering.rows] *= log_scale.exp()
        self.flow.head.initialize(init_loc, scale)

    @property
    def is_wide(self) -> bool:
        """Whether the flow has further layers, from :meth:`widen`."""
        return len(self.flow.transform.inserted) > 0

    @property
    def can_widen(self) -> bool:
        """Whether :meth:`widen` has layers to insert."""
        return self._spec is not None and self._spec.can_widen_to(self.layout.num_free) and not self.is_wide

    def widen(self, directions: Tensor | None = None) -> None:
        """Insert further layers into the flow, which leave the distribution as it is.

        Args:
            directions: Unit vectors in the noise space of coordinates that are no leaves, to which the layers should
                respond, ``(count, F)``; None if they are not known, or are in a state that is loaded next.
        """
        assert self._spec is not None
        spec, layout, like = self._spec, self.layout, self.flow.head.raw.value

        def build() -> Layers:
            items = [kind for kind in layout.items() if kind.max() < layout.num_free]
            wider = spec.wider_layers(layout.num_free, items)
            if layout.num_leaves:
                wider = {index: Leading(layout.latent_dim, layer) for index, layer in wider.items()}
            return Layers(wider)

        layers = build_reproducibly(build).to(like)
        if directions is not None:
            for layer in layers.modules():
                if isinstance(layer, DirectedCouplings):
                    layer.point(directions)
        if self._layers:  # the same parameters as before, which Pyro's store knows by name
            self._layers[0].to(like).load_state_dict(layers.state_dict())
        else:
            self._layers = (layers,)
        self._insert(self._layers[0].by_index)

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the kind of flow that a state of these names and shapes has: whether it has leaves, its base
        (:meth:`Flow.adopt_base`), and whether it is wide."""
        own = "flow."
        if shapes and self._layouts[1] is not None:
            has_leaves = any(name.endswith(".log_scale_slope") for name in shapes)
            if has_leaves != (self.layout.num_leaves > 0):
                assert self._spec is not None
                self._layers = ()
                self._build(self._spec, self._layouts[has_leaves], None)
        of_flow = {name.removeprefix(own): shape for name, shape in shapes.items() if name.startswith(own)}
        if self._knows_more and not self._has_head_of(of_flow):
            assert self._spec is not None
            self._layers, self._knows_more = (), False
            self._build(self._spec, self.layout, self._prior_without_effects)
        self.flow.adopt_base(of_flow)
        is_wide = any(name.startswith("transform.inserted.") for name in of_flow)
        if is_wide and self.can_widen:
            self.widen()
        elif self.is_wide and not is_wide:
            self._insert({})

    def _has_head_of(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether the head knows as many priors as the one of a state of these names and shapes."""
        own = {name: value.shape for name, value in self.flow.state_dict().items()}
        shares, others = (
            {tuple(s) for name, s in each.items() if name.endswith((".log_share", ".factor_origin"))}
            for each in (own, shapes)
        )
        return not shapes or shares == others

    def _insert(self, layers: Mapping[int, FlowTransform]) -> None:
        self.flow.transform.insert(layers)
        # Compiled steps have all parameters in one vector, without new ones: apart from it, they are looked for again.
        for parameter in self.flow.parameters():
            parameter.data = parameter.data.clone()

    def distribution(self, *, path_gradient: bool, filtered: bool = False) -> FlowDistribution:
        """The distribution of the packed vector, event shape ``(latent_dim,)``; ``filtered`` adds the gradient filter
        to its draws."""
        gradient_filter = self.gradient_filter if filtered else None
        distribution: FlowDistribution = self.flow(path_gradient=path_gradient, gradient_filter=gradient_filter)
        return distribution

    def standardize(self, packed: Tensor) -> Tensor:
        """Standardize packed values, as input of flows that condition on them."""
        return self.flow.standardize(packed)
