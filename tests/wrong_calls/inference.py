# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of all functions of a model and a guide: what they share, and the options of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_flows import (
    AutoFlowGuide,
    check_calibration,
    compare,
    diagnose,
    fit,
    importance_resample,
    to_inference_data,
)
from pyro_flows.diagnostics import khat_threshold, log_weights, pareto_smooth
from tests.wrong_calls.programs import (
    ARRAY,
    INF,
    NAN,
    NOT_INTEGERS,
    NOT_PROGRAMS,
    SEEDS,
    N,
    Row,
    X,
    Y,
    chains,
    counts,
    hierarchy,
    no_plate,
    other,
    pair,
    ready,
    regression,
    subsampled,
)

__all__ = ["CALLS"]

DATA = (X, Y)


def comparing(model: Any, guide: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    return compare(model, {"guide": guide}, args, kwargs, **options)


def resampling(model: Any, guide: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    return importance_resample(model, guide, 10, args, kwargs, **options)


def weighing(model: Any, guide: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    return log_weights(model, guide, 10, args, kwargs, **options)


# What takes a model, a guide and their arguments, with those options that make it quick.
USES: dict[str, Callable[..., Any]] = {
    "fit": partial(fit, progress=False),
    "diagnose": partial(diagnose, num_samples=100, progress=False),
    "compare": comparing,
    "importance_resample": resampling,
    "log_weights": weighing,
    "to_inference_data": to_inference_data,
    "check_calibration": check_calibration,
}
# Those that can only be right about the guide of this very model, on these very data.
WEIGHING = {name: use for name, use in USES.items() if name != "check_calibration"}
# Those with an argument for the seed.
SEEDED = {name: use for name, use in USES.items() if name != "log_weights"}


def uses(name: str, use: Callable[..., Any]) -> Iterator[tuple[str, Row]]:
    """Wrong models, guides and arguments."""
    for what, (value, words) in NOT_PROGRAMS.items():
        yield (
            f"model is {what}",
            (
                lambda value=value: use(value, ready(), DATA),
                TypeError,
                rf"{name}: expected model to be a Pyro model.*got {words}",
            ),
        )
        guide = "guides['guide']" if name == "compare" else "guide"
        if not (name == "check_calibration" and value is None):
            yield (
                f"guide is {what}",
                (
                    lambda value=value: use(regression, value, DATA),
                    TypeError,
                    rf"{name}: expected {guide.replace('[', '.').replace(']', '.')} to be a Pyro .*got {words}",
                ),
            )
    yield (
        "guide is a class",
        (
            lambda: use(regression, AutoNormal, DATA),
            TypeError,
            rf"{name}: expected guide.* but got the class AutoNormal. Write AutoNormal\(",
        ),
    )
    yield (
        "model and guide swapped",
        (
            lambda: use(ready(), regression, DATA),
            ValueError,
            f"{name}: expected model to be a model, but got a guide, an AutoFlowGuide. Write the model first",
        ),
    )
    for what, value, words in (
        ("a tensor", Y, r"a tensor of shape \(8,\)"),
        ("None", None, "None"),
        ("a number", 3, "3"),
        ("a word", "x", "'x'"),
        ("a dictionary", {"x": X}, "a dict|{'x'"),
        ("an array", ARRAY, r"a NumPy array of shape \(2, 3\)"),
    ):
        yield (
            f"args is {what}",
            (
                lambda value=value: use(regression, ready(), value),
                TypeError,
                rf"{name}: expected args to be a tuple.*but got ({words}).*Write args=\(x,\)",
            ),
        )
    for what, value, words in (
        ("a number", 3, "3"),
        ("a list", [Y], r"\[tensor|a list"),
        ("no names", {1: 2}, "{1: 2}"),
    ):
        yield (
            f"kwargs is {what}",
            (
                lambda value=value: use(regression, ready(), (X,), value),
                TypeError,
                f"{name}: expected kwargs to be a dictionary of the model's arguments by name, but got ({words})",
            ),
        )
    yield (
        "too few arguments",
        (
            lambda: use(regression, ready(), (X,)),
            TypeError,
            rf"{name}: expected the arguments that model takes.*got 1 by position.*'y'",
        ),
    )
    yield (
        "an argument too much",
        (
            lambda: use(regression, ready(), DATA, {"z": Y}),
            TypeError,
            rf"{name}: expected the arguments that model takes.*got 2 by position and z by name",
        ),
    )


def weights(name: str, use: Callable[..., Any]) -> Iterator[tuple[str, Row]]:
    """Wrong pairs of model and guide, and wrong data."""
    yield (
        "a function that observes as guide",
        (
            lambda: use(regression, no_plate, DATA),
            ValueError,
            f"{name}: expected a guide, which observes nothing, but it observes 'y'",
        ),
    )
    yield (
        "another model's guide",
        (
            lambda: use(regression, other(), DATA),
            ValueError,
            f"{name}: expected a guide of this model, whose latent sites are 'b', but the guide draws 'tau'",
        ),
    )
    yield (
        "a guide with a site too much",
        (
            lambda: use(model_a, ready(pair, kind=AutoNormal), ()),
            ValueError,
            f"{name}: expected the guide to draw sites of the model, but it draws 'b'",
        ),
    )
    yield (
        "a model conditioned on a latent of the guide",
        (
            lambda: use(poutine.condition(pair, data={"b": torch.tensor(0.5)}), ready(pair, kind=AutoNormal), ()),
            ValueError,
            f"{name}: expected the guide to draw what the model does not observe, but it draws 'b'",
        ),
    )
    yield (
        "a guide of data of another size",
        (
            lambda: use(hierarchy, ready(hierarchy, Y[:1], kind=AutoNormal), (Y[:4],)),
            ValueError,
            rf"{name}: expected the guide's .*'(groups|theta)' to have shape \(4,\), as the model's, but got \(1,\)",
        ),
    )
    yield (
        "a flow guide of data of another size",
        (
            lambda: use(hierarchy, ready(hierarchy, Y), (Y[:3],)),
            ValueError,
            rf"{name}: expected the guide's .*'(groups|theta)' to have shape \(3,\), as the model's, but got \(8,\)",
        ),
    )
    for what, y, words in (
        ("nan", Y.clone().fill_(NAN), "'y' to be finite, but got 8 of 8 values that are NaN"),
        ("inf", torch.where(torch.arange(N) == 3, INF, Y), r"'y' to be finite, but got 1 of 8 .*infinite.*\[3\]: inf"),
    ):
        yield f"data of {what}", (lambda y=y: use(regression, ready(), (X, y)), ValueError, f"{name}: .*{words}")
    yield (
        "data outside the support",
        (
            lambda: use(counts, ready(counts, X, torch.ones(N)), (X, Y)),
            ValueError,
            rf"{name}: .*'y' to be in the support of its Poisson.*outside, the first at \[0\]",
        ),
    )
    for what, value, words in (
        ("an array", Y.numpy(), r"a NumPy array of shape \(8,\)"),
        ("a list", Y.tolist(), r"a list, \[-1.*"),
        ("a number", 1.0, "1.0"),
    ):
        yield (
            f"data as {what}",
            (
                lambda value=value: use(observes, ready(observes, Y), (value,)),
                TypeError,
                f"{name}: expected the data of site 'y' to be a tensor, but got {words}.*Write torch.as_tensor",
            ),
        )
    yield (
        "a covariate as an array",
        (
            lambda: use(regression, ready(), (X.numpy(), Y)),
            TypeError,
            rf"{name}: expected data as tensors, but got a NumPy array in args\[0\].*Write torch.as_tensor",
        ),
    )
    yield (
        "data as a column",
        (
            lambda: use(regression, ready(), (X, Y.unsqueeze(-1))),
            ValueError,
            f'{name}: expected shapes of the model\'s sites that fit its plates, but at site "y", invalid log_prob',
        ),
    )
    yield (
        "a forgotten plate",
        (
            lambda: use(no_plate, ready(no_plate, X, Y), DATA),
            ValueError,
            f'{name}: expected shapes of the model\'s sites that fit its plates, but at site "y", invalid log_prob',
        ),
    )


def model_a() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))


def observes(y: Any) -> None:
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([N]).to_event(1), obs=y)


