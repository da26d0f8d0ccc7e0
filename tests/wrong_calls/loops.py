# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of loops: ``until_converged`` and its rule, the callback and the optimizer of ``fit``, and settings."""

from __future__ import annotations

import functools
import re
from typing import Any

import pyro.optim
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flows import Convergence, fit, until_converged
from pyro_flows.training.convergence import ConvergenceSettings
from pyro_flows.training.monitor import MonitorSettings
from pyro_flows.training.verdict import VerdictSettings
from tests.wrong_calls.programs import ARRAY, INF, NAN, NOT_INTEGERS, Row, X, Y, ready, regression

__all__ = ["CALLS"]

DATA = (X, Y)


@functools.cache
def svi() -> SVI:
    return SVI(regression, AutoNormal(regression), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())


def loop(args: Any = DATA, kwargs: Any = None, **options: Any) -> Any:
    return until_converged(svi(), args, kwargs, **{"progress": False, **options})


class NoStep:
    step = 3


class Silent:
    """Its steps return nothing."""

    def step(self, x: Any, y: Any) -> None:
        pass


def weight() -> torch.Tensor:
    return torch.zeros(1, requires_grad=True)


LOOP: dict[str, Row] = {
    **{
        f"svi is {name}": (
            lambda value=value: until_converged(value, DATA),
            TypeError,
            rf"until_converged: expected svi to be an SVI.*but got {words}.*Write SVI\(model, guide",
        )
        for name, value, words in (
            ("None", None, "None"),
            ("a number", 3, "3"),
            ("a word", "svi", "'svi'"),
            ("a model", regression, "<function regression"),
            ("a guide", AutoNormal(regression), "AutoNormal"),
            ("a class", SVI, "the class SVI"),
            ("an optimizer", torch.optim.Adam([weight()]), "(Adam|a Adam)"),
            ("an optimizer of Pyro", pyro.optim.Adam({"lr": 0.01}), "<pyro.optim"),
            ("without a step", NoStep(), "<.*NoStep"),
        )
    },
    **{
        f"max_steps is {name}": (
            lambda value=value: loop(max_steps=value),
            ValueError,
            f"until_converged: expected max_steps to be an integer >= 1, but got {words}",
        )
        for name, (value, words) in NOT_INTEGERS.items()
    },
    "max_steps is None": (lambda: loop(max_steps=None), ValueError, "max_steps to be an integer >= 1, but got None"),
    **{
        f"args is {name}": (
            lambda value=value: loop(value),
            TypeError,
            rf"until_converged: expected args to be a tuple.*but got {words}.*Write args=\(x,\)",
        )
        for name, value, words in (
            ("a tensor", X, "a tensor"),
            ("None", None, "None"),
            ("a number", 3, "3"),
            ("a word", "x", "'x'"),
            ("an array", ARRAY, "a NumPy array"),
            ("a dictionary", {"x": 3}, "{'x': 3}"),
        )
    },
    "args is an iterator": (lambda: loop(iter([DATA])), TypeError, "until_converged: .*iterated over again.*iterator"),
    "no mini-batches": (lambda: loop([]), ValueError, "until_converged: expected args to have at least one mini-batch"),
    "mini-batches by name": (
        lambda: loop([{"x": X, "y": Y}]),
        TypeError,
        "until_converged: expected mini-batches to be tuples.*a dictionary of 'x', 'y'",
    ),
    "kwargs is a tensor": (lambda: loop((X,), Y), TypeError, "until_converged: expected kwargs to be a dictionary"),
    "too few arguments": (
        lambda: loop((X,)),
        TypeError,
        "until_converged: expected the arguments that model takes.*got 1 by position.*'y'",
    ),
    "an argument too much": (
        lambda: loop(DATA, {"z": X}),
        TypeError,
        "until_converged: expected the arguments that model takes.*z by name",
    ),
    "a step of other arguments": (
        lambda: until_converged(Silent(), (X,)),
        TypeError,
        r"until_converged: expected the arguments that svi\.step takes.*got 1 by position.*'y'",
    ),
    "a step without a loss": (
        lambda: next(iter(until_converged(Silent(), DATA, progress=False))),
        TypeError,
        r"until_converged: expected what svi\.step returns to be a number, but got None",
    ),
    "progress is a word": (lambda: loop(progress="no"), TypeError, "until_converged: expected progress.*got 'no'"),
    "progress is None": (lambda: loop(progress=None), TypeError, "until_converged: expected progress.*got None"),
    "settings is a rule": (lambda: loop(settings=Convergence()), TypeError, "settings to be a ConvergenceSettings"),
    "settings is a dictionary": (lambda: loop(settings={}), TypeError, "settings to be a ConvergenceSettings.*got {}"),
    "a misspelt option": (lambda: loop(max_step=5), TypeError, "got 'max_step'. Did you mean 'max_steps'"),
    "no svi": (lambda: until_converged(), TypeError, r"expected until_converged\(svi, \.\.\.\).*'svi'"),  # type: ignore[call-arg]
}

RULE: dict[str, Row] = {
    "settings is a number": (lambda: Convergence(3), TypeError, "Convergence: expected settings.*but got 3"),
    "settings is a dictionary": (lambda: Convergence({}), TypeError, "Convergence: expected settings.*but got {}"),
    "an unknown option": (
        lambda: Convergence(min_window=10),  # type: ignore[call-arg]
        TypeError,
        "Convergence: expected options among settings, but got 'min_window'",
    ),
    **{
        f"a loss of {name}": (
            lambda value=value: Convergence().add(value),
            TypeError,
            f"Convergence.add: expected loss to be a number, but got {words}",
        )
        for name, value, words in (
            ("None", None, "None"),
            ("a word", "1.0", "'1.0'"),
            ("True", True, "True"),
            ("a list", [1.0], r"\[1.0\]"),
            ("several", X, r"a tensor of shape \(8,\)"),
        )
    },
}

