# SPDX-License-Identifier: Apache-2.0
"""L3. AutoFlowGuide: the guide that users swap for AutoNormal."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.nn.module import _is_module_local_param_enabled
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_flows._checks import check_int, check_positive
from pyro_flows.flows import FlowDistribution, FlowSpec
from pyro_flows.flows.resolve import FlowLike, resolve
from pyro_flows.guides.initialization import init_to_prior_median
from pyro_flows.guides.joint import JointBlock
from pyro_flows.guides.prototype import checked_init, hide_from_guide, refuse_subsampled, trace_latents
from pyro_flows.sites import SiteTable

__all__ = ["AutoFlowGuide"]


class AutoFlowGuide(AutoContinuous):
    r"""A normalizing flow over all the latents of a model; takes the place of ``AutoNormal``.

    The guide starts exactly at the mean-field normal that ``AutoNormal`` starts at (for families with an identity
    start), and a flow closes the gap :math:`\log p(x) - \mathrm{ELBO} = \mathrm{KL}(q(z) \| p(z | x))` from there.
    It trains with plain ``SVI`` and any ELBO whose guide may be reparameterised. Gradients are path gradients
    by default (see :class:`~pyro_flows.flows.FlowDistribution`), whose noise vanishes as q nears the posterior.

    The structure of the model (sites, shapes, supports) must not change between calls. Supports that depend on
    other latents are taken as they were at the first call, as in all of Pyro's autoguides.

    Args:
        model: A Pyro model. Discrete sites marked for enumeration are left out; train with ``TraceEnum_ELBO``.
        flow: The family: a name in ``flows.names()``, a :class:`~pyro_flows.flows.FlowSpec`, or a function
            ``input_dim -> transform(s)``, as ``AutoNormalizingFlow`` takes. ``"auto"`` suits any model.
        init_loc_fn: Where the guide starts, site by site; see ``pyro.infer.autoguide.initialization``. The default is
            :func:`init_to_prior_median`, the prior's exact median where it is known.
        init_scale: Standard deviation at the start, in unconstrained space; > 0.
        create_plates: Function of the model's arguments that returns a plate or an iterable of plates.
        path_gradient: Whether ELBO gradients leave out the score term.
        name: Name in Pyro's parameter store. None takes a free one, so that several guides train in one process. A
            guide with a name takes over parameters that it finds under that name, for instance in a store loaded
            from a file.

    Raises:
        ValueError: At the first call, if a site is discrete and not enumerated, spherical or circular.
        NotImplementedError: At the first call, if a latent site is in a sequential or subsampled plate.
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

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowLike = "auto",
        *,
        init_loc_fn: Callable[..., Any] = init_to_prior_median,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
        path_gradient: bool = True,
        name: str | None = None,
    ) -> None:
        check_positive("AutoFlowGuide", "init_scale", init_scale)
        super().__init__(model, init_loc_fn=checked_init(init_loc_fn))
        self.create_plates = create_plates
        self.init_scale = float(init_scale)
        self.path_gradient = path_gradient
        self._spec: FlowSpec | None = resolve(flow)
        if not self._spec.one_pass_sampling:
            raise NotImplementedError(
                f"AutoFlowGuide: expected a flow that draws in one pass, but {type(self._spec).__name__} takes a pass "
                'per dimension, and a guide draws at every step. Use "iaf", the same family in the other direction.'
            )
        self._given_name = name
        self._registered = False
        if name is not None:
            self._pyro_name = name

    # Life cycle

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlowGuide:
        """Build every parameter, once; the first call of the guide does it otherwise.

        After this a ``state_dict`` loads into a fresh guide. Takes the model's arguments; returns the guide.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = trace_latents(self.model, args, kwargs)
        if self.master is not None and self.master().prototype_trace is not None:
            self.master()._check_prototype(trace)
        table = SiteTable.from_trace(trace)
        assert self._spec is not None
        self.add_module("joint", JointBlock(table, self._spec, self.init_scale))
        self.latent_dim = table.latent_dim
        self._prototype_frames = {frame.name: frame for site in table for frame in site.frames}
        if self.master is None:
            with poutine.block():
                self._create_plates(*args, **kwargs)  # NeuTraReparam reads them, perhaps before any call.
        self._spec = None  # A user's function need not be picklable, and is done with.
        self.prototype_trace = trace

    @property
    def _joint(self) -> JointBlock:
        # PyroModule's own attribute access would run a pyro.module statement each time.
        block = self._modules.get("joint")
        if block is None:
            raise RuntimeError(
                "AutoFlowGuide: expected the guide to be set up, but it has not seen its model's arguments yet. "
                "Call `guide.setup(*args, **kwargs)` with the model's arguments first."
            )
        assert isinstance(block, JointBlock)
        return block

    @property
    def model(self) -> Callable[..., Any]:
        """The model; not part of a pickled guide."""
        if self._model is None:
            raise RuntimeError(
                "AutoFlowGuide: expected a model, but a guide that was loaded from a file has none. "
                "Use the model itself, or load a state_dict into a fresh AutoFlowGuide(model)."
            )
        model: Callable[..., Any] = self._model[0]
        return model

    def __getstate__(self) -> dict[str, Any]:
        for param in self.parameters():
            param.__dict__.pop("unconstrained", None)  # A weak reference that pyro.param sets at each call.
        return {**self.__dict__, "_model": None, "master": None, "_registered": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlowGuide:
        """A copy with parameters of its own and the same model; it takes a new name in the parameter store."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = {**self.__getstate__(), "_given_name": None}
        new.__setstate__(copy.deepcopy(state, memo))
        new._model = self._model
        return new

    # Parameters in Pyro's store

    def _declare_parameters(self) -> None:
        """Run a param statement for every trainable parameter, so that SVI finds it."""
        joint = self._joint
        params = [(name, p) for name, p in joint.named_parameters("joint") if p.requires_grad]
        if _is_module_local_param_enabled():
            for name, param in params:
                fullname = f"{self._pyro_name}.{name}"
                # What Pyro does for a PyroParam; for a plain nn.Parameter it omits `unconstrained`, and SVI fails.
                value = param.detach()
                value.unconstrained = weakref.ref(param)  # type: ignore[attr-defined]
                statement = poutine.runtime.effectful(type="param")(lambda *_, value=value, **__: value)
                statement(fullname, param, constraint=dist.constraints.real, event_dim=param.dim(), name=fullname)
            return
        if not self._registered or self._is_displaced(params):
            self._register(params)
        for name, param in params:
            pyro.param(f"{self._pyro_name}.{name}", param, event_dim=param.dim())

    def _is_displaced(self, params: Sequence[tuple[str, Tensor]], prefix: str | None = None) -> bool:
        """Whether the store holds another tensor under one of our names."""
        store = pyro.get_param_store()._params
        prefix = self._pyro_name if prefix is None else prefix
        return any(store.get(f"{prefix}.{name}", param) is not param for name, param in params)

    def _register(self, params: Sequence[tuple[str, Tensor]]) -> None:
        """Settle which names in the store are ours; see the constructor's ``name``."""
        if self._is_displaced(params):
            if self._pyro_name == self._given_name:
                self._adopt(params)
            else:
                free = self._free_name(params)
                if self._registered:
                    warnings.warn(
                        f"AutoFlowGuide: the parameter store holds other tensors under the name '{self._pyro_name}' "
                        f"(another guide's, or a loaded file's), so this guide goes on with its own as '{free}'. "
                        "To take parameters from the store, pass a name: AutoFlowGuide(model, name=...).",
                        stacklevel=6,
                    )
                self._pyro_set_supermodule(free, self._pyro_context)
        self._registered = True

    def _free_name(self, params: Sequence[tuple[str, Tensor]]) -> str:
        stem, _, suffix = self._pyro_name.rpartition("_")
        if not (stem and suffix.isdigit()):
            stem = self._pyro_name
        index = 1
        while self._is_displaced(params, f"{stem}_{index}"):
            index += 1
        return f"{stem}_{index}"

    @torch.no_grad()
    def _adopt(self, params: Sequence[tuple[str, Tensor]]) -> None:
        store = pyro.get_param_store()
        for name, param in params:
            fullname = f"{self._pyro_name}.{name}"
            if fullname not in store:
                continue
            found = store[fullname]
            if found.shape != param.shape:
                raise RuntimeError(
                    f"AutoFlowGuide: expected the parameter store's '{fullname}' to have shape {tuple(param.shape)}, "
                    f"but got {tuple(found.shape)}. Pass another name= or call pyro.clear_param_store()."
                )
            param.copy_(found)
            del store[fullname]

    # Distribution

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the packed unconstrained vector, event shape ``(latent_dim,)``."""
        return self._joint.distribution(path_gradient=self.path_gradient)

    def get_base_dist(self) -> dist.TorchDistribution:
        """Standard normal noise, event shape ``(latent_dim,)``."""
        return self._joint.flow.base_dist

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The flow's map from noise to the packed unconstrained vector."""
        return self._joint.flow.transform.condition(None)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for site, unconstrained in self._joint.table.split(latent):
            yield self.prototype_trace.nodes[site.name], unconstrained

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        plates: dict[str, pyro.plate] = super()._create_plates(*args, **kwargs)
        for site in self._joint.table:
            for frame in site.frames:
                plate = plates[frame.name]
                if plate.subsample_size < plate.size:
                    local = [s.name for s in self._joint.table if any(f.name == frame.name for f in s.frames)]
                    refuse_subsampled(local, frame.name, plate.subsample_size, plate.size)
        return plates

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents; takes the model's arguments.

        Returns:
            Site name -> value.
        """
        self.setup(*args, **kwargs)
        self._declare_parameters()
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        no_density = poutine.get_mask() is False
        result = {}
        for site, unconstrained in self._joint.table.split(latent):
            value, log_density = site.constrain(unconstrained)
            delta = dist.Delta(value, 0.0 if no_density else log_density, event_dim=site.event_dim)
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                result[site.name] = pyro.sample(site.name, delta)
        return result

    # Summaries

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide, without gradients.

        Args:
            num_samples: Number of draws, >= 1.
            args: The model's arguments; needed only if the guide is not set up yet.
            kwargs: Likewise.

        Returns:
            Site name -> ``(num_samples, *site shape)``.
        """
        check_int("sample_posterior", "num_samples", num_samples, 1)
        joint = self.setup(*args, **kwargs)._joint
        return joint.table.unpack(joint.sample(num_samples))

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log density of the guide at given values, in the model's own (constrained) space.

        Differentiable in the values and in the guide's parameters.

        Args:
            values: Site name -> ``batch_shape + site shape``, for every latent site.
            args: The model's arguments; needed only if the guide is not set up yet.
            kwargs: Likewise.

        Returns:
            ``batch_shape``.

        Raises:
            ValueError: If sites are missing or a shape does not fit.
            NotImplementedError: If the family has no inverse (``has_inverse`` of its spec).
        """
        joint = self.setup(*args, **kwargs)._joint
        packed, ladj = joint.table.pack(values)
        return joint.log_prob(packed) + ladj

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_samples: int = 4000, **kwargs: Any
    ) -> dict[str, Tensor]:
        r"""Quantiles of each coordinate of each site, from draws.

        Taken in unconstrained space and mapped to the support, so that the result is on it. The standard error of
        the p-quantile is at most :math:`\sqrt{p (1 - p) / S} / f`, with :math:`f` the density there: for a normal 2 %
        of a standard deviation at the median and 4 % at 5 %, with the default number of draws. The noise is the same
        at each call and symmetric, so results repeat and the median of a Gaussian guide is exact.

        Args:
            quantiles: Probabilities in [0, 1].
            args: The model's arguments; needed only if the guide is not set up yet.
            num_samples: Number of draws, >= 1.
            kwargs: As ``args``.

        Returns:
            Site name -> ``(len(quantiles), *site shape)``.
        """
        check_int("quantiles", "num_samples", num_samples, 1)
        joint = self.setup(*args, **kwargs)._joint
        draws = joint.summary_draws(num_samples)
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        if levels.dim() != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"quantiles: expected a list of probabilities in [0, 1], but got {quantiles}.")
        return joint.table.quantiles(draws, levels)

    def median(self, *args: Any, num_samples: int = 4000, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each coordinate of each site, from draws; see :meth:`quantiles` for the error.

        Returns:
            Site name -> value of the site's shape.
        """
        medians = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value.squeeze(0) for name, value in medians.items()}
