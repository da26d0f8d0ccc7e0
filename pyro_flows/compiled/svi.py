# SPDX-License-Identifier: Apache-2.0
"""L1. :class:`CompiledSVI`: Pyro's SVI with its whole step compiled."""

from __future__ import annotations

import itertools
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
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._blame import user_level
from pyro_flows._checks import checked, integer, shown
from pyro_flows._random import forked
from pyro_flows._threads import one_at_a_time
from pyro_flows.compiled.adam import AdamRule
from pyro_flows.compiled.graph import LAUNCH, LossGraph
from pyro_flows.compiled.parameters import FlatParameter, RecordingError, limits_of, state_of, trial
from pyro_flows.compiled.unread import tensor_loss

__all__ = ["CompiledSVI"]


@dataclass(frozen=True)
class GraphSettings:
    """Limits of recorded steps.

    Attributes:
        max_graphs: Number of graphs that are kept, one for each structure of arguments; others take eager steps.
        max_reads: Number of graphs that differ only in what Python reads of the data, after which steps are eager.
    """

    max_graphs: int = 4
    max_reads: int = 2


GRAPHS = GraphSettings()
# Optimizers that treat each entry of a parameter alike, so that one vector moves as its parts would.
ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "AdagradRMSProp", "Adam", "AdamW", "Adamax", "ClippedAdam", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
}  # fmt: skip


