# SPDX-License-Identifier: Apache-2.0
"""L1. Adapters that make transforms of Pyro and torch parts of a flow."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pyro.distributions.transforms as T
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform, _InverseTransform

from pyro_flows._blame import user_level
from pyro_flows._checks import checked
from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.permutation import Permutation

__all__ = ["PyroTransform", "adapt"]

# Transforms that would give a wrong density: class, reason, remedy.
_REFUSED: tuple[tuple[type, str, str], ...] = (
    (
        T.Sylvester,
        "its log-determinant is not that of its map, so the ELBO can exceed the log evidence",
        'Use flow="sylvester".',
    ),
    (
        T.MatrixExponential,
        "its series is truncated, so its log-determinant is wrong for large weights and the ELBO can exceed the log "
        "evidence",
        'Use flow="full_rank_normal" or flow="sylvester".',
    ),
    (
        T.BatchNorm,
        "it is not a bijection while training: its map depends on the other draws",
        "Leave it out; the flow's affine head sets location and scale.",
    ),
)


def adapt(transform: Any, input_dim: int, context_dim: int = 0) -> list[FlowTransform]:
    """Convert what a user's function returned to transforms of this library, base side first.

    Compositions and lists are flattened; this library's transforms are left unchanged; Pyro's ``Permute`` becomes a
    :class:`Permutation`, which is saved in the ``state_dict``; everything else is wrapped in a :class:`PyroTransform`.

    Args:
        transform: A transform, or a list or tuple of them.
        input_dim: Length of the flow's vector.
        context_dim: Length of the flow's context vector. Foreign transforms ignore the context.

    Raises:
        TypeError: If any part is not a transform.
        ValueError: If a transform does not map vectors of length ``input_dim`` onto such vectors, or its density is
            known to be wrong.
    """
    if isinstance(transform, (list, tuple, nn.ModuleList)) and not isinstance(transform, Transform):
        return [part for member in transform for part in adapt(member, input_dim, context_dim)]
    if isinstance(transform, T.ComposeTransform):
        return [part for member in transform.parts for part in adapt(member, input_dim, context_dim)]
    if isinstance(transform, T.IndependentTransform) and transform.reinterpreted_batch_ndims == 1:
        return adapt(transform.base_transform, input_dim, context_dim)
    if isinstance(transform, FlowTransform):
        _check_dims(transform, input_dim, context_dim)
        return [transform]
    if isinstance(transform, T.Permute) and transform.event_dim == 1:
        found = len(transform.permutation)
        if found != input_dim:
            raise _wrong_dims(transform, input_dim, found)
        return [Permutation(input_dim, context_dim, permutation=transform.permutation)]
    return [PyroTransform(transform, input_dim, context_dim)]


class PyroTransform(FlowTransform):
    r"""Wrapper of a single Pyro or torch transform.

    Each log-determinant is computed right after its map, and the transform's caches are cleared afterwards: Pyro's
    caches keep the last graph alive, which breaks ``copy.deepcopy``, and some return a stale value. Elementwise
    log-slopes are summed. Tensors of a transform that is not a module are kept as buffers, so that they are saved and
    moved with the flow. There is no path gradient (``has_score`` is false); the ordinary gradient is used.

    Args:
        transform: A bijection of real vectors or, elementwise, of reals.
        input_dim: Length of the transformed vector.
        context_dim: Length of the context vector, which is ignored.

    Raises:
        TypeError: If ``transform`` is not a transform.
        ValueError: If it does not map vectors of length ``input_dim`` onto such vectors, or its density is known to be
            wrong.
    """

    has_score: ClassVar[bool] = False

    @checked()
    def __init__(self, transform: Transform, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        if not isinstance(transform, Transform):
            raise TypeError(
                f"PyroTransform: expected a torch.distributions Transform, but got {_name(transform)}. Return "
                "unconditional transforms, such as pyro.distributions.transforms.affine_autoregressive(input_dim)."
            )
        self.inverted = isinstance(transform, _InverseTransform)
        inner = transform.inv if self.inverted else transform
        _check_density(inner)
        _check_hidden_modules(inner)
        _check_domain(inner)
        self._values: list[str] = []
        if not isinstance(inner, nn.Module):
            for name, value in list(vars(inner).items()):
                if isinstance(value, nn.Parameter):
                    self.register_parameter(f"value_{name}", value)
                elif isinstance(value, Tensor):
                    self.register_buffer(f"value_{name}", value.detach().clone())
                else:
                    continue
                self._values.append(name)
        self.wrapped = inner
        self._probe()

    def _probe(self) -> None:
        """Map two points each way, to check dimensions and find out whether there is an inverse."""
        declared = getattr(self.wrapped, "input_dim", self.input_dim)
        if isinstance(declared, int) and declared != self.input_dim:
            raise _wrong_dims(self.wrapped, self.input_dim, declared)
        reference = next(self.parameters(), next(self.buffers(), torch.empty(0)))
        dtype = reference.dtype if reference.is_floating_point() else torch.get_default_dtype()
        points = torch.linspace(-0.9, 0.8, 2 * self.input_dim, dtype=dtype, device=reference.device)
        points = points.reshape(2, self.input_dim)
        with torch.no_grad():
            try:
                mapped = self.forward_and_ladj(points)[0]
            except (RuntimeError, ValueError, IndexError) as error:
                raise _wrong_dims(self.wrapped, self.input_dim, None) from error
            if mapped.shape != points.shape:
                raise _wrong_dims(self.wrapped, self.input_dim, mapped.shape[-1])
            try:
                self.inverse_and_ladj(mapped)
            except NotImplementedError:
                self.has_inverse = False  # type: ignore[misc]

    def _ladj(self, x: Tensor, y: Tensor) -> Tensor:
        """The transform's log-determinant, one number per vector."""
        ladj: Tensor = self.wrapped.log_abs_det_jacobian(x, y)
        if self.wrapped.domain.event_dim == 0:
            ladj = ladj.expand(x.shape).sum(-1)
        return ladj.expand(x.shape[:-1])

    def _there(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map and log-determinant in the wrapped transform's forward direction."""
        for name in self._values:
            setattr(self.wrapped, name, getattr(self, f"value_{name}"))
        try:
            y = self.wrapped(x)
            return y, self._ladj(x, y)
        finally:
            _clear_caches(self.wrapped)

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse direction; the log-determinant comes from a new forward pass, so that no cache can be stale."""
        for name in self._values:
            setattr(self.wrapped, name, getattr(self, f"value_{name}"))
        try:
            x = self.wrapped._inv_call(y)
        except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise NotImplementedError(
                f"{_name(self.wrapped)}: expected an inverse, but the transform cannot be inverted at this value "
                f"({type(error).__name__}: {error}). Use a family with `has_inverse` to score arbitrary values."
            ) from error
        finally:
            _clear_caches(self.wrapped)
        return x, -self._there(x)[1]

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._back(x) if self.inverted else self._there(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._there(y) if self.inverted else self._back(y)


def _name(value: Any) -> str:
    return type(value).__name__


def _wrong_dims(transform: Any, wanted: int, found: int | None) -> ValueError:
    got = "it fails on such a vector" if found is None else f"got length {found}"
    return ValueError(
        f"{_name(transform)}: expected a map of vectors of length {wanted} onto such vectors, but {got}. "
        "Build the transform from the input_dim that your function receives."
    )


def _check_dims(transform: FlowTransform, input_dim: int, context_dim: int) -> None:
    if transform.input_dim != input_dim:
        raise _wrong_dims(transform, input_dim, transform.input_dim)
    if transform.context_dim != context_dim:
        raise ValueError(
            f"{_name(transform)}: expected context_dim={context_dim}, but got {transform.context_dim}. "
            f"Build the transform with context_dim={context_dim}."
        )


def _check_density(transform: Transform) -> None:
    for refused, reason, remedy in _REFUSED:
        if isinstance(transform, refused):
            raise ValueError(f"{_name(transform)}: expected a transform whose density is right, but {reason}. {remedy}")
    if isinstance(transform, T.BlockAutoregressive) and transform.residual is None:
        warnings.warn(
            "BlockAutoregressive: without residual connections its range is bounded, so the guide's tails are cut off "
            'and importance weights fail. Pass residual="gated" or use flow="block_autoregressive".',
            UserWarning,
            stacklevel=user_level(),
        )


def _check_hidden_modules(transform: Transform) -> None:
    if isinstance(transform, nn.Module):
        return
    for value in vars(transform).values():
        for member in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(member, nn.Module):
                raise ValueError(
                    f"{_name(transform)}: expected a transform that registers its parameters, but it holds a "
                    f"{_name(member)} that no optimizer would see. Return the {_name(member)} itself, or a list."
                )


def _check_domain(transform: Transform) -> None:
    for side, constraint in (("domain", transform.domain), ("codomain", transform.codomain)):
        event_dim, base = constraint.event_dim, constraint
        while isinstance(base, constraints.independent):
            base = base.base_constraint
        if not transform.bijective or event_dim > 1 or not isinstance(base, type(constraints.real)):
            raise ValueError(
                f"{_name(transform)}: expected a bijection of real vectors, but its {side} is {constraint}"
                f"{'' if transform.bijective else ' and it is not bijective'}. The guide maps onto each site's support "
                "by itself; leave such transforms out."
            )


def _clear_caches(transform: Transform) -> None:
    """Clear what Pyro's transforms, and those nested in them, cache from the last call."""
    for part in transform.modules() if isinstance(transform, nn.Module) else (transform,):
        for name in list(vars(part)):
            if name == "_cached_x_y":
                part._cached_x_y = None, None
            elif name.startswith("_cache") and name != "_cache_size":
                setattr(part, name, None)