def used() -> Iterator[Any]:
    yield DATA


class UsedUp:
    """Mini-batches that come once."""

    def __init__(self) -> None:
        self.batches = iter([DATA, DATA])

    def __iter__(self) -> Iterator[Any]:
        return self.batches


class Second:
    """As many mini-batches as are left, with a length, as a data set has."""

    def __init__(self) -> None:
        self.left = [DATA, DATA]

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.left.pop()


def loader(data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, batch_size=4, **options)


def train(**options: Any) -> Any:
    return fit(regression, ready(), **{"args": DATA, "progress": False, **options})


FIT: dict[str, Row] = {
    **{
        f"{option} is {name}": (
            lambda option=option, value=value: train(**{option: value}),
            ValueError,
            f"fit: expected {option} to be an integer >= 1, but got {words}",
        )
        for option in ("num_steps", "num_particles")
        for name, (value, words) in NOT_INTEGERS.items()
    },
    **{
        f"{option} is {value!r}": (
            lambda option=option, value=value: train(**{option: value}),
            ValueError,
            f"fit: expected {option} to be a number > 0, but got {re.escape(repr(value))}",
        )
        for option in ("learning_rate", "max_seconds", "target_gap")
        for value in (0.0, -0.1, NAN, INF, "0.01", True, [0.1])
        if (option, value) != ("target_gap", INF)  # which asks for no wider flow
    },
    "anneal is a word": (lambda: train(anneal="no"), TypeError, "anneal to be True or False, but got 'no'"),
    "anneal is None": (lambda: train(anneal=None), TypeError, "anneal to be True or False, but got None"),
    "progress is a word": (lambda: train(progress="no"), TypeError, "progress to be True or False, but got 'no'"),
    "compile is a word": (
        lambda: train(compile="no"),
        ValueError,
        "compile to be one of True, False, 'auto', but got 'no'",
    ),
    "compile is a number": (
        lambda: train(compile=1),
        ValueError,
        "compile to be one of True, False, 'auto', but got 1",
    ),
    "compile is an array": (lambda: train(compile=ARRAY), ValueError, "compile to be one of.*got a NumPy array"),
    "checkpoint is a number": (
        lambda: train(checkpoint=3),
        TypeError,
        "checkpoint to be the path of a file, but got 3",
    ),
    "checkpoint is True": (
        lambda: train(checkpoint=True),
        TypeError,
        "checkpoint to be the path of a file, but got True",
    ),
    "checkpoint is empty": (lambda: train(checkpoint=""), TypeError, "checkpoint to be the path of a file, but got ''"),
    "checkpoint is a list": (lambda: train(checkpoint=["a"]), TypeError, r"checkpoint to be the path.*got \['a'\]"),
    "settings is a number": (lambda: train(settings=3), TypeError, "settings to be a FitSettings, but got 3"),
    "settings is a dictionary": (lambda: train(settings={}), TypeError, "settings to be a FitSettings, but got {}"),
    "the model's argument as an option": (
        lambda: train(y=Y),
        TypeError,
        r"fit: expected options among model.*got 'y'.*args=\(\.\.\.,\) or kwargs=\{'y': \.\.\.\}",
    ),
    "a misspelt option": (lambda: train(num_step=5), TypeError, "got 'num_step'. Did you mean 'num_steps'"),
    "another library's option": (lambda: train(lr=0.1), TypeError, "fit: expected options among.*got 'lr'"),
    "no guide": (lambda: fit(regression), TypeError, r"fit: expected fit\(model, guide, \.\.\.\).*'guide'"),
    "data by position": (
        lambda: fit(regression, ready(), DATA, {}, 100),
        TypeError,
        r"fit: expected fit\(model, guide, \.\.\.\), but got too many positional",
    ),
    "a generator": (lambda: train(args=used()), TypeError, "iterated over again, but got an iterator"),
    "an iterator": (lambda: train(args=iter([DATA])), TypeError, "iterated over again, but got an iterator"),
    "an object that is its own iterator": (lambda: train(args=UsedUp()), TypeError, "iterated over again.*iterator"),
    "mini-batches that come once": (
        lambda: fit(regression, AutoNormal(regression), Second(), progress=False),
        TypeError,
        "expected args to be mini-batches that can be iterated over again, but a second pass got none",
    ),
    "no mini-batches": (lambda: train(args=[]), ValueError, "args to have at least one mini-batch, but got none"),
    "an empty loader": (
        lambda: train(args=loader(TensorDataset(X[:0], Y[:0]))),
        ValueError,
        "args to have at least one mini-batch, but got none",
    ),
    "a loader of dictionaries": (
        lambda: train(args=loader([{"x": x, "y": y} for x, y in zip(X, Y)])),
        TypeError,
        "mini-batches to be tuples of the model's arguments, but got a dictionary of 'x', 'y'",
    ),
    "a list of dictionaries": (
        lambda: train(args=[{"x": X}]),
        TypeError,
        "mini-batches to be tuples of the model's arguments, but got a dictionary of 'x'",
    ),
    "a loader of one tensor": (
        lambda: train(args=loader(TensorDataset(X))),
        TypeError,
        "expected the arguments that model takes.*got 1 by position",
    ),
    "mini-batches of tensors": (
        lambda: train(args=[X, Y]),
        TypeError,
        "expected the arguments that model takes.*got 1 by position",
    ),
    "an unknown flow": (
        lambda: fit(regression, AutoFlowGuide(regression, flow="nsf"), DATA),
        ValueError,
        "one of 'auto'.*but got 'nsf'",
    ),
    "a guide that takes nothing": (
        lambda: fit(regression, lambda: None, DATA),
        TypeError,
        r"fit: expected the arguments that guide takes, \(\), but got 2 by position",
    ),
    "items of the model's own choice": (
        lambda: fit(subsampled_indices, AutoFlowGuide(subsampled_indices), (Y, torch.tensor([0, 2, 5]))),
        ValueError,
        "latent site 'z' is in the plate 'items', which the model gives indices of its own",
    ),
}


