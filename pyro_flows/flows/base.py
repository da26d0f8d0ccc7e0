# SPDX-License-Identifier: Apache-2.0
"""L2. A flow's recipe (:class:`FlowSpec`) and its module (:class:`Flow`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_flows._checks import NamedOptions, check_int, check_type
from pyro_flows.flows.bases import Base, BaseSpec, base_of_shapes, resolve_base
from pyro_flows.flows.distribution import FlowDistribution
from pyro_flows.flows.fields import check_fields, choice
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.flows.version_0_1_0 import from_0_1_0, is_from_0_1_0
from pyro_flows.transforms import (
    AffineHead,
    Chain,
    ConditionalGaussianHead,
    DiagonalAffine,
    FlowTransform,
    FullRankAffine,
    Head,
    LowRankAffine,
    PlateHead,
    Preconditioner,
)
from pyro_flows.transforms.base import check_context

__all__ = ["Flow", "FlowSpec"]

HEADS = ("diagonal", "low_rank", "full_rank")


def _check_base(owner: str, name: str, value: Any) -> None:
    resolve_base(owner, value)


class _Parts(NamedTuple):
    """See :class:`Flow`."""

    layers: tuple[FlowTransform, ...]
    head: Head
    preconditioner: Preconditioner | None


class Flow(nn.Module):
    """A flow with its parameters. Calling it gives the distribution, with or without a context.

    Usable anywhere that Pyro takes a distribution: in a guide, or inside a model as a learned prior or likelihood.

    Args:
        layers: Transforms from the base outwards; may be empty.
        head: The outermost trained transform, which is affine.
        preconditioner: Fixed affine map that a warm start may set, outside of the head, or inside of one that knows
            priors.
        base: Distribution of the noise; None means standard normal.
        outermost: A map without parameters that follows all others; None for none.

    Attributes:
        chooses_base: Whether a warm start may replace the base, and a state that is loaded brings its own kind.

    Example:
        >>> from pyro_flows import flows
        >>> flow = flows.get("realnvp").build(input_dim=3)
        >>> z, log_q = flow().rsample_and_log_prob((5,))
        >>> z.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        layers: Sequence[FlowTransform],
        head: Head,
        preconditioner: Preconditioner | None = None,
        base: Base | None = None,
        outermost: FlowTransform | None = None,
    ) -> None:
        super().__init__()
        check_type("Flow", "head", head, Head)
        for part in (*layers, *(part for part in (preconditioner, outermost) if part is not None)):
            check_type("Flow", "each of layers", part, FlowTransform)
            if part.input_dim != head.input_dim:
                raise ValueError(
                    f"Flow: expected layers of input_dim {head.input_dim}, the head's, but got {part.input_dim}."
                )
        self.input_dim = head.input_dim
        self.context_dim = head.context_dim
        self.base = Base(head.input_dim) if base is None else base
        self.chooses_base = False
        outer: list[FlowTransform] = [head] if preconditioner is None else [head, preconditioner]
        if head.is_outermost:
            outer.reverse()
        if outermost is not None:
            outer.append(outermost)
        self.transform = Chain([*layers, *outer], head.context_layout)
        # In a tuple, since the chain registers them as modules, and parameters must have one name each.
        self._parts = _Parts(tuple(layers), head, preconditioner)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As for any module; a state of version 0.1.0 is converted before the layers load it."""
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if is_from_0_1_0(own, self):
            for name in own:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: value for name, value in from_0_1_0(own, self).items()})
        self.adopt_base({name: value.shape for name, value in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[no-untyped-call]

    def adopt_base(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the kind of base that a state of these names and shapes has, if a warm start may have chosen it."""
        found = {name.removeprefix("base."): tuple(s) for name, s in shapes.items() if name.startswith("base.")}
        if self.chooses_base and found != {name: tuple(p.shape) for name, p in self.base.named_parameters()}:
            self.base = base_of_shapes(self.input_dim, found).to(self.head.raw.value)

    @property
    def layers(self) -> tuple[FlowTransform, ...]:
        """The transforms between the noise and the head, base side first, less those inserted later."""
        return self._parts.layers

    @property
    def head(self) -> Head:
        """The trained transform that follows all layers."""
        return self._parts.head

    @property
    def preconditioner(self) -> Preconditioner | None:
        """Affine map that a warm start may set, outside of the head, or inside of one that knows the priors."""
        return self._parts.preconditioner

    def standardize(self, y: Tensor) -> Tensor:
        """Standardized values, as input of flows that are conditional on them; see :meth:`Head.standardize`."""
        if self.preconditioner is None or self.head.is_outermost:
            return self.head.standardize(y)
        return self.preconditioner.standardize(y, *self.head.gaussian())

    @property
    def base_dist(self) -> dist.TorchDistribution:
        """Noise of event shape ``(input_dim,)``, on the parameters' device."""
        base_dist: dist.TorchDistribution = self.base(self.head.raw.value)
        return base_dist

    def forward(
        self,
        context: Tensor | None = None,
        *,
        path_gradient: bool = True,
        parents: tuple[Tensor, ...] = (),
        gradient_filter: GradientFilter | None = None,
    ) -> FlowDistribution:
        """The distribution given a context.

        Args:
            context: ``batch_shape + (context_dim,)``, or None for an unconditional flow.
            path_gradient: Whether draws carry the path gradient; see :class:`FlowDistribution`.
            parents: Latents of which the context is a function; see :class:`FlowDistribution`.
            gradient_filter: Filter of the gradients in draws; see :class:`FlowDistribution`.

        Raises:
            ValueError: If the context is missing, given to an unconditional flow, or of the wrong length.
        """
        check_context("Flow", self.context_dim, context)
        base_dist = self.base_dist
        if context is not None:
            base_dist = base_dist.expand(context.shape[:-1])
        return FlowDistribution(base_dist, self.transform, context, path_gradient, parents, gradient_filter)


