# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of ``plots``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from matplotlib import pyplot as plt

from pyro_flows import AutoFlowGuide, flows, plots
from pyro_flows.diagnostics import Calibration, SiteCalibration
from tests.wrong_calls.programs import INF, NAN, NOT_INTEGERS, Decoder, Row, X, Y, hierarchy, pair, ready

__all__ = ["CALLS"]

LOSSES = [35.0, 33.0, 32.0, 31.9]
DRAWS = {"mu": torch.linspace(-1.0, 1.0, 50), "theta": torch.linspace(-1.0, 1.0, 100).reshape(50, 2)}
WEIGHTS = torch.linspace(-1.0, 1.0, 50)
IMAGES = torch.rand(3, 16)
SITE = SiteCalibration("mu", 0.5, 0.0, 0.1, 1.0, 0.1)
REPORT = Calibration({"mu": torch.rand(50, 1)}, {"mu": SITE}, calibrated=True, failed=0)


@functools.cache
def axes() -> Any:
    return plt.subplots()[1]


def predictive(draws: Any = torch.randn(20, 8), observed: Any = Y, **options: Any) -> Any:
    return plots.posterior_predictive(draws, observed, **options)


def walk(decode: Any = Decoder(), z: Any = torch.zeros(2), **options: Any) -> Any:
    return plots.latent_traversal(decode, z, **options)


def prior(decode: Any = Decoder(), z: Any = torch.zeros(5, 2), **options: Any) -> Any:
    return plots.prior_samples(decode, z, **options)


def grid(flow: Any, **options: Any) -> Any:
    return plots.flow_grid(flow, **options)


# Every function that draws on one Axes, called right.
ON_AX = {
    "training": lambda **options: plots.training(LOSSES, **options),
    "calibration": lambda **options: plots.calibration(REPORT, **options),
    "flow_grid": lambda **options: grid(torch.exp, **options),
    "posterior_predictive": predictive,
    "reconstructions": lambda **options: plots.reconstructions(IMAGES, IMAGES, **options),
    "prior_samples": prior,
    "latent_traversal": walk,
}
# What takes draws by label and site.
OF_DRAWS = {"pairs": plots.pairs, "marginals": plots.marginals}

