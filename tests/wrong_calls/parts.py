# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of flows, their recipes and transforms; of ``CompiledSVI`` and the ELBO; of settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions.transforms as T
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam
from torch import nn

from pyro_flows import AutoFlowGuide, CompiledSVI, Flow, FlowSpec, VectorizedTrace_ELBO, flows, init_to_prior_median
from pyro_flows import transforms as ours
from pyro_flows.training import EstimateSettings, FitSettings, ScheduleSettings, TrainerSettings
from tests.wrong_calls.programs import ARRAY, INF, NAN, NOT_INTEGERS, NOT_PROGRAMS, Row, X, Y, other, ready, regression

__all__ = ["CALLS"]

# A family, one of its hyper-parameters, a value, the kind of error, and its words.
HYPER: tuple[tuple[str, str, Any, type[Exception], str], ...] = (
    ("iaf", "num_transforms", 0, ValueError, "an integer >= 1, but got 0"),
    ("iaf", "num_transforms", "3", ValueError, "an integer >= 1, but got '3'"),
    ("iaf", "num_transforms", True, ValueError, "an integer >= 1, but got True"),
    ("iaf", "num_transforms", 2.5, ValueError, "an integer >= 1, but got 2.5"),
    ("iaf", "num_transforms", None, ValueError, "an integer >= 1, but got None"),
    ("iaf", "hidden_dims", 64, ValueError, "a tuple of integers >= 1.*but got 64"),
    ("iaf", "hidden_dims", (), ValueError, r"at least one entry, but got \(\)"),
    ("iaf", "hidden_dims", [64], ValueError, r"a tuple of integers >= 1.*but got \[64\]"),
    ("iaf", "hidden_dims", (0,), ValueError, r"a tuple of integers >= 1.*but got \(0,\)"),
    ("iaf", "hidden_dims", (True,), ValueError, r"a tuple of integers >= 1.*but got \(True,\)"),
    ("iaf", "log_scale_bound", -1.0, ValueError, "a number > 0, but got -1.0"),
    ("iaf", "log_scale_bound", INF, ValueError, "a number > 0, but got inf"),
    ("iaf", "head", "full", ValueError, "one of 'diagonal', 'low_rank', 'full_rank', but got 'full'"),
    ("iaf", "head", None, ValueError, "one of 'diagonal', 'low_rank', 'full_rank', but got None"),
    ("iaf", "base", "gamma", ValueError, "one of 'normal', 'student_t', 'mixture'.*but got 'gamma'"),
    ("iaf", "base", flows.StudentT, ValueError, "one of 'normal'.*but got the class StudentT"),
    ("spline", "count_bins", 1, ValueError, r"an integer in \[2, 128\], but got 1"),
    ("spline", "count_bins", 200, ValueError, r"an integer in \[2, 128\], but got 200"),
    ("spline", "bound", 0.0, ValueError, "a number > 0, but got 0.0"),
    ("spline", "bound", NAN, ValueError, "a number > 0, but got nan"),
    ("sylvester", "num_ortho", 0, ValueError, "an integer >= 1, but got 0"),
    ("householder", "num_reflections", -1, ValueError, "an integer >= 2, but got -1"),
    ("neural_autoregressive", "num_units", 1, ValueError, "an integer >= 2, but got 1"),
    ("spline_coupling", "num_transforms", 1, ValueError, "an integer >= 2, but got 1"),
)


def family(name: str = "iaf", dim: Any = 3, context_dim: Any = 0) -> Flow:
    return flows.get(name).build(dim, context_dim)


def head(dim: int) -> Any:
    return ours.DiagonalAffine(dim)


class Other(FlowSpec):
    """A family that is not registered."""