SETTINGS: dict[str, Row] = {
    **{
        f"{kind.__name__}, {option} is {value!r}": (
            lambda kind=kind, option=option, value=value: kind(**{option: value}),
            ValueError,
            f"{kind.__name__}: expected {option} to be {words}, but got {re.escape(str(value))}",
        )
        for kind, option, values, words in (
            (ConvergenceSettings, "min_window", (9, -1, 10.5, True, NAN), "an integer >= 10"),
            (ConvergenceSettings, "share", (0.0, -0.1, NAN, True), "a number > 0"),
            (ConvergenceSettings, "share", (0.6, 1), r"a number in \(0, 0.5\]"),
            (ConvergenceSettings, "growth", (1.0, 0.5, NAN, INF, True), "a number > 1"),
            (ConvergenceSettings, "z_score", (0.0, -1.0, None), "a number > 0"),
            (ConvergenceSettings, "num_checks", (0, 1.5, None), "an integer >= 1"),
            (ConvergenceSettings, "max_failures", (0, -1), "an integer >= 1"),
            (ConvergenceSettings, "snapshot_interval", (0, -1, 2.5), "an integer >= 1"),
            (ConvergenceSettings, "num_draws", (0, True), "an integer >= 1"),
            (VerdictSettings, "num_draws", (-1, 100.5, True, None), "an integer >= 0"),
            (VerdictSettings, "min_draws", (-1, 0.5), "an integer >= 0"),
            (VerdictSettings, "max_values", (0, NAN), "an integer >= 1"),
            (MonitorSettings, "interval", (0, -1, 1.5), "an integer >= 1"),
            (MonitorSettings, "window", (0, None), "an integer >= 1"),
            (MonitorSettings, "seconds", (0.0, -1.0, NAN), "a number > 0"),
        )
        for value in values
    },
    "ConvergenceSettings, an unknown name": (
        lambda: ConvergenceSettings(window=10),  # type: ignore[call-arg]
        TypeError,
        "ConvergenceSettings: expected options by name, min_window.*'window'. Did you mean 'min_window'",
    ),
    "VerdictSettings, an unknown name": (
        lambda: VerdictSettings(num_draw=10),  # type: ignore[call-arg]
        TypeError,
        "VerdictSettings: expected options by name.*'num_draw'. Did you mean 'num_draws'",
    ),
}


def train(**options: Any) -> Any:
    return fit(regression, ready(), DATA, progress=False, **options)


FIT: dict[str, Row] = {
    **{
        f"callback is {name}": (
            lambda value=value: train(callback=value),
            TypeError,
            f"fit: expected callback to be a function, but got {words}",
        )
        for name, value, words in (
            ("a number", 3, "3"),
            ("True", True, "True"),
            ("a word", "stop", "'stop'"),
            ("a list", [print], r"\[<built-in"),
        )
    },
    "a callback that takes nothing": (
        lambda: train(callback=lambda: None),
        TypeError,
        r"fit: expected the arguments that callback takes, \(\), but got 1 by position.*Let it take a FitProgress",
    ),
    "a callback that takes two": (
        lambda: train(callback=lambda step, loss: None),
        TypeError,
        r"fit: expected the arguments that callback takes, \(step, loss\).*Let it take a FitProgress",
    ),
    **{
        f"optim is {name}": (lambda value=value: train(optim=value), TypeError, f"fit: expected an optimizer {words}")
        for name, value, words in (
            ("a number", 3, "that is made of the guide's parameters, but got a int"),
            ("a word", "adam", "that is made of the guide's parameters, but got a str"),
            ("a dictionary", {"lr": 0.1}, "that is made of the guide's parameters, but got a dict"),
            ("an optimizer that is made", torch.optim.Adam([weight()]), "that is made of.*functools.partial"),
            (
                "a schedule",
                pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}),
                "without a schedule",
            ),
        )
    },
    "optim by a function of options": (
        lambda: train(optim=pyro.optim.Adam(lambda name: {"lr": 0.1})),
        TypeError,
        "fit: expected one set of options for all parameters, but got a function",
    ),
    "optim makes nothing": (
        lambda: train(optim=lambda parameters: None),
        TypeError,
        r"fit: expected optim to make a torch\.optim\.Optimizer, but got a NoneType",
    ),
    "optim takes nothing": (
        lambda: train(optim=lambda: None),
        TypeError,
        "fit: expected optim to make an optimizer of a list of parameters, but it raises TypeError",
    ),
    "optim of a negative rate": (
        lambda: train(optim=functools.partial(torch.optim.Adam, lr=-1.0)),
        ValueError,
        r"fit: expected optim to make an optimizer.*it raises ValueError\('Invalid learning rate: -1.0'\)",
    ),
    "optim of an unknown option": (
        lambda: train(optim=pyro.optim.Adam({"lr": 0.1, "momentun": 0.9})),
        TypeError,
        "fit: expected optim to make an optimizer.*momentun",
    ),
    "optim of a rate of zero": (
        lambda: train(optim=functools.partial(torch.optim.SGD, lr=0.0)),
        ValueError,
        r"fit: expected an optimizer with a learning rate > 0, but got 0\.0",
    ),
}

CALLS = {
    **{f"until_converged, {name}": row for name, row in LOOP.items()},
    **{f"Convergence, {name}": row for name, row in RULE.items()},
    **SETTINGS,
    **{f"fit, {name}": row for name, row in FIT.items()},
}
