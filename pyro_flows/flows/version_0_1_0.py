# SPDX-License-Identifier: Apache-2.0
"""L2. Conversion of parameters saved by version 0.1.0. The distribution is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyro_flows.transforms import FullPrecisionHead, PlateHead, SiteOrderedAffine
from pyro_flows.transforms.coupling import Couplings
from pyro_flows.transforms.heads.base import Head, encode_gaussian
from pyro_flows.transforms.networks import Packed

__all__ = ["from_0_1_0", "is_from_0_1_0", "names_in_0_1_0"]

# In 0.1.0 heads stored log-scales and shifts in these units, site-ordered maps shifts in the latter; and this was the
# bound on conditional log-scales, which was not stored.
LOG_SCALE_UNIT, SHIFT_UNIT, LOG_SCALE_BOUND = 5.0, 3.0, 7.0


def is_from_0_1_0(state: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether 0.1.0 saved this state: a head had three rows, and now has two.

    Args:
        state: Name -> value of a module's parameters.
        module: Module that contains the flows.
    """
    rows = [state.get(f"{prefix}raw.value") for prefix, part in _layers(module) if isinstance(part, Head)]
    return any(value is not None and len(value) == 3 for value in rows)


def names_in_0_1_0(module: nn.Module) -> list[str]:
    """Names of a module's parameters in 0.1.0, in its order."""
    renamed = {
        f"{prefix}{name}": [f"{prefix}{former}" for former in names]
        for prefix, part in _layers(module)
        for name, names in _renamed(part).items()
    }
    return [former for name, _ in module.named_parameters() for former in renamed.get(name, [name])]


@torch.no_grad()
def from_0_1_0(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Convert a module's state from 0.1.0 to this version.

    Args:
        state: Name -> value in 0.1.0 of all parameters, with or without buffers.
        module: Module that contains the flows, as built by this version.

    Raises:
        ValueError: If this version has other layers for the model, or none that make the same distribution.
    """
    found = dict(state)
    for prefix, part in _layers(module):
        renamed = _renamed(part)
        formers = [former for names in renamed.values() for former in names]
        before = {former: found.pop(f"{prefix}{former}", None) for former in formers}
        absent = [former for former, value in before.items() if value is None]
        if absent:
            raise _refusal(f"it has no '{prefix}{absent[0]}'")
        if f"{prefix}raw.trunk.0.weight" in found:
            raise _refusal(f"location and scale of '{prefix}raw' follow a context, by a network that has no equal here")
        after = _converted(part, {name: value for name, value in before.items() if value is not None}, prefix)
        found.update({f"{prefix}{name}": value for name, value in after.items()})
    known = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for name in found:
        if name not in known:
            raise _refusal(f"there is no '{name}' here")
    for name, parameter in module.named_parameters():
        if name not in found:
            raise _refusal(f"it has no '{name}'")
        if found[name].shape != parameter.shape:
            raise _refusal(f"'{name}' has shape {tuple(found[name].shape)} there and {tuple(parameter.shape)} here")
    return found


def _refusal(reason: str) -> ValueError:
    return ValueError(
        "AutoFlowGuide: expected parameters of version 0.1.0 that a guide of this version can take over, but "
        f"{reason}. Pass the flow, the model and the data that they were stored with; if these are the same, this "
        "version gives the model other layers: train the guide afresh, or keep version 0.1.0 for this file."
    )


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose parameters have changed, with the prefix of their names."""
    for name, part in module.named_modules():
        if isinstance(part, (Head, Couplings, SiteOrderedAffine)):
            yield f"{name}." if name else "", part


def _renamed(part: nn.Module) -> dict[str, list[str]]:
    """Parameters of a layer -> those of 0.1.0 that they are made of, in its order; none of what is new."""
    if isinstance(part, Couplings):
        return {"packed.flat": _networks(len(part.packed.shapes) // 2)}
    if isinstance(part, SiteOrderedAffine):
        _, below, *steering = part.packed.shapes
        names = ["log_scale", *(["below_diagonal"] if below.numel() else [])]
        if steering:
            names += ["heads", "shift", "linear", *([] if part.rank is None else ["project"])]
            names += _networks((len(steering) - 4) // 2)
        return {"log_scale_bound": [], "packed.flat": names}
    new: dict[str, list[str]] = {"unit": [], "log_scale_bound": []} if isinstance(part, PlateHead) else {}
    if isinstance(part, FullPrecisionHead):
        new = {"origin": ["origin"], "skew": [], "rest": []}
    return {**new, "raw.value": ["raw.value"]}


def _networks(num_layers: int) -> list[str]:
    """Weights and biases of a stack of networks."""
    return [f"{kind}.{layer}" for kind in ("weights", "biases") for layer in range(num_layers)]


def _converted(part: nn.Module, before: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters of a layer from those of 0.1.0."""
    if isinstance(part, Head):
        value = before["raw.value"]
        if value.shape != (3, part.input_dim):
            raise _refusal(f"'{prefix}raw.value' has shape {tuple(value.shape)}, not {(3, part.input_dim)}")
        loc, log_scale, shift = value.double()
        scale = (LOG_SCALE_UNIT * log_scale).exp()
        after = {"raw.value": encode_gaussian(torch.addcmul(loc, scale, shift, value=SHIFT_UNIT), scale).to(value)}
        if isinstance(part, PlateHead):
            # Items' locations were stored in units of the scales of the Gaussian that they share.
            after |= {"unit": scale.to(value), "log_scale_bound": value.new_tensor(LOG_SCALE_BOUND)}
        if isinstance(part, FullPrecisionHead):
            # They were those of the coordinates, and are now of the likelihood's directions: they become the origin.
            after = _as_origin(part, after["raw.value"], before["origin"])
            after |= {name: torch.zeros_like(part.skew.data) for name in ("skew", "rest")}
        return after
    assert isinstance(part, (Couplings, SiteOrderedAffine))
    num_layers = sum(name.startswith("weights") for name in before)
    inner = [before[f"{kind}.{layer}"] for layer in range(num_layers) for kind in ("weights", "biases")]
    if isinstance(part, Couplings):
        return {"packed.flat": _packed(part.packed, inner, prefix)}
    log_scale = before["log_scale"]
    tensors = [log_scale, before.get("below_diagonal", log_scale[:0])]
    if "heads" in before:
        tensors += [before["heads"], SHIFT_UNIT * before["shift"], before["linear"]]
        tensors += [before.get("project", log_scale.new_zeros(part.packed.shapes[5])), *inner]
    bound = log_scale.new_tensor(LOG_SCALE_BOUND)
    return {"log_scale_bound": bound, "packed.flat": _packed(part.packed, tensors, prefix)}


def _as_origin(head: FullPrecisionHead, raw: Tensor, origin: Tensor) -> dict[str, Tensor]:
    """The same head, with locations and scales of pooled coordinates in its origin."""
    pooled = head.order[head.count_free :]
    loc, _, log_scale = head.decode(raw[:, pooled], origin[:, pooled])
    after = torch.stack([loc, log_scale])
    standard = encode_gaussian(torch.zeros_like(loc), torch.ones_like(loc))
    return {"raw.value": raw.index_copy(-1, pooled, standard), "origin": origin.index_copy(-1, pooled, after)}


def _packed(packed: Packed, tensors: list[Tensor], prefix: str) -> Tensor:
    shapes = [tensor.shape for tensor in tensors]
    if shapes != packed.shapes:
        raise _refusal(f"'{prefix}' has shapes {[*map(tuple, shapes)]} there and {[*map(tuple, packed.shapes)]} here")
    return torch.cat([tensor.flatten() for tensor in tensors])