SPECS: dict[str, Row] = {
    "get of an unknown name": (lambda: flows.get("nsf"), ValueError, "flows.get: expected name to be one of.*'nsf'"),
    "get of a misspelt name": (lambda: flows.get("real_nvp"), ValueError, "got 'real_nvp'. Did you mean 'realnvp'"),
    "get of None": (lambda: flows.get(None), ValueError, "flows.get: expected name to be one of.*got None"),
    "get of a class": (lambda: flows.get(flows.IAF), ValueError, "expected name to be one of.*got the class IAF"),
    "get, an unknown hyper-parameter": (
        lambda: flows.get("iaf", num_layers=3),
        TypeError,
        "IAF: expected options by name, .*num_transforms.*but got 'num_layers'",
    ),
    "a misspelt hyper-parameter": (
        lambda: flows.IAF(num_transform=3),
        TypeError,
        "IAF: expected options.*got 'num_transform'. Did you mean 'num_transforms'",
    ),
    "a hyper-parameter by position": (lambda: flows.IAF(3), TypeError, "IAF: expected options by name.*got 3"),
    "StudentT, an unknown hyper-parameter": (
        lambda: flows.StudentT(dof=3),
        TypeError,
        "StudentT: expected options by name, df, but got 'dof'",
    ),
    "StudentT, df": (lambda: flows.StudentT(df=1.0), ValueError, "StudentT: expected df to be a number > 1.*got 1.0"),
    "Mixture, components": (
        lambda: flows.Mixture(num_components=1),
        ValueError,
        "Mixture: expected num_components to be an integer >= 2, but got 1",
    ),
    "Mixture, a float": (
        lambda: flows.Mixture(num_components=2.0),
        ValueError,
        "Mixture: expected num_components to be an integer >= 2, but got 2.0",
    ),
    **{
        f"{name}, {hyper} is {value!r}": (
            lambda name=name, hyper=hyper, value=value: flows.get(name, **{hyper: value}),
            kind,
            f"expected {hyper} to (be|have) {words}",
        )
        for name, hyper, value, kind, words in HYPER
    },
    **{
        f"build, input_dim is {what}": (
            lambda value=value: family(dim=value),
            ValueError,
            f"IAF: expected input_dim to be an integer >= 1, but got {words}",
        )
        for what, (value, words) in NOT_INTEGERS.items()
    },
    "build, too few dimensions": (lambda: family(dim=1), ValueError, "IAF: expected input_dim >= 2, but got 1"),
    "build, context_dim": (
        lambda: family(context_dim=-1),
        ValueError,
        "context_dim to be an integer >= 0, but got -1",
    ),
    "build, context_dim is a tensor": (
        lambda: family(context_dim=X),
        ValueError,
        "context_dim to be an integer >= 0, but got a tensor",
    ),
    "register a number": (lambda: flows.register(3, flows.IAF), TypeError, "register: expected name to be a string.*3"),
    "register None": (lambda: flows.register(None), TypeError, "register: expected name to be a string.*None"),
    "register two words": (lambda: flows.register("a b", Other), ValueError, "name to be an identifier, but got 'a b'"),
    "register an instance": (
        lambda: flows.register("mine", flows.IAF()),
        TypeError,
        "spec_class to be a subclass of FlowSpec, but got IAF",
    ),
    "register a function": (
        lambda: flows.register("mine", family),
        TypeError,
        "spec_class to be a subclass of FlowSpec, but got <function",
    ),
    "register a taken name": (
        lambda: flows.register("iaf", Other),
        ValueError,
        "expected a new name, but 'iaf' is IAF",
    ),
    "custom, no function": (lambda: flows.CustomFlow(function=3), TypeError, "function to be a function, but got 3"),
    "custom, a function that returns a name": (
        lambda: flows.CustomFlow(function=lambda d: "planar").build(3),
        TypeError,
        "expected a torch.distributions Transform, but got str",
    ),
    "Flow, no head": (lambda: Flow([], None), TypeError, "Flow: expected head to be a Head, but got None"),
    "Flow, a layer as head": (lambda: Flow([], ours.Planar(3)), TypeError, "Flow: expected head to be a Head.*Planar"),
    "Flow, a transform of Pyro": (
        lambda: Flow([T.planar(3)], head(3)),
        TypeError,
        "Flow: expected each of layers to be a FlowTransform, but got Planar",
    ),
    "Flow, layers of another length": (
        lambda: Flow([ours.Planar(2)], head(3)),
        ValueError,
        "Flow: expected layers of input_dim 3, the head's, but got 2",
    ),
    "a context that is missing": (lambda: family(context_dim=2)(), ValueError, "context of length 2, but got none"),
    "a context too much": (lambda: family()(torch.zeros(2)), ValueError, r"context of length 0, but got shape \(2,\)"),
    "a context of another length": (
        lambda: family(context_dim=2)(torch.zeros(5, 3)),
        ValueError,
        r"context of length 2, but got shape \(5, 3\)",
    ),
    "a number as context": (lambda: family(context_dim=2)(3.0), ValueError, "context of length 2, but got 3.0"),
    "a scalar as context": (
        lambda: family(context_dim=1)(torch.tensor(3.0)),
        ValueError,
        r"context of length 1, but got shape \(\)",
    ),
    **{
        f"log_prob of {what}": (
            lambda value=value: family()().log_prob(value),
            ValueError,
            rf"FlowDistribution: expected value to be a tensor of shape \(\.\.\., 3\), but got {words}",
        )
        for what, value, words in (
            ("None", None, "None"),
            ("a list", [0.0, 0.0, 0.0], r"\[0.0, 0.0, 0.0\]"),
            ("an array", ARRAY, r"a NumPy array of shape \(2, 3\)"),
            ("a number", torch.tensor(0.0), r"\(\)"),
            ("two numbers", torch.zeros(5, 2), r"\(5, 2\)"),
            ("one number each", torch.zeros(5, 1), r"\(5, 1\)"),
        )
    },
    "log_prob of float64": (
        lambda: family("realnvp")().log_prob(torch.zeros(5, 3, dtype=torch.float64)),
        TypeError,
        "value of dtype torch.float32, the flow's own, but got torch.float64",
    ),
    **{
        f"draws of {what}": (
            lambda value=value: family()().rsample(value),
            TypeError,
            f"FlowDistribution: expected sample_shape to be a tuple of sizes.*but got {words}",
        )
        for what, value, words in (
            ("5", 5, "5"),
            ("None", None, "None"),
            ("a name", "5", "'5'"),
            ("a float", (2.5,), r"\(2.5,\)"),
        )
    },
}


