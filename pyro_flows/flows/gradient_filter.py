# SPDX-License-Identifier: Apache-2.0
"""L2. Clipping and variance reduction of the gradients in a flow's draws, independent of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows._recording import is_recording

__all__ = ["GradientFilter"]


@dataclass(frozen=True)
class FilterSettings:
    """Threshold for outliers in gradients, and the weight of running means.

    Attributes:
        largest: Entries are clipped beyond this multiple of their running root mean square. A much lower bound would do
            harm: only rare large gradients show that a site overflows, and if these are cut, draws spread until it
            overflows often.
        weight: Weight of a new gradient in the exponential running means, after an initial phase of plain averages.
    """

    largest: float = 1e3
    weight: float = 0.02


FILTER = FilterSettings()


class GradientFilter(nn.Module):
    r"""Reduces the noise of the gradient :math:`u` of a loss in draws :math:`z`.

    *Clipping.* Entries that are not finite become zero, and outliers are clipped, draw by draw: an optimizer with
    moments remembers one extreme gradient for thousands of steps, and NaN forever. Outliers are relative to previous
    gradients, so that units, a scale of the loss and the distance to the posterior do not matter.

    *A control variate.* The path gradient of :math:`\log q` and the ordinary one, of :math:`\log q_\theta(z(\theta))`,
    differ by the score term, whose mean is zero; any multiple c of their difference may be added:

    .. math::
        \Big(\frac{\partial z}{\partial \theta}\Big)^{\!\top} (u - c\, s)
        + c\, \nabla_\theta \log q_\theta(z(\theta)), \qquad s = \nabla_z \log q(z).

    With precisions :math:`\Lambda_j` of the posterior and variances :math:`\sigma_j^2` of q, the noise of :math:`u_j`
    is proportional to :math:`\Lambda_j \sigma_j^2 - 1`, and that of the ordinary gradient to
    :math:`\Lambda_j \sigma_j^2`. The former vanishes at the posterior; while q is too narrow, as guides are initially,
    the latter is smaller. The multiple with the least noise is the regression coefficient of u on s, and is learned.

    Args:
        dim: Length of a draw.

    Attributes:
        largest_multiple: Upper bound on c: the largest weight of a draw's entropy in the loss.
        num_refused: Number of gradients with entries that are not finite.
        refused_draw: The first draw with such a gradient, ``(D,)``; None if there was none.
        is_fresh: Whether a gradient has arrived since this was last set to false.

    References:
        [1] Roeder, Wu, Duvenaud. Sticking the Landing. NeurIPS 2017. arXiv:1703.09194, section 4, for the path
            gradient, and for scaling the score term.
        [2] Geffner, Domke. Using Large Ensembles of Control Variates for Variational Inference. NeurIPS 2018.
            arXiv:1810.12482, for control variates whose weights come from previous gradients.
    """

    count: Tensor
    square: Tensor
    moments: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.largest_multiple = 1.0
        self.num_refused = 0
        self.refused_draw: Tensor | None = None
        self.is_fresh = False
        # Not saved: they are re-estimated within some dozens of steps.
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("square", torch.zeros(dim), persistent=False)  # of the gradient
        # Running means of the gradient, of its product with the score of q, and of that score's square.
        self.register_buffer("moments", torch.zeros(3, dim), persistent=False)

    def watch(self, value: Tensor, score: Tensor, log_q: Tensor, through: Tensor, by_context: Tensor) -> Tensor:
        """Draws with the same values, ``(..., D)``, whose gradient is filtered.

        Args:
            value: The draws.
            score: ``s``, ``(..., D)``.
            log_q: Their log density up to a constant, differentiable in all parameters, ``(...)``.
            through: The context through which the density depends on earlier latents, or an empty tensor.
            by_context: The score in that context.
        """
        draws: Tensor = _Filtered.apply(value, log_q, through, score, by_context, self)  # type: ignore[no-untyped-call]
        return draws

    def clip(self, value: Tensor) -> None:
        """Clip the gradient of draws without a score, ``(..., D)``."""
        if value.requires_grad:
            draw = value.detach()  # not the draw itself, which would hold on to its own graph
            value.register_hook(lambda gradient: self._clipped(gradient, draw))

    @torch.no_grad()
    def _clipped(self, gradient: Tensor, draw: Tensor) -> Tensor:
        """The gradient, ``(..., D)``, with outliers clipped."""
        if not is_recording():
            self.is_fresh = True
            finite = gradient.isfinite()
            if not finite.all():
                if self.refused_draw is None:
                    row = int((~finite).any(-1).flatten().int().argmax())
                    self.refused_draw = draw.reshape(-1, draw.shape[-1])[row].clone()
                self.num_refused += 1
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        square = gradient.square().reshape(-1, gradient.shape[-1]).mean(0)
        before = self.square.clone()
        usual = torch.where(before > 0.0, before, square)
        largest = FILTER.largest * usual.sqrt()
        gradient = gradient.clamp(-largest, largest)
        self.square.copy_(torch.lerp(usual, torch.minimum(square, largest.square()), FILTER.weight))
        return gradient

    @torch.no_grad()
    def _multiple(self, gradient: Tensor, score: Tensor) -> Tensor:
        """``c``, ``()``; updates the running means by these gradients and scores, ``(..., D)``."""
        # From previous draws, so that it does not depend on these: the mean of the gradient is unchanged.
        _, product, square = before = self.moments.clone()
        # All coordinates have equal weight, once there were enough draws to estimate the size of their scores.
        units = square + square.mean() / self.count.clamp_min(1.0)
        multiple = (product / units).sum() / (square / units).sum()
        rows, score = gradient.reshape(-1, gradient.shape[-1]), score.reshape(-1, score.shape[-1])
        count = self.count + 1.0
        found = torch.stack([rows, (rows - before[0]) * score, score.square()]).mean(1)
        self.count.copy_(count)
        self.moments.copy_(torch.lerp(before, found, count.reciprocal().clamp_min(FILTER.weight)))
        return multiple.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, self.largest_multiple)


class _Filtered(torch.autograd.Function):
    """Draws, unchanged, with the gradient of :class:`GradientFilter`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, log_q: Tensor, through: Tensor, *others: Any) -> Tensor:
        score, by_context, ctx.filter = others
        ctx.shape = log_q.shape
        ctx.save_for_backward(value, score, by_context)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, score, by_context = ctx.saved_tensors
        gradient = ctx.filter._clipped(gradient, value)
        multiple = ctx.filter._multiple(gradient, score)
        return (
            torch.addcmul(gradient, score, multiple, value=-1.0),
            multiple.expand(ctx.shape),
            -multiple * by_context,
            None,
            None,
            None,
        )
