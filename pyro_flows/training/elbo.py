# SPDX-License-Identifier: Apache-2.0
"""L7. :class:`VectorizedTrace_ELBO`: many particles in one run of any model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_flows._checks import check_choice, check_int, checked, integer
from pyro_flows._recording import is_recording
from pyro_flows.models.batching import BatchedModel
from pyro_flows.models.particles import look_at
from pyro_flows.models.traces import REFUSALS, Call, by_draw, mini_batches, sample_nodes

__all__ = ["VectorizedTrace_ELBO"]

OWNER = "VectorizedTrace_ELBO"


def _check_nesting(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is an integer >= 0, or infinite."""
    if not (isinstance(value, float) and value == math.inf):
        check_int(owner, name, value, 0)


class VectorizedTrace_ELBO(Trace_ELBO):
    """``Trace_ELBO`` whose particles share one run of the model, even if the model was not written for that.

    ``Trace_ELBO(num_particles=16, vectorize_particles=True)`` needs a model that broadcasts over an outer plate. Most
    do not: ``x @ w``, ``a[group]``, a loop over time, an ``nn.Module``. Here the guide runs in an outer plate, and the
    model too if that gives the log densities of plain runs; if not, it runs under ``torch.vmap``. Sites that the model
    enumerates in parallel are summed out, as by ``TraceEnum_ELBO``. Works with ``SVI`` and
    :class:`~pyro_flows.CompiledSVI`, with Pyro's guides and those of this library.

    Particles at which the model raises (a Cholesky factorization that fails, say) are left out, up to a tenth of them.

    Args:
        num_particles: Number of particles, >= 1.
        max_plate_nesting: Number of batch dimensions in use; with infinity it is read off the first run.
        options: Other options of ``Trace_ELBO``.

    Raises:
        RuntimeError: At the first step, if the model can't be vectorized; names the line of the model that prevents it.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyro_flows import AutoFlowGuide, VectorizedTrace_ELBO
        >>> def model(x, y):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        >>> svi = SVI(model, AutoFlowGuide(model), Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=16))
        >>> loss = svi.step(torch.randn(10, 2), torch.randn(10))
    """

    @checked(num_particles=integer(1), max_plate_nesting=_check_nesting)
    def __init__(self, num_particles: int = 1, max_plate_nesting: float = math.inf, **options: Any) -> None:
        options.pop("vectorize_particles", None)
        known = [name for name in inspect.signature(ELBO).parameters if name != "vectorize_particles"]
        for name in options:
            check_choice(OWNER, "each option", name, known)
        self._least_nesting = 0 if math.isinf(max_plate_nesting) else int(max_plate_nesting)
        super().__init__(num_particles, max_plate_nesting, vectorize_particles=True, **options)  # type: ignore[no-untyped-call]
        self._batched: BatchedModel | None = None
        self._is_given = False

    @classmethod
    def of(cls, batched: BatchedModel, num_particles: int) -> VectorizedTrace_ELBO:
        """The loss of models that differ only by scales from one that was analyzed before."""
        made = cls(num_particles)
        made._batched, made._is_given = batched, True
        made.max_plate_nesting = batched.nesting + (num_particles > 1)
        return made

    def _get_traces(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._batched is None or not (self._is_given or self._batched.model == model):
            self._batched = look_at(OWNER, model, guide, Call(args, kwargs), self._least_nesting)
            self.max_plate_nesting = self._batched.nesting + (self.num_particles > 1)
        if self._batched.obstacle and self.num_particles > 1:
            raise RuntimeError(
                f"{OWNER}: expected a model that can be run at many draws at once, but {self._batched.obstacle}. Take "
                f"Trace_ELBO(num_particles={self.num_particles}), which runs them one by one."
            )
        return super()._get_traces(model, guide, args, kwargs)  # type: ignore[no-untyped-call]

    def _get_vectorized_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        batched = self._batched
        assert batched is not None
        guide_trace, values = self._draw(guide, args, kwargs)
        model_trace = batched(values, Call(args, kwargs, mini_batches(guide_trace)), model)
        guide_trace = prune_subsample_sites(guide_trace)
        if not is_recording():
            _leave_out_refused(model_trace, guide_trace, self.num_particles)
        return model_trace, guide_trace

    def _draw(
        self, guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, dict[str, Tensor]]:
        """A run of the guide, with densities; and its draws of the model's latents, ``(S, *site shape)``."""
        batched = self._batched
        assert batched is not None
        trace = poutine.trace(self._vectorized_num_particles(guide)).get_trace(*args, **kwargs)
        values = {
            name: batched.rows(name, node["value"], self.num_particles)
            for name, node in sample_nodes(trace).items()
            if name in batched.nodes
        }
        trace.compute_score_parts()
        return trace, values


def _leave_out_refused(model_trace: Trace, guide_trace: Trace, count: int) -> None:
    """Average over the draws at which the model does not raise."""
    terms = [by_draw(node["log_prob"]) for node in sample_nodes(model_trace).values()]
    usable = ~torch.stack([term.detach() for term in terms]).sum(0).isnan()
    refused = count - int(usable.sum())
    if not 0 < refused <= REFUSALS.max_share * count:
        return

    def usable_only(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0 or len(value) != count:
            return value
        keep = usable.reshape(-1, *(1,) * (value.dim() - 1))
        return torch.where(keep, value, 0.0) * (count / (count - refused))

    for node in sample_nodes(model_trace).values():
        node["log_prob"] = usable_only(node["log_prob"])
        node["log_prob_sum"] = node["log_prob"].sum()
    for node in sample_nodes(guide_trace).values():
        node["log_prob"] = usable_only(node["log_prob"])
        node["log_prob_sum"] = node["log_prob"].sum()
        node["score_parts"] = type(node["score_parts"])(*map(usable_only, node["score_parts"]))
