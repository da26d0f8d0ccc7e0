# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of ``predict`` and ``prior_predictive``, of the export's predictions, and of their settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_flows import AutoFlowGuide, predict, prior_predictive, to_inference_data
from pyro_flows.models.predictor import PredictionSettings
from tests.wrong_calls.inference import uses
from tests.wrong_calls.programs import (
    ARRAY,
    NAN,
    NOT_INTEGERS,
    NOT_PROGRAMS,
    SEEDS,
    Row,
    X,
    Y,
    other,
    ready,
    regression,
)

__all__ = ["CALLS"]

NEW = (X[:3],)


def optional(x: Tensor, y: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def groups(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("groups", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


def no_latents(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros_like(x) if y is None else y)


def by_hand(x: Tensor, y: Tensor) -> None:
    pyro.sample("b", dist.Normal(0.0, 1.0))


def predicted(args: Any = NEW, kwargs: Any = None, **options: Any) -> Any:
    return predict(optional, ready(optional, X, Y), args, kwargs, **{"num_samples": 5, "progress": False, **options})


def of_groups(items: Any) -> Any:
    return predict(groups, ready(groups, X, Y), NEW, num_samples=5, items={"groups": items}, progress=False)


def prior(args: Any = NEW, kwargs: Any = None, **options: Any) -> Any:
    return prior_predictive(optional, args, kwargs, **{"num_samples": 5, "progress": False, **options})


def export(**options: Any) -> Any:
    return to_inference_data(optional, ready(optional, X, Y), (X, Y), **{"num_samples": 10, **options})


DRAWING: dict[str, Callable[..., Any]] = {"predict": predicted, "prior_predictive": prior}

BOTH: dict[str, Row] = {
    **{
        f"{owner}, num_samples is {name}": (
            lambda call=call, value=value: call(num_samples=value),
            ValueError,
            f"{owner}: expected num_samples to be an integer >= 1, but got {words}",
        )
        for owner, call in DRAWING.items()
        for name, (value, words) in NOT_INTEGERS.items()
    },
    **{
        f"{owner}, seed is {name}": (
            lambda call=call, value=value: call(seed=value),
            ValueError,
            rf"{owner}: expected seed to be an integer in \[.*but got {words}",
        )
        for owner, call in DRAWING.items()
        for name, (value, words) in SEEDS.items()
    },
    **{
        f"{owner}, {what}": (lambda call=call, options=options: call(**options), kind, rf"{owner}: .*{words}")
        for owner, call in DRAWING.items()
        for what, options, kind, words in (
            ("sites is a number", {"sites": 3}, TypeError, r"expected sites to be a list of names.*but got 3"),
            ("sites is True", {"sites": True}, TypeError, r"expected sites to be a list of names.*but got True"),
            ("sites of numbers", {"sites": [1]}, TypeError, r"expected sites to be a list of names.*but got \[1\]"),
            ("sites of lists", {"sites": [["y"]]}, TypeError, r"expected sites to be a list of names.*\[\['y'\]\]"),
            ("sites of None", {"sites": [None]}, TypeError, r"expected sites to be a list of names.*\[None\]"),
            ("sites is a tensor", {"sites": X}, TypeError, r"expected sites to be a list of names.*a tensor"),
            ("sites is an array", {"sites": ARRAY}, TypeError, r"expected sites to be a list of names.*NumPy array"),
            ("sites of none", {"sites": []}, ValueError, "expected sites of the model, 'b', 'y', but got none"),
            ("an unknown site", {"sites": ["z"]}, ValueError, "expected sites of the model, 'b', 'y', but got 'z'"),
            ("the name of no site", {"sites": "z"}, ValueError, "expected sites of the model, 'b', 'y', but got 'z'"),
            ("path is a number", {"path": 3}, TypeError, "expected path to be the path of a folder, but got 3"),
            ("path is True", {"path": True}, TypeError, "expected path to be the path of a folder, but got True"),
            ("path is empty", {"path": ""}, TypeError, "expected path to be the path of a folder, but got ''"),
            ("path is a list", {"path": ["a"]}, TypeError, r"expected path to be the path of a folder.*\['a'\]"),
            (
                "path is a file",
                {"path": __file__},
                ValueError,
                r"expected path to be a folder.*predictions\.py' is not",
            ),
            ("path is in a file", {"path": f"{__file__}/a"}, ValueError, r"expected path to be a folder.*/a' is not"),
            ("progress is a word", {"progress": "no"}, TypeError, "expected progress to be True or False.*'no'"),
            ("progress is None", {"progress": None}, TypeError, "expected progress to be True or False.*None"),
            (
                "settings is a dictionary",
                {"settings": {}},
                TypeError,
                "settings to be a PredictionSettings, but got {}",
            ),
            ("settings is a class", {"settings": PredictionSettings}, TypeError, "got the class PredictionSettings"),
            (
                "too large",
                {"settings": PredictionSettings(max_bytes=8)},
                MemoryError,
                "expected draws that fit in memory",
            ),
            ("a misspelt option", {"num_sample": 5}, TypeError, "expected options among.*Did you mean 'num_samples'"),
            ("the model's argument", {"x": X}, TypeError, r"expected options among.*got 'x'.*kwargs=\{'x'"),
            ("kwargs is a tensor", {"kwargs": X}, TypeError, "expected kwargs to be a dictionary.*got a tensor"),
            ("an unknown keyword", {"kwargs": {"z": X}}, TypeError, "arguments that model takes.*z by name"),
            ("no arguments", {"args": ()}, TypeError, r"arguments that model takes.*got 0 by position.*y=None"),
            ("args is a tensor", {"args": X}, TypeError, r"expected args to be a tuple.*Write args=\(x,\)"),
            ("args is a list", {"args": [X]}, TypeError, r"expected args to be a tuple.*Write args=\(x,\)"),
            ("data are passed", {"args": (X, Y)}, ValueError, r"data to be drawn.*site 'y' is observed.*y=None"),
        )
    },
}

PREDICT: dict[str, Row] = {
    "a guide that is not set up": (
        lambda: predict(optional, AutoFlowGuide(optional), NEW),
        RuntimeError,
        r"predict: expected a trained guide, but it has not seen any data yet.*fit\(model, guide, args\)",
    ),
    "a guide of Pyro's that is not set up": (
        lambda: predict(optional, AutoNormal(optional), NEW),
        RuntimeError,
        "predict: expected a trained guide, but it has not seen any data yet",
    ),
    "y=None is forgotten": (
        lambda: predict(regression, ready(), NEW),
        TypeError,
        r"predict: expected the arguments that model takes.*got 1 by position.*'y'.*`def model\(x, y=None\)`",
    ),
    "y=None is forgotten in a guide": (
        lambda: predict(optional, by_hand, NEW),
        TypeError,
        r"predict: expected the arguments that guide takes.*'y'.*a guide takes the same",
    ),
    "another model's guide": (
        lambda: predict(optional, other(), NEW, progress=False),
        ValueError,
        "predict: expected a guide of this model, whose unobserved sites are .*'b'.*but the guide draws .*'tau'",
    ),
    "the guide as args": (
        lambda: predict(optional, NEW, ready()),
        TypeError,
        r"predict: expected guide to be a Pyro guide.*but got \(tensor",
    ),
    "no guide": (lambda: predict(optional), TypeError, r"predict: expected predict\(model, guide, \.\.\.\).*'guide'"),
    "num_samples by position": (
        lambda: predict(optional, ready(), NEW, {}, 100),
        TypeError,
        r"predict: expected predict\(model, guide, \.\.\.\), but got too many positional",
    ),
    "items is a number": (lambda: predicted(items=3), TypeError, "items to be a dictionary.*got 3"),
    "items is a name": (lambda: predicted(items="new"), TypeError, "items to be a dictionary.*got 'new'"),
    "items is a list": (lambda: predicted(items=[0, 1]), TypeError, r"items to be a dictionary.*got \[0, 1\]"),
    "items without a name": (
        lambda: predicted(items={0: "new"}),
        TypeError,
        "items to be a dictionary.*got {0: 'new'}",
    ),
    "items of an unknown plate": (
        lambda: predicted(items={"rows": "new"}),
        ValueError,
        "predict: expected items of plates of the model, 'data', but got 'rows'",
    ),
    **{
        f"items of {name}": (
            lambda value=value: of_groups(value),
            ValueError,
            rf"items\['groups'\] to be 'new', or 3 indices of training items in \[0, 7\].*but got {words}",
        )
        for name, value, words in (
            ("None", None, "None"),
            ("a number", 3, "3"),
            ("another word", "old", "'old'"),
            ("bools", [True, False, True], r"\[True, False, True\]"),
            ("floats", [0.0, 1.0, 2.0], r"\[0.0, 1.0, 2.0\]"),
            ("nan", [NAN, 0, 1], r"\[nan, 0, 1\]"),
            ("words", ["a", "b", "c"], r"\['a', 'b', 'c'\]"),
            ("a dictionary", {"a": 1}, "{'a': 1}"),
            ("complex numbers", torch.zeros(3, dtype=torch.cfloat), r"a tensor of shape \(3,\)"),
            ("too few", [0, 1], r"\[0, 1\]"),
            ("an index too large", [0, 1, 8], r"\[0, 1, 8\]"),
            ("an index too large for torch", [0, 1, 2**70], r"\[0, 1, \d+\]"),
            ("an index below -1", [0, 1, -2], r"\[0, 1, -2\]"),
        )
    },
}

PRIOR: dict[str, Row] = {
    **{
        f"model is {name}": (
            lambda value=value: prior_predictive(value, NEW),
            TypeError,
            f"prior_predictive: expected model to be a Pyro model.*got {words}",
        )
        for name, (value, words) in NOT_PROGRAMS.items()
    },
    "a guide as model": (
        lambda: prior_predictive(ready(), NEW),
        ValueError,
        "prior_predictive: expected model to be a model, but got a guide, an AutoFlowGuide",
    ),
    "a model and a guide": (
        lambda: prior_predictive(optional, ready(), NEW),
        TypeError,
        "prior_predictive: expected args to be a tuple, but got.*AutoFlowGuide",
    ),
    "y=None is forgotten": (
        lambda: prior_predictive(regression, NEW),
        TypeError,
        r"prior_predictive: expected the arguments that model takes.*'y'.*`def model\(x, y=None\)`",
    ),
    "items": (lambda: prior(items={"data": "new"}), TypeError, "prior_predictive: expected options among.*got 'items'"),
    "no latents": (
        lambda: prior_predictive(no_latents, NEW),
        ValueError,
        "prior_predictive: expected a model with latent sites, but it has none",
    ),
}

EXPORT: dict[str, Row] = {
    **{
        f"num_chains is {name}": (
            lambda value=value: export(num_chains=value),
            ValueError,
            f"to_inference_data: expected num_chains to be an integer >= 1, but got {words}",
        )
        for name, (value, words) in NOT_INTEGERS.items()
    },
    **{
        f"num_prior_samples is {name}": (
            lambda value=value: export(num_prior_samples=value),
            ValueError,
            f"to_inference_data: expected num_prior_samples to be an integer >= 0, but got {words}",
        )
        for name, (value, words) in NOT_INTEGERS.items()
        if name != "zero"
    },
    "num_prior_samples is None": (
        lambda: export(num_prior_samples=None),
        ValueError,
        "num_prior_samples to be an integer >= 0, but got None",
    ),
    "chains of two lengths": (
        lambda: export(num_chains=4),
        ValueError,
        "expected chains of one length, but 10 draws do not split into 4. Take num_samples=8",
    ),
    "more chains than draws": (lambda: export(num_chains=20), ValueError, "10 draws do not split into 20.*=20"),
    "log_prior is None": (lambda: export(log_prior=None), TypeError, "log_prior to be True or False, but got None"),
    "log_prior is a word": (lambda: export(log_prior="b"), TypeError, "log_prior to be True or False, but got 'b'"),
    **{
        f"predictions is {name}": (
            lambda value=value: export(predictions=value),
            TypeError,
            rf"to_inference_data: expected predictions to be a tuple.*but got {words}.*Write predictions=\(x,\)",
        )
        for name, value, words in (
            ("a tensor", X, "a tensor"),
            ("a list", [X], r"(\[tensor|a list)"),
            ("a number", 3, "3"),
            ("True", True, "True"),
            ("a word", "x", "'x'"),
            ("an array", ARRAY, "a NumPy array"),
            ("numbered", {0: 3}, "{0: 3}"),
        )
    },
    "predictions of nothing": (
        lambda: export(predictions=()),
        TypeError,
        "to_inference_data: expected the arguments that model takes.*got 0 by position",
    ),
    "predictions of an unknown name": (
        lambda: export(predictions={"x": X, "z": Y}),
        TypeError,
        "to_inference_data: expected the arguments that model takes.*x, z by name",
    ),
    "predictions with data": (
        lambda: export(predictions=(X, Y)),
        ValueError,
        "to_inference_data: expected data to be drawn, but site 'y' is observed",
    ),
}

SETTINGS: dict[str, Row] = {
    **{
        f"{option} is {name}": (
            lambda option=option, value=value: PredictionSettings(**{option: value}),
            ValueError,
            f"PredictionSettings: expected {option} to be an integer >= 1, but got {words}",
        )
        for option in ("max_elements", "max_chunk", "num_probes", "max_bytes")
        for name, (value, words) in NOT_INTEGERS.items()
        if name in ("zero", "negative", "a float", "a bool", "nan")
    },
    "an unknown name": (
        lambda: PredictionSettings(max_chunks=3),  # type: ignore[call-arg]
        TypeError,
        "PredictionSettings: expected options by name, max_elements.*'max_chunks'. Did you mean 'max_chunk'",
    ),
    "by position": (lambda: PredictionSettings(3), TypeError, "PredictionSettings: expected options by name.*got 3"),
}

CALLS = {
    **{f"predict, {name}": row for name, row in uses("predict", partial(predict, progress=False))},
    **BOTH,
    **{f"predict, {name}": row for name, row in PREDICT.items()},
    **{f"prior_predictive, {name}": row for name, row in PRIOR.items()},
    **{f"export, {name}": row for name, row in EXPORT.items()},
    **{f"PredictionSettings, {name}": row for name, row in SETTINGS.items()},
}
