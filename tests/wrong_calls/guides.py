# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of ``AutoFlowGuide`` and its methods."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_flows import AutoFlowGuide, flows
from tests.wrong_calls.programs import (
    ARRAY,
    INF,
    NAN,
    NOT_INTEGERS,
    NOT_PROGRAMS,
    Row,
    X,
    Y,
    hierarchy,
    items,
    ready,
    regression,
    subsampled,
    supports,
)

__all__ = ["CALLS"]

VALUES = {
    "tau": torch.tensor(1.0),
    "p": torch.tensor(0.5),
    "u": torch.tensor(0.0),
    "w": torch.tensor([0.2, 0.3, 0.5]),
    "z": torch.tensor(0.0),
}


def guide(**options: Any) -> AutoFlowGuide:
    return AutoFlowGuide(regression, **options)


def set_up(**options: Any) -> AutoFlowGuide:
    return guide(**options).setup(X, Y)


def amortized(encoder: Any, *args: Any) -> Any:
    return AutoFlowGuide(items, amortize={"items": encoder})(*(args or (Y,)))


def with_plates(plates: Any) -> Any:
    return AutoFlowGuide(hierarchy, create_plates=lambda y: plates(y) if callable(plates) else plates)(Y)


def log_prob(**changes: Any) -> Tensor:
    return ready(supports).log_prob({**VALUES, **changes})


def without(site: str) -> dict[str, Tensor]:
    return {name: value for name, value in VALUES.items() if name != site}


def shrunk(model: Any = hierarchy) -> None:
    made = AutoFlowGuide(model, create_plates=lambda y: pyro.plate("groups", len(y))).setup(Y)
    made(Y[:3])


def bad_subsample(index: Any) -> None:
    def model(y: Tensor, index: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 8, subsample=index) as chosen:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[chosen])

    made = AutoFlowGuide(model, create_plates=lambda y, index: pyro.plate("items", 8, subsample=index))
    made(Y, index)


def sequential() -> None:
    def model(y: Tensor) -> None:
        for i in pyro.plate("items", len(y)):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    AutoFlowGuide(model)(Y)


def site(made: dist.Distribution) -> None:
    AutoFlowGuide(lambda: pyro.sample("z", made))()


