# SPDX-License-Identifier: Apache-2.0
"""What a user imports: it is there, documented, and importing it changes nothing for anyone else."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import pyro_flows
from pyro_flows import diagnostics, flows, plots, transforms
from pyro_flows.flows import FlowSpec


@pytest.mark.parametrize("module", [pyro_flows, flows, transforms, diagnostics, plots], ids=lambda m: m.__name__)
def test_everything_public_is_there_and_documented(module):
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.ismodule(thing):
            continue
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing) and module is not transforms:
            for method_name, method in vars(thing).items():
                if inspect.isfunction(method) and not method_name.startswith("_"):
                    assert inspect.getdoc(getattr(thing, method_name)), f"{name}.{method_name}"


def test_import_changes_nothing_global():
    program = """
import torch, pyro, pyro.distributions as dist, warnings
warnings.simplefilter("error")
before = (torch.get_default_dtype(), dist.Distribution.__dict__.get("_validate_args"), torch.get_rng_state().sum(),
          dict(torch.distributions.constraint_registry.biject_to._registry), len(pyro.get_param_store()))
import pyro_flows
after = (torch.get_default_dtype(), dist.Distribution.__dict__.get("_validate_args"), torch.get_rng_state().sum(),
         dict(torch.distributions.constraint_registry.biject_to._registry), len(pyro.get_param_store()))
assert before == after
try:
    dist.Normal(0.0, -1.0)
except ValueError:
    print("still validates")
import sys
assert not {"matplotlib", "arviz", "xarray"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "still validates"


@pytest.mark.parametrize("name", flows.names())
def test_specs_are_data(name):
    spec = flows.get(name)
    assert isinstance(spec, FlowSpec)
    assert spec == flows.get(name)
    assert eval(repr(spec), vars(flows)) == spec