AXES: dict[str, Row] = {
    f"{name}, ax is {what}": (
        lambda draw=draw, value=value: draw(ax=value),
        TypeError,
        f"{name}: expected ax to be Axes of matplotlib, but got {words}.*plt.subplots",
    )
    for name, draw in ON_AX.items()
    for what, value, words in (("a number", 3, "3"), ("a name", "ax", "'ax'"), ("a list", [1], r"\[1\]"))
}
SAMPLES: dict[str, Row] = {
    f"{name}, {what}": (lambda draw=draw, call=call: call(draw), kind, f"{name}: .*{words}")
    for name, draw in OF_DRAWS.items()
    for what, call, kind, words in (
        ("None", lambda draw: draw(None), TypeError, "expected samples to be draws of sites by label, but got None"),
        ("a tensor", lambda draw: draw(X), TypeError, "expected samples to be draws.*but got a tensor of shape"),
        ("a guide", lambda draw: draw(ready()), TypeError, "expected samples to be draws.*AutoFlowGuide"),
        ("nothing", lambda draw: draw({}), ValueError, "expected 1 to 6 sets of draws, but got 0"),
        ("no label", lambda draw: draw(DRAWS), TypeError, "draws of sites under 'mu', but got a Tensor"),
        (
            "seven sets",
            lambda draw: draw(dict.fromkeys("abcdefg", DRAWS)),
            ValueError,
            "1 to 6 sets of draws, but got 7",
        ),
        ("a set without sites", lambda draw: draw({"a": {}}), ValueError, "expected 1 to .* columns, but got 0"),
        (
            "a word at a site",
            lambda draw: draw({"a": {"mu": "b"}}),
            TypeError,
            "draws of 'mu' in 'a' to be a tensor.*'b'",
        ),
        ("None at a site", lambda draw: draw({"a": {"mu": None}}), TypeError, "draws of 'mu' in 'a' to be a.*got None"),
        (
            "one number",
            lambda draw: draw({"a": {"mu": 3.0}}),
            ValueError,
            r"draws of 'mu' in 'a' to have shape .*got \(\)",
        ),
        ("no draws", lambda draw: draw({"a": {"mu": X[:0]}}), ValueError, r"draws of 'mu' in 'a' to have.*got \(0,\)"),
        (
            "unequal lengths",
            lambda draw: draw({"a": {"mu": X, "b": X[:3]}}),
            ValueError,
            r"as many draws of each site in 'a', but got \[3, 8\]",
        ),
        ("nan", lambda draw: draw({"a": {"mu": X * NAN}}), ValueError, "draws of 'mu' in 'a', but none of 8 is finite"),
        (
            "another set's site",
            lambda draw: draw({"a": DRAWS, "b": {"mu": X}}),
            ValueError,
            "one number a draw of 'theta.0.' in 'b'",
        ),
        (
            "too many columns",
            lambda draw: draw({"a": {"z": torch.rand(9, 41)}}),
            ValueError,
            "1 to .* columns, but got 41",
        ),
        (
            "an unknown site",
            lambda draw: draw({"a": DRAWS}, sites=["tau"]),
            ValueError,
            "expected sites among 'mu', 'theta', but got 'tau'",
        ),
        (
            "an element out of range",
            lambda draw: draw({"a": DRAWS}, sites=["theta[7]"]),
            ValueError,
            r"one number a draw of 'theta\[7\]'",
        ),
        (
            "a name as sites",
            lambda draw: draw({"a": DRAWS}, sites="mu"),
            TypeError,
            "sites to be a list of names.*'mu'",
        ),
        (
            "numbers as sites",
            lambda draw: draw({"a": DRAWS}, sites=[0]),
            TypeError,
            r"sites to be a list of names.*\[0\]",
        ),
        ("a number as axes", lambda draw: draw({"a": {"mu": X}}, axes=3), TypeError, "expected axes to be Axes.*got 3"),
        (
            "too few axes",
            lambda draw: draw({"a": DRAWS}, axes=axes()),
            ValueError,
            r"expected \d x \d Axes, but got 1",
        ),
        (
            "a misspelt option",
            lambda draw: draw({"a": DRAWS}, site=["mu"]),
            TypeError,
            "got 'site'. Did you mean 'sites'",
        ),
    )
}
OTHERS: dict[str, Row] = {
    **{
        f"{name}, {option} is {what}": (
            lambda draw=draw, option=option, value=value: draw(**{option: value}),
            ValueError,
            f"{name}: expected {option} to be an integer >= {low}, but got {words}",
        )
        for name, option, low, draw in (
            ("pairs", "max_points", 1, functools.partial(plots.pairs, {"a": DRAWS})),
            ("marginals", "num_columns", 1, functools.partial(plots.marginals, {"a": DRAWS})),
            ("training", "window", 1, functools.partial(plots.training, LOSSES)),
            ("flow_grid", "num_lines", 2, functools.partial(grid, torch.exp)),
            ("prior_samples", "num_columns", 1, prior),
        )
        for what, (value, words) in NOT_INTEGERS.items()
        if what in ("zero", "a float", "a name")
    },
    **{
        f"training of {what}": (lambda value=value: plots.training(value), kind, f"training: expected {words}")
        for what, value, kind, words in (
            ("None", None, TypeError, "losses of 'ELBO' to be a tensor, an array or a list of numbers, but got None"),
            ("a word", "a", TypeError, "losses of 'ELBO' to be a tensor.*but got 'a'"),
            ("a guide", ready(), TypeError, "losses of 'ELBO' to be a tensor.*but got .*AutoFlowGuide"),
            ("nothing", [], ValueError, "losses of 'ELBO'.*but got none"),
            ("one number", 3.0, ValueError, r"losses of 'ELBO'.*but got shape \(\)"),
            ("a table", torch.zeros(3, 2), ValueError, r"losses of 'ELBO'.*but got shape \(3, 2\)"),
            ("nan", [NAN, NAN], ValueError, "losses of 'ELBO'.*but got none that is finite"),
            ("no runs", {}, ValueError, "1 to 5 runs, but got 0"),
            ("six runs", dict.fromkeys("abcdef", LOSSES), ValueError, "1 to 5 runs, but got 6"),
            ("a run of None", {"a": None}, TypeError, "losses of 'a' to be a tensor.*but got None"),
        )
    },
    "training, gaussian is a word": (
        lambda: plots.training(LOSSES, gaussian="a"),
        ValueError,
        "gaussian to be a finite number, but got 'a'",
    ),
    "training, log_evidence is nan": (
        lambda: plots.training(LOSSES, log_evidence=NAN),
        ValueError,
        "log_evidence to be a finite number, but got nan",
    ),
    "training, gaussian is many": (
        lambda: plots.training(LOSSES, gaussian=X),
        ValueError,
        "gaussian to be a finite number, but got a tensor of shape",
    ),
    **{
        f"weights of {what}": (lambda value=value: plots.weights(value), kind, f"weights: expected {words}")
        for what, value, kind, words in (
            ("None", None, TypeError, "log_weights to be a tensor.*but got None"),
            ("a word", "a", TypeError, "log_weights to be a tensor.*but got 'a'"),
            ("a guide", ready(), TypeError, "log_weights to be a tensor.*but got .*AutoFlowGuide"),
            ("few", torch.zeros(5), ValueError, r"at least 20 log weights, \(S,\).*but got shape \(5,\)"),
            ("many items", torch.zeros(50, 2), ValueError, r"at least 20 log weights.*got shape \(50, 2\).*\[:, 0\]"),
            ("nan", WEIGHTS * NAN, ValueError, "at least 20 log weights.*none of them NaN"),
            ("inf", torch.full((50,), INF), ValueError, r"at least 20 log weights.*none of them NaN or \+inf"),
            ("-inf", torch.full((50,), -INF), ValueError, "at least 20 log weights.*but got"),
        )
    },
    "weights, axes is a number": (lambda: plots.weights(WEIGHTS, axes=3), TypeError, "axes to be Axes.*but got 3"),
    "weights, one Axes": (lambda: plots.weights(WEIGHTS, axes=axes()), ValueError, "1 x 2 Axes, but got 1"),
    "calibration of None": (lambda: plots.calibration(None), TypeError, "report to be a Calibration, but got None"),
    "calibration of a guide": (
        lambda: plots.calibration(ready()),
        TypeError,
        "report to be a Calibration.*AutoFlowGuide",
    ),
    "calibration, an unknown site": (
        lambda: plots.calibration(REPORT, sites=["tau"]),
        ValueError,
        r"1 to 5 of mu, but got \['tau'\]",
    ),
    "calibration, a name as sites": (
        lambda: plots.calibration(REPORT, sites="mu"),
        TypeError,
        "sites to be a list of names.*got 'mu'",
    ),
    "calibration, no sites": (lambda: plots.calibration(REPORT, sites=[]), ValueError, r"1 to 5 of mu, but got \[\]"),
    "flow_grid of None": (lambda: grid(None), TypeError, "flow to be a guide, a flow or a function, but got None"),
    "flow_grid of a name": (lambda: grid("iaf"), TypeError, "flow to be a guide, a flow or a function, but got 'iaf'"),
    "flow_grid of a spec": (lambda: grid(flows.get("iaf")), TypeError, r"flow to be a guide.*but got (IAF|a IAF)"),
    "flow_grid in one dimension": (lambda: grid(ready()), ValueError, "a flow over two dimensions, but got one over 1"),
    "flow_grid in three": (lambda: grid(flows.get("iaf").build(3)), ValueError, "two dimensions, but got one over 3"),
    "flow_grid before setup": (lambda: grid(AutoFlowGuide(pair)), RuntimeError, r"guide.setup\(\*args"),
    "flow_grid of items": (
        lambda: grid(AutoFlowGuide(hierarchy, structure="plates").setup(Y)),
        ValueError,
        "one flow over all latents, but those of plate 'groups' are local",
    ),
    "flow_grid of a sum": (lambda: grid(lambda z: z.sum(-1)), ValueError, r"flow to map \(N, 2\).*but got shape"),
    "flow_grid of a function of None": (
        lambda: grid(lambda z: None),
        TypeError,
        "flow's values to be a tensor.*got None",
    ),
    "flow_grid, no context": (
        lambda: grid(flows.get("iaf").build(2, 3)),
        ValueError,
        "expected a context of length 3, but got none",
    ),
    "flow_grid, another context": (
        lambda: grid(flows.get("iaf").build(2, 3), context=torch.zeros(2)),
        ValueError,
        r"expected a context of length 3, but got shape \(2,\)",
    ),
    "flow_grid, a context too much": (
        lambda: grid(flows.get("iaf").build(2), context=torch.zeros(2)),
        ValueError,
        r"expected a context of length 0, but got shape \(2,\)",
    ),
    **{
        f"flow_grid, extent is {value!r}": (
            lambda value=value: grid(torch.exp, extent=value),
            ValueError,
            f"extent to be a number > 0, but got {value!r}",
        )
        for value in (0, -1.0, NAN, INF, "3")
    },
    **{
        f"posterior_predictive, {what}": (call, kind, f"posterior_predictive: expected {words}")
        for what, call, kind, words in (
            ("draws is None", lambda: predictive(None), TypeError, "draws to be a tensor.*but got None"),
            ("draws is a word", lambda: predictive("y"), TypeError, "draws to be a tensor.*but got 'y'"),
            ("draws is a dictionary", lambda: predictive({"y": X}), TypeError, "draws to be a tensor.*but got"),
            (
                "draws of other data",
                lambda: predictive(torch.zeros(20, 3)),
                ValueError,
                r"draws of shape \(S, .*\(20, 3\)",
            ),
            ("no draws", lambda: predictive(torch.zeros(0, 8)), ValueError, r"draws of shape \(S, .*got \(0, 8\)"),
            ("draws of nan", lambda: predictive(torch.full((20, 8), NAN)), ValueError, "draws to be finite"),
            ("observed is None", lambda: predictive(observed=None), TypeError, "observed to be a tensor.*but got None"),
            ("observed is a word", lambda: predictive(observed="y"), TypeError, "observed to be a tensor.*but got 'y'"),
            ("x is a word", lambda: predictive(x="a"), TypeError, "x to be a tensor.*but got 'a'"),
            ("x of another length", lambda: predictive(x=X[:3]), ValueError, "8 values of x, but got 3"),
            ("interval is 1", lambda: predictive(interval=1), ValueError, r"interval to be in \(0, 1\), but got 1"),
            ("interval is 90", lambda: predictive(interval=90), ValueError, r"interval to be in \(0, 1\), but got 90"),
            (
                "interval is a word",
                lambda: predictive(interval="a"),
                ValueError,
                r"interval to be in \(0, 1\).*got 'a'",
            ),
            ("interval is nan", lambda: predictive(interval=NAN), ValueError, r"interval to be in \(0, 1\).*got nan"),
        )
    },
    **{
        f"reconstructions, {what}": (call, kind, f"reconstructions: expected {words}")
        for what, call, kind, words in (
            ("None", lambda: plots.reconstructions(None, IMAGES), TypeError, "images to be a tensor.*but got None"),
            (
                "of None",
                lambda: plots.reconstructions(IMAGES, None),
                TypeError,
                "reconstructed 'draw' to be a.*got None",
            ),
            (
                "nothing",
                lambda: plots.reconstructions(X[:0], X[:0]),
                ValueError,
                r"images of shape \(N, \*image\), but got \(0,\)",
            ),
            (
                "a number",
                lambda: plots.reconstructions(3.0, 3.0),
                ValueError,
                r"images of shape \(N, \*image\), but got \(\)",
            ),
            (
                "another shape",
                lambda: plots.reconstructions(IMAGES, IMAGES[:, :3]),
                ValueError,
                r"'draw' to have shape",
            ),
            ("another number", lambda: plots.reconstructions(IMAGES, IMAGES[:2]), ValueError, r"'draw' to have shape"),
            (
                "no square",
                lambda: plots.reconstructions(X[None], X[None]),
                ValueError,
                r".*image_shape None.*shape \(8,\)",
            ),
            (
                "another image_shape",
                lambda: plots.reconstructions(IMAGES, IMAGES, image_shape=(3, 3)),
                ValueError,
                r"images that fit image_shape \(3, 3\), but each has shape \(16,\)",
            ),
            (
                "a long image_shape",
                lambda: plots.reconstructions(IMAGES, IMAGES, image_shape=(2, 2, 2, 2)),
                ValueError,
                r"image_shape to be \(height, width\).*but got \(2, 2, 2, 2\)",
            ),
            (
                "a number as image_shape",
                lambda: plots.reconstructions(IMAGES, IMAGES, image_shape=4),
                ValueError,
                "image_shape to be .*but got 4",
            ),
            (
                "a number as limits",
                lambda: plots.reconstructions(IMAGES, IMAGES, limits=1),
                ValueError,
                "limits to be two numbers.*but got 1",
            ),
            (
                "equal limits",
                lambda: plots.reconstructions(IMAGES, IMAGES, limits=(1.0, 1.0)),
                ValueError,
                r"limits to be an increasing pair of numbers, but got \(1.0, 1.0\)",
            ),
        )
    },
    **{
        f"prior_samples, {what}": (call, kind, f"prior_samples: expected {words}")
        for what, call, kind, words in (
            ("decode is None", lambda: prior(None), TypeError, "decode to be a function, but got None"),
            (
                "decode and z swapped",
                lambda: prior(X, Decoder()),
                TypeError,
                "decode to be a function, but got a tensor",
            ),
            ("z is None", lambda: prior(z=None), TypeError, "z to be a tensor, but got None"),
            ("z is a number of images", lambda: prior(z=48), TypeError, "z to be a tensor, but got 48"),
            ("z is one", lambda: prior(z=torch.zeros(2)), ValueError, r"z of shape \(N, latent_dim\), but got \(2,\)"),
            (
                "z is empty",
                lambda: prior(z=torch.zeros(0, 2)),
                ValueError,
                r"z of shape \(N, latent_dim\), but got \(0, 2\)",
            ),
            (
                "decode returns None",
                lambda: prior(lambda z: None),
                TypeError,
                "the result of decode to be a tensor.*None",
            ),
            (
                "decode returns a pair",
                lambda: prior(lambda z: (z, z[0])),
                TypeError,
                "the result of decode to be a tensor",
            ),
            (
                "decode returns numbers",
                lambda: prior(lambda z: z.sum(-1)),
                ValueError,
                r"decode to return images.*got \(5,\)",
            ),
            (
                "decode returns one",
                lambda: prior(lambda z: z[:1]),
                ValueError,
                r"decode to return images.*got \(1, 2\)",
            ),
            ("limits", lambda: prior(limits=(0.0, NAN)), ValueError, "limits to be two numbers.*nan"),
        )
    },
    **{
        f"latent_traversal, {what}": (call, kind, f"latent_traversal: expected {words}")
        for what, call, kind, words in (
            ("decode is None", lambda: walk(None), TypeError, "decode to be a function, but got None"),
            ("z is a list", lambda: walk(z=[0.0, 0.0]), TypeError, r"z to be a tensor, but got \[0.0, 0.0\]"),
            (
                "z is a table",
                lambda: walk(z=torch.zeros(1, 2)),
                ValueError,
                r"z of shape \(latent_dim,\), but got \(1, 2\)",
            ),
            ("z is empty", lambda: walk(z=torch.zeros(0)), ValueError, r"z of shape \(latent_dim,\), but got \(0,\)"),
            ("dims out of range", lambda: walk(dims=[2]), ValueError, r"dims in \[0, 1\], but got \[2\]"),
            ("dims below", lambda: walk(dims=[-1]), ValueError, r"dims in \[0, 1\], but got \[-1\]"),
            ("dims empty", lambda: walk(dims=[]), ValueError, r"dims in \[0, 1\], but got \[\]"),
            ("dims a number", lambda: walk(dims=1), ValueError, r"dims in \[0, 1\], but got 1"),
            ("dims floats", lambda: walk(dims=[0.5]), ValueError, r"dims in \[0, 1\], but got \[0.5\]"),
            ("values is a word", lambda: walk(values="a"), TypeError, "values to be a tensor.*but got 'a'"),
            ("values is a number", lambda: walk(values=1.0), ValueError, "values to be a list of numbers, but got 1.0"),
            ("values is empty", lambda: walk(values=[]), ValueError, r"values to be a list of numbers, but got \[\]"),
            (
                "decode returns vectors",
                lambda: walk(lambda z: z[:, 0]),
                ValueError,
                r"decode to return images.*got \(22,\)",
            ),
        )
    },
}

CALLS = {**AXES, **SAMPLES, **OTHERS}
