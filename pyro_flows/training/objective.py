# SPDX-License-Identifier: Apache-2.0
"""L7. The ELBO of a model and a guide on data that may come in mini-batches: its gradient, and its value with error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_flows._memory import is_out_of_memory
from pyro_flows._random import forked, seeded
from pyro_flows.compiled.cost import OperationCounter, StepCost
from pyro_flows.compiled.graph import LossGraph, used_leaves
from pyro_flows.compiled.parameters import FlatParameter, RecordingError, leaves_of, state_of, trial
from pyro_flows.compiled.unread import tensor_loss
from pyro_flows.importance.psis import nearly_constant, pareto_smooth
from pyro_flows.importance.weights import gap_of, log_weights
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.checks import start_elsewhere, where_not_finite, without_density
from pyro_flows.models.particles import at_a_draw, check_shapes, look_at
from pyro_flows.models.precision import remedy_at, rounding_message, rounding_variance
from pyro_flows.models.traces import (
    NO_DENSITY,
    REFUSALS,
    Call,
    mini_batches,
    nesting_of,
    run_quietly,
    sample_nodes,
)
from pyro_flows.training.batches import Arguments, Batches, by_shape
from pyro_flows.training.elbo import VectorizedTrace_ELBO
from pyro_flows.training.estimates import Estimate, EstimateSettings
from pyro_flows.training.parts import Parts
from pyro_flows.training.read_loss import read_loss
from pyro_flows.training.variance import VarianceReduction

__all__ = ["Objective"]


class Objective:
    """The ELBO, by :class:`VectorizedTrace_ELBO`, or by Pyro's ELBOs where draws cannot share a run of the model.

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide.
        batches: Their arguments.
        settings: Number of draws of estimates.
        parts: The parts of a step; None means a single one.

    Attributes:
        parts: The parts of a step.
        model: The model.
        guide: The guide.
        batches: Their arguments.
        subsampled: Whether a step sees a part of the data only.
        scale: Largest factor by which log densities of a mini-batch are scaled, >= 1.
        num_items: Size of the largest latent site in a mini-batch.
        num_values: Number of latent and observed values in a mini-batch.
        batched: The model at many draws; None if only Pyro can enumerate its sites.
        trains_model: Whether the model has parameters of its own.
        calls: Arguments of the mini-batches that estimates go through.
        buffers: Tensors of the model's and the guide's modules that a step may change in place.
        inverse_temperature: Factor of the log joint in gradients, in (0, 1]; 1 is the model itself.
        leaves: Unconstrained leaves of the guide's and the model's parameters.
        parameters: The leaves; or, once a step is recorded, one vector of those in use.
        graph: The recorded step, if there is one.
        is_read: Whether that does without the model's own operations; see
            :func:`~pyro_flows.training.read_loss.read_loss`.
        kind: Its name.
        title: Its name in a progress bar.
    """

    kind = "elbo"
    title = "ELBO"

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batches: Batches,
        settings: EstimateSettings | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.settings = settings or EstimateSettings()
        self.parts = parts or Parts()
        self.parts.look_for_plate(model, guide, Call(*batches.first))
        self.model = model
        self.guide = guide
        self.batches = batches
        args, kwargs = batches.first
        self.batched, self._sites = self._look()
        sites = self._sites
        self.enumerates = any(site["infer"].get("enumerate") for site in sites)
        frames = [frame for site in sites for frame in site["cond_indep_stack"]]
        self.subsampled = batches.many or any(frame.full_size not in (None, frame.size) for frame in frames)
        self.scale = max((float(torch.as_tensor(site["scale"]).max()) for site in sites), default=1.0)
        self.num_items = max((site["value"].numel() for site in sites if not site["is_observed"]), default=1)
        self.num_values = sum(torch.as_tensor(site["value"]).numel() for site in sites)
        self.calls = batches.one_pass(self.settings.max_batches, self.settings.max_elements)
        for call in by_shape(self.calls)[1:]:  # the first one was checked already
            check_shapes(model, guide, Call(*call))
        of_guide = leaves_of(guide, args, kwargs)
        of_model = leaves_of(at_a_draw(model, guide), args, kwargs)
        self.trains_model = any(all(p is not q for q in of_guide) for p in of_model)
        self.buffers = state_of(model, guide)
        self.inverse_temperature = 1.0
        self.leaves = list({id(p): p for p in (*of_guide, *of_model)}.values())
        self.parameters = self.leaves
        self._flat: FlatParameter | None = None
        self.graph: LossGraph | None = None
        self.is_read = False

    def _look(self) -> tuple[BatchedModel | None, list[dict[str, Any]]]:
        """The model at many draws, None if only Pyro can enumerate its sites; and its sample sites."""
        args, kwargs = self.batches.first
        try:
            batched = look_at("fit", self.model, self.guide, Call(args, kwargs))
        except NotImplementedError:
            with pyro.validation_enabled(False):  # only the structure is looked at
                trace = run_quietly(at_a_draw(self.model, self.guide), Call(args, kwargs))
            return None, list(sample_nodes(trace).values())
        return batched, list(batched.nodes.values())

    @property
    def obstacle(self) -> str:
        """Reason why draws cannot be run at once; empty if they can."""
        return "its sites are not enumerated in parallel" if self.batched is None else self.batched.obstacle

    @property
    def vectorized(self) -> bool:
        """Whether particles can be drawn in one run."""
        return not self.obstacle

    def elbo(self, num_particles: int) -> Trace_ELBO | TraceEnum_ELBO:
        """The loss with ``num_particles`` particles."""
        if self.batched is not None and (self.vectorized or num_particles == 1):
            return VectorizedTrace_ELBO.of(self.batched, num_particles)
        kind = TraceEnum_ELBO if self.enumerates else Trace_ELBO
        nesting = nesting_of(self._sites)
        return kind(num_particles=num_particles, max_plate_nesting=nesting, ignore_jit_warnings=True)

    def _programs(self, elbo: Trace_ELBO | TraceEnum_ELBO, part: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The model and the guide as the loss of a part runs them."""
        power = self.inverse_temperature
        model = self.model if power == 1.0 else poutine.scale(self.model, scale=power)
        guide = self.guide
        model, guide = self.parts.programs(part, model, guide)
        if elbo.vectorize_particles and elbo.num_particles > 1:
            guide = VarianceReduction(centered=self.subsampled)(guide)
        return model, guide

    def gradient(self, elbo: Trace_ELBO | TraceEnum_ELBO, call: Arguments, part: int = 0) -> float:
        """Loss of a mini-batch in a part of a step; its gradient is left in ``grad`` of :attr:`parameters`, which must
        be None."""
        args, kwargs = call
        if self._flat is not None and self.graph is not None and self.graph.matches(args, kwargs):
            try:
                loss, gradient = self.graph(args, kwargs)
            except RuntimeError:  # an index out of range, say; a failed factorization is NaN instead
                loss = torch.tensor(math.nan)
            if loss.isfinite():
                self._flat.flat.grad = gradient
                return float(loss)
            # A draw at which the model raises makes a recorded step NaN; an eager step leaves out only that draw.
        with _quiet():
            value = float(elbo.loss_and_grads(*self._programs(elbo, part), *args, **kwargs))
        if self._flat is not None:  # a mini-batch of another shape, say
            self._flat.gather_gradients()
        return value

    def record(self, elbo: Trace_ELBO | TraceEnum_ELBO) -> LossGraph:
        """Record the step (see :class:`LossGraph`); there is a single parameter then, until :meth:`release`.

        Raises:
            RecordingError: If the step can't be recorded.
        """
        args, kwargs = self.batches.first
        if self.parts.plate and len(self.parts.own) > 1:
            raise RecordingError("a process has several parts of a step, each with other items of its plate")
        loss = read_loss(self, elbo.num_particles)
        self.is_read = loss is not None
        if loss is None:
            loss = partial(tensor_loss(elbo), *self._programs(elbo, self.parts.own[0]))
        state = self.buffers
        with trial(state):
            leaves = used_leaves(loss, self.leaves, args, kwargs)
            flat = FlatParameter(leaves)
            try:
                self.graph = LossGraph(loss, flat, args, kwargs, state, (self.model, self.guide))
            except RecordingError:
                flat.release()
                raise
        self._flat = flat
        self.parameters = [flat.flat]
        return self.graph

    def recorded_cost(self) -> StepCost:
        """What the recorded step costs, where that is not what an eager one costs."""
        assert self.graph is not None
        with forked(), trial(self.buffers), OperationCounter() as counter:
            self.graph(*self.batches.first)
        return self.parts.processes.broadcast(counter.cost)

    def compile(self) -> None:
        """Compile the recorded step.

        Raises:
            RuntimeError: If there is no working compiler; the graph runs uncompiled then.
        """
        assert self.graph is not None
        with forked():
            self.graph.compile(*self.batches.first)

    @property
    def recorded_leaves(self) -> list[Tensor]:
        """Leaves that make up the single parameter of a recorded step, in order."""
        assert self._flat is not None
        return self._flat.leaves

    def release(self) -> None:
        """Give parameters memory of their own again, after :meth:`record`, and forget the graph."""
        if self._flat is not None:
            self._flat.release()
            self._flat, self.graph, self.parameters = None, None, self.leaves

    def estimate(self, seed: int | None = None) -> Estimate:
        """Estimate the ELBO without gradients, on mini-batches that are the same each time.

        Args:
            seed: Seed of the noise; None draws it afresh.
        """
        if not self.parts.is_whole:
            seed = self.parts.processes.broadcast(int(torch.randint(2**31, ())) if seed is None else seed)
        with seeded(seed):
            settings = self.settings
            if not self.vectorized:
                return self._estimate(self.parts.num_runs(settings.num_sequential_runs, settings.min_runs), 1, seed)
            runs = self.parts.num_runs(max(settings.num_runs, len(self.calls)), settings.min_runs)
            shape = settings.shape(runs, self.parts.per_run, self.num_items, self.num_values)
            return self._estimate(*self.parts.processes.broadcast(shape), seed)

    def has_light_tails(self) -> bool:
        """Whether the importance weights of the guide's draws have a k-hat below ``max_khat``."""
        return self._are_light(self._log_weights(self.settings.affordable_draws(self.num_values)))

    def _are_light(self, log_weights: Tensor) -> bool:
        smoothed, count = pareto_smooth(log_weights), len(log_weights)
        ess = (-(2.0 * smoothed.log_weights).logsumexp(0)).exp().item()
        largest = (smoothed.log_weights.max() + math.log(count)).item()
        return smoothed.khat < self.settings.max_khat or nearly_constant(largest, ess, count)

    def gap(self, enough: float = math.inf) -> float:
        """How far the ELBO is below the evidence that importance weights of the guide's draws give, in nats, >= 0; too
        small where the guide misses a part of the posterior, infinite without weights. The same in all processes. Fewer
        draws suffice where they tell that it is larger than ``enough``, or smaller with a light tail. Half the variance
        of rounding errors, by which that evidence is too high, is subtracted where it is known."""
        few, all_draws = self.settings.num_gap_draws, self.settings.affordable_draws(self.num_values)
        try:
            weights = self._log_weights(min(few, all_draws))
            gap, error = gap_of(weights)
            margin = self.settings.gap_errors * error
            is_told = gap - margin > enough or (gap + margin < enough < math.inf and self._are_light(weights))
            if few < all_draws and not self.parts.processes.broadcast(is_told):
                gap, _ = gap_of(torch.cat([weights, self._log_weights(all_draws - few)]))
        except NotImplementedError:  # a guide of some of the latents, the others of which have no density
            return math.inf
        if gap > self.settings.max_rounded_gap:
            gap = max(0.0, gap - rounding_variance(self.model, self.guide, Call(*self.batches.first)) / 2)
        return self.parts.processes.broadcast(gap)

    def _log_weights(self, num_draws: int) -> Tensor:
        args, kwargs = self.batches.first
        return log_weights(self.model, self.guide, num_draws, args, kwargs)[0]

    def without_density(self) -> str:
        """Error message if no loss is finite; names the sites of the model without density at a draw of the guide.

        Raises:
            Exception: Any exception that the model raises there.
        """
        self.parts.shards.join()  # all processes are here, and training ends
        call = Call(*self.batches.first)
        trace = run_quietly(self.guide, call)
        values = {name: node["value"] for name, node in sample_nodes(trace).items()}
        call = call._replace(fixed=mini_batches(trace))
        sites = without_density(self.model, values, call)
        if sites:
            return start_elsewhere("fit", sites, remedy_at(self.model, values, call))
        reason = self.rounding() or (
            "Look for what overflows in it, or in its gradient, such as the root of zero; or for draws at which it "
            "raises."
        )
        return (
            "fit: expected a finite loss and gradient in one of the first steps, but got none, although the model has "
            f"a finite log density at a draw. {reason}"
        )

    def where_not_finite(self) -> str:
        """Sites of the model without a finite log density at one of many draws of the guide, in words."""
        programs = self.parts.programs(self.parts.own[0], self.model, self.guide)
        return where_not_finite(*programs, Call(*self.batches.first), self.settings.num_sequential_runs)

    def rounding(self) -> str:
        """What float32 is the reason for; see :func:`~pyro_flows.models.precision.rounding_message`."""
        return rounding_message(self.model, self.guide, Call(*self.batches.first))

    def prefers(self, now: Estimate, before: Estimate) -> bool:
        """Whether an estimate is accepted over an earlier one: higher, or with mini-batches not significantly lower.

        The latter since a part of the data favors parameters that were fitted to it.
        """
        gain, error = now.gain_over(before)
        return gain > (-2 * error if self.subsampled else 0.0)

    @torch.no_grad()
    def _estimate(self, runs: int, particles: int, seed: int | None) -> Estimate:
        elbo = self.elbo(particles)
        try:
            with self.parts.first_buffers(self.buffers):
                value = partial(self._value, elbo)
                values = self.parts.runs(value, self.calls, runs, seed, self.batches)
        except (RuntimeError, MemoryError) as error:
            if particles == 1 or not is_out_of_memory(error):
                raise
            return self._estimate(runs, particles // 2, seed)
        sample = torch.tensor(values, dtype=torch.float64, device="cpu")  # as a checkpoint restores it
        kept = sample[~sample.isnan()]
        if len(kept) < (1.0 - REFUSALS.max_share) * runs or not kept.isfinite().all():
            return Estimate(-math.inf, math.inf, math.inf, sample)
        variance = kept.var().item()
        draws = particles * self.parts.per_run
        return Estimate(kept.mean().item(), math.sqrt(variance / len(kept)), variance * draws, sample)

    def _value(self, elbo: Trace_ELBO | TraceEnum_ELBO, call: Arguments, part: int) -> float:
        """ELBO of a mini-batch of a part's items; NaN where the model raises."""
        args, kwargs = call
        try:
            # Without validation, which would raise at draws of zero density.
            with _quiet(), pyro.validation_enabled(False):
                return -float(elbo.loss(*self.parts.programs(part, self.model, self.guide), *args, **kwargs))
        except NO_DENSITY:
            return math.nan


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Pyro's warnings about losses that are not finite, which are checked and counted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|infinite|[+-]?inf)", category=UserWarning)
        yield
