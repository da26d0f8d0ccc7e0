# SPDX-License-Identifier: Apache-2.0
"""Random Pyro models, as their users would write them: a hypothesis strategy whose examples are Python source."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["Program", "RandomModel", "numbered_model", "random_models"]

PREAMBLE = """\
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints, transforms
from torch.nn.functional import softplus
"""


@dataclass(frozen=True)
class Program:
    """A model that was made from its source.

    Attributes:
        model: The model.
        calls: Arguments of its calls: one, or a mini-batch each.
        options: Options of ``AutoFlowGuide``.
    """

    model: Callable[..., Any]
    calls: list[tuple[Any, ...]]
    options: dict[str, Any]

    @property
    def plain_options(self) -> dict[str, Any]:
        """Those that Pyro's own guides take too."""
        return {name: value for name, value in self.options.items() if name in ("create_plates", "init_loc_fn")}


@dataclass(frozen=True)
class RandomModel:
    """A model as source, which defines ``model``, ``calls`` and ``options``; see :class:`Program`.

    Attributes:
        source: A complete Python script.
        features: What is special about it: ``"enumerated"``, ``"subsampled"``, ``"amortized"``, ``"parameters"``,
            ``"double"``, ``"branch"``.
    """

    source: str
    features: frozenset[str]

    def __repr__(self) -> str:
        return f"# {', '.join(sorted(self.features)) or 'plain'}\n{self.source}"

    @classmethod
    def parse(cls, text: str) -> RandomModel:
        """A model as it was printed: its features are the first line."""
        first, _, source = text.partition("\n")
        return cls(source, frozenset(re.findall(r"\w+", first)) - {"plain"})

    @contextmanager
    def default_dtype(self) -> Iterator[None]:
        """Restores the default dtype, which the source may set, in the end."""
        before = torch.get_default_dtype()
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def run(self) -> Program:
        """Run the source: a new model, with new networks."""
        file = f"<random model {abs(hash(self.source))}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"__name__": "random_model"}
        exec(compile(self.source, file, "exec"), namespace)
        return Program(namespace["model"], namespace["calls"], namespace["options"])


@dataclass(frozen=True)
class Value:
    """A scalar of the model: of one item, if it is in a plate.

    Attributes:
        code: Its expression where it was drawn.
        kind: ``"real"``, ``"positive"``, ``"bounded"`` or ``"discrete"``.
        place: ``""``, ``"groups"`` or ``"rows"``.
    """

    code: str
    kind: str
    place: str


