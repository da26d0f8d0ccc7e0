# SPDX-License-Identifier: Apache-2.0
"""L2. Autoregressive families: one loop over layers in alternating order, and the map of each family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pyro_flows.flows.base import FlowSpec
from pyro_flows.flows.fields import integer, positive, widths
from pyro_flows.flows.registry import register
from pyro_flows.transforms import (
    AffineAutoregressive,
    BlockAutoregressive,
    FlowTransform,
    Inverse,
    NeuralAutoregressive,
    Permutation,
    SplineAutoregressive,
)

__all__ = ["IAF", "MAF", "NAF", "AutoregressiveSpec", "BlockNAF", "SplineAutoregressiveFlow"]


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSpec(FlowSpec):
    """Base of autoregressive families: layers in which each coordinate depends on those before it.

    The order alternates: first to last in even layers, last to first in odd ones, so that every coordinate can depend
    on every other. A family is a subclass that implements :meth:`layer`. Sampling takes one pass; parameters grow as
    the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
    """

    draw_cost: ClassVar[str] = "one pass; two masked networks"
    parameters: ClassVar[str] = "O(D²)"

    num_transforms: int = integer(2, low=1)

    def layers(self, input_dim: int, context_dim: int) -> list[FlowTransform]:
        forwards = range(input_dim)
        orders = [forwards if index % 2 == 0 else forwards[::-1] for index in range(self.num_transforms)]
        return [part for order in orders for part in self.layer(input_dim, context_dim, order)]

    def layer(self, input_dim: int, context_dim: int, order: Sequence[int]) -> list[FlowTransform]:
        """The maps of one layer, autoregressive in ``order``."""
        raise NotImplementedError


@register("iaf")
@dataclass(frozen=True, kw_only=True)
class IAF(AutoregressiveSpec):
    """Inverse autoregressive flow (IAF): each coordinate affine given the noise of those before it, layer by layer in
    alternating order.

    One pass to sample and to score the sample; up to one pass per dimension and layer to score another value. Contains
    every full-rank Gaussian. Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_dims: Widths of each masked network's hidden layers, at least one; raised to twice the flow's
            dimension if smaller.
        log_scale_bound: Largest absolute log-scale of one layer, > 0.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling. Improving Variational Inference with Inverse
        Autoregressive Flow. NeurIPS 2016. arXiv:1606.04934.
    """

    min_dim: ClassVar[int] = 2
    practical_dim: ClassVar[int | None] = 300
    best_for: ClassVar[str] = "smooth dependence; contains every Gaussian"
    tails: ClassVar[str] = r"Gaussian given the other coordinates; each layer scales by at most :math:`e^{\pm 3}`"

    hidden_dims: tuple[int, ...] = widths((64, 64), min_length=1)
    log_scale_bound: float = positive(3.0)

    def layer(self, input_dim: int, context_dim: int, order: Sequence[int]) -> list[FlowTransform]:
        return [
            AffineAutoregressive(
                input_dim,
                context_dim,
                hidden_dims=self.hidden_dims,
                log_scale_bound=self.log_scale_bound,
                order=order,
            )
        ]


@register("maf")
@dataclass(frozen=True, kw_only=True)
class MAF(IAF):
    """Masked autoregressive flow (MAF): the inverse of an IAF, for densities of given values.

    One pass to score any value; up to one pass per dimension and layer to sample. Use it inside a model, as a learned
    prior or likelihood of observed data. A guide is sampled at every step, so ``AutoFlowGuide`` refuses it: use
    ``"iaf"`` there. Takes the hyper-parameters of :class:`IAF`.

    References:
        Papamakarios, Pavlakou, Murray. Masked Autoregressive Flow for Density Estimation. NeurIPS 2017.
        arXiv:1705.07057.
    """

    one_pass_sampling: ClassVar[bool] = False
    best_for: ClassVar[str] = "densities of data inside a model; refused by ``AutoFlowGuide``"
    draw_cost: ClassVar[str] = "D passes; two masked networks"
    tails: ClassVar[str] = "as ``iaf``"

    def layer(self, input_dim: int, context_dim: int, order: Sequence[int]) -> list[FlowTransform]:
        return [Inverse(part) for part in super().layer(input_dim, context_dim, order)]


@register("spline_autoregressive")
@dataclass(frozen=True, kw_only=True)
class SplineAutoregressiveFlow(AutoregressiveSpec):
    """Autoregressive neural spline flow (NSF): each coordinate is mapped by a spline that depends on the noise of those
    before it, layer by layer in alternating order.

    The most flexible conditionals with one pass to sample; up to one pass per dimension and layer to score another
    value. Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_dims: Widths of each masked network's hidden layers, at least one; raised to twice the flow's
            dimension if smaller.
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032.
    """

    practical_dim: ClassVar[int | None] = 100
    best_for: ClassVar[str] = "the most flexible conditionals, few dimensions"
    tails: ClassVar[str] = "as ``spline``"

    hidden_dims: tuple[int, ...] = widths((64, 64), min_length=1)
    count_bins: int = integer(8, low=2, high=128)
    bound: float = positive(5.0)

    def layer(self, input_dim: int, context_dim: int, order: Sequence[int]) -> list[FlowTransform]:
        return [
            SplineAutoregressive(
                input_dim,
                context_dim,
                hidden_dims=self.hidden_dims,
                count_bins=self.count_bins,
                bound=self.bound,
                order=order,
            )
        ]


@register("neural_autoregressive")
@dataclass(frozen=True, kw_only=True)
class NAF(AutoregressiveSpec):
    """Neural autoregressive flow (NAF, deep sigmoidal flow): each coordinate is mapped by a mixture of sigmoids that
    depends on the noise of those before it, layer by layer in alternating order.

    One pass to sample; cannot score values other than its own draws. Unlike splines, not limited to a box. Initialized
    within 0.01 of the Gaussian, not at it. Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_dims: Widths of each masked network's hidden layers, at least one; raised to twice the flow's
            dimension if smaller.
        num_units: Sigmoids per coordinate, >= 2; one alone is affine.

    References:
        Huang, Krueger, Lacoste, Courville. Neural Autoregressive Flows. ICML 2018. arXiv:1804.00779.
    """

    has_inverse: ClassVar[bool] = False
    identity_start: ClassVar[bool] = False
    practical_dim: ClassVar[int | None] = 100
    best_for: ClassVar[str] = "bent conditionals without a box"
    tails: ClassVar[str] = "straight lines, whose slope follows the other coordinates: Gaussian"

    hidden_dims: tuple[int, ...] = widths((64, 64), min_length=1)
    num_units: int = integer(8, low=2)

    def layer(self, input_dim: int, context_dim: int, order: Sequence[int]) -> list[FlowTransform]:
        return [
            NeuralAutoregressive(
                input_dim,
                context_dim,
                hidden_dims=self.hidden_dims,
                num_units=self.num_units,
                order=order,
            )
        ]


@register("block_autoregressive")
@dataclass(frozen=True, kw_only=True)
class BlockNAF(AutoregressiveSpec):
    """Block neural autoregressive flow (BNAF): monotone block triangular networks as gated residuals, layer by layer in
    alternating order.

    One pass to sample; cannot score values other than its own draws. Initialized near the Gaussian, not at it.
    Parameters grow as the square of the dimension.

    Args:
        num_transforms: Number of layers, >= 1.
        hidden_factors: Hidden units per coordinate in each hidden layer; at least one entry, each >= 1.

    References:
        De Cao, Titov, Aziz. Block Neural Autoregressive Flow. UAI 2019. arXiv:1904.04676.
    """

    has_inverse: ClassVar[bool] = False
    identity_start: ClassVar[bool] = False
    practical_dim: ClassVar[int | None] = 100
    best_for: ClassVar[str] = "bent conditionals without a box, few dimensions"
    draw_cost: ClassVar[str] = "one pass; two block networks"
    tails: ClassVar[str] = "straight lines: Gaussian"

    hidden_factors: tuple[int, ...] = widths((8, 8), min_length=1)

    def layer(self, input_dim: int, context_dim: int, order: Sequence[int]) -> list[FlowTransform]:
        block = BlockAutoregressive(input_dim, context_dim, hidden_factors=self.hidden_factors)
        if list(order) == list(range(input_dim)):
            return [block]
        # Reverse and restore the order, so that the head sees coordinates in place. Reversal is its own inverse.
        there, back = (Permutation(input_dim, context_dim, permutation=order) for _ in range(2))
        return [there, block, back]
