# SPDX-License-Identifier: Apache-2.0
"""L5. Files of guides."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyro
from torch import Tensor

from pyro_flows import _files
from pyro_flows._checks import check_call, check_callable, check_path, check_text, checked, optional
from pyro_flows._random import forked
from pyro_flows.flows.recipe import Recipe
from pyro_flows.flows.resolve import FlowLike, resolve
from pyro_flows.guides.initialization import init_to_prior_median
from pyro_flows.guides.summaries import SummarizedGuide
from pyro_flows.models.sites import Site, full_size
from pyro_flows.posterior.posterior import Posterior

__all__ = ["FiledGuide"]

FORMAT = 1
KIND = "a guide"

Guide = TypeVar("Guide", bound="FiledGuide")


class FiledGuide(SummarizedGuide):
    """A guide that can be saved to a file and loaded from it."""

    init_scale: float
    structure: str
    path_gradient: bool
    create_plates: Callable[..., Any] | None

    @property
    def flow_title(self) -> str:
        """The flow's family and its hyper-parameters, as text."""
        return self._recipe.title

    @checked(path=check_path)
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the guide: its parameters, those of encoders included, its flow and its options.

        The file is replaced as a whole or not at all. It holds tensors, numbers and text, no code: :meth:`load` takes
        the model, and what else is code, again.

        Args:
            path: The file.

        Raises:
            RuntimeError: If the guide has no parameters yet.
            TypeError: If this is not a path.
            ValueError: If the file can't be written.
        """
        posterior = self._posterior
        contents = {
            "format": FORMAT,
            "kind": KIND,
            "recipe": {"family": self._recipe.family, "hyper": self._recipe.hyper, "title": self._recipe.title},
            "options": {
                "init_scale": self.init_scale,
                "structure": self.structure,
                "path_gradient": self.path_gradient,
                "name": self._given_name,
            },
            "amortized": [encoder.plate for encoder in posterior.all_encoders()],
            "creates_plates": self.create_plates is not None,
            "sites": _sites(posterior),
            "state": dict(posterior.state_dict()),
        }
        try:
            _files.write(Path(path), contents)
        except OSError as error:
            raise ValueError(
                f"{type(self).__name__}.save: expected '{path}' to be a file that can be written, but "
                f"{error.strerror or error}. Make its folder, free space on the disk, or pass another path."
            ) from None

    @classmethod
    @checked(
        path=check_path,
        init_loc_fn=check_callable,
        create_plates=optional(check_callable),
        name=optional(check_text),
    )
    def load(
        cls: type[Guide],
        path: str | os.PathLike[str],
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        flow: FlowLike | None = None,
        init_loc_fn: Callable[..., Any] = init_to_prior_median,
        create_plates: Callable[..., Any] | None = None,
        amortize: Mapping[str, Callable[..., Any]] | None = None,
        name: str | None = None,
    ) -> Guide:
        """Load a guide that :meth:`save` has saved: the same distribution, with all parameters in place.

        Torch's random state is left alone.

        Args:
            path: The file.
            model: The model of the guide.
            args: Arguments of the model, on which the guide is set up: of the data that it was trained on, or of one
                mini-batch; with amortized plates, of any data.
            kwargs: Keyword arguments of the model.
            flow: As for the constructor; needed only for a flow that is a function or a class of your own that is not
                registered.
            init_loc_fn: As for the constructor; matters only if the model can't run at the default's values.
            create_plates: As for the constructor.
            amortize: As for the constructor; the encoders get the weights that were saved.
            name: Name in Pyro's parameter store; None takes the one that the guide was given by its user, if any.
                Parameters that the store holds under this name are removed.

        Raises:
            TypeError: If an argument is of another type, or the model does not take the arguments.
            ValueError: If the file is not a guide's or was damaged; if model, data or flow do not fit it.
        """
        owner = f"{cls.__name__}.load: expected '{path}' to"
        check_call(f"{cls.__name__}.load", "model", model, args, kwargs or {})
        contents = _contents(owner, Path(path))
        recipe, options = Recipe(**contents["recipe"]), contents["options"]
        make: Any = cls  # AutoFlowGuide, or a subclass with its arguments
        guide: Guide = make(
            model,
            _flow(owner, recipe, flow),
            init_loc_fn=init_loc_fn,
            init_scale=options["init_scale"],
            create_plates=create_plates,
            amortize=amortize,
            structure=options["structure"],
            path_gradient=options["path_gradient"],
            name=options["name"] if name is None else name,
        )
        plates = contents["amortized"]
        if sorted(plates) != sorted(amortize or {}):
            raise ValueError(
                f"{owner} hold a guide with encoders for {sorted(amortize or {})}, but it has them for {plates}. Pass "
                "amortize= with an encoder, of the same layers, for each of these plates."
            )
        if contents["creates_plates"] != (create_plates is not None):
            has = "was made with" if contents["creates_plates"] else "was made without"
            raise ValueError(f"{owner} be loaded as it was made, but the guide {has} create_plates. Pass the same.")
        with forked():
            guide.setup(*args, **(kwargs or {}))
        posterior = guide._posterior
        posterior.adopt({key: value.shape for key, value in contents["state"].items()})
        difference = _difference(contents["sites"], _sites(posterior)) or _state_difference(
            contents["state"], posterior.state_dict()
        )
        if difference:
            raise ValueError(
                f"{owner} hold a guide of this model and these data, but {difference}. Pass the model, and arguments "
                "of the shapes, that it was trained with."
            )
        posterior.load_state_dict(contents["state"])
        if guide._given_name is not None:
            store = pyro.get_param_store()
            for key in [key for key in store if key.startswith(f"{guide._given_name}.posterior.")]:
                del store[key]
        return guide

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None and any(name.startswith(prefix) for name in state_dict):
            raise RuntimeError(
                "AutoFlowGuide: expected the guide to be set up before a state_dict is loaded, but it has no "
                "parameters yet. Call `guide.setup(*args, **kwargs)` with the model's arguments first."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _contents(owner: str, path: Path) -> dict[str, Any]:
    try:
        found = _files.read(path, unsigned=True)
    except (_files.FileError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{owner} be a file that guide.save has written, but {reason}. Pass another path.") from None
    kind = found.get("kind")
    if kind != KIND:
        what = kind or "no such file; if it is a state_dict, set up a guide and call guide.load_state_dict"
        raise ValueError(f"{owner} hold {KIND}, but it is {what}. Pass the path of a file that guide.save has written.")
    if found["format"] != FORMAT:
        raise ValueError(
            f"{owner} have format {FORMAT}, but got {found['format']}. Load it with the version of pyro_flows that "
            "has written it, or a later one."
        )
    return found


def _flow(owner: str, recipe: Recipe, flow: FlowLike | None) -> Any:
    """The flow in a file, or a user's own, which no file holds."""
    if flow is not None:
        spec = resolve(flow)
        if Recipe.of(spec).title != recipe.title:
            raise ValueError(
                f"{owner} hold a guide with flow={Recipe.of(spec).title}, but it has {recipe.title}. Leave flow= out, "
                "or pass the same."
            )
        return spec
    try:
        return recipe.spec()
    except ValueError as error:
        raise ValueError(
            f"{owner} hold a flow that can be made anew, but {error}. Pass the same flow as when the guide was made, "
            "flow=...; flows.register makes a family known by its name."
        ) from None