CONSTRUCTOR: dict[str, Row] = {
    **{
        f"model is {name}": (
            lambda value=value: AutoFlowGuide(value),
            TypeError,
            rf"AutoFlowGuide: expected model to be a Pyro model, a function, but got {words}",
        )
        for name, (value, words) in NOT_PROGRAMS.items()
    },
    "model is a guide": (
        lambda: AutoFlowGuide(AutoNormal(regression)),
        ValueError,
        "expected model to be a model, but got a guide, an AutoNormal",
    ),
    "model is a class": (
        lambda: AutoFlowGuide(nn.Linear),
        TypeError,
        r"expected model to be a model, but got the class Linear. Write Linear\(",
    ),
    "no model": (lambda: AutoFlowGuide(), TypeError, r"expected AutoFlowGuide\(model, \.\.\.\).*'model'"),
    "unknown option": (
        lambda: guide(init_scales=0.1),
        TypeError,
        "AutoFlowGuide: expected options among model, flow.*got 'init_scales'. Did you mean 'init_scale'",
    ),
    "too many by position": (
        lambda: AutoFlowGuide(regression, "iaf", 0.1),
        TypeError,
        r"expected AutoFlowGuide\(model, \.\.\.\).*too many positional",
    ),
    "flow is None": (lambda: guide(flow=None), TypeError, "expected flow to be a name.*got None"),
    "flow is a number": (lambda: guide(flow=3), TypeError, "expected flow to be a name.*got 3"),
    "flow is unknown": (lambda: guide(flow="iaff"), ValueError, "one of 'auto'.*got 'iaff'. Did you mean 'iaf'"),
    "flow is empty": (lambda: guide(flow=""), ValueError, "one of 'auto'.*got ''"),
    "flow is a class": (lambda: guide(flow=flows.IAF), TypeError, r"got the class IAF. Write flow=IAF\(\)"),
    "flow is a transform": (lambda: guide(flow=T.planar(3)), TypeError, "flow to be a name.*lambda input_dim"),
    "flow draws dimension by dimension": (lambda: guide(flow="maf"), NotImplementedError, 'MAF.*Use "iaf"'),
    "flow is a function of nothing": (
        lambda: guide(flow=lambda: T.planar(1)),
        TypeError,
        r"expected function to take input_dim, and nothing else, but got function\(\)",
    ),
    "flow is a function of two": (
        lambda: guide(flow=lambda a, b: T.planar(1)),
        TypeError,
        r"expected function to take input_dim.*got function\(a, b\)",
    ),
    "flow returns None": (lambda: set_up(flow=lambda d: None), TypeError, "expected a .*Transform, but got NoneType"),
    "flow returns another length": (
        lambda: set_up(flow=lambda d: T.planar(d + 1)),
        ValueError,
        "Planar: expected a map of vectors of length 1.*got length 2",
    ),
    "flow returns a constrained map": (
        lambda: set_up(flow=lambda d: T.ExpTransform()),
        ValueError,
        "ExpTransform: expected a bijection of real vectors",
    ),
    "flow for two latents, one latent": (
        lambda: set_up(flow="realnvp"),
        ValueError,
        "RealNVP: expected input_dim >= 2, but got 1",
    ),
    "init_loc_fn is None": (lambda: guide(init_loc_fn=None), TypeError, "init_loc_fn to be a function, but got None"),
    "init_loc_fn is a tensor": (
        lambda: guide(init_loc_fn=X),
        TypeError,
        r"init_loc_fn to be a function, but got a tensor of shape \(8,\)",
    ),
    "init_loc_fn is a dictionary": (
        lambda: guide(init_loc_fn={"b": 0.0}),
        TypeError,
        "init_loc_fn to be a function, but got {'b': 0.0}",
    ),
    "init_loc_fn returns a float": (
        lambda: set_up(init_loc_fn=lambda site: 0.5),
        ValueError,
        r"init_loc_fn to return a tensor of shape \(\) for site 'b', but got 0.5",
    ),
    "init_loc_fn returns another shape": (
        lambda: set_up(init_loc_fn=lambda site: torch.zeros(2)),
        ValueError,
        r"init_loc_fn to return a tensor of shape \(\) for site 'b', but got a tensor of shape \(2,\)",
    ),
    "init_loc_fn returns nan": (
        lambda: set_up(init_loc_fn=lambda site: torch.tensor(NAN)),
        ValueError,
        "expected latent site 'b' to start at finite.*got nan",
    ),
    "init_loc_fn leaves the support": (
        lambda: AutoFlowGuide(supports, init_loc_fn=lambda site: -torch.ones(site["fn"].shape()))(),
        ValueError,
        "expected latent site 'tau' to start at.*init_to_value",
    ),
    **{
        f"init_scale is {value!r}": (
            lambda value=value: guide(init_scale=value),
            ValueError,
            f"init_scale to be a number > 0, but got {value!r}",
        )
        for value in (0, -1.0, NAN, INF, None, "0.1", True)
    },
    "init_scale is an array": (
        lambda: guide(init_scale=ARRAY),
        ValueError,
        r"init_scale to be a number > 0, but got a NumPy array of shape \(2, 3\)",
    ),
    "structure is unknown": (
        lambda: guide(structure="plate"),
        ValueError,
        "structure to be one of.*got 'plate'. Did you mean 'plates'",
    ),
    "structure is None": (lambda: guide(structure=None), ValueError, "structure to be one of.*got None"),
    "path_gradient is a word": (
        lambda: guide(path_gradient="no"),
        TypeError,
        "path_gradient to be True or False.*'no'",
    ),
    "path_gradient is a number": (
        lambda: guide(path_gradient=1),
        TypeError,
        "path_gradient to be True or False.*got 1",
    ),
    "name is a number": (lambda: guide(name=3), TypeError, "name to be a string.*got 3"),
    "name is empty": (lambda: guide(name=""), TypeError, "name to be a string, and not empty, but got ''"),
    "create_plates is a number": (
        lambda: guide(create_plates=3),
        TypeError,
        "expected create_plates to be a function, but got 3",
    ),
    "create_plates is a list": (
        lambda: guide(create_plates=["data"]),
        TypeError,
        r"expected create_plates to be a function, but got \['data'\]",
    ),
    "amortize is a list": (lambda: guide(amortize=["items"]), TypeError, r"got amortize=\['items'\]"),
    "amortize is an encoder": (
        lambda: guide(amortize=nn.Linear(1, 2)),
        TypeError,
        "expected amortize={.*got amortize=Linear",
    ),
    "amortize has no encoder": (lambda: guide(amortize={"items": 3}), TypeError, "amortized plate 'items', but got 3"),
    "amortize has no names": (
        lambda: guide(amortize={3: nn.Linear(1, 2)}),
        TypeError,
        "expected amortize={name of a plate: encoder}, but got 3",
    ),
}
SETUP: dict[str, Row] = {
    "no arguments": (lambda: guide()(), TypeError, r"arguments that model takes, \(x.*y.*got 0 by position.*'x'"),
    "setup with no arguments": (
        lambda: guide().setup(),
        TypeError,
        r"AutoFlowGuide: expected the arguments that model takes.*got 0 by position",
    ),
    "warm start with too many": (
        lambda: guide().warm_start(X, Y, Y),
        TypeError,
        "expected the arguments that model takes.*got 3 by position.*too many",
    ),
    "an unknown argument": (
        lambda: guide()(X, y=Y, z=1),
        TypeError,
        "expected the arguments that model takes.*got 1 by position and y, z by name.*'z'",
    ),
    "warm_start_on nothing": (
        lambda: guide().warm_start_on([]),
        ValueError,
        r"warm_start_on: expected calls, \[\(args, kwargs\), \.\.\.\], but got \[\]",
    ),
    "warm_start_on a tensor": (
        lambda: guide().warm_start_on(X),
        ValueError,
        r"warm_start_on: expected calls.*got a tensor of shape \(8,\)",
    ),
    "warm_start_on arguments": (
        lambda: guide().warm_start_on([(X, Y)]),
        ValueError,
        r"warm_start_on: expected calls.*\(args, kwargs\)",
    ),
    "no latents": (
        lambda: AutoFlowGuide(lambda: None)(),
        RuntimeError,
        "AutoFlowGuide found no latent variables",
    ),
    "a sequential plate": (sequential, NotImplementedError, "site 'z_0' is in the sequential plate 'items'"),
    "a discrete site": (lambda: site(dist.Bernoulli(0.5)), ValueError, "discrete sample site 'z'.*config_enumerate"),
    "a circular site": (lambda: site(dist.VonMises(0.0, 1.0)), ValueError, "'z' to live on a line, but VonMises"),
    "a masked site": (
        lambda: site(dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])).to_event(1)),
        ValueError,
        "'z' to have a density in all its entries, but 1 of 2 are masked",
    ),
    "amortize of another plate": (
        lambda: AutoFlowGuide(items, amortize={"rows": nn.Linear(1, 2)})(Y),
        ValueError,
        r"amortized plate 'rows' to hold latent sites, but those that do are \['items'\]",
    ),
    "joint and subsampled": (
        lambda: AutoFlowGuide(subsampled, structure="joint")(Y),
        ValueError,
        "no subsampled or amortized plate with structure='joint', but plate 'items'",
    ),
    "create_plates takes nothing": (
        lambda: AutoFlowGuide(hierarchy, create_plates=lambda: pyro.plate("groups", 8))(Y),
        TypeError,
        r"expected the arguments that create_plates takes, \(\), but got 1 by position",
    ),
    "create_plates returns None": (
        lambda: with_plates(None),
        TypeError,
        "create_plates to return a plate, or a list of them, but got None",
    ),
    "create_plates returns names": (
        lambda: with_plates(["groups"]),
        TypeError,
        r"create_plates to return a plate, or a list of them, but got \['groups'\]",
    ),
    "create_plates returns a generator": (
        lambda: with_plates(lambda y: (pyro.plate("groups", len(y)) for _ in range(1))),
        TypeError,
        "create_plates to return a plate, or a list of them, but got a generator",
    ),
    "create_plates returns another plate": (
        lambda: with_plates(lambda y: pyro.plate("rows", len(y))),
        ValueError,
        "create_plates to return plates of the model.*'groups'.*but got 'rows'",
    ),
    "create_plates returns another size": (
        lambda: with_plates(lambda y: pyro.plate("groups", 3)),
        ValueError,
        "plate 'groups' .*8.*but got 3",
    ),
    "create_plates returns another dim": (
        lambda: with_plates(lambda y: pyro.plate("groups", 8, dim=-2)),
        ValueError,
        "plate 'groups' .*dim.*-1.*but got -2",
    ),
    "fewer items than at setup": (shrunk, ValueError, "plate 'groups' to have the 8 items.*got 3"),
    "an empty subsample": (
        lambda: bad_subsample(torch.tensor([], dtype=torch.long)),
        ValueError,
        "plate 'items'.*at least one index.*but got none",
    ),
    "floats as subsample": (
        lambda: bad_subsample(torch.tensor([0.0, 1.0])),
        TypeError,
        "plate 'items' to be integers, but got torch.float32",
    ),
    "a subsample outside the plate": (
        lambda: bad_subsample(torch.tensor([0, 8])),
        ValueError,
        r"indices of plate 'items' in \[0, 7\], but got 8",
    ),
    "a subsample below the plate": (
        lambda: bad_subsample(torch.tensor([-1, 2])),
        ValueError,
        r"indices of plate 'items' in \[0, 7\], but got -1",
    ),
    "a subsample of two dimensions": (
        lambda: bad_subsample(torch.zeros(2, 2, dtype=torch.long)),
        ValueError,
        r"plate 'items'.*one dimension.*but got shape \(2, 2\)",
    ),
    "an encoder without columns": (
        lambda: amortized(lambda y: y.new_zeros(len(y), 0)),
        ValueError,
        r"encoder of plate 'items' to return.*but got shape \(8, 0\).*context_dim is 1 at least",
    ),
    "an encoder of vectors": (
        lambda: amortized(lambda y: y),
        ValueError,
        r"encoder of plate 'items' to return.*but got shape \(8,\)",
    ),
    "an encoder of integers": (
        lambda: amortized(lambda y: torch.zeros(len(y), 2, dtype=torch.long)),
        ValueError,
        r"encoder of plate 'items' to return a floating-point tensor.*of torch.int64",
    ),
    "an encoder of None": (
        lambda: amortized(lambda y: None),
        ValueError,
        "encoder of plate 'items' to return a floating-point tensor.*got 'NoneType'",
    ),
    "an encoder of a pair": (
        lambda: amortized(lambda y: (y.unsqueeze(-1), y.unsqueeze(-1))),
        ValueError,
        "encoder of plate 'items' to return a floating-point tensor.*got 'tuple'",
    ),
    "an encoder of another number of rows": (
        lambda: amortized(lambda y: y[:3].unsqueeze(-1)),
        ValueError,
        "encoder of plate 'items' to return a row for each of the 8 items.*got 3",
    ),
    "an encoder that takes nothing": (
        lambda: amortized(lambda: None),
        TypeError,
        r"expected the arguments that the encoder of plate 'items' takes, \(\), but got 1 by position",
    ),
    "an encoder of nan": (
        lambda: amortized(lambda y: y.unsqueeze(-1) * NAN),
        ValueError,
        "encoder of plate 'items' to return finite numbers, but got",
    ),
}
METHODS: dict[str, Row] = {
    **{
        f"sample_posterior, {name}": (
            lambda value=value: ready().sample_posterior(value),
            ValueError,
            f"sample_posterior: expected num_samples to be an integer >= 1, but got {words}",
        )
        for name, (value, words) in NOT_INTEGERS.items()
    },
    "median, no draws": (
        lambda: ready().median(num_samples=0),
        ValueError,
        "median: expected num_samples to be an integer >= 1, but got 0",
    ),
    "median, a float": (lambda: ready().median(num_samples=2.5), ValueError, "num_samples.*got 2.5"),
    "quantiles, no draws": (
        lambda: ready().quantiles([0.5], num_samples=0),
        ValueError,
        "quantiles: expected num_samples to be an integer >= 1, but got 0",
    ),
    **{
        f"quantiles of {name}": (
            lambda value=value: ready().quantiles(value),
            ValueError,
            rf"expected quantiles to be a list of probabilities in \[0, 1\].*but got {words}",
        )
        for name, value, words in (
            ("a letter", "a", "'a'"),
            ("letters", ["a"], r"\['a'\]"),
            ("None", None, "None"),
            ("nothing", [], r"\[\]"),
            ("one number", 0.5, r"0\.5"),
            ("percents", [5, 95], r"\[5, 95\]"),
            ("nan", [NAN], r"\[nan\]"),
            ("a negative number", [-0.1], r"\[-0\.1\]"),
            ("a table", [[0.5]], r"\[\[0\.5\]\]"),
        )
    },
    "draws of an amortized guide without data": (
        lambda: AutoFlowGuide(items, amortize={"items": lambda y: y.unsqueeze(-1)}).setup(Y).sample_posterior(3),
        ValueError,
        "expected the model's arguments, since plate 'items' is amortized, but got none",
    ),
    "draws before setup": (
        lambda: guide().sample_posterior(3),
        TypeError,
        "expected the arguments that model takes.*got 0",
    ),
    "posterior before setup": (lambda: guide().get_posterior(), RuntimeError, r"guide.setup\(\*args"),
    "a state before setup": (
        lambda: guide().load_state_dict({"posterior.joint": X}),
        RuntimeError,
        r"expected the guide to be set up.*guide.setup\(\*args",
    ),
    "a state of None": (
        lambda: ready().load_state_dict(None),
        TypeError,
        "load_state_dict: expected state_dict to be a dictionary with names as keys, but got None",
    ),
    "log_prob of None": (lambda: ready().log_prob(None), TypeError, "log_prob: expected values to be a dict.*got None"),
    "log_prob of a tensor": (
        lambda: ready().log_prob(X),
        TypeError,
        r"log_prob: expected values to be a dictionary.*a tensor of shape \(8,\)",
    ),
    "log_prob of a list": (lambda: ready().log_prob([0.0]), TypeError, r"expected values to be a dict.*got \[0.0\]"),
    "log_prob, a missing site": (
        lambda: ready(supports).log_prob(without("tau")),
        ValueError,
        r"a value for each of the latent sites.*missing are \['tau'\]",
    ),
    "log_prob, an unknown site": (lambda: log_prob(q=torch.zeros(())), ValueError, r"unknown are \['q'\]"),
    "log_prob, None at a site": (lambda: log_prob(z=None), TypeError, "value of site 'z' to be a tensor, but got None"),
    "log_prob, a word at a site": (lambda: log_prob(z="a"), TypeError, "value of site 'z' to be a tensor, but got 'a'"),
    "log_prob, nan at a site": (
        lambda: log_prob(tau=torch.tensor(NAN)),
        ValueError,
        "value of site 'tau' to be numbers, but got NaN",
    ),
    "log_prob, a wrong shape": (
        lambda: log_prob(w=torch.ones(4) / 4),
        ValueError,
        r"site 'w' to have shape batch_shape \+ \(3,\), but got \(4,\)",
    ),
    "log_prob, too few dimensions": (
        lambda: log_prob(w=torch.tensor(1.0)),
        ValueError,
        r"site 'w' to have shape batch_shape \+ \(3,\), but got \(\)",
    ),
    "log_prob, two batch shapes": (
        lambda: log_prob(z=torch.zeros(5), tau=torch.ones(4)),
        ValueError,
        "expected site '.*' to have the batch shape",
    ),
    "log_prob without an inverse": (
        lambda: set_up(flow="neural_autoregressive").log_prob({"b": torch.zeros(())}),
        NotImplementedError,
        "expected a value drawn from this flow",
    ),
    "log_prob of some items": (
        lambda: (
            AutoFlowGuide(hierarchy, structure="plates")
            .setup(Y)
            .log_prob({"mu": torch.tensor(0.0), "theta": torch.zeros(3)})
        ),
        ValueError,
        r"values for all \(8,\) items of groups, but got \(3,\)",
    ),
}

FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def saved() -> Path:
    """The file of a guide."""
    path = Path(FOLDER.name) / "guide.pt"
    ready(hierarchy, Y).save(path)
    return path


def load(path: Any, model: Any = hierarchy, args: Any = (Y,), kwargs: Any = None, **options: Any) -> Any:
    return AutoFlowGuide.load(path, model, args, kwargs, **options)


def load_saved(**options: Any) -> Any:
    return load(saved(), **options)


PATHS: dict[str, tuple[Any, str]] = {
    "None": (None, "None"),
    "a number": (3, "3"),
    "True": (True, "True"),
    "empty": ("", "''"),
    "a list": (["guide.pt"], r"\['guide.pt'\]"),
    "bytes": (b"guide.pt", "b'guide.pt'"),
    "a model": (regression, "<function regression"),
}

FILES: dict[str, Row] = {
    **{
        f"{method}, path is {name}": (
            lambda call=call, value=value: call(value),
            TypeError,
            f"AutoFlowGuide.{method}: expected path to be the path of a file, but got {words}",
        )
        for method, call in (("save", lambda path: ready().save(path)), ("load", load))
        for name, (value, words) in PATHS.items()
    },
    "save, path is a folder": (
        lambda: ready().save(FOLDER.name),
        ValueError,
        "AutoFlowGuide.save: expected '.*' to be a file that can be written, but Is a directory",
    ),
    "save, a missing folder": (
        lambda: ready().save(Path(FOLDER.name) / "none" / "guide.pt"),
        ValueError,
        r"AutoFlowGuide.save: expected '.*none/guide\.pt' to be a file that can be written, but No such file",
    ),
    "save, not set up": (lambda: guide().save(saved()), RuntimeError, r"Call `guide\.setup\(\*args, \*\*kwargs\)`"),
    "save, no path": (lambda: ready().save(), TypeError, r"expected AutoFlowGuide\.save\(path, \.\.\.\).*'path'"),
    "load, no model": (
        lambda: AutoFlowGuide.load(saved()),  # type: ignore[call-arg]
        TypeError,
        r"expected AutoFlowGuide\.load\(path, model, \.\.\.\), but got missing a required argument: 'model'",
    ),
    "load, a missing file": (
        lambda: load(Path(FOLDER.name) / "none.pt"),
        ValueError,
        r"AutoFlowGuide.load: expected '.*none\.pt' to be a file that guide\.save has written, but",
    ),
    "load, a folder": (
        lambda: load(FOLDER.name),
        ValueError,
        r"AutoFlowGuide.load: expected '.*' to be a file that guide\.save has written, but it is a folder",
    ),
    "load, text": (
        lambda: load(__file__),
        ValueError,
        r"AutoFlowGuide.load: expected '.*guides\.py' to be a file that guide\.save has written, but it was cut off",
    ),
    **{
        f"load, model is {name}": (
            lambda value=value: load_saved(model=value),
            TypeError,
            f"AutoFlowGuide.load: expected model to be a Pyro model, a function, but got {words}",
        )
        for name, (value, words) in NOT_PROGRAMS.items()
    },
    "load, the guide as model": (
        lambda: load_saved(model=ready(hierarchy, Y)),
        ValueError,
        "AutoFlowGuide.load: expected model to be a model, but got a guide",
    ),
    "load, another model": (
        lambda: load_saved(model=items),
        ValueError,
        "AutoFlowGuide.load: expected '.*' to hold a guide of this model and these data, but site 'mu' is of shape",
    ),
    "load, data of another size": (
        lambda: load_saved(args=(Y[:3],)),
        ValueError,
        r"hold a guide of this model and these data, but site 'theta' is of shape \(8\).*of shape \(3\)",
    ),
    **{
        f"load, args is {name}": (
            lambda value=value: load_saved(args=value),
            TypeError,
            rf"AutoFlowGuide.load: expected args to be a tuple, but got {words}",
        )
        for name, value, words in (
            ("a tensor", Y, "a tensor"),
            ("None", None, "None"),
            ("a list", [3], r"\[3\]"),
        )
    },
    "load, kwargs is a tensor": (
        lambda: load_saved(args=(), kwargs=Y),
        TypeError,
        "AutoFlowGuide.load: expected kwargs to be a dictionary of the model's arguments",
    ),
    "load, no arguments": (
        lambda: load_saved(args=()),
        TypeError,
        "AutoFlowGuide.load: expected the arguments that model takes.*got 0 by position.*'y'",
    ),
    "load, an argument too much": (
        lambda: load_saved(args=(Y, Y)),
        TypeError,
        "AutoFlowGuide.load: expected the arguments that model takes.*got 2 by position",
    ),
    "load, flow is a number": (lambda: load_saved(flow=3), TypeError, "expected.*flow.*3"),
    "load, an unknown flow": (lambda: load_saved(flow="nsf"), ValueError, "expected.*got 'nsf'"),
    "load, another flow": (
        lambda: load_saved(flow="planar"),
        ValueError,
        "AutoFlowGuide.load: expected '.*' to hold a guide with flow=planar.*Leave flow= out",
    ),
    "load, init_loc_fn is a number": (
        lambda: load_saved(init_loc_fn=3),
        TypeError,
        "AutoFlowGuide.load: expected init_loc_fn to be a function, but got 3",
    ),
    "load, create_plates is a plate's name": (
        lambda: load_saved(create_plates="groups"),
        TypeError,
        "AutoFlowGuide.load: expected create_plates to be a function, but got 'groups'",
    ),
    "load, create_plates of a guide without": (
        lambda: load_saved(create_plates=lambda y: pyro.plate("groups", len(y))),
        ValueError,
        "be loaded as it was made, but the guide was made without create_plates",
    ),
    "load, encoders of a guide without": (
        lambda: load_saved(amortize={"groups": nn.Linear(1, 2)}),
        ValueError,
        r"hold a guide with encoders for \['groups'\], but it has them for \[\]",
    ),
    "load, amortize is a list": (
        lambda: load_saved(amortize=["groups"]),
        TypeError,
        r"expected amortize.*\['groups'\]",
    ),
    "load, name is a number": (
        lambda: load_saved(name=3),
        TypeError,
        "AutoFlowGuide.load: expected name to be a string, and not empty, but got 3",
    ),
    "load, name is empty": (
        lambda: load_saved(name=""),
        TypeError,
        "AutoFlowGuide.load: expected name to be a string, and not empty, but got ''",
    ),
    "load, a misspelt option": (
        lambda: load_saved(amortise={}),
        TypeError,
        "AutoFlowGuide.load: expected options among path.*'amortise'. Did you mean 'amortize'",
    ),
    "load, the model's argument": (
        lambda: load_saved(y=Y),
        TypeError,
        r"AutoFlowGuide.load: expected options among path.*'y'.*kwargs=\{'y'",
    ),
}

CALLS = {**CONSTRUCTOR, **SETUP, **METHODS, **FILES}