def made(name: str, *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(ours, name)(*args, **options)


TRANSFORMS: dict[str, Row] = {
    **{
        f"{name}, input_dim is {what}": (
            made(name, value),
            ValueError,
            f"{name}: expected input_dim to be an integer >= 1, but got {words}",
        )
        for name in ("Planar", "Radial", "Householder", "Sylvester", "Spline", "AffineAutoregressive", "Permutation")
        for what, (value, words) in NOT_INTEGERS.items()
        if what in ("zero", "a float", "a name", "a tensor")
    },
    **{
        f"{name}, {option} is {value!r}": (
            made(name, 3, **{option: value}),
            ValueError,
            f"{name}: expected {option} to be {words}",
        )
        for name, option, value, words in (
            ("Planar", "context_dim", -1, "an integer >= 0, but got -1"),
            ("Radial", "context_dim", None, "an integer >= 0, but got None"),
            ("Householder", "num_reflections", 0, "an integer >= 1, but got 0"),
            ("Sylvester", "num_ortho", "2", "an integer >= 1, but got '2'"),
            ("Spline", "count_bins", 1, "an integer >= 2, but got 1"),
            ("Spline", "bound", -1.0, "a number > 0, but got -1.0"),
            ("AffineCouplings", "num_transforms", 0, "an integer >= 1, but got 0"),
            ("AffineCouplings", "num_parts", 1, "an integer >= 2, but got 1"),
            ("AffineCouplings", "hidden_dims", 64, "a tuple of integers >= 1.*but got 64"),
            ("AffineCouplings", "hidden_dims", (0,), r"a tuple of integers >= 1.*but got \(0,\)"),
            ("AffineCouplings", "log_scale_bound", INF, "a number > 0, but got inf"),
            ("SplineCouplings", "count_bins", "8", r"an integer in \[2, 128\], but got '8'"),
            ("SplineCouplings", "bound", None, "a number > 0, but got None"),
            ("AffineAutoregressive", "hidden_dims", None, "a tuple of integers >= 1.*but got None"),
            ("AffineAutoregressive", "log_scale_bound", 0, "a number > 0, but got 0"),
            ("SplineAutoregressive", "count_bins", 129, r"an integer in \[2, 128\], but got 129"),
            ("NeuralAutoregressive", "num_units", 1, "an integer >= 2, but got 1"),
            ("BlockAutoregressive", "hidden_factors", "8", "a tuple of integers >= 1.*but got '8'"),
            ("LowRankAffine", "rank", 0, "an integer >= 1, but got 0"),
            ("LowRankPreconditioner", "rank", -1, "an integer >= 1, but got -1"),
        )
    },
    **{
        f"{name} of one dimension": (
            made(name, 1),
            ValueError,
            f"{name}: expected input_dim to be an integer >= 2, but got 1",
        )
        for name in ("AffineCouplings", "SplineCouplings")
    },
    **{
        f"{name}, {option} is {what}": (
            made(name, 3, **{option: value}),
            ValueError,
            f"{name}: expected {option} to hold 0 to 2 once each, but got {words}",
        )
        for name, option in (("Permutation", "permutation"), ("AffineAutoregressive", "order"))
        for what, value, words in (
            ("too short", [0, 1], r"\[0, 1\]"),
            ("repeated", [0, 0, 1], r"\[0, 0, 1\]"),
            ("of floats", [0.0, 1.0, 2.0], r"\[0.0, 1.0, 2.0\]"),
            ("a word", "abc", "'abc'"),
            ("a table", torch.zeros(2, 2, dtype=torch.long), r"a tensor of shape \(2, 2\)"),
        )
    },
    "Chain of nothing": (made("Chain", []), TypeError, r"Chain: expected parts to be FlowTransforms.*but got \[\]"),
    "Chain of None": (made("Chain", None), TypeError, r"Chain: expected parts to be FlowTransforms.*but got \[None\]"),
    "Chain of a name": (made("Chain", "planar"), TypeError, "Chain: expected parts to be FlowTransforms.*but got"),
    "Chain of Pyro's": (made("Chain", [T.planar(3)]), TypeError, "Chain: expected parts.*transforms.adapt"),
    "Chain of two lengths": (
        lambda: ours.Chain([ours.Planar(3), ours.Planar(2)]),
        ValueError,
        r"Chain: expected parts of one input_dim, but got \[3, 2\]",
    ),
    "Inverse of None": (made("Inverse", None), TypeError, "Inverse: expected transform to be a FlowTransform.*None"),
    "Inverse of Pyro's": (made("Inverse", T.planar(3)), TypeError, "Inverse: expected transform to be a FlowTransform"),
    "Inverse of a map without one": (
        lambda: ours.Inverse(ours.NeuralAutoregressive(3)),
        NotImplementedError,
        "Inverse: expected a transform with an inverse, but got NeuralAutoregressive",
    ),
    "site order, other blocks": (
        made("SiteOrderedAffine", 3, block_sizes=(1, 1)),
        ValueError,
        r"SiteOrderedAffine: expected block_sizes to add up to input_dim, 3, but got \(1, 1\)",
    ),
    "site order, a number": (
        made("SiteOrderedAffine", 3, block_sizes=3),
        ValueError,
        "SiteOrderedAffine: expected block_sizes to be a tuple of integers >= 1.*but got 3",
    ),
    "site order, no blocks": (
        made("SiteOrderedAffine", 3),
        TypeError,
        "SiteOrderedAffine: expected SiteOrderedAffine.input_dim, block_sizes",
    ),
    "site order, rank": (
        made("SiteOrderedAffine", 3, block_sizes=(1, 2), rank=0),
        ValueError,
        "rank to be an integer >= 1, but got 0",
    ),
    "adapt None": (made("adapt", None, 3), TypeError, "expected a torch.distributions Transform, but got NoneType"),
    "adapt a name": (made("adapt", "planar", 3), TypeError, "expected a torch.distributions Transform, but got str"),
    "adapt a class": (made("adapt", T.Planar, 3), TypeError, "expected a torch.distributions Transform, but got type"),
    "adapt a network": (made("adapt", nn.Linear(3, 3), 3), TypeError, "Transform, but got Linear"),
    "adapt another length": (made("adapt", T.planar(2), 3), ValueError, "vectors of length 3.*but got length 2"),
    "adapt a permutation of another length": (
        made("adapt", T.permute(2), 3),
        ValueError,
        "Permute: expected a map of vectors of length 3.*but got length 2",
    ),
    "adapt a wrong density": (
        made("adapt", T.sylvester(3), 3),
        ValueError,
        "Sylvester: expected a transform whose dens",
    ),
    "adapt no length": (made("adapt", T.planar(3), "3"), ValueError, "input_dim to be an integer >= 1, but got '3'"),
    **{
        f"a map of {what}": (
            lambda value=value: ours.Planar(3)(value),
            ValueError,
            rf"Planar: expected a tensor of shape \(\.\.\., 3\), but got {words}",
        )
        for what, value, words in (
            ("None", None, "None"),
            ("a list", [0.0], r"\[0.0\]"),
            ("two numbers", torch.zeros(5, 2), r"\(5, 2\)"),
            ("one number", torch.zeros(5, 1), r"\(5, 1\)"),
        )
    },
    "the inverse of two numbers": (
        lambda: ours.Planar(3).inv(torch.zeros(5, 2)),
        ValueError,
        r"Planar: expected a tensor of shape \(\.\.\., 3\), but got \(5, 2\)",
    ),
    "a map without its context": (
        lambda: ours.Planar(3, 2)(torch.zeros(5, 3)),
        ValueError,
        "Planar: expected a context of length 2, but got none",
    ),
    "a map with another context": (
        lambda: ours.Planar(3, 2).condition(torch.zeros(3)),
        ValueError,
        r"Planar: expected a context of length 2, but got shape \(3,\)",
    ),
    "a map with a context too much": (
        lambda: ours.Planar(3).condition(torch.zeros(2)),
        ValueError,
        r"Planar: expected a context of length 0, but got shape \(2,\)",
    ),
}


def compiled(model: Any = regression, guide: Any = None, optim: Any = None, loss: Any = None) -> CompiledSVI:
    return CompiledSVI(model, guide or ready(), optim or Adam({"lr": 0.01}), loss or Trace_ELBO())


def stepped(model: Any, guide: Any, *args: Any) -> Any:
    return SVI(model, guide, Adam({"lr": 0.01}), VectorizedTrace_ELBO(num_particles=2)).step(*args)


def per_parameter(name: str) -> dict[str, Any]:
    return {"lr": 0.01}


STEPS: dict[str, Row] = {
    **{
        f"CompiledSVI, {which} is {what}": (
            lambda which=which, value=value: CompiledSVI(
                **{"model": regression, "guide": ready(), "optim": Adam({}), "loss": Trace_ELBO(), which: value}
            ),
            TypeError,
            f"CompiledSVI: expected {which} to be a Pyro {which}, a function, but got {words}",
        )
        for which in ("model", "guide")
        for what, (value, words) in NOT_PROGRAMS.items()
    },
    "CompiledSVI, swapped": (
        lambda: compiled(ready(), regression),
        ValueError,
        "CompiledSVI: expected model to be a model, but got a guide, an AutoFlowGuide",
    ),
    "CompiledSVI, no optimizer": (
        lambda: CompiledSVI(regression, ready(), None, Trace_ELBO()),
        ValueError,
        "optim to be one of pyro.optim's optimizers.*but got None",
    ),
    "CompiledSVI, an optimizer's name": (
        lambda: compiled(optim="adam"),
        ValueError,
        "optim to be one of pyro.optim's optimizers.*but got 'adam'",
    ),
    "CompiledSVI, torch's optimizer": (
        lambda: compiled(optim=torch.optim.Adam(nn.Linear(1, 1).parameters())),
        ValueError,
        "optim to be one of pyro.optim's optimizers.*but got a?.*Adam",
    ),
    "CompiledSVI, torch's class": (
        lambda: compiled(optim=torch.optim.Adam),
        ValueError,
        "optim to be one of pyro.optim's optimizers.*but got the class Adam",
    ),
    "CompiledSVI, options by parameter": (
        lambda: compiled(optim=Adam(per_parameter)),
        ValueError,
        "same options for all parameters",
    ),
    "CompiledSVI, clip_norm": (
        lambda: compiled(optim=Adam({"lr": 0.01}, {"clip_norm": 1.0})),
        ValueError,
        "no clip_norm",
    ),
    "CompiledSVI, no loss": (
        lambda: CompiledSVI(regression, ready(), ClippedAdam({"lr": 0.01}), None),
        ValueError,
        "a loss with a differentiable_loss.*but got None",
    ),
    "CompiledSVI, a loss's class": (
        lambda: compiled(loss=Trace_ELBO),
        ValueError,
        "a loss with a differentiable_loss.*but got the class Trace_ELBO",
    ),
    "CompiledSVI, a function as loss": (
        lambda: compiled(loss=regression),
        ValueError,
        "a loss with a differentiable_loss.*but got <function regression",
    ),
    "CompiledSVI, the loss is missing": (
        lambda: CompiledSVI(regression, ready(), Adam({})),
        TypeError,
        "CompiledSVI: expected CompiledSVI.model, guide, optim, loss.*'loss'",
    ),
    **{
        f"CompiledSVI.run, num_steps is {what}": (
            lambda value=value: compiled().run(value, X, Y),
            ValueError,
            f"CompiledSVI.run: expected num_steps to be an integer >= 1, but got {words}",
        )
        for what, (value, words) in NOT_INTEGERS.items()
    },
    "CompiledSVI.run, progress": (
        lambda: compiled().run(1, X, Y, progress="no"),
        TypeError,
        "CompiledSVI.run: expected progress to be True or False, but got 'no'",
    ),
    **{
        f"VectorizedTrace_ELBO, num_particles is {what}": (
            lambda value=value: VectorizedTrace_ELBO(num_particles=value),
            ValueError,
            f"VectorizedTrace_ELBO: expected num_particles to be an integer >= 1, but got {words}",
        )
        for what, (value, words) in NOT_INTEGERS.items()
    },
    **{
        f"VectorizedTrace_ELBO, max_plate_nesting is {value!r}": (
            lambda value=value: VectorizedTrace_ELBO(max_plate_nesting=value),
            ValueError,
            f"VectorizedTrace_ELBO: expected max_plate_nesting to be an integer >= 0, but got {value!r}",
        )
        for value in (-1, 1.5, "1", None, NAN)
    },
    "VectorizedTrace_ELBO, an unknown option": (
        lambda: VectorizedTrace_ELBO(num_particle=2),
        ValueError,
        "VectorizedTrace_ELBO: expected each option to be one of.*got 'num_particle'. Did you mean 'num_particles'",
    ),
    "VectorizedTrace_ELBO, swapped": (
        lambda: stepped(ready(), regression, X, Y),
        ValueError,
        "VectorizedTrace_ELBO: expected a guide, which observes nothing, but it observes 'y'",
    ),
    "VectorizedTrace_ELBO, another model's guide": (
        lambda: stepped(regression, other(AutoFlowGuide), X, Y),
        ValueError,
        "VectorizedTrace_ELBO: expected a guide of this model, whose latent sites are 'b', but the guide draws 'tau'",
    ),
    "VectorizedTrace_ELBO, data of nan": (
        lambda: stepped(regression, ready(), X, Y * NAN),
        ValueError,
        "VectorizedTrace_ELBO: expected the data of site 'y' to be finite, but got 8 of 8",
    ),
    "VectorizedTrace_ELBO, data as a column": (
        lambda: stepped(regression, AutoNormal(regression), X, Y.unsqueeze(-1)),
        ValueError,
        "VectorizedTrace_ELBO: expected shapes of the model's sites that fit its plates",
    ),
    "init_to_prior_median without a site": (
        lambda: AutoFlowGuide(regression, init_loc_fn=init_to_prior_median()),
        TypeError,
        r"expected init_to_prior_median\(site, \.\.\.\).*'site'",
    ),
    "init_to_prior_median of a tensor": (
        lambda: init_to_prior_median(X),
        TypeError,
        "init_to_prior_median: expected site to be a dictionary.*but got a tensor",
    ),
}
SETTINGS: dict[str, Row] = {
    f"{kind.__name__}, {name} is {value!r}": (
        lambda kind=kind, name=name, value=value: kind(**{name: value}),
        ValueError if error is None else error,
        f"{kind.__name__}: expected {words}",
    )
    for kind, name, value, error, words in (
        (FitSettings, "rate_warm", "a", None, "rate_warm to be a number > 0, but got 'a'"),
        (FitSettings, "rate_cold", -0.1, None, "rate_cold to be a number > 0, but got -0.1"),
        (FitSettings, "rate_annealed", INF, None, "rate_annealed to be a number > 0, but got inf"),
        (FitSettings, "max_particles", 2.5, None, "max_particles to be an integer >= 1, but got 2.5"),
        (FitSettings, "trainer", None, TypeError, "trainer to be a TrainerSettings, but got None"),
        (FitSettings, "rate", 0.1, TypeError, "options by name, .*but got 'rate'"),
        (EstimateSettings, "num_runs", 0, None, "num_runs to be an integer >= 1, but got 0"),
        (EstimateSettings, "max_khat", NAN, None, "max_khat to be a number > 0, but got nan"),
        (TrainerSettings, "clip", True, None, "clip to be a number > 0, but got True"),
        (TrainerSettings, "betas", 0.9, TypeError, r"betas to be .*but got 0.9"),
        (TrainerSettings, "window", "100", None, "window to be an integer >= 1, but got '100'"),
        (ScheduleSettings, "first_cycle", 0, None, "first_cycle to be an integer >= 1, but got 0"),
        (ScheduleSettings, "patients", 3, TypeError, "options by name, .*but got 'patients'. Did you mean 'patience'"),
    )
}

CALLS = {**SPECS, **TRANSFORMS, **STEPS, **SETTINGS}
