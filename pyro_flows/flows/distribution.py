# SPDX-License-Identifier: Apache-2.0
"""L2. The distribution of a flow (:class:`FlowDistribution`). The only file that knows how Pyro receives path
gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor

from pyro_flows._checks import shown
from pyro_flows.flows.gradient_filter import GradientFilter
from pyro_flows.flows.noise import base_score
from pyro_flows.transforms import BoundTransform, FlowTransform
from pyro_flows.transforms.base import is_jit_tracing

__all__ = ["FlowDistribution"]


@dataclass(frozen=True)
class MeanSettings:
    """Settings of the estimate of a flow's mean, where gradients are centered.

    Attributes:
        num_draws: Number of draws of the estimate.
    """

    num_draws: int = 128


MEAN = MeanSettings()


class FlowDistribution(dist.TransformedDistribution):
    r"""Distribution of base noise that is transformed by a flow.

    ``log_prob`` is the ordinary density, differentiable in the value and in the parameters. Pyro's ELBOs take their
    gradient from ``score_parts(value).entropy_term``; for this distribution's own draw it has the value
    :math:`\log q(z)` and the *path* gradient

    .. math::
        \nabla_\theta = \Big(\frac{\partial z}{\partial \theta}\Big)^{\!\top} \nabla_z \log q(z),

    which omits the score term: its mean is zero, its variance is not, and without it the gradient of the ELBO
    vanishes for every draw where q is the posterior ("sticking the landing"). Parameters of the base enter through
    their effect on the noise. Any other value, such as a replayed one, gets the ordinary density.

    Args:
        base_dist: Noise with event shape ``(input_dim,)``; its draws have path derivatives.
        transform: The flow's map.
        context: Optional context, ``batch_shape + (context_dim,)``.
        path_gradient: Whether draws carry the path gradient. Needs grad mode; skipped under ``torch.no_grad()``
            and where ``transform.has_score`` is false.
        parents: Latents drawn earlier, of which the context is a function. The path gradient then includes their effect
            on this density, and omits the effect that parameters have on it through the context.
        gradient_filter: Filter that is applied to the gradients in draws in the backward pass.

    References:
        Roeder, Wu, Duvenaud. Sticking the Landing. NeurIPS 2017. arXiv:1703.09194, eq. (8).
    """

    def __init__(
        self,
        base_dist: dist.TorchDistribution,
        transform: FlowTransform,
        context: Tensor | None = None,
        path_gradient: bool = True,
        parents: tuple[Tensor, ...] = (),
        gradient_filter: GradientFilter | None = None,
    ) -> None:
        self._filter = gradient_filter
        if parents and context is not None:
            context = context.expand(base_dist.batch_shape + context.shape[-1:])  # a score for every element
        self._bound = BoundTransform(transform, context)
        self._parents = parents
        self._path_gradient = path_gradient and transform.has_score
        self._centered = False
        # (value, its score if known, the context and the score in it if it has parents)
        self._draw: tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None] | None = None
        super().__init__(base_dist, [self._bound])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of any value, ``batch_shape``; that of its own last draw takes no second pass.

        Raises:
            TypeError: If the value has a dtype that the flow can't take.
            ValueError: If the value is no tensor, or its last dimension is not the flow's.
        """
        if not torch.is_tensor(value) or value.shape[-1:] != self.event_shape:
            found = tuple(value.shape) if torch.is_tensor(value) else shown(value)
            raise ValueError(
                f"FlowDistribution: expected value to be a tensor of shape (..., {self.event_shape[0]}), but got "
                f"{found}. Build the flow with the length of your vectors."
            )
        try:
            return super().log_prob(value)
        except RuntimeError as error:
            dtype = next(self._bound.transform.parameters()).dtype
            if value.dtype == dtype:
                raise
            raise TypeError(
                f"FlowDistribution: expected value of dtype {dtype}, the flow's own, but got {value.dtype}. Write "
                f"value.to({dtype}), or convert the flow."
            ) from error

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> FlowDistribution:
        base_dist = self.base_dist.expand(batch_shape)
        bound = self._bound
        other = FlowDistribution(
            base_dist, bound.transform, bound.context, self._path_gradient, self._parents, self._filter
        )
        other._centered = self._centered
        return other

    def centered(self) -> FlowDistribution:
        r"""This distribution with a control variate for the noise that all draws along the first dimension share.

        The gradients :math:`u_p` in the draws :math:`z_p` of one mini-batch share most of their noise, which is that of
        subsampling. It enters the estimator :math:`\sum_p (\partial z_p / \partial\theta)^\top u_p`, which is replaced
        by

        .. math::
            \sum_p \Big(\frac{\partial z_p}{\partial\theta}\Big)^{\!\top} \Big(u_p - \frac{1}{P - 1}
            \sum_{r \neq p} u_r\Big) + \Big(\frac{\partial \bar z}{\partial\theta}\Big)^{\!\top} \sum_p u_p,

        with :math:`\bar z` the mean of many more draws, on which the model is not run. The expectation is the same, and
        the shared noise affects locations only.
        """
        other = self.expand(self.base_dist.batch_shape)
        other._centered = True
        return other

    def stratified(self) -> FlowDistribution:
        """This distribution with draws stratified along the first dimension; see ``StratifiedNormal``.

        The marginal distribution of each draw is unchanged. A base other than the normal is left unchanged.
        """
        other = self.expand(self.base_dist.batch_shape)
        if other._is_normal:
            other.base_dist = other.base_dist.base_dist.stratified().to_event(1)
        return other

    def unfiltered(self) -> FlowDistribution:
        """This distribution without a gradient filter, which suits gradients of the ELBO only."""
        other = self.expand(self.base_dist.batch_shape)
        other._filter = None
        return other

    def widened(self) -> FlowDistribution:
        """This distribution with draws from a wider one, of noise with heavy tails; see ``WideNormal``.

        A base other than the normal is left unchanged. The gradient is not filtered.
        """
        other = self.unfiltered()
        if other._is_normal:
            other.base_dist = other.base_dist.base_dist.widened().to_event(1)
        return other

    @property
    def log_ratio(self) -> Tensor | float:
        """Log density of the wider distribution, less this one's, of the last draws, ``(S,)``."""
        return getattr(self.base_dist.base_dist, "log_ratio", 0.0)

    @property
    def has_path(self) -> bool:
        """Whether the last draw carries the path gradient."""
        return self._draw is not None

    @property
    def _is_normal(self) -> bool:
        return getattr(getattr(self.base_dist, "base_dist", None), "is_standard_normal", False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        if not isinstance(sample_shape, torch.Size):
            sample_shape = _as_size(sample_shape)
        eps = self.base_dist.rsample(sample_shape)
        if not (self._path_gradient and torch.is_grad_enabled()):
            self._draw = None
            value = self._bound(eps)
            if self._filter is not None and not is_jit_tracing():
                self._filter.clip(value)
            return value
        if is_jit_tracing():  # no torch.autograd.grad inside torch.jit.trace
            value = self._bound(eps)
            scorable = self._bound.transform.one_pass_inverse and not self._parents
            self._draw = (value, None, None) if scorable else None
            return value
        value, score = self._bound.call_with_score(eps.requires_grad_(), base_score(self.base_dist, eps))
        if self._centered and self._bound.context is None and value.dim() > 1 and len(value) > 1:
            value = self._bound.replace_last(self._recentered(value))
        conditioned = None
        if not (self._parents and sample_shape):  # else one context for several draws: no score for each
            conditioned = self._conditioned(eps, value, score)
        if self._filter is not None:
            value = self._bound.replace_last(self._filtered(eps, value, score, conditioned))
        self._draw = None if self._parents and sample_shape else (value, score, conditioned)
        return value

    def _filtered(self, eps: Tensor, value: Tensor, score: Tensor, conditioned: tuple[Tensor, Tensor] | None) -> Tensor:
        """See :class:`GradientFilter`."""
        assert self._filter is not None
        log_q = -self._bound.log_abs_det_jacobian(eps, value)
        if not self._is_normal:  # whose density has no parameters
            log_q = log_q + self.base_dist.log_prob(eps)
        nothing = value.new_zeros(0)
        through, by_context = (nothing, nothing) if conditioned is None else conditioned
        return self._filter.watch(value, score, log_q, through, by_context)

    def _recentered(self, value: Tensor) -> Tensor:
        """See :meth:`centered`."""
        value.register_hook(lambda u: u - (u.sum(0, keepdim=True) - u) / (len(u) - 1))
        if self._is_normal:
            half = torch.randn(MEAN.num_draws // 2, value.shape[-1], dtype=value.dtype, device=value.device)
            eps = torch.cat([half, -half])
        else:
            rounds = math.ceil(MEAN.num_draws / self.batch_shape.numel())
            eps = self.base_dist.rsample(torch.Size([rounds])).reshape(-1, value.shape[-1])
        mean = self._bound.transform.forward_and_ladj(eps)[0].mean(0)
        return value + (mean - mean.detach())

    def _conditioned(self, eps: Tensor, value: Tensor, score: Tensor) -> tuple[Tensor, Tensor] | None:
        r"""The context, with a gradient in the parent latents only; and :math:`\nabla_c \log q(z | c)` at fixed z: the
        derivative at fixed noise, less the part through z."""
        context = self._bound.context
        if not self._parents or context is None or not context.requires_grad:
            return None
        ladj = self._bound.log_abs_det_jacobian(eps, value)
        less = -score, -torch.ones_like(ladj)
        (by_context,) = torch.autograd.grad((value, ladj), context, less, retain_graph=True)
        through: Tensor = _Through.apply(context, *self._parents)  # type: ignore[no-untyped-call]
        return through, by_context

    def rsample_and_log_prob(self, sample_shape: torch.Size = torch.Size()) -> tuple[Tensor, Tensor]:
        """A reparameterized draw and its log density, from one pass."""
        value = self.rsample(sample_shape)
        return value, self.log_prob(value)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Ingredients of Pyro's gradient estimators; see the class for the entropy term."""
        log_prob = self.log_prob(value)
        entropy_term = log_prob
        if self._draw is not None and self._draw[0] is value:
            _, score, conditioned = self._draw
            if score is None:
                entropy_term = self._frozen_log_prob(value)
            else:
                scores = (value, score, *(conditioned or ()))
                entropy_term = _WithScores.apply(log_prob.detach(), *scores)  # type: ignore[no-untyped-call]
        return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=entropy_term)

    def _frozen_log_prob(self, value: Tensor) -> Tensor:
        """Log density whose gradient flows through values only: the path gradient, for one inverse pass."""
        context = self._bound.context
        with _frozen(self._bound.transform) as transform:
            eps, ladj = transform.inverse_and_ladj(value, None if context is None else context.detach())
        path = (eps * base_score(self.base_dist, eps)).sum(-1)  # no gradient in parameters of the base
        return self.base_dist.log_prob(eps).detach() + (path - path.detach()) + ladj


def _as_size(sample_shape: Any) -> torch.Size:
    """A tuple of sizes as torch's own.

    Raises:
        TypeError: If it is none.
    """
    try:
        return torch.Size(sample_shape)
    except (TypeError, ValueError):
        raise TypeError(
            f"FlowDistribution: expected sample_shape to be a tuple of sizes, such as (5,), but got "
            f"{shown(sample_shape)}."
        ) from None


class _WithScores(torch.autograd.Function):
    """Log densities, ``(...)``, unchanged, with given derivatives in vectors: pairs of the two, ``(..., D)``."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return log_prob.view_as(log_prob)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows = gradient.unsqueeze(-1)
        return None, *(part for score in ctx.saved_tensors for part in (rows * score, None))


class _Through(torch.autograd.Function):
    """A tensor, unchanged, with a gradient in some tensors that it is a function of, and in nothing else."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *sources: Tensor) -> Tensor:
        ctx.tensor, ctx.sources = tensor, sources
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = torch.autograd.grad(ctx.tensor, ctx.sources, gradient, retain_graph=True, allow_unused=True)
        return None, *gradients


@contextmanager
def _frozen(module: FlowTransform) -> Iterator[FlowTransform]:
    """The module with its parameters detached. ``torch.func.functional_call`` does this, but not inside a trace."""
    slots = [(part._parameters, name, p) for part in module.modules() for name, p in part._parameters.items()]
    try:
        for parameters, name, p in slots:
            parameters[name] = None if p is None else p.detach()  # type: ignore[assignment]
        yield module
    finally:
        for parameters, name, p in slots:
            parameters[name] = p
