# SPDX-License-Identifier: Apache-2.0
"""Every test starts from one state, and may not change what all of torch and Pyro share."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows.flows import registry


def _validation() -> tuple[object, ...]:
    """Every validation flag, as it is now."""
    return (
        torch.distributions.Distribution._validate_args,
        dist.Distribution._validate_args if hasattr(dist.Distribution, "_validate_args") else None,
        pyro.poutine.util.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(),
    )


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seed 0, an empty parameter store, validation on; fails a test that leaves a global setting changed."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    before = (torch.get_default_dtype(), *_validation())
    yield
    after = (torch.get_default_dtype(), *_validation())
    torch.set_default_dtype(before[0])
    pyro.enable_validation(True)
    assert after == before, f"The test changed a global setting: (default dtype, validation flags) {before} -> {after}."


@pytest.fixture
def restored_registry() -> Iterator[None]:
    """Families that a test registers are gone after it."""
    before = dict(registry._FAMILIES)
    yield
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)
