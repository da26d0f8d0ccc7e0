# SPDX-License-Identifier: Apache-2.0
"""L7. :class:`WeightedLoss`: losses whose gradient weighs each draw of the guide by its importance weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows._recording import is_recording
from pyro_flows.flows import FlowDistribution
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.traces import REFUSALS, Call, by_draw, mini_batches, rows_of, sample_nodes
from pyro_flows.training.elbo import VectorizedTrace_ELBO

__all__ = ["FORWARD_KL", "IMPORTANCE_WEIGHTED", "WeightedLoss"]

IMPORTANCE_WEIGHTED = "importance_weighted"
FORWARD_KL = "forward_kl"


class WeightedLoss(VectorizedTrace_ELBO):
    r"""A loss of K draws :math:`z_k` of the guide that are weighted against each other.

    ``"importance_weighted"`` is the negative bound of [1], eq. (8), which is closer to the log evidence than the ELBO.
    With :math:`w_k = p(x, z_k) / q(z_k)` and :math:`\tilde w_k = w_k / \sum_j w_j`,

    .. math::
        -\mathcal L_K = -\log \frac1K \sum_k w_k, \qquad
        -\nabla_\theta \mathcal L_K \approx -\sum_k \tilde w_k^2
        \Big(\frac{\partial z_k}{\partial \theta}\Big)^{\!\top} \nabla_{z_k} \log w_k,

    the doubly reparameterized gradient IWAE-DReG of [2], which is unbiased and vanishes where q is the posterior.

    ``"forward_kl"`` is :math:`\operatorname{KL}(p \,\|\, q)`, from the posterior to the guide. The draws are those of a
    wider distribution r with heavy tails, :class:`~pyro_flows.flows.noise.WideNormal` through the flow, since the
    guide's own hardly show what it does not cover. With :math:`\tilde w_k \propto p(x, z_k) / r(z_k)` and
    :math:`\tilde v_k \propto q(z_k) / r(z_k)`, each normalized,

    .. math::
        \operatorname{KL}(p \,\|\, q) \approx \sum_k \tilde w_k \log \frac{p(x, z_k)}{q(z_k)}
        - \log \frac{\sum_k p(x, z_k) / r(z_k)}{\sum_k q(z_k) / r(z_k)}, \qquad
        \nabla_\theta \approx -\sum_k (\tilde w_k - \tilde v_k) \nabla_\theta \log q(z_k).

    The part with :math:`\tilde w_k` is the wake-phase update of q in [3], section 2; the one with :math:`\tilde v_k`
    estimates zero, and has the gradient vanish for any draws where q is the posterior, as the divergence does. Both
    have a bias of order 1 / K, and fail where hardly any draw has a weight, as they do in many dimensions [4].

    Parameters of the model get :math:`-\sum_k \tilde w_k \nabla \log p(x, z_k)`. A guide whose draws carry no path
    gradient gets the ordinary gradient of the bound; one without a normal base is its own r.

    Args:
        batched: The model at many draws.
        kind: ``"importance_weighted"`` or ``"forward_kl"``.
        num_draws: K, >= 2.
        num_sets: Number of sets of K draws, over which the loss is averaged, >= 1.

    References:
        [1] Burda, Grosse, Salakhutdinov. Importance weighted autoencoders. ICLR 2016. arXiv:1509.00519.
        [2] Tucker, Lawson, Gu, Maddison. Doubly reparameterized gradient estimators for Monte Carlo objectives. ICLR
            2019. arXiv:1810.04152.
        [3] Bornschein, Bengio. Reweighted wake-sleep. ICLR 2015. arXiv:1406.2751. Also Le, Kosiorek, Siddharth, Teh,
            Wood. Revisiting reweighted wake-sleep. UAI 2019. arXiv:1805.10469.
        [4] Geffner, Domke. On the difficulty of unbiased alpha divergence minimization. ICML 2021. arXiv:2010.09541.
    """

    def __init__(self, batched: BatchedModel, kind: str, num_draws: int, num_sets: int = 1) -> None:
        super().__init__(num_draws * num_sets)
        self._batched, self._is_given = batched, True
        self._nesting = batched.nesting
        self.max_plate_nesting = batched.nesting + 1
        self.kind = kind
        self.num_sets = num_sets

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The loss, whose derivative is the gradient above; it can be recorded."""
        drawn = _Draws(widened=self.kind == FORWARD_KL)(guide)
        guide_trace, values = self._draw(drawn, args, kwargs)
        nodes, call = list(sample_nodes(guide_trace).values()), Call(args, kwargs, mini_batches(guide_trace))
        evaluate = self._bound if self.kind == IMPORTANCE_WEIGHTED else self._forward_kl
        value, surrogate = evaluate(model, values, nodes, call)
        return value + (surrogate - surrogate.detach())

    def _bound(
        self, model: Callable[..., Any], values: dict[str, Tensor], nodes: list[dict[str, Any]], call: Call
    ) -> tuple[Tensor, Tensor]:
        """The negative bound, and a function with its gradient."""
        # Of their own, so that the gradients which the model sends back can be weighted.
        values = {name: value.view_as(value) for name, value in values.items()}
        log_p = self._log_joint(model, values, call)
        log_q = self._total(node["log_prob"] for node in nodes)
        log_weights = self._by_set(log_p - log_q).detach()
        weights = log_weights.softmax(-1).reshape(-1)
        terms = weights * (log_p - log_q)
        if all(map(_is_path, nodes)):
            for value in values.values():
                if value.requires_grad:
                    value.register_hook(lambda gradient: gradient * _like(weights, gradient))
            path = self._total(node["score_parts"].entropy_term for node in nodes)
            terms = weights * (log_p - weights * path)
        bound = log_weights.logsumexp(-1).mean() - math.log(log_weights.shape[-1])
        return -bound, -_sum_of_weighted(terms, weights) / self.num_sets

    def _forward_kl(
        self, model: Callable[..., Any], values: dict[str, Tensor], nodes: list[dict[str, Any]], call: Call
    ) -> tuple[Tensor, Tensor]:
        """The forward KL, and a function with its gradient."""
        log_p = self._log_joint(model, {name: value.detach() for name, value in values.items()}, call)
        log_q = self._total(node["log_prob"] for node in nodes)
        log_ratio = torch.zeros_like(log_q) + sum(_log_ratio(node) for node in nodes)
        by_q = self._by_set(log_p - log_q).detach()
        of_p, of_q = by_q - self._by_set(log_ratio), -self._by_set(log_ratio)
        weights, others = of_p.softmax(-1).reshape(-1), of_q.softmax(-1).reshape(-1)
        if all(map(_is_path, nodes)):  # what is left is the gradient at fixed draws
            at_draws = log_q - self._total(node["score_parts"].entropy_term for node in nodes)
        else:
            free = [node for node in nodes if not isinstance(node["fn"], dist.Delta)]
            at_draws = self._total(node["fn"].log_prob(node["value"].detach()) for node in free)
        log_evidence = (of_p.logsumexp(-1) - of_q.logsumexp(-1)).mean()
        mean = _sum_of_weighted(weights * by_q.reshape(-1), weights) / self.num_sets
        terms = weights * log_p + (weights - others) * at_draws
        return mean - log_evidence, -_sum_of_weighted(terms, weights + others) / self.num_sets

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, as a number; its gradient is added to ``grad`` of all parameters."""
        value = self.differentiable_loss(model, guide, *args, **kwargs)
        value.backward()
        return float(value.detach())

    def _total(self, terms: Iterable[Tensor]) -> Tensor:
        """Sum of terms of sites of the guide, with the draws' dimension or without it, ``(S,)``."""
        return torch.stack([by_draw(rows_of(term, self._nesting, self.num_particles)) for term in terms]).sum(0)

    def _by_set(self, terms: Tensor) -> Tensor:
        """``(S,)`` to ``(num_sets, K)``."""
        return terms.reshape(self.num_sets, -1)

    def _log_joint(self, model: Callable[..., Any], values: dict[str, Tensor], call: Call) -> Tensor:
        """Log joint densities ``(S,)``; minus infinity at draws at which the model raises, up to a tenth of them."""
        assert self._batched is not None
        trace = self._batched(values, call, model)
        log_p = torch.stack([by_draw(node["log_prob"]) for node in sample_nodes(trace).values()]).sum(0)
        if is_recording():
            return log_p
        refused = log_p.isnan()
        few = refused.to(log_p.dtype).mean() <= REFUSALS.max_share
        return torch.where(refused & few, -math.inf, log_p)


