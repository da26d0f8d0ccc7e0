# SPDX-License-Identifier: Apache-2.0
"""L5. AutoFlowGuide: a drop-in replacement for AutoNormal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_flows._checks import (
    check_bool,
    check_call,
    check_callable,
    check_choice,
    check_positive,
    check_text,
    checked,
    optional,
)
from pyro_flows._recording import is_recording
from pyro_flows._threads import one_at_a_time
from pyro_flows.distributed.shards import Shards
from pyro_flows.flows import FlowDistribution, FlowSpec
from pyro_flows.flows.recipe import Recipe
from pyro_flows.flows.resolve import FlowLike, resolve
from pyro_flows.guides.delta import DensityDelta
from pyro_flows.guides.files import FiledGuide
from pyro_flows.guides.initialization import better_start, init_to_prior_median
from pyro_flows.guides.refusals import check_spec, warn_of_refused
from pyro_flows.models.latents import checked_init, hide_from_guide, trace_latents
from pyro_flows.models.sites import full_size
from pyro_flows.models.traces import as_indices
from pyro_flows.posterior.encoders import checked_encoders
from pyro_flows.posterior.joint import JointBlock
from pyro_flows.posterior.mini_batches import Arguments, Watch, check_calls, unwatched
from pyro_flows.posterior.plate import LocalBlock
from pyro_flows.posterior.posterior import Latents, Posterior
from pyro_flows.posterior.step_limit import StepLimit
from pyro_flows.posterior.structure import STRUCTURES, check_plate, listed_plates, local_plates
from pyro_flows.starts.plates import warm_start

__all__ = ["AutoFlowGuide"]


class AutoFlowGuide(FiledGuide):
    r"""A normalizing flow over the latents of a model; a drop-in replacement for ``AutoNormal``.

    The initial guide is exactly the mean-field normal of ``AutoNormal`` (for families that are initialized to the
    identity), and a flow closes the gap :math:`\log p(x) - \mathrm{ELBO} = \mathrm{KL}(q(z) \| p(z | x))` from there.
    It trains with plain ``SVI``, with any ELBO that takes reparameterized guides, and with the optimizer and the
    learning rate that train ``AutoNormal``: location and scale move as they do there, all other parameters by small
    steps (see :class:`~pyro_flows.posterior.step_limit.StepLimit`), and entries of a draw's gradient that are not
    finite count as zero (see :class:`~pyro_flows.flows.gradient_filter.GradientFilter`). Gradients are path gradients
    by default (see :class:`~pyro_flows.flows.FlowDistribution`), whose noise vanishes as q nears the posterior.

    Latents inside a subsampled or amortized plate are *local*: each item gets a conditional flow given the globals and
    its parent groups, with weights that all items share. Each item has parameters of its own for a Gaussian site
    approximation and a small embedding; in an amortized plate, both are computed from the encoder's output instead.
    See :class:`~pyro_flows.transforms.PlateHead`.

    The structure of the model (sites, shapes, supports) must not change between calls, except for the sizes of
    mini-batches and of amortized plates. Supports that depend on other latents are fixed at the first call, as in all
    of Pyro's autoguides.

    Args:
        model: A Pyro model. Discrete sites marked for enumeration are left out; train with ``TraceEnum_ELBO``
            or :class:`~pyro_flows.VectorizedTrace_ELBO`.
        flow: The family: a name in ``flows.names()``, a :class:`~pyro_flows.flows.FlowSpec`, or a function
            ``input_dim -> transform(s)``, as ``AutoNormalizingFlow`` takes. ``"auto"`` suits any model.
        init_loc_fn: Initial location of each site; see ``pyro.infer.autoguide.initialization``. The default is
            :func:`init_to_prior_median`, or ``AutoNormal``'s initial location if the model's density is higher there.
        init_scale: Initial standard deviation in unconstrained space, > 0.
        create_plates: Function of the model's arguments that returns a plate or a list of plates.
        amortize: Plate -> encoder, any callable of the model's arguments that returns ``(batch, context_dim)``: the
            latents of that plate have no parameters of their own, and new data need no training. The encoder is called
            inside the plate where the plate subsamples, so that ``pyro.subsample`` works in it. Such latents are
            initialized with a Gaussian encoder of the prior's scale (``init_scale`` where the prior is not Gaussian).
        structure: ``"plates"`` makes the latents of every plate local, ``"joint"`` none (no plate may then be
            subsampled), and ``"auto"`` those of subsampled and amortized plates, of plates from ``create_plates`` and,
            where a joint flow would have more than 10,000 dimensions, of the largest plates.
        path_gradient: Whether ELBO gradients leave out the score term.
        name: Name in Pyro's parameter store. None takes a free one, so that several guides can train in one process. A
            guide with a name takes over the parameters stored under that name, for instance in a store loaded from a
            file.

    Raises:
        TypeError: If an encoder is not callable.
        ValueError: At the first call, if a site is discrete and not enumerated, spherical, circular or masked in part;
            if it is in a plate for which the model chooses indices and ``create_plates`` does not, or its bounds
            differ between items of a subsampled plate; if a plate to amortize has no latents, or an encoder's output
            does not fit the plate.
        NotImplementedError: At the first call, if a latent site is in a sequential plate.
        RuntimeError: At the first call, if there are no latents.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.optim import Adam
        >>> from pyro_flows import AutoFlowGuide
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("schools", len(y)):
        ...         theta = pyro.sample("theta", dist.Normal(mu, tau))
        ...         pyro.sample("y", dist.Normal(theta, 10.0), obs=y)
        >>> y = torch.tensor([28.0, 8.0, -3.0, 7.0])
        >>> guide = AutoFlowGuide(model)
        >>> svi = SVI(model, guide, Adam({"lr": 5e-3}), Trace_ELBO())
        >>> loss = svi.step(y)
        >>> {site: tuple(draws.shape) for site, draws in guide.sample_posterior(100, y).items()}
        {'mu': (100,), 'tau': (100,), 'theta': (100, 4)}
    """

    _prototype_hide_fn = staticmethod(hide_from_guide)

    @checked(
        init_loc_fn=check_callable,
        init_scale=check_positive,
        create_plates=optional(check_callable),
        structure=partial(check_choice, choices=STRUCTURES),
        path_gradient=check_bool,
        name=optional(check_text),
    )
    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowLike = "auto",
        *,
        init_loc_fn: Callable[..., Any] = init_to_prior_median,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
        amortize: Mapping[str, Callable[..., Any]] | None = None,
        structure: str = "auto",
        path_gradient: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=checked_init(init_loc_fn), name=name)
        self._has_default_start = init_loc_fn is init_to_prior_median
        self._encoders = checked_encoders(amortize)
        self.structure = structure
        self.create_plates = create_plates
        self.init_scale = float(init_scale)
        self.path_gradient = path_gradient
        self.limits_steps = True
        self._has_warned = False
        self._spec: FlowSpec | None = resolve(flow)
        self._recipe = Recipe.of(self._spec)
        check_spec(self._spec)

    # Life cycle

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlowGuide:
        """Build all parameters, once; otherwise the first call of the guide does so.

        Afterwards a ``state_dict`` can be loaded. Takes the model's arguments; returns the guide.
        """
        if self.prototype_trace is None:
            check_call("AutoFlowGuide", "model", self.model, args, kwargs)
            self._setup_prototype(*args, **kwargs)
        return self

    def warm_start(self, *args: Any, **kwargs: Any) -> AutoFlowGuide:
        """Before training, initialize at the best Gaussian by ELBO of many candidates, for some hundred gradients.

        Where the model's priors are known and the Gaussian relative to them has a higher ELBO, as in a funnel, that
        one is taken. Local latents of the items in the arguments are initialized at each item's mode and curvature.
        Takes the model's arguments; returns the guide. See :mod:`pyro_flows.starts.select` and
        :mod:`pyro_flows.starts.plates`.

        Raises:
            NotImplementedError: If a plate is amortized; if there are local latents and enumerated sites; if sites are
                enumerated one value after another, or scaled.
            ValueError: If data are not finite or outside their support, or of another size than at set-up.
            RuntimeError: If the model has no finite density near the initial location; names the sites.
        """
        return self.warm_start_on([(args, kwargs)])

    def warm_start_on(
        self, calls: Sequence[Arguments], watch: Watch = unwatched, model: Any = None, shards: Shards | None = None
    ) -> AutoFlowGuide:
        """Warm start from ``(args, kwargs)`` of many mini-batches, which together hold every item.

        See :meth:`warm_start`. ``watch`` takes a pass over the mini-batches and its title, and wraps it in a progress
        bar. ``model`` is the model that will be trained, where the guide's own is a part of it, as in
        ``AutoFlowGuide(poutine.block(model, expose=[...]))``. ``shards`` are the shares that processes have of items.
        """
        check_calls(calls)
        args, kwargs = calls[0]
        with one_at_a_time("AutoFlowGuide.warm_start"):
            posterior = self.setup(*args, **kwargs)._posterior
            plates, shards = partial(self._make_plates, {}), shards or Shards()
            warm_start(model or self.model, posterior, calls, plates, self.init_scale, watch, shards)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._has_default_start:
            init_loc_fn = better_start(self.model, self.init_scale, args, kwargs)
            self._model = (self.model, InitMessenger(checked_init(init_loc_fn))(self.model))
        given = self._given_plates(args, kwargs)
        trace = trace_latents(self.started_model, args, kwargs, given)
        if self.master is not None and self.master().prototype_trace is not None:
            self.master()._check_prototype(trace)
        self._prototype_frames = {
            frame.name: frame
            for _, node in trace.iter_stochastic_nodes()
            for frame in node["cond_indep_stack"]
            if frame.vectorized
        }
        if self.master is None:
            with poutine.block():
                self._create_plates(*args, **kwargs)  # NeuTraReparam may read them before any call.
        plates = self.plates if self.master is None else getattr(self.master(), "plates", {})
        own = given if self.create_plates is not None else ()
        subsampled = {name for name, plate in plates.items() if plate.subsample_size < plate.size}
        assert self._spec is not None
        posterior = Posterior(
            self.model,
            trace,
            self._spec,
            self.init_scale,
            local=local_plates(trace, plates, own, self._encoders, self.structure),
            varying={*subsampled, *own, *self._encoders},
            amortize=self._encoders,
            args=args,
            kwargs=kwargs,
        )
        self.add_module("posterior", posterior)
        self.latent_dim = posterior.latent_dim
        self._spec = None  # A user's function need not be picklable, and is no longer needed.
        self._encoders = {}
        self.prototype_trace = trace
        self._initial = self._fingerprint()

    def _given_plates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, pyro.plate]:
        """The plates that the user creates for the guide, or for the ``AutoGuideList`` that it is in."""
        make = self.create_plates
        if make is None and self.master is not None:
            make = self.master().create_plates
        if make is None:
            return {}
        check_call("AutoFlowGuide", "create_plates", make, args, kwargs, "Let it take the model's.")
        with poutine.block():
            plates = make(*args, **kwargs)
        return {plate.name: plate for plate in listed_plates(plates)}

    @property
    def _posterior(self) -> Posterior:
        # PyroModule's own attribute access would run a pyro.module statement each time.
        posterior = self._modules.get("posterior")
        if posterior is None:
            raise RuntimeError(
                "AutoFlowGuide: expected the guide to be set up, but it has not seen its model's arguments yet. "
                "Call `guide.setup(*args, **kwargs)` with the model's arguments first."
            )
        assert isinstance(posterior, Posterior)
        posterior.step_limit.apply()
        return posterior

    @property
    def step_limit(self) -> StepLimit:
        """Limit on steps of all parameters but the Gaussian's; see
        :class:`~pyro_flows.posterior.step_limit.StepLimit`."""
        return self._posterior.step_limit

    def _trained(self) -> Posterior:
        return self._posterior

    @property
    def _joint(self) -> JointBlock:
        """The joint block, which is the only block of a guide without local latents."""
        return self._posterior.only_block

    @property
    def num_refused(self) -> int:
        """Number of draws whose gradient had entries that were not finite; these entries counted as zero."""
        return sum(part.num_refused for part in self._posterior.filters)

    # Distribution

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the packed unconstrained vector, event shape ``(latent_dim,)``."""
        return self._joint.distribution(path_gradient=self.path_gradient)

    def get_base_dist(self) -> dist.TorchDistribution:
        """The flow's noise, event shape ``(latent_dim,)``: a standard normal, or the spec's ``base``."""
        return self._joint.flow.base_dist

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The flow's map from noise to the packed unconstrained vector."""
        return self._joint.flow.transform.condition(None)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for site, unconstrained in self._joint.layout.split(latent):
            yield self.prototype_trace.nodes[site.name], unconstrained

    def _encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Outputs of the encoders of plates that are as long as the data of each call."""
        if self.create_plates is not None or self.master is not None:
            return {}
        return {
            name: encoder(args, kwargs)
            for name, frame in self._prototype_frames.items()
            if (encoder := self._posterior.encoder(name)) is not None and full_size(frame) == frame.size
        }

    def _make_plates(
        self, encoded: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, pyro.plate]:
        """Pyro's plates for this call; amortized ones have the size of the encoder's output."""
        frames = self._prototype_frames
        sizes = {name: len(rows) for name, rows in encoded.items()}
        resized = {name: frames[name]._replace(size=size, full_size=size) for name, size in sizes.items()}
        self._prototype_frames = {**frames, **resized}
        try:
            plates: dict[str, pyro.plate] = self._create_plates(*args, **kwargs)
        finally:
            self._prototype_frames = frames
        amortized = [name for name in frames if self._posterior.encoder(name) is not None]
        for name, frame in frames.items():
            if name not in amortized:
                local = any(name in block.layout.plate_names for block in self._posterior.blocks())
                check_plate(plates[name], frame, local=local)
        return plates

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents; takes the model's arguments.

        Returns:
            Site name -> value; local sites have values for the items of the mini-batch only.
        """
        posterior = self.setup(*args, **kwargs)._posterior
        if self.num_refused and not self._has_warned and not is_recording():
            self._has_warned = True
            warn_of_refused(self.model, posterior, args, kwargs)
        self._declare_parameters()
        if self.limits_steps:
            posterior.step_limit.mark()
        encoded = self._encode(args, kwargs)
        plates = self._make_plates(encoded, args, kwargs)
        latents: Latents = {}
        if posterior.joint is not None:
            joint = posterior.joint.distribution(path_gradient=self.path_gradient, filtered=True)
            latents[()] = pyro.sample(f"_{self._pyro_name}_latent", joint, infer={"is_auxiliary": True})
        for block in posterior.blocks():
            latents[block.layout.plate_names] = self._sample_local(block, latents, plates, encoded, args, kwargs)
        unconstrained = {site.name: (site, value) for site, value in posterior.split(latents)}
        no_density = poutine.get_mask() is False
        result = {}
        for name in posterior.order:
            site, latent = unconstrained[name]
            value, log_density = site.constrain(latent)
            delta = DensityDelta(value, 0.0 if no_density else log_density, event_dim=site.event_dim)
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, delta)
        return result

    def _sample_local(
        self,
        block: LocalBlock,
        latents: Latents,
        plates: Mapping[str, pyro.plate],
        encoded: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Draw the packed latents of the items of the mini-batch, in their plates."""
        posterior = self._posterior
        indices, rows = {}, {}
        with ExitStack() as stack:
            for name in block.layout.plate_names:
                indices[name] = as_indices(stack.enter_context(plates[name]))
                encoder = posterior.encoder(name)
                if encoder is not None:
                    output = encoded[name] if name in encoded else encoder(args, kwargs)
                    rows[name] = encoder.rows(output, plates[name].size, indices[name])
            sizes = [(plates[name].size, plates[name].subsample_size) for name in block.layout.plate_names]
            block.gradient_filter.largest_multiple = math.prod(size / count for size, count in sizes)
            distribution = block.distribution(
                block.item_context(indices, rows),
                latents,
                posterior.joint,
                posterior.parents(block),
                path_gradient=self.path_gradient,
                filtered=True,
            )
            name = f"_{self._pyro_name}_{'_'.join(block.layout.plate_names)}_latent"
            value: Tensor = pyro.sample(name, distribution, infer={"is_auxiliary": True})
        return value
