# SPDX-License-Identifier: Apache-2.0
"""L1. The interface of a flow transform, and the two objects that callers use: the transform
and the transform bound to a context. Forward always means base noise -> latent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_flows._checks import checked, shown
from pyro_flows._recording import is_recording

__all__ = [
    "BoundTransform",
    "FlowTransform",
    "as_rows",
    "check_context",
    "expand_context",
    "is_jit_tracing",
    "is_readable",
]


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording operations, as under Pyro's ``JitTrace_ELBO``."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_readable(x: Tensor) -> bool:
    """Whether Python may read the values of a tensor: not while tracing, nor under ``torch.func``."""
    return not (is_recording() or torch._C._functorch.is_functorch_wrapped_tensor(x))


class FlowTransform(TransformModule):
    r"""A learnable bijection of :math:`\mathbb{R}^D`, optionally conditional on a context vector.

    This is Pyro's ``TransformModule`` with two additions that variational inference needs: the map and its
    log-determinant come from one pass and nothing is cached on the module (Pyro's transforms keep the last graph
    alive, which breaks ``copy.deepcopy`` and holds memory), and the score of the transformed density can be
    pushed through the map, which gives path gradients without a second density evaluation.

    Implementing a transform:

    - :meth:`forward_and_ladj` is required.
    - :meth:`inverse_and_ladj` is required unless ``has_inverse`` is false.
    - :meth:`forward_with_score` is optional where an inverse exists, and required where none does, unless
      ``has_score`` is false; flows with such a part use ordinary gradients.
    - A parameter that a warm start sets and training does not change is a
      :class:`~pyro_flows.transforms.FixedParameter`, which the map detaches.
    - ``one_pass_inverse`` says whether an inverse takes one pass for any value, as ``torch.jit.trace`` requires.

    Shape:
        - x, y, score: ``batch_shape + (input_dim,)``.
        - context: ``(..., context_dim)``, broadcastable against ``batch_shape``; None if ``context_dim == 0``.
        - ladj: ``batch_shape``.

    Args:
        input_dim: Length of the transformed vector, :math:`D \ge 1`.
        context_dim: Length of the context vector. 0 means unconditional.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    has_inverse: ClassVar[bool] = True
    has_score: ClassVar[bool] = True
    one_pass_inverse: ClassVar[bool] = True

    @checked()
    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.context_dim = context_dim

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map base to latent; returns ``(y, log|det dy/dx|)``."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent to base; returns ``(x, log|det dx/dy|)``."""
        raise NotImplementedError(
            f"{type(self).__name__}: expected a value drawn from this flow, but got another one, and the map has no "
            "inverse in closed form. Use a family with `has_inverse` to score arbitrary values."
        )

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Map base to latent and propagate the score.

        With :math:`g_x = \nabla_x \log q(x)` the density of ``y`` has the score
        :math:`g_y = J^{-\top}(g_x - \nabla_x \log|\det J|)` (Vaitl et al. 2024, algorithm 1).

        Args:
            x: Input that requires grad; parameters receive gradients through ``y`` and ``ladj`` only.
            score: :math:`g_x`, detached.
            context: As in :meth:`forward_and_ladj`.

        Returns:
            ``(y, ladj, g_y)``, the last one detached.

        References:
            Vaitl, Winkler, Richter, Kessel. Fast and unified path gradient estimators for normalizing flows.
            ICLR 2024. arXiv:2403.15881.
        """
        y, ladj = self.forward_and_ladj(x, context)
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            x_of_y, ladj_of_y = self.inverse_and_ladj(leaf, None if context is None else context.detach())
            log_density = (x_of_y * score).sum() + ladj_of_y.sum()
        (score_y,) = torch.autograd.grad(log_density, leaf)
        return y, ladj, score_y

    def condition(self, context: Tensor | None) -> BoundTransform:
        """Fix the context; the result is an ordinary ``torch.distributions`` transform.

        Raises:
            ValueError: If the context is missing, too much, or of another length.
        """
        check_context(type(self).__name__, self.context_dim, context)
        return BoundTransform(self, context)

    @property
    def sign(self) -> int:
        """Not known. Raises AttributeError, since torch.jit.trace_module asks every module whether it has this."""
        raise AttributeError(f"{type(self).__name__} does not know the sign of its Jacobian's determinant.")

    # Pyro's interface, for use without a context.

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_ladj(self._checked(x))[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(self._checked(y))[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.forward_and_ladj(self._checked(x))[1]

    def _checked(self, vectors: Any) -> Tensor:
        """The vectors, of the right length, for a map without a context."""
        if not torch.is_tensor(vectors) or vectors.shape[-1:] != (self.input_dim,):
            found = tuple(vectors.shape) if torch.is_tensor(vectors) else shown(vectors)
            raise ValueError(
                f"{type(self).__name__}: expected a tensor of shape (..., {self.input_dim}), but got {found}. Build "
                "the transform with the length of your vectors."
            )
        check_context(type(self).__name__, self.context_dim, None)
        return vectors


class BoundTransform(Transform):
    """A :class:`FlowTransform` with its context fixed, which caches the last pair that it mapped.

    A new one is made for each distribution, so the cache (which holds a graph) is freed with that distribution, and
    ``transform(x)`` followed by ``transform.log_abs_det_jacobian(x, y)`` costs one pass.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, transform: FlowTransform, context: Tensor | None = None) -> None:
        super().__init__()
        self.transform = transform
        self.context = context
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.transform.forward_and_ladj(x, self.context)
        self._last = (x, y, ladj)
        return y

    def call_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Like a call, but also returns the score of ``y``; see :meth:`FlowTransform.forward_with_score`."""
        y, ladj, score = self.transform.forward_with_score(x, score, self.context)
        self._last = (x, y, ladj)
        return y, score

    def replace_last(self, y: Tensor) -> Tensor:
        """Replace the cached ``y`` by a tensor of the same value; returns it."""
        assert self._last is not None
        self._last = (self._last[0], y, self._last[2])
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        if self._last is not None and self._last[1] is y:
            return self._last[0]
        x, ladj = self.transform.inverse_and_ladj(y, self.context)
        self._last = (x, y, -ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] is not y:
            self._call(x)
        assert self._last is not None
        return self._last[2]


def check_context(owner: str, context_dim: int, context: Any) -> None:
    """Raise ValueError unless a context has the length ``context_dim``, or is None and that is 0."""
    is_vector = torch.is_tensor(context) and context.dim() > 0
    if context_dim != (context.shape[-1] if is_vector else 0 if context is None else None):
        found = "none" if context is None else shown(context)
        if torch.is_tensor(context):
            found = f"shape {tuple(context.shape)}"
        raise ValueError(
            f"{owner}: expected a context of length {context_dim}, but got {found}. Build it with context_dim equal to "
            "the context's last dimension, and give the context with `.condition(context)` or `flow(context)`."
        )


def expand_context(context: Tensor, x: Tensor) -> Tensor:
    """Broadcast ``(..., context_dim)`` over the batch shape of ``x``."""
    return context.expand(x.shape[:-1] + context.shape[-1:])


def as_rows(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Vectors as ``(N, D)``, and a context for each; else every linear layer would reshape a single vector."""
    around = None if context is None else expand_context(context, x).reshape(-1, context.shape[-1])
    return x.reshape(-1, x.shape[-1]), around
