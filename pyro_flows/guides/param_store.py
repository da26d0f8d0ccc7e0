# SPDX-License-Identifier: Apache-2.0
"""L5. A guide's parameters in Pyro's store: found by SVI, under unique names, saved and loaded with the store."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.nn.module import _is_module_local_param_enabled
from torch import Tensor, nn

from pyro_flows._blame import user_level
from pyro_flows._checks import check_mapping
from pyro_flows.flows.version_0_1_0 import from_0_1_0, is_from_0_1_0
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.transforms import FixedParameter
from pyro_flows.transforms.fixed import look_again

__all__ = ["StoredGuide"]


class StoredGuide(AutoContinuous):
    """An autoguide with plain ``nn.Parameter``s, which it registers under unique names in Pyro's parameter store.

    Args:
        model: A Pyro model.
        init_loc_fn: See ``AutoContinuous``.
        name: Name in Pyro's parameter store. None takes a free one. A guide with a name takes over the parameters
            stored under that name.
    """

    _model: tuple[Callable[..., Any], ...] | None

    def __init__(self, model: Any, init_loc_fn: Any, name: str | None) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        assert self._model is not None
        self._model = (model, *self._model)  # the second has its latents at their initial values
        self._given_name = name
        self._registered = False
        self._declared: list[tuple[str, nn.Parameter]] = []  # the posterior's list when they were last declared
        if name is not None:
            self._pyro_name = name

    @property
    def model(self) -> Callable[..., Any]:
        """The model; not part of a pickled guide."""
        return self._models()[0]

    @property
    def started_model(self) -> Callable[..., Any]:
        """The model with its latents at their initial values. Code that sets the latents itself uses :attr:`model`,
        which does not call ``init_loc_fn``."""
        return self._models()[1]

    def _models(self) -> tuple[Callable[..., Any], ...]:
        if self._model is None:
            raise RuntimeError(
                "AutoFlowGuide: expected a model, but a guide that was loaded from a file has none. "
                "Use the model itself, or load a state_dict into a fresh AutoFlowGuide(model)."
            )
        return self._model

    def _trained(self) -> Posterior:
        """The module that holds the parameters."""
        raise NotImplementedError

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are in the store, by their names in the store less the guide's."""
        return [(f"posterior.{name}", p) for name, p in self._trained().listed_parameters() if p.requires_grad]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state, as for any module.

        Raises:
            TypeError: If the state is no mapping.
            RuntimeError: If the guide is not set up, and so has no parameters yet.
        """
        check_mapping("load_state_dict", "state_dict", state_dict)
        result = super().load_state_dict(state_dict, *args, **kwargs)
        if self._declared:
            self._withdraw()
        return result

    def __getstate__(self) -> dict[str, Any]:
        for param in self.parameters():
            param.__dict__.pop("unconstrained", None)  # A weak reference that pyro.param sets at each call.
        return {**self.__dict__, "_model": None, "master": None, "_registered": False, "_declared": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredGuide:
        """A copy with parameters of its own and the same model; it takes a new name in the parameter store."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = {**self.__getstate__(), "_given_name": None}
        new.__setstate__(copy.deepcopy(state, memo))
        new._model = self._model
        return new

    def _declare_parameters(self) -> None:
        """Run a ``pyro.param`` statement for every trainable parameter, so that SVI finds it."""
        params = self._named()
        local = _is_module_local_param_enabled()
        if not local and (not self._registered or self._is_displaced(params)):
            self._register(params)
            params = self._named()
        if not local:
            self._withdraw()
        fixed = [param for _, param in params if isinstance(param, FixedParameter)]
        for name, param in params:
            fullname = f"{self._pyro_name}.{name}"
            if local:
                # As Pyro does for a PyroParam; for a plain nn.Parameter it omits `unconstrained`, and SVI fails.
                _declare(fullname, param, unconstrained=param)
            elif isinstance(param, FixedParameter):
                # torch.jit has to know it, but SVI need not step it, which takes as long as for any other: one of them
                # stands for all.
                pyro.get_param_store().setdefault(fullname, param)
                _declare(fullname, param, unconstrained=fixed[0])
            else:
                pyro.param(fullname, param, event_dim=param.dim())

    def _withdraw(self) -> None:
        """Remove parameters from the store that the guide put there and no longer has, since its flow has taken another
        kind: a guide that takes over the store's parameters would take that kind, too."""
        listed, before = self._trained().listed_parameters(), self._declared
        if listed is before:
            return
        store, kept = pyro.get_param_store(), dict(listed)
        for name, param in before:
            fullname = f"{self._pyro_name}.posterior.{name}"
            if kept.get(name) is not param and store._params.get(fullname) is param:
                del store[fullname]
        self._declared = listed

    def _is_displaced(self, params: Sequence[tuple[str, Tensor]], prefix: str | None = None) -> bool:
        """Whether the store holds another tensor under the name of one of the guide's parameters."""
        store = pyro.get_param_store()._params
        prefix = self._pyro_name if prefix is None else prefix
        return any(store.get(f"{prefix}.{name}", param) is not param for name, param in params)

    def _register(self, params: Sequence[tuple[str, Tensor]]) -> None:
        """Choose the guide's names in the store; see the constructor's ``name``."""
        if self._is_displaced(params):
            if self._pyro_name == self._given_name:
                self._adopt()
            else:
                free = self._free_name(params)
                if self._registered:
                    warnings.warn(
                        f"AutoFlowGuide: the parameter store holds other tensors under the name '{self._pyro_name}' "
                        f"(another guide's, or a loaded file's), so this guide goes on with its own as '{free}'. "
                        "To take parameters from the store, pass a name: AutoFlowGuide(model, name=...).",
                        stacklevel=user_level(),
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
    def _adopt(self) -> None:
        store = pyro.get_param_store()
        self._convert_stored()
        prefix = f"{self._pyro_name}.posterior."
        stored = {name.removeprefix(prefix): store[name].shape for name in store if name.startswith(prefix)}
        self._trained().adopt(stored)
        for name, param in self._named():
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
        look_again(self._trained())

    def _convert_stored(self) -> None:
        """Replace stored parameters of version 0.1.0 by those of this version."""
        store = pyro.get_param_store()
        prefix = f"{self._pyro_name}.posterior."
        stored = {name.removeprefix(prefix): store[name].detach() for name in store if name.startswith(prefix)}
        if is_from_0_1_0(stored, self._trained()):
            converted = from_0_1_0(stored, self._trained())
            for name in stored:
                del store[prefix + name]
            for name, value in converted.items():
                pyro.param(prefix + name, value)


def _declare(name: str, param: Tensor, unconstrained: Tensor) -> None:
    """A ``pyro.param`` statement of a parameter that is not looked up in the store.

    Args:
        name: Name in the store.
        param: The parameter.
        unconstrained: What SVI takes it for, and steps.
    """
    value = param.detach()
    value.unconstrained = weakref.ref(unconstrained)  # type: ignore[attr-defined]
    _statement(name, value, constraint=dist.constraints.real, event_dim=param.dim(), name=name)


@poutine.runtime.effectful(type="param")  # type: ignore[untyped-decorator]
def _statement(name: str, value: Tensor, **_: Any) -> Tensor:
    return value
