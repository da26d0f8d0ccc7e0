# SPDX-License-Identifier: Apache-2.0
"""50 random models, each with all quick properties and one of the slow ones; 1000 by ``tests/benchmarks``."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from pyro.infer.autoguide import AutoNormal

from pyro_flows import AutoFlowGuide
from tests.random_models import properties
from tests.random_models.models import RandomModel, numbered_model, random_models
from tests.random_models.properties import QUICK, SLOW, check

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a smaller example takes minutes to find: tests/benchmarks/random_models.py --shrink
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@settings(SETTINGS, max_examples=50)
@given(model=random_models())
def test_promises_hold_for_any_model(model: RandomModel) -> None:
    slow = list(SLOW)[zlib.crc32(model.source.encode()) % len(SLOW)]
    for name in (*QUICK, slow):
        check(model, name, num_steps=30)


# The strategy


def test_models_are_of_all_kinds() -> None:
    """What 300 models have, among them every prior, way of writing, and kind of data."""
    text = "".join(repr(numbered_model(seed)) for seed in range(300))
    wanted = """
        Normal StudentT Laplace Cauchy Logistic Gumbel SoftLaplace AsymmetricLaplace SkewLogistic HalfNormal HalfCauchy
        LogNormal Gamma InverseGamma Exponential Weibull Chi2 FisherSnedecor FoldedDistribution Pareto Beta Uniform
        Kumaraswamy AffineBeta Dirichlet MultivariateNormal LowRankMultivariateNormal MultivariateStudentT LKJ
        LKJCholesky MixtureOfDiagNormals ImproperUniform Categorical OneHotCategorical Bernoulli Poisson Binomial
        NegativeBinomial OrderedLogistic ZeroInflatedPoisson
    """
    missing = [name for name in wanted.split() if f"dist.{name}(" not in text]
    assert not missing
    for code in (
        "x @ (", "[group]", "[..., group]", "torch.stack(", "assert eta.shape", "PyroSample(", "pyro.param(",
        "pyro.factor(", 'pyro.plate("outer"', "poutine.mask(", "poutine.scale(", "create_plates", "amortize",
        "subsample=idx", "subsample_size=", 'in pyro.plate("rows"', "in range(", 'f"y_{i}"', "to_event(2)",
        "if a > 0.5", "torch.set_default_dtype", "# enumerated", "dim=-1",
    ):  # fmt: skip
        assert code in text, code


def test_a_printed_model_is_a_model() -> None:
    text = f"# double\nimport torch\n{CONJUGATE}"
    model = RandomModel.parse(text)
    assert model.features == {"double"}
    assert repr(model) == text
    assert model.run().calls[0][0].tolist() == [1.0, 2.0]


# Each property finds what it is for


CONJUGATE = """\
import pyro
import pyro.distributions as dist
import torch


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


calls = [(torch.tensor([1.0, 2.0]),)]
options = {}
"""


class Lost(AutoFlowGuide):
    """Ends far from where it should."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.setup(*args, **kwargs).posterior.joint.flow.head.raw.value[0] = 30.0
        return super().forward(*args, **kwargs)


class Denser(AutoFlowGuide):
    """Has another density than its draws."""

    def log_prob(self, *args: Any, **kwargs: Any) -> Any:
        return super().log_prob(*args, **kwargs) + 0.1


class Wider(AutoFlowGuide):
    """Starts wider than AutoNormal."""

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(model, init_scale=0.2, **options)


class Forgetful(AutoFlowGuide):
    """Loads nothing."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Short(AutoFlowGuide):
    """Leaves out a site."""

    def sample_posterior(self, *args: Any, **kwargs: Any) -> Any:
        drawn = super().sample_posterior(*args, **kwargs)
        return {"loc": drawn["loc"]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("svi 0.01", Lost), ("density", Denser), ("start", Wider), ("state", Forgetful), ("builds", Short)],
)
def test_a_broken_guide_is_found(monkeypatch: pytest.MonkeyPatch, name: str, kind: type[AutoFlowGuide]) -> None:
    model = RandomModel(CONJUGATE, frozenset())
    check(model, name, num_steps=30)
    monkeypatch.setattr(properties, "AutoFlowGuide", kind)
    monkeypatch.setattr(properties, "REPEATS", 2)
    with pytest.raises(AssertionError):
        check(model, name, num_steps=30)


def test_a_wrong_report_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another model's ELBO."""
    model = RandomModel(CONJUGATE, frozenset())
    other = RandomModel(CONJUGATE.replace("LogNormal(0.0, 1.0)", "LogNormal(0.0, 3.0)"), frozenset()).run().model
    whole = properties.diagnose
    monkeypatch.setattr(properties, "diagnose", lambda _, *args, **options: whole(other, *args, **options))
    with pytest.raises(AssertionError, match="plain Monte Carlo"):
        check(model, "diagnose")


def test_the_baseline_is_not_below_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RandomModel(CONJUGATE, frozenset())
    monkeypatch.setattr(properties, "AutoFlowGuide", AutoNormal)
    for rate in ("0.001", "0.1"):
        check(model, f"svi {rate}", num_steps=30)
