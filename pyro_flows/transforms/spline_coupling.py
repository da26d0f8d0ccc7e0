# SPDX-License-Identifier: Apache-2.0
"""L1. Spline couplings (RQ-NSF (C))."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_flows._checks import check_positive, checked, integer
from pyro_flows.transforms.coupling import Couplings
from pyro_flows.transforms.spline import RationalQuadratic

__all__ = ["SplineCouplings"]


class SplineCouplings(Couplings):
    r"""A stack of spline couplings: :math:`y_b = \mathrm{RQ}(x_b;\, \phi(x_a))` elementwise, :math:`y_a = x_a`.

    RQ is a monotone rational-quadratic spline with ``3 count_bins - 1`` parameters per coordinate. Pyro's
    ``SplineCoupling`` is initialized far from the identity, with a random spline on the conditioning half, which never
    depends on the other, and its inverse gives NaN in float32. These are initialized to the identity.

    Warning:
        Linear outside ``[-bound, bound]``; mean 0 and variance 1: put an affine layer after it to move or scale
        mass.
        From an initialization much narrower than the target, path gradients can converge to splines stretched to the
        edge of the box: initialize near the target's scale, or use ordinary gradients first.

    Shape:
        As in :class:`FlowTransform`.

    Args:
        input_dim: Length of the transformed vector, at least 2.
        context_dim: Length of the context vector. 0 means unconditional.
        num_transforms: Number of couplings; at least 1.
        hidden_dims: Widths of each network's hidden layers.
        count_bins: Bins per spline, in [2, 128].
        bound: Half-width of the warped box in base standard deviations, > 0.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032, section 3.
    """

    @checked(input_dim=integer(2), num_transforms=integer(1), count_bins=integer(2, 128), bound=check_positive)
    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        num_transforms: int = 4,
        hidden_dims: Sequence[int] = (64, 64),
        count_bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        count_raw = 3 * count_bins - 1
        super().__init__(
            input_dim, context_dim, num_transforms=num_transforms, hidden_dims=hidden_dims, count_raw=count_raw
        )
        self.count_raw = count_raw
        self.bound = bound

    def _spline(self, raw: Tensor) -> RationalQuadratic:
        return RationalQuadratic(raw.unflatten(-1, (self.count_raw, -1)), self.bound)

    def _map(self, b: Tensor, raw: Tensor, *, with_slope: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._spline(raw)(b, with_slope=with_slope)

    def _unmap(self, b: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self._spline(raw).inverse(b)