@dataclass(frozen=True, kw_only=True)
class FlowSpec(NamedOptions):
    """Recipe of a flow: hyper-parameters only, so it compares, prints and pickles as data.

    A family is a subclass that defines the layers between the noise and the affine head. Its hyper-parameters are
    fields of ``pyro_flows.flows.fields``, which are checked when a recipe is made.

    Args:
        head: Outermost affine layer: ``"diagonal"``, ``"low_rank"`` or ``"full_rank"``.
        base: Distribution of the noise: ``"normal"``; ``"student_t"`` or a :class:`~pyro_flows.flows.StudentT`, for
            heavy tails; ``"mixture"`` or a :class:`~pyro_flows.flows.Mixture`, for several modes.

    Attributes:
        has_inverse: Whether values other than the flow's own draws can be scored.
        min_dim: Smallest dimension that the family supports.
        identity_start: Whether a new flow is exactly the Gaussian of its head.
        one_pass_sampling: Whether a draw takes one pass, not one per dimension; required in a guide.
        correlates: Whether layers correlate coordinates, so that the family contains a warm start with correlations.
        knows_priors: Whether the family makes use of the priors of a model's sites.
        chooses_base: Whether a warm start that finds several modes may replace a normal base by a mixture.
        knows_leaves: Whether the family has :meth:`layers_with_leaves`.
        best_for: When to use the family, in a few words.
        practical_dim: Approximate largest dimension at which parameters and steps are affordable. None means any.
        draw_cost: Cost of a draw with the default hyper-parameters.
        tails: Tails of a coordinate in unconstrained space, from normal noise.
        parameters: How the number of parameters grows with the dimension D.
    """

    # Capabilities of a family: used by the guide and checked by tests.
    has_inverse: ClassVar[bool] = True
    min_dim: ClassVar[int] = 1
    identity_start: ClassVar[bool] = True
    one_pass_sampling: ClassVar[bool] = True
    correlates: ClassVar[bool] = True
    knows_priors: ClassVar[bool] = False
    chooses_base: ClassVar[bool] = False
    knows_leaves: ClassVar[bool] = False
    # Its row in the table of docs/choosing_a_flow.rst.
    best_for: ClassVar[str] = ""
    practical_dim: ClassVar[int | None] = None
    draw_cost: ClassVar[str] = "one pass"
    tails: ClassVar[str] = "Gaussian"
    parameters: ClassVar[str] = "O(D)"

    head: str = choice("diagonal", HEADS)
    base: str | BaseSpec = field(default="normal", metadata={"check": _check_base})

    def __post_init__(self) -> None:
        check_fields(self)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        """The transforms between the noise and the head, base side first."""
        raise NotImplementedError

    def layers_with_leaves(self, input_dim: int, num_leaves: int) -> list[FlowTransform]:
        """As :meth:`layers`, for a vector whose last coordinates are independent of each other given the others."""
        raise NotImplementedError

    def can_widen_to(self, input_dim: int) -> bool:
        """Whether there are :meth:`wider_layers` for a vector of this length."""
        return False

    def wider_layers(self, input_dim: int, items: Sequence[Tensor] = ()) -> dict[int, FlowTransform]:
        """Transforms by which a flow becomes wider, initialized to the identity; see :meth:`can_widen_to`.

        Args:
            input_dim: Length of the flow's vector.
            items: Which coordinates belong to the same items, one tensor ``(num_items, m)`` for each kind.

        Returns:
            Index of one of :meth:`layers` -> the transform to insert before it.
        """
        raise NotImplementedError

    def with_blocks(self, block_sizes: Sequence[int]) -> FlowSpec:
        """This recipe for a vector that consists of blocks in a meaningful order, such as a model's sites."""
        return self

    def build(self, input_dim: int, context_dim: int = 0) -> Flow:
        """Make a flow with fresh parameters, in torch's default dtype and on its default device.

        Args:
            input_dim: Length of the flow's vector, at least ``min_dim``.
            context_dim: Length of the context vector. 0 means unconditional.

        Raises:
            ValueError: If ``input_dim`` is less than ``min_dim``.
        """
        check_int(type(self).__name__, "context_dim", context_dim, 0)
        self._check_input_dim(input_dim)
        head = self._make_head(input_dim, context_dim)
        return Flow(self.layers(input_dim, context_dim), head, base=self._make_base(input_dim))

    def build_joint(
        self,
        block_sizes: Sequence[int],
        *,
        head: ConditionalGaussianHead | None = None,
        preconditioner: Preconditioner | None = None,
        has_leaves: bool = False,
        outermost: FlowTransform | None = None,
    ) -> Flow:
        """Make a flow over a model's sites.

        Args:
            block_sizes: The sites' sizes, in order; they add up to the flow's ``input_dim``.
            head: A head that knows the priors of a hierarchy. Families that do not use priors replace it by their own.
            preconditioner: Fixed affine map that a warm start with correlations sets. Families without correlations
                omit it.
            has_leaves: Whether the coordinates of the last site are independent of each other given the others.
            outermost: A map without parameters from the head's coordinates to the sites'.
        """
        dim = sum(block_sizes)
        self._check_input_dim(dim)
        if head is None or not (self.knows_priors and self.head == "diagonal"):
            chosen: Head = self._make_head(dim, 0)
        else:
            chosen = head
        if not (self.correlates or self.head == "full_rank"):
            preconditioner = None
        spec = self.with_blocks(block_sizes)
        layers = spec.layers_with_leaves(dim, block_sizes[-1]) if has_leaves else spec.layers(dim, 0)
        flow = Flow(layers, chosen, preconditioner, self._make_base(dim), outermost)
        flow.chooses_base = self.chooses_base and type(flow.base) is Base
        return flow

    def build_local(
        self, input_dim: int, parent_dim: int, feature_dim: int, known: Tensor | None = None, *, plain: bool = False
    ) -> Flow:
        """Make a flow for one item of a plate, with weights that all items share and a partially pooled head.

        A vector that is too short for the family (one latent per item, with couplings) gets the head alone. A head
        other than the diagonal one mixes the item's noise before the partially pooled head.

        Args:
            input_dim: Length of an item's vector.
            parent_dim: Length of the latents that an item depends on; may be 0.
            feature_dim: Length of an item's features.
            known: Which coordinates have a known prior, ``(input_dim,)``; None means none.
            plain: Whether to use the head alone, without networks, because there are too many items.
        """
        if plain:
            head = PlateHead(input_dim, parent_dim=parent_dim, feature_dim=feature_dim, known=known, hidden_dims=())
            return Flow([], head, base=self._make_base(input_dim))
        layers = self.layers(input_dim, parent_dim + feature_dim) if input_dim >= self.min_dim else []
        if self.head != "diagonal" and input_dim > 1:
            layers.append(self._make_head(input_dim, 0))
        head = PlateHead(input_dim, parent_dim=parent_dim, feature_dim=feature_dim, known=known)
        return Flow(layers, head, base=self._make_base(input_dim))

    def _check_input_dim(self, input_dim: int) -> None:
        owner = type(self).__name__
        check_int(owner, "input_dim", input_dim, 1)
        if input_dim < self.min_dim:
            raise ValueError(
                f"{owner}: expected input_dim >= {self.min_dim}, but got {input_dim}. "
                'Use "spline" or "auto" for a single latent.'
            )

    def _make_base(self, input_dim: int) -> Base:
        return resolve_base(type(self).__name__, self.base).build(input_dim)

    def _make_head(self, input_dim: int, context_dim: int) -> AffineHead:
        if self.head == "full_rank":
            return FullRankAffine(input_dim, context_dim)
        if self.head == "low_rank":
            rank = min(input_dim, math.ceil(math.sqrt(input_dim)) + 2, 20)
            return LowRankAffine(input_dim, context_dim, rank=rank)
        return DiagonalAffine(input_dim, context_dim)
