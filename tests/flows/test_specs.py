# SPDX-License-Identifier: Apache-2.0
"""Recipes: argument messages, and the registry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest
import torch

from pyro_flows import flows


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("planar", {"num_transforms": 0}, r"PlanarFlow: expected num_transforms to be an integer >= 1, but got 0"),
        ("radial", {"num_transforms": 1.5}, r"RadialFlow: expected num_transforms to be an integer >= 1, but got 1.5"),
        ("householder", {"num_reflections": 1}, r"HouseholderFlow: expected num_reflections to be an integer >= 2"),
        ("householder", {"num_reflections": 3}, r"expected num_reflections to be even, but got 3"),
        ("sylvester", {"num_ortho": 0}, r"SylvesterFlow: expected num_ortho to be an integer >= 1, but got 0"),
        ("sylvester", {"num_transforms": True}, r"SylvesterFlow: expected num_transforms to be an integer >= 1"),
        ("spline_coupling", {"num_transforms": 1}, r"SplineCoupling: expected num_transforms to be an integer >= 2"),
        ("spline_coupling", {"count_bins": 129}, r"SplineCoupling: expected count_bins to be an integer in \[2, 128\]"),
        ("spline_coupling", {"bound": 0.0}, r"SplineCoupling: expected bound to be a number > 0, but got 0.0"),
        ("spline_coupling", {"hidden_dims": [8]}, r"SplineCoupling: expected hidden_dims to be a tuple of integers"),
        ("realnvp", {"num_transforms": 1}, r"RealNVP: expected num_transforms to be an integer >= 2, but got 1"),
        ("spline", {"count_bins": 1}, r"ElementwiseSpline: expected count_bins to be an integer in \[2, 128\]"),
        ("auto", {"num_transforms": -1}, r"Auto: expected num_transforms to be an integer >= 0, but got -1"),
        ("planar", {"head": "round"}, r"PlanarFlow: expected head to be one of 'diagonal', 'low_rank', 'full_rank'"),
    ],
)
def test_messages(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flows.get(name, **hyper)


@pytest.mark.parametrize("name", flows.names())
def test_build_checks_sizes(name: str) -> None:
    spec = flows.get(name)
    with pytest.raises(ValueError, match="expected input_dim to be an integer >= 1, but got 0"):
        spec.build(0)
    with pytest.raises(ValueError, match="expected context_dim to be an integer >= 0, but got -1"):
        spec.build(4, -1)
    with pytest.raises(ValueError, match="expected a context of length 2, but got none"):
        spec.build(4, 2)()
    with pytest.raises(ValueError, match=r"expected a context of length 0, but got shape \(5, 2\)"):
        spec.build(4)(torch.zeros(5, 2))
    with pytest.raises(FrozenInstanceError):
        spec.head = "full_rank"  # type: ignore[misc]


@pytest.mark.parametrize("head", ("diagonal", "low_rank", "full_rank"))
def test_heads(head: str) -> None:
    flow = flows.PlanarFlow(num_transforms=1, head=head).build(4)
    flow.head.initialize(torch.ones(4), torch.full((4,), 0.5))
    z, log_prob = flow().rsample_and_log_prob((3,))
    torch.testing.assert_close(flow().log_prob(z.detach().clone()), log_prob.detach(), atol=1e-4, rtol=1e-4)


def test_hyperparameters_reach_the_flow() -> None:
    def count(spec: flows.FlowSpec) -> int:
        return sum(p.numel() for p in spec.build(4).parameters())

    assert len(flows.PlanarFlow(num_transforms=3).build(4).transform.parts) == 4
    assert len(flows.RadialFlow(num_transforms=3).build(4).transform.parts) == 4
    assert len(flows.SylvesterFlow(num_transforms=3).build(4).transform.parts) == 4
    assert count(flows.HouseholderFlow(num_reflections=4)) - count(flows.HouseholderFlow(num_reflections=2)) == 8
    assert count(flows.SylvesterFlow(num_ortho=2)) > count(flows.SylvesterFlow(num_ortho=1))
    assert count(flows.SylvesterFlow(num_ortho=99)) == count(flows.SylvesterFlow(num_ortho=4))
    assert count(flows.SplineCoupling(count_bins=9)) > count(flows.SplineCoupling(count_bins=8))
    assert count(flows.SplineCoupling(hidden_dims=(32,))) < count(flows.SplineCoupling())


@dataclass(frozen=True, kw_only=True)
class _TwoPlanars(flows.PlanarFlow):
    """A user's own family."""

    num_transforms: int = 2


def test_another_default_keeps_the_check() -> None:
    assert _TwoPlanars().num_transforms == 2
    with pytest.raises(ValueError, match="_TwoPlanars: expected num_transforms to be an integer >= 1, but got 0"):
        _TwoPlanars(num_transforms=0)


@pytest.mark.parametrize("name", flows.names())
def test_a_family_describes_itself(name: str) -> None:
    """What the docs' tables take from the class is there, and every hyper-parameter has a range and a description."""
    spec_class = type(flows.get(name))
    assert vars(spec_class).get("best_for"), "when to use it, in a few words"
    assert vars(spec_class).get("__doc__", "").split("\n")[0], "what it is"
    described = "\n".join(inspect.getdoc(parent) or "" for parent in spec_class.__mro__)
    for known in fields(spec_class):
        assert f"\n    {known.name}: " in described, known.name
        with pytest.raises(ValueError, match=f"^{spec_class.__name__}: expected {known.name} to be "):
            flows.get(name, **{known.name: object()})


def test_every_family_is_imported() -> None:
    """A module of ``flows/`` that nobody imports would register its family too late for these tests."""
    before = flows.names()
    for module in pkgutil.iter_modules(flows.__path__, flows.__name__ + "."):
        importlib.import_module(module.name)
    assert flows.names() == before, "add a line to pyro_flows/flows/__init__.py"


def test_registry(restored_registry: None) -> None:
    known = ("planar", "radial", "householder", "sylvester", "spline_coupling", "realnvp", "auto")
    assert set(known) <= set(flows.names())
    assert list(flows.names()) == sorted(flows.names())
    with pytest.raises(ValueError, match=r"flows.get: expected name to be one of .*'sylvester'.*but got 'flow'"):
        flows.get("flow")

    assert flows.register("two_planars", _TwoPlanars) is _TwoPlanars
    flows.register("two_planars", _TwoPlanars)  # again, as when a notebook cell is run twice
    assert "two_planars" in flows.names()
    assert flows.get("two_planars", head="full_rank") == _TwoPlanars(head="full_rank")

    assert flows.register("as_decorator")(_TwoPlanars) is _TwoPlanars
    assert flows.get("as_decorator") == _TwoPlanars()

    with pytest.raises(ValueError, match=r"'planar' is PlanarFlow\. Choose another"):
        flows.register("planar", _TwoPlanars)
    with pytest.raises(ValueError, match="expected name to be an identifier, but got 'two planars'"):
        flows.register("two planars")
    with pytest.raises(TypeError, match="expected spec_class to be a subclass of FlowSpec"):
        flows.register("three", torch.nn.Linear)  # type: ignore[arg-type]
