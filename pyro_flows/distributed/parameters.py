# SPDX-License-Identifier: Apache-2.0
"""L3. The same parameters in all processes, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_flows._checks import check_call, checked
from pyro_flows.compiled.parameters import leaves_of, limits_of, state_of, trial
from pyro_flows.distributed.processes import Processes
from pyro_flows.models.particles import at_a_draw

__all__ = ["broadcast_parameters", "parameters_of", "share_parameters"]


@checked()
def broadcast_parameters(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Set the parameters of a model and a guide, and their modules' buffers, to those of the first process.

    Before the first step with :class:`DistributedOptim`, where processes begin with other seeds or data; all of them
    call it. Takes the model's arguments, runs both programs once, and leaves the random state alone. Without a group,
    it changes nothing. :func:`~pyro_flows.fit` does it itself.

    Raises:
        ValueError: If the parameters of processes have other shapes.
        RuntimeError: If another process has ended.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_flows import AutoFlowGuide
        >>> from pyro_flows.distributed import broadcast_parameters
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> broadcast_parameters(model, AutoFlowGuide(model))
    """
    for name, program in (("model", model), ("guide", guide)):
        check_call("broadcast_parameters", name, program, args, kwargs)
    share_parameters(Processes.of_group("broadcast_parameters"), model, guide, args, kwargs)


def parameters_of(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Parameters of the guide, then further ones of the model; runs both once, and leaves the random state alone."""
    with trial(state_of(model, guide)):
        leaves = [*leaves_of(guide, args, kwargs), *leaves_of(at_a_draw(model, guide), args, kwargs)]
    return list({id(leaf): leaf for leaf in leaves}.values())


def share_parameters(
    processes: Processes,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """See :func:`broadcast_parameters`."""
    tensors = [*parameters_of(model, guide, args, kwargs), *state_of(model, guide)]
    shapes = processes.gather([tuple(tensor.shape) for tensor in tensors])
    for rank, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(
                f"{processes.owner}: expected the same model and guide in all processes, but their parameters have "
                f"shapes {shapes[0]} in process 0 and {found} in process {rank}. Pass data of the same shapes, and the "
                "same model and guide; fit(..., distributed=False) trains each process by itself."
            )
    processes.share(tensors)
    for limit in limits_of(guide):  # this was no step, to be shortened
        limit.forget()