def subsampled_indices(y: Tensor, index: Tensor) -> None:
    with pyro.plate("items", len(y), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def report(**options: Any) -> Any:
    return diagnose(regression, ready(), DATA, **{"progress": False, **options})


def table(guides: Any, **options: Any) -> Any:
    return compare(regression, guides, DATA, **{"progress": False, **options})


def resample(
    num_samples: Any = 10, model: Any = regression, guide: Any = None, args: Any = DATA, **options: Any
) -> Any:
    return importance_resample(model, guide or ready(), num_samples, args, **options)


def calibrate(guide: Any = None, **options: Any) -> Any:
    return check_calibration(regression, guide, DATA, **{"progress": False, **options})


def export(**options: Any) -> Any:
    return to_inference_data(regression, ready(), DATA, **{"num_samples": 10, **options})


def point(model: Any = regression) -> Any:
    return ready(model, kind=AutoDelta)


def no_refit(result: Any) -> Any:
    return calibrate(refit=lambda model, args, kwargs: result, num_datasets=2)


DIAGNOSTICS: dict[str, Row] = {
    **{
        f"{owner}, num_samples is {name}": (
            lambda call=call, value=value: call(value),
            ValueError,
            f"{owner}: expected num_samples to be an integer >= {low}, but got {words}",
        )
        for owner, low, call in (
            ("diagnose", 100, lambda value: report(num_samples=value)),
            ("compare", 100, lambda value: table({"a": ready()}, num_samples=value)),
            ("importance_resample", 1, lambda value: resample(value)),
            ("log_weights", 1, lambda value: log_weights(regression, ready(), value, DATA)),
            ("to_inference_data", 1, lambda value: export(num_samples=value)),
            ("check_calibration", 20, lambda value: calibrate(ready(), num_samples=value)),
        )
        for name, (value, words) in NOT_INTEGERS.items()
        if name in ("zero", "a float", "a name", "nan")
    },
    "diagnose, search is a word": (lambda: report(search="no"), TypeError, "search to be True or False, but got 'no'"),
    "diagnose, a misspelt option": (
        lambda: report(num_sample=100),
        TypeError,
        "'num_sample'. Did you mean 'num_samples'",
    ),
    "diagnose, the model's argument": (
        lambda: diagnose(regression, ready(), x=X, y=Y),
        TypeError,
        r"diagnose: expected options among.*got 'x'.*kwargs=\{'x': \.\.\.\}",
    ),
    "diagnose, a point": (
        lambda: diagnose(regression, point(), DATA, progress=False),
        NotImplementedError,
        "guide to have a density, but it holds site 'b' at a point, as AutoDelta",
    ),
    "diagnose, an empty guide": (
        lambda: diagnose(regression, lambda x, y: None, DATA),
        NotImplementedError,
        "expected a guide that draws latent sites, but it draws none",
    ),
    "diagnose, a site left out": (
        lambda: diagnose(pair, lambda: model_a(), ()),
        NotImplementedError,
        "expected the guide to draw latent site 'b', but it does not",
    ),
    "diagnose, data left out": (
        lambda: diagnose(optional_data, ready(model_a, kind=AutoNormal)),
        NotImplementedError,
        r"expected the guide to draw latent site 'y', but it does not. If it is data, pass them: args=\(y,\)",
    ),
    "diagnose, distributed is a word": (
        lambda: report(distributed="yes"),
        TypeError,
        "diagnose: expected distributed to be True or False, but got 'yes'",
    ),
    "compare, distributed is None": (
        lambda: table({"a": ready()}, distributed=None),
        TypeError,
        "compare: expected distributed to be True or False, but got None",
    ),
    "diagnose, num_samples of 99": (lambda: report(num_samples=99), ValueError, "num_samples to be an integer >= 100"),
    **{
        f"compare, guides is {name}": (
            lambda value=value: table(value),
            ValueError,
            f"compare: expected guides to be guides by name.*but got {words}",
        )
        for name, value, words in (
            ("None", None, "None"),
            ("empty", {}, "{}"),
            ("a list", [3], r"\[3\]"),
            ("a number", 3, "3"),
            ("numbered", {1: 3}, "{1: 3}"),
        )
    },
    "compare, a guide": (lambda: table(ready()), ValueError, "compare: expected guides to be guides by name.*AutoFlow"),
    "compare, a guide and None": (
        lambda: table({"a": ready(), "b": None}),
        TypeError,
        r"compare: expected guides\['b'\] to be a Pyro .*but got None",
    ),
    "compare, another model's guide": (
        lambda: table({"a": other()}),
        ValueError,
        "compare: expected a guide of this model, whose latent sites are 'b'",
    ),
    "compare, search is None": (
        lambda: table({"a": ready()}, search=None),
        TypeError,
        "search to be True or False, but got None",
    ),
    "compare, the row of another guide": (
        lambda: table({"flow": ready()}, num_samples=100, search=False)["flows"],
        KeyError,
        r"Comparison: expected a guide of \['flow'\], but got 'flows'. Did you mean 'flow'",
    ),
    "importance_resample, num_draws": (
        lambda: resample(num_draws=10),
        ValueError,
        "num_draws to be an integer >= 100, but got 10",
    ),
    "importance_resample, settings": (
        lambda: resample(settings=3),
        TypeError,
        "settings to be a ResampleSettings, but got 3",
    ),
    "importance_resample, args in place of num_samples": (
        lambda: importance_resample(regression, ready(), DATA),
        ValueError,
        r"importance_resample: expected num_samples to be an integer >= 1, but got \(tensor|a tuple",
    ),
    "importance_resample, subsampled": (
        lambda: resample(model=subsampled, guide=ready(subsampled, Y, kind=AutoNormal), args=(Y,)),
        NotImplementedError,
        "expected full plates, but 'items' is subsampled",
    ),
    "importance_resample, no density": (
        lambda: resample(model=impossible, guide=ready(model_a, kind=AutoNormal), args=()),
        RuntimeError,
        "importance_resample: expected draws of the guide that the model gives a density, but only 0 of 10000",
    ),
    "log_weights, a point": (
        lambda: log_weights(regression, point(), 10, DATA),
        NotImplementedError,
        "log_weights: expected the guide to have a density",
    ),
    **{
        f"pareto_smooth of {name}": (
            lambda value=value: pareto_smooth(value),
            kind,
            f"pareto_smooth: expected log_weights to be a tensor.*but got {words}",
        )
        for name, value, kind, words in (
            ("a list", [0.0, 1.0], TypeError, r"\[0.0, 1.0\]"),
            ("None", None, TypeError, "None"),
            ("an array", ARRAY, TypeError, "a NumPy array"),
            ("nothing", torch.zeros(0), ValueError, r"shape \(0,\)"),
            ("a table", torch.zeros(5, 2), ValueError, r"shape \(5, 2\)"),
            ("nan", torch.tensor([0.0, NAN]), ValueError, "1 of 2 that are NaN"),
        )
    },
    **{
        f"khat_threshold of {name}": (
            lambda value=value: khat_threshold(value),
            ValueError,
            f"khat_threshold: expected num_samples to be an integer >= 1, but got {words}",
        )
        for name, (value, words) in NOT_INTEGERS.items()
        if name in ("zero", "negative", "a name", "nan")
    },
    "check_calibration, neither": (
        lambda: calibrate(),
        ValueError,
        "expected an amortized guide, or refit=.*but got neither",
    ),
    "check_calibration, both": (lambda: calibrate(ready(), refit=print), ValueError, "or refit=.*but got both"),
    "check_calibration, refit is a number": (
        lambda: calibrate(refit=3),
        TypeError,
        "refit to be a function, but got 3",
    ),
    "check_calibration, refit is a guide": (
        lambda: calibrate(refit=X),
        TypeError,
        "refit to be a function, but got a tensor",
    ),
    "check_calibration, to_args is a tuple": (
        lambda: calibrate(ready(), to_args=(X,)),
        TypeError,
        r"to_args to be a function, but got \(tensor|a tuple",
    ),
    "check_calibration, num_datasets": (
        lambda: calibrate(ready(), num_datasets=1),
        ValueError,
        "num_datasets to be an integer >= 2, but got 1",
    ),
    "check_calibration, settings": (
        lambda: calibrate(ready(), settings={}),
        TypeError,
        "settings to be a CalibrationSettings, but got {}",
    ),
    "check_calibration, refit returns None": (
        lambda: no_refit(None),
        TypeError,
        "check_calibration: expected refit to return a guide, but got None",
    ),
    "check_calibration, refit returns a result": (
        lambda: no_refit(3.0),
        TypeError,
        "check_calibration: expected refit to return a guide, but got 3.0",
    ),
    "check_calibration, refit takes nothing": (
        lambda: calibrate(refit=lambda: None, num_datasets=2),
        TypeError,
        r"check_calibration: expected the arguments that refit takes, \(\), but got 3 by position",
    ),
    "check_calibration, to_args returns a tensor": (
        lambda: calibrate(ready(), to_args=lambda data: data["y"], num_datasets=2),
        TypeError,
        r"check_calibration: expected to_args to return \(args, kwargs\), but got a tensor of shape \(8,\)",
    ),
    "check_calibration, no data among the arguments": (
        lambda: check_calibration(lambda: model_a(), model_a, ()),
        ValueError,
        "expected an observed site whose data are among the arguments",
    ),
    "check_calibration, another model's guide": (
        lambda: calibrate(other(), num_datasets=2),
        ValueError,
        "check_calibration: expected a guide of this model",
    ),
    "check_calibration, a factor": (
        lambda: check_calibration(impossible, model_a, ()),
        ValueError,
        "expected a model that can draw its own data, but 'never' is a pyro.factor",
    ),
    "export, posterior_predictive": (
        lambda: export(posterior_predictive=3),
        TypeError,
        "posterior_predictive to be True or False, but got 3",
    ),
    "export, log_likelihood": (
        lambda: export(log_likelihood="y"),
        TypeError,
        "log_likelihood to be True or False.*'y'",
    ),
    "export, coords is a list": (lambda: export(coords=["data"]), TypeError, r"coords to be a dictionary.*\['data'\]"),
    "export, coords of a number": (
        lambda: export(coords={"data": 8}),
        ValueError,
        r"expected coords\['data'\] to be 8 labels, but got 8",
    ),
    "export, coords of another length": (
        lambda: export(coords={"data": ["a", "b"]}),
        ValueError,
        r"expected coords\['data'\] to be 8 labels, but got 2 labels",
    ),
    "export, coords of another plate": (
        lambda: export(coords={"rows": list("abcdefgh")}),
        ValueError,
        r"expected coords\['rows'\] to be labels of .*'data'",
    ),
    "export, dims is a number": (lambda: export(dims=3), TypeError, "dims to be a dictionary.*got 3"),
    "export, dims of another site": (lambda: export(dims={"z": ["a"]}), ValueError, "expected dims of .*but got 'z'"),
    "export, dims is a name": (
        lambda: export(dims={"y": "rows"}),
        ValueError,
        r"expected dims\['y'\] to be a list of 1 names.*got 'rows'",
    ),
    "export, dims of a number": (
        lambda: export(dims={"y": 3}),
        ValueError,
        r"expected dims\['y'\] to be a list of 1 names.*got 3",
    ),
    "export, a plate named chain": (
        lambda: to_inference_data(chains, ready(chains, Y), (Y,), num_samples=10),
        ValueError,
        "plate 'chain'.*ArviZ",
    ),
}


def optional_data(y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def impossible() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("never", torch.tensor(-INF))


SEED: dict[str, Row] = {
    f"{name}, seed is {what}": (
        lambda use=use, value=value: use(regression, ready(), DATA, seed=value),
        ValueError,
        rf"{name}: expected seed to be an integer in \[.*but got {words}",
    )
    for name, use in SEEDED.items()
    for what, (value, words) in SEEDS.items()
}
SHARED: dict[str, Row] = {}
for owner, function in USES.items():
    SHARED |= {f"{owner}, {what}": row for what, row in uses(owner, function)}
for owner, function in WEIGHING.items():
    SHARED |= {f"{owner}, {what}": row for what, row in weights(owner, function)}

CALLS = {**SHARED, **SEED, **{f"fit, {name}": row for name, row in FIT.items()}, **DIAGNOSTICS}
