# SPDX-License-Identifier: Apache-2.0
"""L1. A loss and its gradient as one graph of tensor operations over a single flat parameter, without Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pyro_flows._blame import blame
from pyro_flows.compiled import tracer
from pyro_flows.compiled.adam import AdamRule, append_step
from pyro_flows.compiled.arguments import structure, tensors
from pyro_flows.compiled.cuda import CudaGraph
from pyro_flows.compiled.fused import LargePart, large_part, to_fused
from pyro_flows.compiled.guard import Guard, watch_reads
from pyro_flows.compiled.inductor import to_machine_code, without_collector
from pyro_flows.compiled.parameters import FlatParameter, RecordingError, trial
from pyro_flows.compiled.script import to_script
from pyro_flows.compiled.simplify import merge_repeated

__all__ = ["LossGraph", "used_leaves"]


@dataclass(frozen=True)
class AgreementSettings:
    """How closely a graph has to reproduce the loss and the gradient of the eager code from the same noise.

    Attributes:
        double: Largest norm of a difference in float64, relative to the norm of the result; allows for rounding.
        single: The same in other precisions.
        first_check: Number of calls of a graph after which its loss is compared again; the next time is after twice as
            many. An eager loss takes the time of some fifty compiled steps of a small model, so that this costs 5 % of
            the time at most.
    """

    double: float = 1e-8
    single: float = 2e-3
    first_check: int = 2000

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest relative difference of results of a dtype."""
        return self.double if dtype == torch.float64 else self.single


@dataclass(frozen=True)
class LaunchSettings:
    """How a GPU is given its work.

    Attributes:
        num_steps: Number of compiled steps that are one CUDA graph where more than that are asked for at once. Python
            takes longer to launch a small step than a GPU to compute it.
    """

    num_steps: int = 20


AGREEMENT = AgreementSettings()
LAUNCH = LaunchSettings()
Loss = Callable[..., Tensor]