class Writer:
    """Writes one model.

    Args:
        choose: Chooses one of n options: n -> its index, 0 for the simplest.
    """

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.features: set[str] = set()
        self.globals: list[str] = []
        self.body: list[str] = []
        self.in_rows: list[str] = []  # body of the plate of rows
        self.terms: list[str] = []  # of the linear predictor, scalars or (rows,)
        self.row_terms: list[str] = []  # scalars of an item, inside the plate of rows
        self.values: list[Value] = []
        self.names = iter("abcdefghijklmnopqrstuvwxyz")
        self.cells = ""
        self.improper: tuple[str, str] | None = None  # the improper site, and where it starts

        self.rows = self.pick(5, 1, 2, 3, 8, 12)
        self.groups = self.pick(3, 1, 2, 4, 12)
        self.columns = self.pick(2, 3, 1)
        dtype = self.pick(*["float32"] * 5, "default", "tensors")
        self.strict = dtype == "tensors"
        if dtype != "float32":
            self.features.add("double")
        self.default_double = dtype == "default"
        self.broadcasts = self.pick("no", "yes", "mixed")
        self.call = self.pick("whole", "whole", "whole", "subsample", "subsample_size", "amortized")
        self.enumerates = self.call == "whole" and self.coin(0.2)

    # Choices

    def pick(self, *options: Any) -> Any:
        return options[self.choose(len(options))]

    def coin(self, probability: float) -> bool:
        return self.choose(100) >= 100 - round(100 * probability)

    def number(self, *options: float) -> str:
        value = repr(float(self.pick(*options)))
        return f"tensor({value})" if self.strict or self.coin(0.3) else value

    def vector(self, size: int, *options: float) -> str:
        return f"tensor({[float(self.pick(*options)) for _ in range(size)]})"

    def ellipsis(self) -> bool:
        """Whether an expression is written so that it broadcasts over particles."""
        return self.broadcasts == "yes" or (self.broadcasts == "mixed" and self.coin(0.5))

    # Parameters of priors

    def parents(self, place: str, *kinds: str) -> list[str]:
        """Expressions of the scalars that a site in that plate can depend on."""
        found = []
        for value in self.values:
            if value.kind not in kinds or (value.kind == "discrete" and place == "expanded"):
                continue  # an enumerated parameter has dimensions that Pyro cannot expand to a given shape
            if value.place in ("", place):
                found.append(value.code)
            elif place == "rows" and value.place == "groups" and value.kind != "discrete":
                found.append(f"{value.code}[group{self.row_index}]")
        return found

    @property
    def row_index(self) -> str:
        return "[idx]" if self.is_subsampled else ""

    @property
    def is_subsampled(self) -> bool:
        return self.call in ("subsample", "subsample_size")

    def location(self, place: str, *options: float) -> str:
        discrete = self.parents(place, "discrete")
        if discrete and self.coin(0.4):
            code = self.pick(*discrete)
            return self.pick(
                f"torch.where({code} == 1, {self.number(1.0, 2.0)}, {self.number(-1.0, 0.0)})",
                f"{self.vector(3, 0.0, 1.0, -2.0)}[{code}.long()]",
            )
        real, positive = self.parents(place, "real", "bounded"), self.parents(place, "positive")
        if (real or positive) and self.coin(0.4):
            if real and (not positive or self.coin(0.7)):
                code = self.pick(*real)
                return self.pick(code, f"0.5 * {code}", f"{code}.tanh()", f"({code} / 3).sin()", f"0.3 * {code}**2")
            code = self.pick(*positive)
            return self.pick(f"{code}.log()", f"torch.log1p({code})", f"{code}.sqrt()")
        if place == "groups" and self.coin(0.2):
            return self.vector(self.groups, *options)
        if place == "rows" and self.coin(0.3):
            return f"0.5 * x{self.row_index}[:, 0]"
        return self.number(*options)

    def scale(self, place: str, *options: float) -> str:
        discrete = self.parents(place, "discrete")
        if discrete and self.coin(0.3):
            return f"torch.where({self.pick(*discrete)} == 1, {self.number(2.0, 1.0)}, {self.number(0.2, 0.5)})"
        real, positive = self.parents(place, "real", "bounded"), self.parents(place, "positive")
        if (real or positive) and self.coin(0.4):
            if positive and (not real or self.coin(0.7)):
                code = self.pick(*positive)
                return self.pick(code, f"(0.1 + {code})", f"{code}.sqrt()")
            code = self.pick(*real)
            return self.pick(f"({code} / 2).exp()", f"softplus({code})", f"(0.5 + {code}**2)")
        if place == "groups" and self.coin(0.2):
            return self.vector(self.groups, *options)
        return self.number(*options)

    # Priors

    def univariate(
        self, place: str = "", *, kinds: tuple[str, ...] = ("real", "positive", "bounded")
    ) -> tuple[str, str]:
        """A prior and the kind of its values."""
        kind = self.pick(*kinds)
        loc = lambda: self.location(place, 0.0, 1.0, -2.0)  # noqa: E731
        scale = lambda: self.scale(place, 1.0, 0.5, 3.0)  # noqa: E731
        if kind == "real":
            family = self.pick(
                "Normal", "Normal", "StudentT", "Laplace", "Cauchy", "Logistic", "Gumbel", "SoftLaplace",
                "AsymmetricLaplace", "SkewLogistic", "Affine",
            )  # fmt: skip
            if family == "StudentT":
                return f"dist.StudentT({self.number(4.0, 1.5, 10.0)}, {loc()}, {scale()})", kind
            if family == "AsymmetricLaplace":
                return f"dist.AsymmetricLaplace({loc()}, {scale()}, {self.number(1.5, 0.5)})", kind
            if family == "SkewLogistic":
                return f"dist.SkewLogistic({loc()}, {scale()}, {self.number(1.0, 2.0)})", kind
            if family == "Affine":
                base = f"dist.Normal({self.number(0.0)}, {self.number(1.0)})"
                return (
                    f"dist.TransformedDistribution({base}, [transforms.AffineTransform({loc()}, {scale()})])",
                    kind,
                )
            return f"dist.{family}({loc()}, {scale()})", kind
        if kind == "positive":
            family = self.pick(
                "HalfNormal", "HalfCauchy", "LogNormal", "Gamma", "InverseGamma", "Exponential", "Weibull", "Chi2",
                "FisherSnedecor", "Folded", "Pareto", "Exp",
            )  # fmt: skip
            if family in ("HalfNormal", "HalfCauchy", "Exponential"):
                return f"dist.{family}({scale()})", kind
            if family == "LogNormal":
                return f"dist.LogNormal({loc()}, {self.scale(place, 0.5, 1.0)})", kind
            if family in ("Gamma", "InverseGamma"):
                return f"dist.{family}({self.number(2.0, 1.0, 0.5, 5.0)}, {scale()})", kind
            if family == "Weibull":
                return f"dist.Weibull({scale()}, {self.number(1.5, 0.8, 3.0)})", kind
            if family == "Chi2":
                return f"dist.Chi2({self.number(3.0, 1.0, 5.0)})", kind
            if family == "FisherSnedecor":
                return f"dist.FisherSnedecor({self.number(5.0, 3.0)}, {self.number(6.0, 4.0)})", kind
            if family == "Folded":
                return (
                    f"dist.FoldedDistribution(dist.StudentT({self.number(3.0)}, {self.number(0.0)}, {scale()}))",
                    kind,
                )
            if family == "Pareto":
                return f"dist.Pareto({self.number(0.5, 1.0)}, {self.number(2.0, 3.0)})", kind
            return (
                f"dist.TransformedDistribution(dist.Normal({loc()}, {self.number(0.5)}), [transforms.ExpTransform()])",
                kind,
            )
        family = self.pick("Beta", "Uniform", "Unit", "Kumaraswamy", "AffineBeta", "LogitNormal", "Bounds")
        if family == "Beta":
            return f"dist.Beta({scale()}, {self.number(2.0, 1.0, 0.7)})", kind
        if family == "Unit":
            return f"dist.Uniform({self.number(0.0)}, {self.number(1.0)})", kind
        if family == "Uniform":
            return f"dist.Uniform({self.number(-1.0, -5.0, 0.5)}, {self.number(2.0, 1.0, 10.0)})", kind
        if family == "Bounds" and place == "groups":
            return f"dist.Uniform({self.vector(self.groups, 0.0, -1.0)}, {self.vector(self.groups, 1.0, 3.0)})", kind
        if family in ("Bounds", "Kumaraswamy"):
            return f"dist.Kumaraswamy({self.number(2.0, 1.0)}, {self.number(3.0, 1.5)})", kind
        if family == "AffineBeta":
            return f"dist.AffineBeta({scale()}, {self.number(2.0)}, {self.number(-1.0)}, {self.number(3.0)})", kind
        return (
            f"dist.TransformedDistribution(dist.Normal({loc()}, {self.number(1.0)}), [transforms.SigmoidTransform()])",
            kind,
        )

    def multivariate(self, place: str = "") -> tuple[str, str]:
        """A prior of vectors of ``columns`` (or of matrices) and the kind of its values."""
        size = self.columns
        families = ["iid", "tensor", "bounds", "MultivariateNormal"]
        if size > 1:
            families += ["Dirichlet", "covariance", "LowRank", "MultivariateStudentT", "LKJCholesky", "ordered"]
            families += ["MixtureOfDiagNormals", *([] if place else ["LKJ"])]  # Pyro cannot expand an LKJ
        family = self.pick(*families)
        if family == "iid":
            prior, kind = self.univariate("expanded")
            return f"{prior}.expand([{size}]).to_event(1)", kind
        if family == "tensor":
            zeros, ones = self.vector(size, 0.0, 1.0, -1.0), self.vector(size, 1.0, 2.0, 0.5)
            name = self.pick("Normal", "Laplace", "Gamma", "Beta", "LogNormal")
            if name in ("Gamma", "Beta"):
                return (
                    f"dist.{name}({ones}, {self.number(1.0, 2.0)}).to_event(1)",
                    "positive" if name == "Gamma" else "bounded",
                )
            return f"dist.{name}({zeros}, {ones}).to_event(1)", "positive" if name == "LogNormal" else "real"
        if family == "bounds":
            return f"dist.Uniform({self.vector(size, 0.0, -1.0)}, {self.vector(size, 1.0, 4.0)}).to_event(1)", "bounded"
        zeros = self.vector(size, 0.0, 1.0)
        tril = f"tensor({[[1.0 if i == j else 0.4 if i > j else 0.0 for j in range(size)] for i in range(size)]})"
        if family == "MultivariateNormal":
            return f"dist.MultivariateNormal({zeros}, scale_tril={tril})", "real"
        if family == "covariance":
            which = self.pick("covariance_matrix", "precision_matrix")
            return f"dist.MultivariateNormal({zeros}, {which}={tril} @ {tril}.mT)", "real"
        if family == "LowRank":
            factor = f"tensor({[[0.7]] * size})"
            return f"dist.LowRankMultivariateNormal({zeros}, {factor}, {self.vector(size, 1.0, 0.5)})", "real"
        if family == "MultivariateStudentT":
            return f"dist.MultivariateStudentT({self.number(4.0)}, {zeros}, {tril})", "real"
        if family == "Dirichlet":
            return f"dist.Dirichlet({self.vector(size, 1.0, 2.0, 0.5)})", "bounded"
        if family == "ordered":
            base = f"dist.Normal({zeros}, {self.number(1.0)}).to_event(1)"
            return f"dist.TransformedDistribution({base}, [dist.transforms.OrderedTransform()])", "real"
        if family == "MixtureOfDiagNormals":
            locs = f"tensor({[[1.0] * size, [-1.0] * size]})"
            scales = f"tensor({[[1.0] * size, [0.5] * size]})"
            return f"dist.MixtureOfDiagNormals({locs}, {scales}, tensor([0.0, 0.5]))", "real"
        return f"dist.{family}({size}, {self.number(1.0, 2.0)})", "matrix"

    # Sites

    def sample(self, prior: str, kind: str, indent: str = "") -> str:
        name = next(self.names)
        infer = ', infer={"enumerate": "parallel"}' if kind == "discrete" else ""
        self.body.append(f'{indent}{name} = pyro.sample("{name}", {prior}{infer})')
        return name

    def effect(self, code: str, kind: str) -> str:
        """A term of the predictor for a scalar, or for all coordinates of a vector alike."""
        if kind == "positive":
            return self.pick(f"{code}.log()", f"torch.log1p({code})", f"-{code}.sqrt()")
        if kind == "bounded":
            return self.pick(code, f"2.0 * {code}")
        return self.pick(code, f"{code}.tanh()", f"(0.5 * {code}).sin()", f"0.5 * {code}")

    def scalar(self) -> None:
        prior, kind = self.univariate()
        name = self.sample(prior, kind)
        self.values.append(Value(name, kind, ""))
        if kind != "positive" or self.coin(0.3):  # others are scales
            times = f" * x[:, {self.choose(self.columns)}]" if self.coin(0.3) else ""
            self.terms.append(f"{self.effect(name, kind)}{times}")

    def of_vector(self, name: str, kind: str) -> str:
        """A term for a vector ``(columns,)``: a scalar or ``(rows,)``."""
        if kind == "matrix":
            return f"{name}[..., -1, 0]" if self.ellipsis() else f"{name}[-1, 0]"
        effect = self.effect(name, kind)
        if self.ellipsis():
            return self.pick(
                f"(x * {effect}).sum(-1)" if " " not in effect else f"(x * ({effect})).sum(-1)",
                f"{name}[..., 0]",
                f"({effect}).mean(-1)",
            )
        return self.pick(f"x @ ({effect})", f"{name}[0]", f"({effect}).sum()", f"torch.mv(x, {effect})")

    def improper_site(self) -> None:
        """A flat prior on a coefficient, whose posterior is proper given data of a normal distribution."""
        support, start = self.pick(("real", "0.0"), ("positive", "1.0"))
        name = self.sample(f"dist.ImproperUniform(constraints.{support}, (), ())", "improper")
        self.improper = name, start
        self.terms.append(name)

    def vector_site(self) -> None:
        prior, kind = self.multivariate()
        name = self.sample(prior, kind)
        if kind == "matrix" and prior.startswith("dist.LKJCholesky") and self.coin(0.6):
            child = next(self.names)
            zeros = self.vector(self.columns, 0.0, 1.0)
            self.body.append(f'{child} = pyro.sample("{child}", dist.MultivariateNormal({zeros}, scale_tril={name}))')
            name, kind = child, "real"
        self.terms.append(self.of_vector(name, kind))

    def group_sites(self) -> None:
        self.uses("groups")
        self.body.append(f'with pyro.plate("groups", {self.groups}{self.pick("", ", dim=-1")}):')
        for _ in range(self.pick(1, 1, 2)):
            if self.enumerates and self.coin(0.5) and not self.parents("groups", "discrete"):
                prior = self.discrete("groups")
                name = self.sample(prior, "discrete", "    ")
                self.values.append(Value(name, "discrete", "groups"))
            if self.coin(0.35):
                prior, kind = self.multivariate("groups")
                name = self.sample(prior, kind, "    ")
                at = f"{name}[group]"
                if kind == "matrix":
                    self.terms.append(f"{name}[..., group, -1, 0]" if self.ellipsis() else f"{at}[:, -1, 0]")
                elif self.ellipsis():
                    self.terms.append(f"(x * {name}[..., group, :]).sum(-1)")
                else:
                    self.terms.append(
                        self.pick(f"(x * {at}).sum(-1)", f"{at}[:, 0]", f"torch.einsum('nk,nk->n', x, {at})")
                    )
                continue
            prior, kind = self.univariate("groups")
            name = self.sample(prior, kind, "    ")
            self.values.append(Value(name, kind, "groups"))
            self.terms.append(self.effect(f"{name}[..., group]" if self.ellipsis() else f"{name}[group]", kind))

    def loop(self) -> None:
        self.uses("time")
        name = next(self.names)
        length = self.pick(3, 1, 2, 6)
        scale = self.scale("", 0.5, 1.0)
        self.body += [
            f"{name} = []",
            f"for t in range({length}):",
            f"    last = {name}[-1] if t else {self.number(0.0, 1.0)}",
        ]
        family = self.pick(
            f"dist.Normal(last, {scale})",
            f"dist.StudentT({self.number(4.0)}, last, {scale})",
            f"dist.LogNormal(0.5 * last, {scale})",
        )
        self.body.append(f'    {name}.append(pyro.sample(f"{name}_{{t}}", {family}))')
        kind = "positive" if "LogNormal" in family else "real"
        code = (
            f"torch.stack({name}, -1)[..., time % {length}]"
            if self.ellipsis()
            else f"torch.stack({name})[time % {length}]"
        )
        self.terms.append(self.pick(self.effect(code, kind), f"sum({name}) / {length}"))

    def grid(self) -> None:
        """Two crossed plates, with data in each cell."""
        outer, inner = self.pick(2, 1, 4), self.pick(3, 1, 2)
        self.globals.append(f"cells = torch.randn({outer}, {inner}, generator=generator, dtype=dtype)")
        order = self.pick("outer, inner", "inner, outer")
        self.body += [
            f'outer = pyro.plate("outer", {outer}, dim=-2)',
            f'inner = pyro.plate("inner", {inner}, dim=-1)',
        ]
        parts = []
        which = self.pick("outer", "inner", "both", "cell")
        scale = self.scale("", 1.0, 0.5)
        for plate in ("outer", "inner"):
            if which in (plate, "both"):
                prior, kind = self.univariate("none")
                name = next(self.names)
                self.body += [f"with {plate}:", f'    {name} = pyro.sample("{name}", {prior})']
                parts.append(self.effect(name, kind))
        self.body.append(f"with {order}:")
        if which == "cell":
            prior, kind = self.univariate("none")
            name = next(self.names)
            self.body.append(f'    {name} = pyro.sample("{name}", {prior})')
            parts.append(self.effect(name, kind))
        self.body.append(f'    pyro.sample("cells", dist.Normal({" + ".join(parts)}, {scale}), obs=cells)')

    def discrete(self, place: str) -> str:
        real = self.parents(place, "real")
        logit = f"logits={self.pick(*real)}" if real and self.coin(0.5) else self.number(0.3, 0.7)
        return self.pick(f"dist.Bernoulli({logit})", f"dist.Categorical({self.vector(3, 0.3, 0.5)})")

    def enumerated(self) -> None:
        self.features.add("enumerated")
        if self.coin(0.4):  # one for all
            name = self.sample(self.discrete(""), "discrete")
            self.values.append(Value(name, "discrete", ""))
            if self.coin(0.5):
                self.terms.append(f"torch.where({name} == 1, {self.number(1.0, 2.0)}, {self.number(0.0, -1.0)})")
            return
        # One a row, which chooses from a vector
        locs, weights = next(self.names), next(self.names)
        name = next(self.names)
        prior = f"dist.Normal(tensor([-2.0, 0.0, 2.0]), {self.number(1.0, 2.0)}).to_event(1)"
        self.body.append(f'{locs} = pyro.sample("{locs}", {prior})')
        self.body.append(f'{weights} = pyro.sample("{weights}", dist.Dirichlet(tensor([1.0, 1.0, 2.0])))')
        kind = self.pick("Categorical", "Categorical", "OneHotCategorical")
        self.in_rows.append(
            f'{name} = pyro.sample("{name}", dist.{kind}({weights}), infer={{"enumerate": "parallel"}})'
        )
        if kind == "OneHotCategorical":
            self.row_terms.append(f"({name} * {locs}).sum(-1)")
        else:
            self.row_terms.append(f"{locs}[{name}]")
        if self.coin(0.3):  # its own child among the discrete ones
            child = next(self.names)
            index = name if kind == "Categorical" else f"{name}.argmax(-1)"
            self.in_rows.append(
                f'{child} = pyro.sample("{child}", dist.Bernoulli(tensor([0.2, 0.5, 0.8])[{index}]), '
                'infer={"enumerate": "parallel"})'
            )
            self.row_terms.append(f"0.5 * {child}")

    def network(self) -> None:
        prior = f"dist.Normal({self.number(0.0)}, {self.number(1.0)})"
        self.globals += [
            f"net = PyroModule[nn.Linear]({self.columns}, 1{', dtype=dtype' if self.strict else ''})",
            f"net.weight = PyroSample({prior}.expand([1, {self.columns}]).to_event(2))",
        ]
        if self.coin(0.5):
            self.globals.append(f"net.bias = PyroSample({prior}.expand([1]).to_event(1))")
        else:
            self.features.add("parameters")
        self.terms.append(self.pick("net(x).squeeze(-1)", "net(x)[:, 0].tanh()"))

    def parameter(self) -> None:
        self.features.add("parameters")
        name = next(self.names)
        if self.coin(0.5):
            self.body.append(f'{name} = pyro.param("{name}", tensor(1.0), constraint=constraints.positive)')
            self.values.append(Value(name, "positive", ""))
        else:
            self.body.append(f'{name} = pyro.param("{name}", tensor(0.5))')
            self.terms.append(name)

    def factor(self) -> None:
        real = self.parents("", "real", "bounded")
        if real:
            code = self.pick(*real)
            name = next(self.names)
            term = self.pick(f"-0.5 * ({code} - 1.0) ** 2", f"-{code}.abs()", f"-torch.logaddexp({code}, -{code})")
            self.body.append(f'pyro.factor("{name}", {term})')

    def row_sites(self) -> None:
        for _ in range(self.pick(1, 1, 2)):
            if self.coin(0.3):
                prior, kind = self.multivariate("rows")
                name = next(self.names)
                self.in_rows.append(f'{name} = pyro.sample("{name}", {prior})')
                self.row_terms.append(f"{name}[..., -1, 0]" if kind == "matrix" else f"{name}[..., 0]")
                continue
            prior, kind = self.univariate("rows")
            name = next(self.names)
            self.in_rows.append(f'{name} = pyro.sample("{name}", {prior})')
            self.values.append(Value(name, kind, "rows"))
            self.row_terms.append(self.effect(name, kind))

    def uses(self, name: str) -> None:
        line = {
            "groups": f"group = torch.arange({self.rows}) % {self.groups}",
            "time": f"time = torch.arange({self.rows})",
        }[name]
        if line not in self.globals:
            self.globals.append(line)

    # Data

    def likelihood(self) -> tuple[str, str]:
        """Distribution of the data given ``mean``, and an expression that makes data."""
        n, positive = self.rows, self.parents("", "positive")
        scale = lambda: self.pick(*positive) if positive and self.coin(0.7) else self.number(1.0, 0.5)  # noqa: E731
        normal = f"torch.randn({n}, generator=generator, dtype=dtype)"
        uniform = f"torch.rand({n}, generator=generator, dtype=dtype)"
        rate = "mean.clamp(-5.0, 5.0).exp()"
        family = "Normal" if self.improper else self.pick(
            "Normal", "Normal", "Normal", "StudentT", "Laplace", "LogNormal", "Gamma", "Exponential", "Poisson",
            "Bernoulli", "Binomial", "NegativeBinomial", "Beta", "Categorical", "OrderedLogistic", "Cauchy",
            "ZeroInflatedPoisson",
        )  # fmt: skip
        if family in ("Normal", "Laplace", "Cauchy"):
            return f"dist.{family}(mean, {scale()})", f"{normal} * {self.pick(1.0, 3.0)} + {self.pick(0.0, 2.0, -5.0)}"
        if family == "StudentT":
            return f"dist.StudentT({self.number(4.0)}, mean, {scale()})", f"2.0 * {normal}"
        if family == "LogNormal":
            return f"dist.LogNormal(mean, {scale()})", f"{normal}.exp()"
        if family == "Gamma":
            return f"dist.Gamma({self.number(2.0)}, {rate})", f"{normal}.exp()"
        if family == "Exponential":
            return f"dist.Exponential({rate})", f"{normal}.exp()"
        if family == "Poisson":
            return f"dist.Poisson({rate})", f"torch.poisson(torch.full(({n},), 3.0, dtype=dtype), generator=generator)"
        if family == "ZeroInflatedPoisson":
            return (
                f"dist.ZeroInflatedPoisson({rate}, gate=tensor(0.3))",
                f"torch.poisson(torch.full(({n},), 1.0, dtype=dtype), generator=generator)",
            )
        if family == "Bernoulli":
            return "dist.Bernoulli(logits=mean)", f"({uniform} < 0.6).to(dtype)"
        if family == "Binomial":
            return "dist.Binomial(total_count=5, logits=mean)", f"(5 * {uniform}).round()"
        if family == "NegativeBinomial":
            return (
                f"dist.NegativeBinomial({self.number(3.0)}, logits=mean.clamp(-5.0, 5.0))",
                f"(6 * {uniform}).round()",
            )
        if family == "Beta":
            return "dist.Beta(0.1 + 2.0 * mean.sigmoid(), 1.5)", f"0.02 + 0.96 * {uniform}"
        if family == "Categorical":
            return "dist.Categorical(logits=torch.stack([0.0 * mean, mean, -mean], -1))", f"(3 * {uniform}).long()"
        return "dist.OrderedLogistic(mean, tensor([-1.0, 1.0]))", f"(3 * {uniform}).long()"

    def write(self) -> RandomModel:
        steps = [self.pick("scalar", "scalar", "vector")]
        kinds = (
            "scalar",
            "scalar",
            "vector",
            "vector",
            "groups",
            "loop",
            "grid",
            "network",
            "parameter",
            "factor",
            "improper",
        )
        for _ in range(self.choose(5)):
            steps.append(self.pick(*kinds))
        if self.enumerates:
            steps.insert(self.choose(len(steps) + 1), "enumerated")
        made = {
            "scalar": self.scalar,
            "vector": self.vector_site,
            "groups": self.group_sites,
            "loop": self.loop,
            "grid": self.grid,
            "network": self.network,
            "parameter": self.parameter,
            "factor": self.factor,
            "improper": self.improper_site,
            "enumerated": self.enumerated,
        }
        once: set[str] = set()
        for step in steps:
            if step in ("groups", "grid", "network", "parameter", "improper") and step in once:
                step = "scalar"
            once.add(step)
            made[step]()
        if self.call == "amortized" or self.coin(0.3):
            self.row_sites()
        likelihood, data = self.likelihood()
        while self.call == "amortized" and ".long()" in data:
            likelihood, data = self.likelihood()
        return self.assemble(likelihood, data)

    def assemble(self, likelihood: str, data: str) -> RandomModel:
        rows, index = self.rows, self.row_index
        head = [PREAMBLE]
        if self.default_double:
            head.append("torch.set_default_dtype(torch.float64)")
        head.append(f"dtype = torch.float{64 if 'double' in self.features else 32}")
        head.append("tensor = lambda value: torch.tensor(value, dtype=dtype)")
        head.append(f"generator = torch.Generator().manual_seed({self.choose(10)})")
        head.append(f"x = torch.randn({rows}, {self.columns}, generator=generator, dtype=dtype)")
        head += self.globals
        head.append(f"y = {data}")
        body = list(self.body)
        body.append("eta = 0.3 * x[:, 0]")
        body += [f"eta = eta + {term}" for term in self.terms]
        local = bool(self.in_rows)
        if not self.ellipsis() and self.coin(0.2) and not self.enumerates:
            body.append(f"assert eta.shape == ({rows},)")
        if not local and self.coin(0.05):
            self.features.add("branch")
            scalars = self.parents("", "real")
            if scalars:
                body += [f"if {self.pick(*scalars)} > 0.5:", "    eta = eta + 0.3"]
        plate = {
            "subsample": f'pyro.plate("rows", {rows}, subsample=idx)',
            "subsample_size": f'pyro.plate("rows", {rows}, subsample_size={(rows + 1) // 2})',
        }.get(self.call, f'pyro.plate("rows", {rows})')
        whole = self.call == "whole"
        form = (
            self.pick("plate", "plate", "plate", "event", "loop", "sequential", "factor")
            if whole and not local
            else "plate"
        )
        if self.enumerates and form != "plate":
            form = "plate"
        if form == "event":
            body += ["mean = eta", f'pyro.sample("y", {likelihood}.to_event(1), obs=y)']
        elif form == "factor":
            body += ["mean = eta", f'pyro.factor("y", {likelihood}.log_prob(y).sum(-1))']
        elif form in ("loop", "sequential"):
            over = f"range({rows})" if form == "loop" else plate
            body += [
                f"for i in {over}:",
                "    mean = eta[..., i]" if self.ellipsis() else "    mean = eta[i]",
                f'    pyro.sample(f"y_{{i}}", {likelihood}, obs=y[i])',
            ]
        else:
            body.append(f"with {plate}{' as idx' if self.is_subsampled else ''}:")
            body += [f"    {line}" for line in self.in_rows]
            at = f"eta{index}" if self.is_subsampled and not self.ellipsis() else "eta[..., idx]" if index else "eta"
            body.append(f"    mean = {' + '.join([at, *self.row_terms])}")
            handler, inner = "", "    "
            if self.coin(0.15):
                head.append(f"keep = torch.arange({rows}) % 3 != 2")
                handler = f"poutine.mask(mask=keep{index})"
            elif self.coin(0.1) and not self.enumerates:
                handler = f"poutine.scale(scale={self.pick(0.5, 2.0)})"
            if handler:
                body.append(f"    with {handler}:")
                inner = "        "
            body.append(f'{inner}pyro.sample("y", {likelihood}, obs=y{index})')
        takes = "x, y" + (", idx" if self.call == "subsample" else "")
        source = [*head, "", "", f"def model({takes}):", *(f"    {line}" for line in body), "", ""]
        source += self.ending(local)
        return RandomModel("\n".join(source) + "\n", frozenset(self.features))

    def ending(self, local: bool) -> list[str]:
        """Calls and options."""
        rows = self.rows
        start = ""
        if self.improper is not None:
            name, value = self.improper
            start = f'"init_loc_fn": init_to_value(values={{"{name}": tensor({value})}})'
        if self.call == "amortized":
            self.features.add("amortized")
            return [
                "class Encoder(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                f"        layers = nn.Linear({self.columns} + 1, 4), nn.Tanh(), nn.Linear(4, 3)",
                "        self.net = nn.Sequential(*layers).to(dtype)",
                "",
                "    def forward(self, x, y):",
                "        return self.net(torch.cat([x, y.unsqueeze(-1) / 5.0], -1))",
                "",
                "",
                "calls = [(x, y)]",
                f'options = {{"amortize": {{"rows": Encoder()}}{start and ", "}{start}}}',
            ]
        if not self.is_subsampled:
            options = [start] if start else []
            if self.coin(0.15):
                options.append(f'"structure": "{self.pick("plates", "joint")}"')
            return ["calls = [(x, y)]", f"options = {{{', '.join(options)}}}"]
        self.features.add("subsampled")
        size = (rows + 1) // 2
        if self.call == "subsample_size":
            calls = ["calls = [(x, y)]"]
            plate = f'lambda x, y: pyro.plate("rows", {rows}, subsample_size={size})'
        else:
            calls = [f"calls = [(x, y, idx) for idx in torch.arange({rows}).split({size})]"]
            plate = f'lambda x, y, idx: pyro.plate("rows", {rows}, subsample=idx)'
        options = [*([f'"create_plates": {plate}'] if local else []), *([start] if start else [])]
        return [*calls, f"options = {{{', '.join(options)}}}"]


@st.composite
def random_models(draw: Callable[..., Any]) -> RandomModel:
    """Models of one latent site to some ten, of all kinds; every one trains under ``SVI`` with ``AutoNormal``."""
    return Writer(lambda count: draw(st.integers(0, count - 1))).write()


def numbered_model(seed: int) -> RandomModel:
    """One of these models, independent of those of other seeds; hypothesis varies what it has, and shrinks."""
    return Writer(Random(seed).randrange).write()
