# SPDX-License-Identifier: Apache-2.0
"""L1. Composition of several transforms, which passes the context and the score through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from pyro_flows._checks import shown
from pyro_flows.transforms.base import FlowTransform
from pyro_flows.transforms.context import ContextLayout

__all__ = ["Chain"]


class Chain(FlowTransform):
    """The composition ``parts[-1] o ... o parts[0]``.

    Args:
        parts: At least one transform, all with the same ``input_dim``, base side first. The last part defines the
            context, which all conditional parts receive.
        layout: Layout of a context with several parts, of which all transforms but the last receive the network input
            only. None if the context is a single vector.

    Attributes:
        parts: The parts given.
        inserted: Further parts, by the number of the one that follows.
    """

    def __init__(self, parts: Iterable[FlowTransform], layout: ContextLayout | None = None) -> None:
        parts = list(parts) if isinstance(parts, Iterable) else [parts]
        if not parts or not all(isinstance(part, FlowTransform) for part in parts):
            raise TypeError(
                f"Chain: expected parts to be FlowTransforms, at least one, but got {shown(parts)}. Use "
                "transforms.adapt for those of Pyro."
            )
        dims = [part.input_dim for part in parts]
        if len(set(dims)) > 1:
            raise ValueError(f"Chain: expected parts of one input_dim, but got {dims}.")
        super().__init__(parts[-1].input_dim, parts[-1].context_dim)
        self.layout = layout
        self.parts = nn.ModuleList(parts)
        self.inserted = nn.ModuleDict()
        self._look_again()

    def insert(self, parts: Mapping[int, FlowTransform]) -> None:
        """Insert parts, each before the one of :attr:`parts` with its number, in place of those inserted before.

        The names of the other parts' parameters stay as they are.
        """
        self.inserted = nn.ModuleDict({str(index): part for index, part in parts.items()})
        self._look_again()

    def _look_again(self) -> None:
        self.has_inverse = all(part.has_inverse for part in self)  # type: ignore[misc]
        self.one_pass_inverse = all(part.one_pass_inverse for part in self)  # type: ignore[misc]
        self.has_score = all(part.has_score for part in self)  # type: ignore[misc]

    def __iter__(self) -> Iterator[FlowTransform]:
        for index, part in enumerate(self.parts):
            if str(index) in self.inserted:
                before = self.inserted[str(index)]
                assert isinstance(before, FlowTransform)
                yield before
            assert isinstance(part, FlowTransform)
            yield part

    def _maps(self, context: Tensor | None) -> list[tuple[FlowTransform, Tensor | None]]:
        """Each part with the context that it receives."""
        *inner, last = self
        maps = [(part, self._inner_context(context) if part.context_dim else None) for part in inner]
        return [*maps, (last, context)]

    def _inner_context(self, context: Tensor | None) -> Tensor | None:
        """The portion of a context that all parts but the last receive."""
        return context if context is None or self.layout is None else self.layout.network_input(context)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total: Tensor | float = 0.0
        for part, seen in self._maps(context):
            x, ladj = part.forward_and_ladj(x, seen)
            total = total + ladj
        assert isinstance(total, Tensor)
        return x, total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total: Tensor | float = 0.0
        for part, seen in reversed(self._maps(context)):
            y, ladj = part.inverse_and_ladj(y, seen)
            total = total + ladj
        assert isinstance(total, Tensor)
        return y, total

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        total: Tensor | float = 0.0
        for part, seen in self._maps(context):
            x, ladj, score = part.forward_with_score(x, score, seen)
            total = total + ladj
        assert isinstance(total, Tensor)
        return x, total, score