def used_leaves(loss: Loss, leaves: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The leaves with respect to which the loss has a gradient, without duplicates, found by an eager step."""
    trained = list({id(leaf): leaf for leaf in leaves if leaf.requires_grad}.values())
    with _unchecked():
        gradients = torch.autograd.grad(loss(*args, **kwargs), trained, allow_unused=True)
    return [leaf for leaf, gradient in zip(trained, gradients, strict=True) if gradient is not None]


class LossGraph:
    """A loss and its gradient as a recorded graph, for arguments of one structure.

    Tensors among the arguments are inputs: new data of the same shapes need no new recording. Tensors that the code
    reads from elsewhere (a closure, buffers of a module) are read again at each call, and noise is drawn afresh.
    Everything else, such as numbers and flags, is fixed at recording; :attr:`guard` notices where it changes.

    Args:
        loss: The loss, differentiable; a function of the arguments.
        parameter: The parameter with respect to which to differentiate.
        args: Positional arguments to record with.
        kwargs: Keyword arguments to record with.
        state: Tensors that the loss may change in place, such as running means. Trials restore them.
        programs: The model and the guide that the loss runs, whose Python values are watched.

    Raises:
        RecordingError: If the loss is not a fixed sequence of tensor operations, or the graph does not agree with it.

    Attributes:
        num_operations: Size of the graph.
        rule: The optimizer's step that is a part of the graph; None if the graph ends with the gradient.
        is_fresh: Whether compilation has not been tried yet.
        guard: The Python values that are fixed at recording.
    """

    def __init__(
        self,
        loss: Loss,
        parameter: FlatParameter,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Sequence[Tensor] = (),
        programs: Sequence[Any] = (),
    ) -> None:
        self._parameter = parameter
        self._state = tuple(state)
        self.rule: AdamRule | None = None
        self.is_fresh = True
        self._calls, self._next_check = 0, AGREEMENT.first_check
        self._structure = structure(args, kwargs)
        inputs, spec = pytree.tree_flatten((args, kwargs))
        data = tensors(args, kwargs)

        def gradient(*data: Tensor) -> tuple[Tensor, Tensor]:
            rest = iter(data)
            args, kwargs = pytree.tree_unflatten(
                [next(rest) if torch.is_tensor(value) else value for value in inputs], spec
            )
            value = loss(*args, **kwargs)
            gradients = torch.autograd.grad(value, parameter.leaves)
            return value.detach(), torch.cat([part.reshape(-1) for part in gradients])

        others = [value for value in inputs if not torch.is_tensor(value)]  # kept, since they are known by id
        with _unchecked():
            with trial(self._state), watch_reads() as reads:
                expected = gradient(*data)
            self.guard = Guard([*programs, *others], reads)
            try:
                with trial(self._state), without_collector():
                    graph, self._captured, self._known = tracer.trace_operations(
                        lambda _, *data: gradient(*data), [parameter.vector], parameter.leaves, data
                    )
            except Exception as error:  # torch reports code that it can't trace in many ways
                raise RecordingError(blame(error, __file__, tracer.__file__)) from error
        merge_repeated(graph)
        self.guard.keep_constant()
        self._others = others
        self._run: Callable[..., Sequence[Tensor]] = graph
        self._graph = graph
        self._machine_code: Callable[..., Sequence[Tensor]] | None = None  # of which a CUDA graph was made
        self._many: Callable[..., Sequence[Tensor]] | None = None
        self.num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
        try:
            with trial(self._state):
                found = self(args, kwargs)
        except RuntimeError as error:  # a draw at which the model raises
            raise RecordingError(blame(error, __file__, tracer.__file__)) from error
        self._verify(expected, found)

    @property
    def may_launch(self) -> bool:
        """Whether :meth:`launch` can be called, and the loss of none of its steps should be compared."""
        return self._machine_code is not None and self._calls + LAUNCH.num_steps < self._next_check

    def count_call(self) -> bool:
        """Count a call; returns whether its loss should be compared with the eager one."""
        self._calls += 1
        if self._calls < self._next_check:
            return False
        self._next_check *= 2
        return True

    def agrees(self, loss: Tensor, expected: Tensor) -> bool:
        """Whether losses from the same noise are the same up to rounding; True if either is not finite."""
        tolerance = AGREEMENT.tolerance(self._parameter.flat.dtype)
        is_known = bool(loss.isfinite() and expected.isfinite())
        return not is_known or bool((loss - expected).abs() <= tolerance * (1e-3 + expected.abs()))

    @property
    def is_current(self) -> bool:
        """Whether the optimizer's options are those that the graph was compiled with."""
        return self.rule is None or self.rule.is_current

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph is for arguments of this structure, for what Python reads of the data, and for the
        optimizer's options."""
        return self._is_of(args, kwargs) and self._reads_same(args, kwargs)

    def reads_differ(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all that keeps the graph from being used for arguments is what Python reads of the data."""
        return self._is_of(args, kwargs) and self.guard.holds and not self._reads_same(args, kwargs)

    def _is_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self.is_current and structure(args, kwargs) == self._structure

    def _reads_same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._known.hold([self._parameter.vector, *tensors(args, kwargs), *self._captured])

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph is what a recording would give now: it fits, and nothing that it fixed has changed."""
        return self.fits(args, kwargs) and self.guard.holds

    @torch.no_grad()
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss, ``()``, and gradient with respect to the flat parameter, ``(N,)``; also takes the optimizer's step if
        :attr:`rule` is not None."""
        state = () if self.rule is None else (*self.rule.moments, self.rule.next_rates(), self._parameter.per_limit)
        loss, gradient = self._run(self._parameter.vector, *state, *tensors(args, kwargs), *self._captured)
        return loss, gradient

    @torch.no_grad()
    def launch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Take ``LAUNCH.num_steps`` steps on a GPU as one CUDA graph: those that as many calls would take.

        Returns:
            The losses before each of them, ``(num_steps,)``, in memory that the next launch overwrites; None if they
            can't be captured, and none was taken.
        """
        assert self.rule is not None
        values = (self._parameter.per_limit, *tensors(args, kwargs), *self._captured)
        if self._many is None:
            try:
                self._many = self._capture_many(values)
            except RuntimeError:  # of memory, say
                self._machine_code = None
                return None
        self._calls += LAUNCH.num_steps
        rates = self.rule.coming_rates(LAUNCH.num_steps)
        (losses,) = self._many(self._parameter.vector, *self.rule.moments, rates, *values)
        return losses

    def _capture_many(self, values: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """Capture steps, and check that they do what single ones do."""
        rule, run = self.rule, self._machine_code
        assert rule is not None and run is not None
        vector, *moments = moved = [self._parameter.vector, *rule.moments]
        rates = vector.new_tensor([[1e-3, 1.0, 0.0, 0.0]], device="cpu").repeat(LAUNCH.num_steps, 1)
        inputs = [*moved, rates, *values]

        def steps(*inputs: Tensor) -> Sequence[Tensor]:
            *moved, rates = inputs[:4]
            return (torch.stack([run(*moved, row[:2], *inputs[4:])[0] for row in rates.unbind()]),)

        def after(take: Callable[[], Tensor]) -> list[Tensor]:
            with trial([*self._state, *moved]):
                moments[0].zero_()
                moments[1].fill_(1.0)  # see `compile`
                return [take().clone(), vector.clone()]

        with trial([*self._state, *moved]):
            many = CudaGraph(steps, inputs, self._moving(inputs))
        expected = after(lambda: torch.stack([self._run(*moved, row[:2], *values)[0].clone() for row in rates]))
        self._verify(expected, after(lambda: many(*inputs)[0]))
        return many

    @cached_property
    def part(self) -> LargePart | None:
        """The part of the graph that :meth:`fuse` compiles; None if that would not be worth it."""
        return None if self._is_on_gpu else large_part(self._graph)

    def script(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have TorchScript run the graph, in half the time, or a GPU as one CUDA graph; takes a second or two. On
        failure the graph is unchanged.

        Args:
            args: Positional arguments of the structure that was recorded.
            kwargs: Keyword arguments of the structure that was recorded.
        """
        if self._is_on_gpu:
            self._try(lambda graph, inputs: CudaGraph(graph, inputs, self._moving(inputs)), args, kwargs)
        else:
            self._try(to_script, args, kwargs)

    def fuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Compile :attr:`part` with torch's compiler, and have TorchScript run the rest; takes some five seconds.

        Args:
            args: Positional arguments of the structure that was recorded.
            kwargs: Keyword arguments of the structure that was recorded.

        Returns:
            Whether that worked; otherwise the graph is unchanged.
        """
        part = self.part
        assert part is not None
        return self._try(lambda graph, inputs: to_fused(graph, part, inputs), args, kwargs)

    @torch.no_grad()
    def _try(
        self,
        make: Callable[[GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Run the graph by what is made of it, if that works and agrees with it."""
        inputs = [self._parameter.vector, *tensors(args, kwargs), *self._captured]
        try:
            with trial(self._state):
                run = make(self._graph, inputs)
            with trial(self._state):
                expected = self._graph(*inputs)
            with trial(self._state):
                self._verify(expected, run(*inputs))
        except Exception:  # torch reports in many ways that it can't
            return False
        self._run = run
        return True

    @torch.no_grad()
    def compile(self, args: tuple[Any, ...], kwargs: dict[str, Any], rule: AdamRule | None = None) -> None:
        """Compile the graph with torch's compiler; takes seconds to minutes, unless the result is in its cache. On a
        GPU, its kernels are launched as one CUDA graph.

        Noise is drawn by the same functions as in eager code, so that the same seed gives the same numbers.

        Args:
            args: Positional arguments of the structure that was recorded.
            kwargs: Keyword arguments of the structure that was recorded.
            rule: An optimizer's step that becomes a part of the graph.

        Raises:
            RuntimeError: If there is no working C++ compiler, or torch's compiler fails. The graph still runs
                uncompiled.
        """
        assert self.is_fresh
        self.is_fresh = False
        vector = self._parameter.vector
        inputs = [vector, *tensors(args, kwargs), *self._captured]
        with trial(self._state):
            expected = [value.clone() for value in self._run(*inputs)]
        moved: list[Tensor] = []
        if rule is not None:
            append_step(self._graph, rule, vector)
            self.rule = rule
            moved = [vector, *rule.moments]
            inputs[1:1] = [*rule.moments, rule.rates(1.0, 1.0), self._parameter.per_limit]
            zeros = torch.zeros_like(vector)
            expected.append(rule.update(vector, expected[1], zeros, zeros + 1.0, *inputs[3:5])[0])

        def accept(make: Callable[[GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]) -> None:
            with trial([*self._state, *moved]):
                run = made = make(self._graph, inputs)
                if self._is_on_gpu:
                    run = CudaGraph(made, inputs, self._moving(inputs))
            with trial([*self._state, *moved]):
                if rule is not None:  # from a second moment that does not vanish where gradients are only rounding
                    moved[1].zero_()
                    moved[2].fill_(1.0)
                found = [*run(*inputs), *(value.clone() for value in moved[:1])]
            self._verify(expected, found)
            self._run = run
            self._machine_code = made if self._is_on_gpu and rule is not None else None

        try:
            accept(to_machine_code)
        except RecordingError:
            raise
        except Exception as error:  # a missing compiler is reported in many ways
            if self._is_on_gpu:
                with suppress(RuntimeError):
                    accept(lambda graph, _: graph)
            raise RuntimeError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error

    @property
    def _is_on_gpu(self) -> bool:
        return self._parameter.vector.is_cuda

    def _moving(self, inputs: Sequence[Tensor]) -> range:
        """Positions of the arguments among all inputs; other inputs stay in place in memory."""
        end = len(inputs) - len(self._captured)
        return range(1 if self.rule is None else 5, end)

    def _verify(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Check that two runs from the same noise agree.

        Raises:
            RecordingError: If they do not agree.
        """
        tolerance = AGREEMENT.tolerance(self._parameter.flat.dtype)
        for name, one, other in zip(("loss", "gradient", "step"), expected, found):  # the last is not always there
            if not one.isfinite().all():
                raise RecordingError(f"its {name} is not finite")
            if not (one - other).norm() <= tolerance * (1e-3 + one.norm()):
                raise RecordingError(
                    f"its {name} is not repeated by the recorded operations from the same noise: random numbers that "
                    "are not torch's, or state that changes from call to call"
                )


@contextmanager
def _unchecked() -> Iterator[None]:
    """Disable validation, which reads values only to check them."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        yield
