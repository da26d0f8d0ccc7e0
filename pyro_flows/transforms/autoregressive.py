# SPDX-License-Identifier: Apache-2.0
"""L1. Base of autoregressive maps: the masked network, the inverse by fixed-point iteration and the score through
a triangular Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.nn.auto_reg_nn import MaskedLinear, create_mask
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flows._recording import is_recording
from pyro_flows.transforms.base import FlowTransform, expand_context
from pyro_flows.transforms.networks import ContextParameters
from pyro_flows.transforms.permutation import as_order

__all__ = ["AutoregressiveTransform", "MaskedAutoregressive", "MaskedNetwork", "propagate_score"]

# Above this dimension the dense Jacobian that a score needs while tracing is too large.
MAX_RECORDED_DIM = 128


class AutoregressiveTransform(FlowTransform):
    r"""Base of the maps :math:`y_i = f(x_i;\, h_i(x_{<i}, c))`, increasing in :math:`x_i`, in some order of the
    coordinates.

    Sampling, with the density of the sample, takes one pass of the network. The log-determinant is the sum of
    :math:`\log \partial f / \partial x_i`. Scoring any other value takes up to :math:`D` passes.

    A subclass implements :meth:`_map`, and :meth:`_unmap` where :math:`f` has an inverse; one whose :math:`h` is a
    masked network extends :class:`MaskedAutoregressive` instead.

    Args:
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector. 0 means unconditional.
        order: Coordinates from first to last. None means 0 to ``input_dim - 1``.

    Raises:
        ValueError: If ``order`` does not contain each coordinate once.
    """

    one_pass_inverse: ClassVar[bool] = False
    order: Tensor

    def __init__(self, input_dim: int, context_dim: int = 0, order: Sequence[int] | Tensor | None = None) -> None:
        super().__init__(input_dim, context_dim)
        order = torch.arange(input_dim) if order is None else order
        self.register_buffer("order", as_order(type(self).__name__, "order", input_dim, order))

    def _map(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``y`` and the elementwise ``log df/dx``, both of the shape of ``x``."""
        raise NotImplementedError(f"{type(self).__name__} must implement _map.")

    def _unmap(self, y: Tensor, parents: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The ``x`` with ``f(x; h(parents)) = y``, and the elementwise ``log df/dx`` there."""
        raise NotImplementedError(f"{type(self).__name__} must implement _unmap.")

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_slope = self._map(x, context)
        return y, log_slope.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Map latent to base by the iteration :math:`x \leftarrow f^{-1}(y;\, h(x))`.

        After k steps the first k coordinates (in the map's order) are exact, so D steps suffice; it stops earlier
        once nothing changes. Gradients flow through the iteration. Returns ``(x, log|det dx/dy|)``.
        """
        if not self.has_inverse:
            return super().inverse_and_ladj(y, context)
        tolerance = 4.0 * torch.finfo(y.dtype).eps
        # Coordinates that are not exact yet may take any value; if finite, the masks multiply them by zero.
        limit = torch.finfo(y.dtype).max ** 0.5
        x, log_slope = self._unmap(y, torch.zeros_like(y), context)
        for _ in range(self.input_dim - 1):
            parents = x.clamp(-limit, limit)
            x, log_slope = self._unmap(y, parents, context)
            if bool(((x - parents).abs() <= tolerance * (1.0 + parents.abs())).all()):
                break
        return x, -log_slope.sum(-1)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_slope = self._map(x, context)
        ladj = log_slope.sum(-1)
        return y, ladj, propagate_score(x, y, ladj, log_slope.detach().exp(), score, self.order)


class MaskedAutoregressive(AutoregressiveTransform):
    r"""Base of the maps whose parameters :math:`h_i(x_{<i}, c)` come from one :class:`MaskedNetwork`.

    A subclass implements the map of one coordinate, :meth:`_univariate`, and :meth:`_univariate_inverse` if that has
    an inverse.

    Args:
        input_dim: Length of the transformed vector, at least 1; a single coordinate is conditional on the context
            only.
        context_dim: Length of the context vector. 0 means unconditional.
        init: Initial parameters of each coordinate, ``(input_dim, P)``.
        hidden_dims: Widths of the masked network's hidden layers; raised to ``2 * input_dim`` if smaller.
        order: Coordinates from first to last. None means 0 to ``input_dim - 1``.
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        init: Tensor,
        hidden_dims: Sequence[int],
        order: Sequence[int] | Tensor | None,
    ) -> None:
        super().__init__(input_dim, context_dim, order)
        self.network = MaskedNetwork(input_dim, context_dim, init, hidden_dims, self.order)

    def _univariate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and ``log df/dx``, elementwise in ``x``, for parameters that broadcast to ``x.shape + (P,)``."""
        raise NotImplementedError(f"{type(self).__name__} must implement _univariate.")

    def _univariate_inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The ``x`` with ``f(x) = y``, and ``log df/dx`` there."""
        raise NotImplementedError(f"{type(self).__name__} must implement _univariate_inverse.")

    def _map(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._univariate(x, self.network(x, context))

    def _unmap(self, y: Tensor, parents: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._univariate_inverse(y, self.network(parents, context))


def propagate_score(x: Tensor, y: Tensor, ladj: Tensor, slope: Tensor, score: Tensor, order: Tensor) -> Tensor:
    r"""Score of ``y`` from the score of ``x`` where the Jacobian is triangular in some order of the coordinates.

    Solves :math:`J^\top g_y = v`, :math:`v = g_x - \nabla_x \log|\det J|`, by the Jacobi iteration
    :math:`g \leftarrow g + (v - J^\top g) / d` with :math:`d = \mathrm{diag}\, J`. Each step is one vector-Jacobian
    product. :math:`D - 1` steps are exact; a few suffice for most maps, whatever :math:`D` is, so the iteration
    stops once the residual is at rounding level.

    Shape:
        - x, y, slope, score, output: ``batch_shape + (D,)``.
        - ladj: ``batch_shape``.

    Args:
        x: Input of the map; requires grad.
        y: Output of the map, with its graph.
        ladj: Log-determinant, with its graph.
        slope: The Jacobian's diagonal :math:`d > 0`, detached.
        score: :math:`g_x`, detached.
        order: Coordinates from first to last, ``(D,)``.

    Returns:
        :math:`g_y`, detached. The graphs of ``y`` and ``ladj`` are kept.

    References:
        Vaitl, Winkler, Richter, Kessel. Fast and unified path gradient estimators for normalizing flows.
        ICLR 2024. arXiv:2403.15881, algorithm 1.
    """
    target = score.detach()
    if ladj.requires_grad:
        (gradient,) = torch.autograd.grad(
            ladj, x, torch.ones_like(ladj), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        target = target - gradient
    if is_recording():
        return _solve(x, y, target, order)
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-6
    with torch.no_grad():
        result = target / slope
    for _ in range(x.shape[-1] - 1):
        (product,) = torch.autograd.grad(y, x, result, retain_graph=True)
        with torch.no_grad():
            residual = target - product
            # Relative to the size of the terms: where they cancel, the residual is pure rounding error.
            size = target.norm(dim=-1) + (slope * result).norm(dim=-1)
            result = result + residual / slope
            if bool((residual.norm(dim=-1) <= tolerance * size).all()):
                break
    return result


def _solve(x: Tensor, y: Tensor, target: Tensor, order: Tensor) -> Tensor:
    """As above, from the full Jacobian: while tracing, the number of steps needed is not known in advance."""
    dim = x.shape[-1]
    if dim > MAX_RECORDED_DIM:
        raise NotImplementedError(
            f"the score of an autoregressive flow of {dim} dimensions takes as many passes as it needs, which is not "
            f"fixed beforehand, or a Jacobian, for at most {MAX_RECORDED_DIM} dimensions. Use path_gradient=False or "
            "another family"
        )
    units = (
        torch.eye(dim, dtype=y.dtype, device=y.device).reshape(dim, *(1,) * (y.dim() - 1), dim).expand(dim, *y.shape)
    )
    (rows,) = torch.autograd.grad(y, x, units, retain_graph=True, is_grads_batched=True)
    with torch.no_grad():
        jacobian = rows.movedim(0, -2).index_select(-2, order).index_select(-1, order)  # lower triangular
        target = target.index_select(-1, order).unsqueeze(-1)
        found = torch.linalg.solve_triangular(jacobian.mT, target, upper=True).squeeze(-1)
        return torch.zeros_like(found).index_copy(-1, order, found)


class MaskedNetwork(nn.Module):
    r"""Network whose i-th row of outputs depends on the coordinates before the i-th, and on the context (MADE).

    Uses Pyro's masks and masked layers, with SiLU and a linear skip from the input to the output. Outputs are
    initialized to ``init`` for every input: the last layer and the skip are zero. Both are scaled by the root of
    their fan-in, because an Adam step moves every weight by the learning rate.

    A single coordinate has no predecessors: then this is a free tensor, or a network of the context.

    Shape:
        - x: ``batch_shape + (D,)``; context: ``(..., context_dim)``.
        - output: ``batch_shape + (D, P)``, or broadcastable to it for ``D == 1``.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Length of the context vector. 0 means unconditional.
        init: Initial outputs, ``(D, P)``.
        hidden_dims: Widths of the hidden layers, at least one; raised to ``2 * input_dim`` if smaller, since every
            coordinate needs units of its own.
        order: Coordinates from first to last.

    Raises:
        ValueError: If ``hidden_dims`` is empty.

    References:
        Germain, Gregor, Murray, Larochelle. MADE: Masked Autoencoder for Distribution Estimation. ICML 2015.
        arXiv:1502.03509.
    """

    def __init__(
        self, input_dim: int, context_dim: int, init: Tensor, hidden_dims: Sequence[int], order: Tensor
    ) -> None:
        super().__init__()
        if not hidden_dims:
            raise ValueError("MaskedNetwork: expected hidden_dims to have at least one width, but got none. Use (64,).")
        self.free: ContextParameters | None = None
        self.layers = nn.ModuleList()
        self.skip: MaskedLinear | None = None
        if input_dim == 1:
            self.free = ContextParameters(init, context_dim, hidden_dims)
            return
        count_params = init.shape[-1]
        network_dim = input_dim + context_dim
        hidden = [max(width, 2 * input_dim) for width in hidden_dims]
        masks, mask_skip = create_mask(input_dim, context_dim, hidden, order, count_params)  # type: ignore[arg-type]
        # Pyro's rows are (P, D); ours are (D, P), so that the parameters of a coordinate are contiguous.
        rows = torch.arange(count_params * input_dim).reshape(count_params, input_dim).T.flatten()
        masks[-1], mask_skip = masks[-1][rows], mask_skip[rows]
        sizes = [network_dim, *hidden, count_params * input_dim]
        for size_in, size_out, mask in zip(sizes[:-1], sizes[1:], masks, strict=True):
            self.layers.append(MaskedLinear(size_in, size_out, mask))
        self.skip = MaskedLinear(network_dim, count_params * input_dim, mask_skip, bias=False)
        self.head_gain = 1.0 / math.sqrt(hidden[-1])
        self.skip_gain = 1.0 / math.sqrt(network_dim)
        with torch.no_grad():
            head = self.layers[-1]
            assert isinstance(head, MaskedLinear)
            head.weight.zero_()
            head.bias.copy_(init.flatten())
            self.skip.weight.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.free is not None:
            free: Tensor = self.free(context)
            return free
        assert self.skip is not None
        # Pyro's masks expect the context first.
        inputs = x if context is None else torch.cat([expand_context(context, x), x], -1)
        hidden = inputs
        for layer in self.layers[:-1]:
            hidden = F.silu(layer(hidden))
        out: Tensor = self.layers[-1](self.head_gain * hidden) + self.skip(self.skip_gain * inputs)
        return out.reshape((*x.shape, -1))
