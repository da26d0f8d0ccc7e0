# SPDX-License-Identifier: Apache-2.0
"""compare: one estimate of the evidence for all, which a bad guide cannot lower."""

from __future__ import annotations

import math
from functools import partial

import pytest

from pyro_flows import compare
from tests.fits import mixture, mixture_guide, normal_fit, one_mode


@pytest.mark.parametrize("search", [True, False])
def test_a_guide_that_lost_a_mode_does_not_set_the_evidence(search: bool) -> None:
    guides = {"one mode": partial(one_mode, 5.0), "both": partial(mixture_guide, 0.4)}
    found = compare(mixture, guides, search=search, seed=0, progress=False)
    assert found.source == "both" and found.reliable
    assert abs(found.log_evidence) < 4 * found.log_evidence_se + 1e-5
    assert [row.name for row in found] == ["both", "one mode"]
    assert found["one mode"].gap == pytest.approx(-math.log(0.7), abs=4 * found["one mode"].gap_se)
    assert found["one mode"].diagnosis.verdict == "start elsewhere"
    assert found["both"].diagnosis.verdict != "start elsewhere"
    table = str(found)
    assert "by the weights of both" in table and len(table.splitlines()) == 4


def test_without_a_good_guide_the_evidence_is_a_bound() -> None:
    fit = normal_fit(10)
    guides = {"narrow": normal_fit(10, scale=0.3).guide, "narrower": normal_fit(10, scale=0.2).guide}
    found = compare(fit.model, guides, fit.args, search=False, seed=0, progress=False)
    assert not found.reliable and "lower bound" in str(found)
    assert found.log_evidence < fit.log_evidence


def test_arguments_that_do_not_make_sense() -> None:
    with pytest.raises(ValueError, match="guides by name"):
        compare(mixture, {})
    with pytest.raises(KeyError):
        compare(mixture, {"both": mixture_guide}, search=False, num_samples=100, progress=False)["none"]