class CompiledSVI(SVI):
    """``pyro.infer.SVI`` whose loss, gradient and Adam are recorded once, as one graph, and compiled by torch.

    Takes any model and guide whose shapes are fixed and whose latents are reparameterized. The first step is eager,
    with all of Pyro's checks, and recorded. Noise comes from torch's generator, so that a seed gives the numbers of
    ``SVI``, up to rounding. A step that can't be recorded is taken by plain ``SVI``, after one warning that names the
    line of the model that prevents it. Without a C++ compiler, the graph runs uncompiled, which still saves Pyro's
    overhead. A graph is used only if it reproduces the loss and the gradient of the eager code from the same noise.

    What changes between steps:

    - Tensors that are arguments, or that change in place (``beta.fill_(0.5)``), are inputs of the graph: new data of
      the same shape use the same graph. Data of other shapes get a graph of their own, after an eager step.
    - What Python reads of these tensors, such as ``int(group.max()) + 1``, is fixed in the graph: data for which it is
      another value get a graph of their own.
    - Everything else in Python is fixed in the graph: numbers, flags such as ``training``, attributes, global
      variables, items of lists and dictionaries. Those that the model's and the guide's functions read are compared at
      each step; where one has changed, the step is eager and a new graph is recorded for the new value, after one
      warning that names it. From the fifth combination of shapes and values on, steps are eager.
    - A handler around the step, such as ``with poutine.scale(...)``, makes the step eager.
    - Values that no comparison of attributes sees, such as the contents of a NumPy array or a file, are found by
      comparing the loss with that of the model, at the 2000th step, the 4000th, the 8000th and so on; steps are eager
      from there, after a warning.
    - A loss or a gradient that is not finite leaves the parameters finite: such entries of the gradient count as zero.
      One warning says so.

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

    @checked()
    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], optim: PyroOptim, loss: ELBO) -> None:
        _check_optimizer(optim)
        if not isinstance(loss, ELBO) or not hasattr(loss, "differentiable_loss"):
            raise ValueError(
                f"CompiledSVI: expected a loss with a differentiable_loss, such as Trace_ELBO(), but got "
                f"{type(loss).__name__ if isinstance(loss, ELBO) else shown(loss)}. Train with pyro.infer.SVI."
            )
        super().__init__(model, guide, optim, loss)
        self._elbo = loss
        self._parameter: FlatParameter | None = None
        self._graphs: list[LossGraph] = []
        self._is_eager = False
        self._has_warned = self._has_warned_of_change = self._has_warned_of_many = False

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step; returns the loss before it, as ``SVI.step`` does. On a GPU, which it waits for, :meth:`run`
        takes less time."""
        return self._steps(1, args, kwargs)[0]

    def _steps(self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
        """Take steps; returns the losses before them, which are read, and a GPU waited for, after the last one."""
        losses: list[float | Tensor] = []  # a tensor may hold those of several steps
        left = count
        with one_at_a_time("CompiledSVI"):
            while left:
                launched = self._launch(args, kwargs) if left >= LAUNCH.num_steps else None
                loss = self._step(args, kwargs) if launched is None else launched
                losses.append(loss.clone() if count > 1 and torch.is_tensor(loss) else loss)
                left -= loss.numel() if torch.is_tensor(loss) else 1
            unread = [loss.reshape(-1) for loss in losses if torch.is_tensor(loss)]
            read = (torch.cat(unread) if len(unread) > 1 else unread[0]).tolist() if unread else []
        if not all(map(math.isfinite, read)):
            self._warn_of_refused()
        rest = iter(read)
        return [
            value
            for loss in losses
            for value in (itertools.islice(rest, loss.numel()) if torch.is_tensor(loss) else [loss])
        ]

    def _launch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Take several steps as one CUDA graph; returns the losses before them, or None if that is not possible."""
        if self._parameter is None or not self._parameter.is_whole:
            return None
        graph = self._graph(args, kwargs)
        return graph.launch(args, kwargs) if graph is not None and graph.may_launch else None

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | Tensor:
        """Take one step; returns the loss before it: that of a graph as a tensor, which the next step overwrites."""
        if self._parameter is None or not self._parameter.is_whole:  # others now, of a cleared store for instance
            return self._first_step(args, kwargs)
        graph = self._graph(args, kwargs)
        if graph is None:
            return self._eager_step(args, kwargs)
        expected = self._eager_loss(args, kwargs) if graph.count_call() else None
        loss, gradient = graph(args, kwargs)
        if graph.rule is None:
            self._parameter.flat.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            with self._parameter.limited():
                self.optim([self._parameter.flat])
        if expected is not None and not graph.agrees(loss, expected):
            self._give_up(
                f"the model's loss is {float(expected):.6g} where its recorded operations give {float(loss):.6g}: "
                "something that it reads has changed since, which is not seen here, such as the contents of a NumPy "
                "array; the steps since that change, 2000 or half of all at most, were those of the model before it"
            )
        if graph.is_fresh:
            self._compile(graph, args, kwargs)
        return loss

    def _first_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Take an eager step, so that the guide and the optimizer are set up, and record."""
        if self._is_eager or _PYRO_STACK:
            return float(super().step(*args, **kwargs))
        self._parameter, self._graphs = None, []
        loss, leaves = self._loss_and_leaves(args, kwargs)
        parameter = None
        try:
            used = [leaf for leaf in leaves if leaf.grad is not None]
            parameter = FlatParameter(used, limits_of(self.guide))
            graph = self._record(parameter, args, kwargs)
        except RecordingError as error:
            self._give_up(str(error))
            if parameter is not None:
                parameter.release()
            self.optim(leaves)
            zero_grads(leaves)
            return loss
        self._parameter = parameter
        self._update(parameter, [])
        self._compile(graph, args, kwargs)
        return loss

    def _eager_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Take an eager step, with Pyro's checks; and record, if these are arguments or values that are new."""
        parameter = self._parameter
        assert parameter is not None
        loss, leaves = self._loss_and_leaves(args, kwargs)
        if not math.isfinite(loss):
            self._warn_of_refused()
        elif not self._is_eager and sum(g.reads_differ(args, kwargs) for g in self._graphs) >= GRAPHS.max_reads:
            self._give_up(
                "what Python reads of the data, by .item(), int(y.max()) or the size of y[y > 0], differs from call "
                "to call"
            )
        elif not self._is_eager and not _PYRO_STACK and len(self._graphs) < GRAPHS.max_graphs:
            try:
                self._record(parameter, args, kwargs)
            except RecordingError as error:
                self._give_up(str(error))
        known = {id(leaf) for leaf in parameter.leaves}
        self._update(parameter, [leaf for leaf in leaves if id(leaf) not in known and leaf.grad is not None])
        return loss

    def _loss_and_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, list[Tensor]]:
        """The loss, and the leaves of all parameters, with their gradients."""
        with poutine.trace(param_only=True) as capture:
            loss = float(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
        leaves = (node["value"].unconstrained() for node in capture.trace.nodes.values())
        return loss, list({id(leaf): leaf for leaf in leaves}.values())

    def _update(self, parameter: FlatParameter, others: list[Tensor]) -> None:
        """Take the optimizer's step by gradients of the leaves, and of parameters that appeared after recording."""
        parameter.gather_gradients()
        assert parameter.flat.grad is not None
        parameter.flat.grad.nan_to_num_(0.0, 0.0, 0.0)
        with parameter.limited():
            self.optim([parameter.flat, *others])
        zero_grads(others)
        self._forget_steps()

    def _eager_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The loss of the model as it is now, from the noise of the next step; None where the model raises."""
        with trial(state_of(self.model, self.guide)), torch.no_grad():
            try:
                return self._loss(*args, **kwargs)
            except (ValueError, RuntimeError):
                return None

    @checked(num_steps=integer(1))
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
        losses: list[float] = []
        with tqdm(total=num_steps, disable=not progress, mininterval=0.5) as bar:
            while len(losses) < num_steps:
                # A GPU takes a step while Python launches the next ones, up to the hundredth, whose loss the bar says.
                is_on_gpu = self._parameter is not None and self._parameter.vector.is_cuda
                count = min(100 - len(losses) % 100, num_steps - len(losses)) if is_on_gpu else 1
                losses += self._steps(count, args, kwargs)
                bar.update(count)
                if len(losses) % 100 == 0:
                    bar.set_postfix_str(f"loss {sum(losses[-100:]) / 100:.3f}")
        return losses

    def _graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossGraph | None:
        """The graph for these arguments and for the Python values that the model reads; None takes an eager step."""
        if self._is_eager or _PYRO_STACK:  # a handler of the user's, around the step
            return None
        change = ""
        for graph in self._graphs:
            if graph.fits(args, kwargs):
                if graph.guard.holds:
                    return graph
                change = graph.guard.change()
        self._graphs = [graph for graph in self._graphs if graph.is_current]
        if change:
            if not self._has_warned_of_change:
                self._has_warned_of_change = True
                self._warn(
                    f"{change} since a step was recorded, which is recorded again for each of its first "
                    f"{GRAPHS.max_graphs} values; at others steps are eager. This is said once. If it changes "
                    "often, pass it as a tensor, or make it one that changes in place (`beta.fill_(0.5)`)"
                )
        elif len(self._graphs) == GRAPHS.max_graphs and not self._has_warned_of_many:
            self._has_warned_of_many = True
            self._warn(
                f"takes eager steps, as pyro.infer.SVI does, for all but the first {GRAPHS.max_graphs} combinations of "
                "shapes and other values of the arguments. Pass numbers as tensors, and data in few shapes"
            )
        return None

    def _record(self, parameter: FlatParameter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossGraph:
        programs = (self.model, self.guide)
        graph = LossGraph(self._loss, parameter, args, kwargs, state_of(*programs), programs)
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
            self._warn(
                "the loss of a step is not finite. Entries of its gradient that are not finite count as zero, so that "
                "parameters stay finite, and the next step goes on from there; this is said once. Take the step with "
                "pyro.infer.SVI to hear which site it was"
            )

    def _give_up(self, reason: str) -> None:
        """Go on with eager steps."""
        self._is_eager = True
        self._warn(f"takes eager steps, as pyro.infer.SVI does, since {reason}")

    def _warn(self, message: str) -> None:
        """Warn at the line that takes the step."""
        warnings.warn(f"CompiledSVI: {message}.", stacklevel=user_level())

    def _compile(self, graph: LossGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile the graph; after the first step, which created the optimizer's state."""
        assert self._parameter is not None
        optimizer = self.optim.optim_objs[self._parameter.flat]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # a scheduler's
        # A subclass may do more at a step, such as take the mean gradient of several processes.
        does_more = type(self.optim).__call__ not in (PyroOptim.__call__, PyroLRScheduler.__call__)
        does_more = does_more or self.optim.grad_clip[self._parameter.flat] is not None
        rule = AdamRule(optimizer) if AdamRule.applies_to(optimizer) and not does_more else None
        try:
            with forked():
                graph.compile(args, kwargs, rule)
        except RuntimeError as error:
            self._warn(f"runs its graph without machine code, since {error}")

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return tensor_loss(self._elbo)(self.model, self.guide, *args, **kwargs)


def _check_optimizer(optim: PyroOptim) -> None:
    """Refuse optimizers that would not update one vector as they would its parts.

    Raises:
        ValueError: If the optimizer is not elementwise, or its options differ between parameters.
    """
    if not isinstance(optim, PyroOptim):
        raise ValueError(
            f"CompiledSVI: expected optim to be one of pyro.optim's optimizers, such as Adam({{'lr': 0.01}}), but got "
            f"{shown(optim)}."
        )
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