def _sites(posterior: Posterior) -> dict[str, str]:
    """Latent site -> its shape, support and plates, as text."""
    return {site.name: _describe(site, posterior) for layout in posterior.layouts() for site in layout}


def _describe(site: Site, posterior: Posterior) -> str:
    shape: list[Any] = list(site.shape)
    for frame in site.frames:
        is_amortized = posterior.encoder(frame.name) is not None
        shape[frame.dim - site.event_dim] = "any" if is_amortized else full_size(frame)
    plates = " and ".join(f"'{frame.name}'" for frame in site.frames)
    of_plates = f" in plate {plates}" if plates else ""
    return f"of shape ({', '.join(map(str, shape))}){of_plates}, by {type(site.to_support).__name__}"


def _difference(stored: Mapping[str, str], found: Mapping[str, str]) -> str:
    for name in dict.fromkeys((*stored, *found)):
        if stored.get(name) != found.get(name):
            return f"site '{name}' is {stored.get(name, 'missing')} there and {found.get(name, 'missing')} here"
    return ""


def _state_difference(stored: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name in dict.fromkeys((*stored, *found)):
        if name not in stored or name not in found:
            return f"'{name}' is only {'there' if name in stored else 'here'}"
        texts = [f"{value.dtype} of shape {tuple(value.shape)}" for value in (stored[name], found[name])]
        if texts[0] != texts[1]:
            hint = ""
            if stored[name].dtype != found[name].dtype:
                hint = f" (torch.set_default_dtype({stored[name].dtype}) makes them alike)"
            return f"'{name}' is {texts[0]} there and {texts[1]} here{hint}"
    return ""
