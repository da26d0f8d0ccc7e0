# SPDX-License-Identifier: Apache-2.0
"""L1. :class:`CompiledSVI`: Pyro's SVI with its whole step compiled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import check_int
from pyro_flows.compiled.adam import AdamRule
from pyro_flows.compiled.graph import LossGraph
from pyro_flows.compiled.parameters import FlatParameter, RecordingError, limits_of, state_of
from pyro_flows.compiled.unread import tensor_loss

__all__ = ["CompiledSVI"]


@dataclass(frozen=True)
class GraphSettings:
    """Limits of recorded steps.

    Attributes:
        max_graphs: Number of graphs that are kept, one for each structure of arguments; others take eager steps.
    """

    max_graphs: int = 4


GRAPHS = GraphSettings()
# Optimizers that treat each entry of a parameter alike, so that one vector moves as its parts would.
ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "AdagradRMSProp", "Adam", "AdamW", "Adamax", "ClippedAdam", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
}  # fmt: skip


class CompiledSVI(SVI):
    """``pyro.infer.SVI`` whose loss, gradient and Adam are recorded once, as one graph, and compiled by torch.

    Takes any model and guide whose shapes are fixed and whose latents are reparameterized. The first step is recorded.
    Data are inputs of the graph, so that new data of the same shape use the same graph, and other shapes another one.
    Noise comes from torch's generator, so that a seed gives the numbers of ``SVI``, up to rounding. A step that can't
    be recorded is taken by plain ``SVI``, after one warning that names the line of the model that prevents it. Without
    a C++ compiler, the graph runs uncompiled, which still saves Pyro's overhead. A graph is used only if it reproduces
    the loss and the gradient of the eager code from the same noise.

    The trained parameters become views of one vector for as long as this object updates them.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        optim: One of Pyro's optimizers that treats all entries of parameters alike, such as ``Adam``, ``ClippedAdam``
            or ``ExponentialLR``, with the same options for all parameters. The first two are part of the graph, and
            so is ``torch.optim.Adam`` under a scheduler; other optimizers run outside it, on the graph's gradient.
        loss: An ELBO with a ``differentiable_loss``: ``Trace_ELBO``, ``TraceMeanField_ELBO`` or
            :class:`~pyro_flows.VectorizedTrace_ELBO`. ``TraceEnum_ELBO`` has one too, but its control flow depends on
            values, so that it takes eager steps.

    Raises:
        ValueError: If the optimizer or the loss is not one of these.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.optim import Adam
        >>> from pyro_flows import AutoFlowGuide, CompiledSVI
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> svi = CompiledSVI(model, AutoFlowGuide(model), Adam({"lr": 0.01}), Trace_ELBO())
        >>> losses = svi.run(1000, torch.tensor([1.0, 2.0, 3.0]))  # doctest: +SKIP
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], optim: PyroOptim, loss: ELBO) -> None:
        _check_optimizer(optim)
        if not hasattr(loss, "differentiable_loss"):
            raise ValueError(
                f"CompiledSVI: expected a loss with a differentiable_loss, such as Trace_ELBO(), but got "
                f"{type(loss).__name__}. Train with pyro.infer.SVI."
            )
        super().__init__(model, guide, optim, loss)
        self._elbo = loss
        self._parameter: FlatParameter | None = None
        self._graphs: list[LossGraph] = []
        self._is_eager = False
        self._has_warned = False

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step; returns the loss before it, as ``SVI.step`` does."""
        if self._is_eager:
            return float(super().step(*args, **kwargs))
        if self._parameter is None or not self._parameter.is_whole:  # others now, of a cleared store for instance
            value, graph = self._first_step(args, kwargs)
        else:
            graph = self._graph(args, kwargs)
            if graph is None:
                with self._parameter.limited():
                    value = float(super().step(*args, **kwargs))
                self._forget_steps()
                return value
            loss, gradient = graph(args, kwargs)
            if graph.rule is None:
                self._parameter.flat.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
                with self._parameter.limited():
                    self.optim([self._parameter.flat])
            value = float(loss)
            if not math.isfinite(value):
                self._warn_of_refused()
        if graph is not None and graph.is_fresh:
            self._compile(graph, args, kwargs)
        return value

    def _first_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, LossGraph | None]:
        """Take an eager step, so that the guide and the optimizer are set up; returns its loss, and a graph."""
        self._parameter, self._graphs = None, []
        with poutine.trace(param_only=True) as capture:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        found = {id(leaf): leaf for leaf in (node["value"].unconstrained() for node in capture.trace.nodes.values())}
        parameter = None
        try:
            parameter = FlatParameter([leaf for leaf in found.values() if leaf.grad is not None], limits_of(self.guide))
            graph = self._record(parameter, args, kwargs)
        except RecordingError as error:
            self._give_up(error)
            if parameter is not None:
                parameter.release()
            self.optim(found.values())
            zero_grads(found.values())
            return float(loss), None
        self._parameter = parameter
        parameter.gather_gradients()
        with parameter.limited():
            self.optim([parameter.flat])
        self._forget_steps()
        return float(loss), graph

    def run(self, num_steps: int, *args: Any, progress: bool = False, **kwargs: Any) -> list[float]:
        """Take ``num_steps`` steps on the same arguments.

        Args:
            num_steps: Number of steps, >= 1.
            args: The model's arguments.
            progress: Whether to show a progress bar.
            kwargs: The model's keyword arguments.

        Returns:
            The loss before each step.
        """
        check_int("CompiledSVI.run", "num_steps", num_steps, 1)
        losses = []
        with tqdm(total=num_steps, disable=not progress, mininterval=0.5) as bar:
            for step in range(num_steps):
                losses.append(self.step(*args, **kwargs))
                bar.update()
                if step % 100 == 99:
                    bar.set_postfix_str(f"loss {sum(losses[-100:]) / 100:.3f}")
        return losses

    def _graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossGraph | None:
        """The graph for these arguments; None if they take an eager step."""
        for graph in self._graphs:
            if graph.matches(args, kwargs):
                return graph
        self._graphs = [graph for graph in self._graphs if graph.is_current]
        if len(self._graphs) == GRAPHS.max_graphs:
            return None
        assert self._parameter is not None
        try:
            return self._record(self._parameter, args, kwargs)
        except RecordingError as error:
            self._give_up(error)
            return None

    def _record(self, parameter: FlatParameter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossGraph:
        graph = LossGraph(self._loss, parameter, args, kwargs, state_of(self.model, self.guide))
        self._forget_steps()
        self._graphs.append(graph)
        return graph

    def _forget_steps(self) -> None:
        """Tell guides that the step limit was applied here, so that they do not shorten the step again."""
        for limit in limits_of(self.guide):
            limit.forget()

    def _warn_of_refused(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "CompiledSVI: the loss of a step is not finite. Parameters whose gradient was not finite stay where "
                "they were, and the next step goes on from there; this is said once. Take the step with "
                "pyro.infer.SVI to hear which site it was.",
                stacklevel=3,
            )

    def _give_up(self, error: RecordingError) -> None:
        """Go on with eager steps."""
        warnings.warn(f"CompiledSVI: takes eager steps, as pyro.infer.SVI does, since {error}.", stacklevel=4)
        self._is_eager = True

    def _compile(self, graph: LossGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile the graph; after the first step, which created the optimizer's state."""
        assert self._parameter is not None
        optimizer = self.optim.optim_objs[self._parameter.flat]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # a scheduler's
        clips = self.optim.grad_clip[self._parameter.flat] is not None
        rule = AdamRule(optimizer) if AdamRule.applies_to(optimizer) and not clips else None
        try:
            with torch.random.fork_rng():
                graph.compile(args, kwargs, rule)
        except RuntimeError as error:
            warnings.warn(f"CompiledSVI: runs its graph without machine code, since {error}.", stacklevel=3)

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return tensor_loss(self._elbo)(self.model, self.guide, *args, **kwargs)


def _check_optimizer(optim: PyroOptim) -> None:
    """Refuse optimizers that would not update one vector as they would its parts.

    Raises:
        ValueError: If the optimizer is not elementwise, or its options differ between parameters.
    """
    if not isinstance(optim, PyroOptim):
        raise ValueError(f"CompiledSVI: expected one of pyro.optim's optimizers, but got {type(optim).__name__}.")
    made = optim.pt_optim_args
    constructor = optim.pt_optim_constructor
    if isinstance(made, dict) and "optimizer" in made:  # a scheduler's
        constructor, made = made["optimizer"], made["optim_args"]
    if callable(made) or callable(optim.pt_clip_args) or "clip_norm" in optim.pt_clip_args:
        raise ValueError(
            "CompiledSVI: expected an optimizer with the same options for all parameters and no clip_norm, which is a "
            "norm of each parameter. Pass a dictionary of options, or train with pyro.infer.SVI."
        )
    name = getattr(constructor, "__name__", str(constructor))
    if name not in ELEMENTWISE:
        raise ValueError(
            f"CompiledSVI: expected an optimizer that treats all entries of a parameter alike, one of "
            f"{', '.join(sorted(ELEMENTWISE))}, but got {name}. Train with pyro.infer.SVI."
        )