class _Draws(Messenger):
    """Draws whose gradients are not filtered, which suits the ELBO only, nor stratified, since weighted gradients need
    independent ones; for the forward KL from wider distributions."""

    def __init__(self, *, widened: bool) -> None:
        super().__init__()
        self.widened = widened

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], FlowDistribution):
            msg["fn"] = msg["fn"].widened() if self.widened else msg["fn"].unfiltered()


def _sum_of_weighted(terms: Tensor, weights: Tensor) -> Tensor:
    """Sum over the draws that have a weight: the others may have no density."""
    return torch.where(weights > 0.0, terms, 0.0).sum()


def _log_ratio(node: dict[str, Any]) -> Tensor | float:
    """Log density by which a site of the guide is drawn, less its own."""
    return node["fn"].log_ratio if isinstance(node["fn"], FlowDistribution) else 0.0


def _is_path(node: dict[str, Any]) -> bool:
    """Whether the entropy term of a site of the guide has the path gradient."""
    fn = node["fn"]
    return isinstance(fn, dist.Delta) or (isinstance(fn, FlowDistribution) and fn.has_path)


def _like(factor: Tensor, gradient: Tensor) -> Tensor:
    """Factors ``(S,)``, for a product with ``(S, ...)``."""
    return factor.reshape(-1, *(1,) * (gradient.dim() - 1))
