# SPDX-License-Identifier: Apache-2.0
"""L3. Encoders, which map the model's arguments to the context of the latents of an amortized plate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows._checks import check_call, shown

__all__ = ["Encoder", "checked_encoders", "probe"]

EXAMPLE = 'amortize={"plate": encoder} with `encoder(*args, **kwargs)` of shape `(batch, context_dim)`'


def checked_encoders(amortize: Mapping[str, Callable[..., Any]] | None) -> dict[str, Callable[..., Any]]:
    """Check the guide's ``amortize`` argument, and return it as a dictionary: plate name -> encoder.

    Raises:
        TypeError: If it is not a mapping from names to callables.
    """
    if amortize is None:
        return {}
    if not isinstance(amortize, Mapping):
        raise TypeError(f"AutoFlowGuide: expected {EXAMPLE}, but got amortize={shown(amortize)}.")
    for plate, encoder in amortize.items():
        if not isinstance(plate, str):
            raise TypeError(f"AutoFlowGuide: expected amortize={{name of a plate: encoder}}, but got {shown(plate)}.")
        if not callable(encoder):
            raise TypeError(
                f"AutoFlowGuide: expected an encoder for the amortized plate '{plate}', but got {shown(encoder)}. "
                f"Write {EXAMPLE.replace('plate', plate, 1)}."
            )
    return dict(amortize)


class Encoder(nn.Module):
    """A user's encoder of the model's arguments, with checks of its output.

    Args:
        plate: Name of the amortized plate.
        function: Any module or callable; a module's parameters are trained with the guide.
    """

    def __init__(self, plate: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.plate = plate
        self.function = function

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Context of each item, ``(batch, context_dim)``.

        Raises:
            ValueError: If the output is not a floating-point matrix.
        """
        context = self.function(*args, **kwargs)
        is_tensor = isinstance(context, Tensor)
        if not is_tensor or context.dim() != 2 or not context.shape[1] or not context.is_floating_point():
            found = f"shape {tuple(context.shape)} of {context.dtype}" if is_tensor else repr(type(context).__name__)
            raise ValueError(
                f"AutoFlowGuide: expected the encoder of plate '{self.plate}' to return a floating-point tensor "
                f"of shape (batch, context_dim), but got {found}. Let it end in `.flatten(1)`, or take the item "
                "dimension first; context_dim is 1 at least."
            )
        return context

    def rows(self, context: Tensor, size: int, indices: Tensor) -> Tensor:
        """Select the context of a mini-batch's items, from an output for these items or for all of the plate's.

        Args:
            context: This encoder's output.
            size: The plate's full size.
            indices: Indices of the mini-batch.

        Raises:
            ValueError: If the output has neither as many rows as the mini-batch nor as many as the plate.
        """
        if len(context) == len(indices):
            return context
        if len(context) == size:
            return context.index_select(0, indices.to(context.device))
        raise ValueError(
            f"AutoFlowGuide: expected the encoder of plate '{self.plate}' to return a row for each of the "
            f"{len(indices)} items of the mini-batch (or of all {size}), but got {len(context)} rows. Give the guide "
            f"the plate that the model uses, `create_plates=lambda *args: pyro.plate('{self.plate}', {size}, "
            "subsample=...)`; inside the encoder, `pyro.subsample(x, event_dim=...)` takes its rows of `x`."
        )


@torch.no_grad()
def probe(encoder: Encoder, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: tuple[int, int]) -> int:
    """Length of an encoder's context, found by calling it.

    Args:
        encoder: The encoder.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        sizes: Number of items of the plate, and of them in the mini-batch.

    Raises:
        TypeError: If it does not take the model's arguments.
        ValueError: If its output is not finite, or has neither as many rows as the plate nor as the mini-batch.
    """
    check_call(
        "AutoFlowGuide",
        f"the encoder of plate '{encoder.plate}'",
        encoder.function,
        args,
        kwargs,
        "Let it take the model's.",
    )
    context = encoder(args, kwargs)
    encoder.rows(context, sizes[0], torch.arange(sizes[1]))
    if not context.isfinite().all():
        raise ValueError(
            f"AutoFlowGuide: expected the encoder of plate '{encoder.plate}' to return finite numbers, but got "
            f"{int((~context.isfinite()).sum())} of {context.numel()} that are not. Look at its weights and the data."
        )
    return context.shape[-1]
