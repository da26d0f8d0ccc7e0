# SPDX-License-Identifier: Apache-2.0
"""L2. Discrete sites that are summed out of the log joint, by Pyro's tensor variable elimination."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

__all__ = ["EnumerateSites", "PackedTerm", "check_enumeration", "enumerated_sites", "packed_terms", "sum_out"]

# Symbol of the dimension of the draws; Pyro takes letters from the beginning of the alphabet.
DRAWS_SYMBOL = "Z"


class EnumerateSites(EnumMessenger):
    """Pyro's enumeration, but also under ``torch.vmap``, which does not allow ``Tensor.data``; Pyro reads a shape from
    that."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if torch.is_tensor(value):
            msg["value"] = _Shaped(value.shape)
        super()._pyro_post_sample(msg)
        msg["value"] = value


class _Shaped:
    """Stand-in for a tensor, with only its shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.data = self

    def dim(self) -> int:
        return len(self.shape)


def enumerated_sites(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names of the sites that the model marks for enumeration -> ``"parallel"`` or ``"sequential"``."""
    return {name: node["infer"]["enumerate"] for name, node in nodes.items() if node["infer"].get("enumerate")}


def check_enumeration(owner: str, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse models whose enumerated sites cannot be summed out exactly.

    Args:
        owner: Name of the caller, for error messages.
        nodes: The model's sample sites.

    Raises:
        NotImplementedError: If a site is enumerated sequentially, or an enumerated site is scaled, since the sum does
            not commute with the scale.
    """
    ways = enumerated_sites(nodes)
    for name, way in ways.items():
        if way != "parallel":
            raise NotImplementedError(
                f"{owner}: expected sites to be enumerated in parallel, but '{name}' is enumerated one value after "
                "another. Write `model = config_enumerate(model)`."
            )
    for name, node in nodes.items():
        if ways and not (isinstance(node["scale"], float) and node["scale"] == 1.0):
            raise NotImplementedError(
                f"{owner}: expected a model that enumerates '{next(iter(ways))}' to have no scaled or subsampled "
                f"sites, but '{name}' is one. Run the model on its full plates."
            )


class PackedTerm(NamedTuple):
    """Dimensions of the log density of a site that depends on enumerated sites.

    Attributes:
        dims: Symbols of its dimensions beside that of the draws.
        plates: Symbols of the plates that the site is in.
        places: Symbol of a plate -> its dimension.
    """

    dims: str
    plates: frozenset[str]
    places: Mapping[str, int]


def packed_terms(
    trace: Trace, nodes: Mapping[str, Mapping[str, Any]], draws: str
) -> dict[str, tuple[Tensor, PackedTerm]]:
    """Log densities of sites that depend on enumerated sites, draws first if they are in a plate.

    Args:
        trace: A trace with log densities.
        nodes: Its sample sites.
        draws: Name of the plate of the draws, if they are in one.
    """
    trace.pack_tensors()
    symbols: dict[str, str] = trace.plate_to_symbol
    plates = {
        frame.name: frame.dim for node in nodes.values() for frame in node["cond_indep_stack"] if frame.vectorized
    }
    places = {symbols[name]: dim for name, dim in plates.items() if name != draws}
    own = symbols.get(draws, "")
    found = {}
    for name, node in nodes.items():
        term = node["packed"]["log_prob"]
        dims = term._pyro_dims
        if set(dims) - {own} <= set(places):
            continue
        if own and own in dims:
            term = term.movedim(dims.index(own), 0)
        inside = frozenset(symbols[frame.name] for frame in node["cond_indep_stack"] if frame.vectorized) - {own}
        found[name] = term, PackedTerm(dims.replace(own, "") if own else dims, inside, places)
    return found


def sum_out(terms: Mapping[str, Tensor], packed: Mapping[str, PackedTerm]) -> list[Tensor]:
    """Sum out enumerated sites; the resulting terms have draws first and then the plates' dimensions in Pyro's order.

    Args:
        terms: Site -> log density, ``(S, ...)``.
        packed: Site -> its dimensions.
    """
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    places: dict[str, int] = {}
    enumerated: set[str] = set()
    for name, (dims, plates, own) in packed.items():
        places.update(own)
        enumerated |= set(dims) - set(own)
        term = terms[name].view_as(terms[name])  # a tensor of its own, to be labeled
        term._pyro_dims = DRAWS_SYMBOL + dims  # type: ignore[attr-defined]
        tree.setdefault(plates | {DRAWS_SYMBOL}, []).append(term)
    rank = max((-dim for dim in places.values()), default=0)
    summed = []
    for left in contract_tensor_tree(tree, enumerated, cache={}).values():
        for term in left:
            kept = DRAWS_SYMBOL + "".join(sorted(set(term._pyro_dims) - {DRAWS_SYMBOL}, key=lambda s: places[s]))
            value = torch.einsum(f"{term._pyro_dims}->{kept}", term)
            shape = [len(value)] + [1] * rank
            for symbol, size in zip(kept[1:], value.shape[1:], strict=True):
                shape[places[symbol]] = size
            summed.append(value.reshape(shape))
    return summed
