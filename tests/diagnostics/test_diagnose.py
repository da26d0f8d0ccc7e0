# SPDX-License-Identifier: Apache-2.0
"""diagnose: exact evidence, identities, and the verdict on fits that are good or bad by construction."""

from __future__ import annotations

import pytest

from pyro_flows import diagnose
from tests.fits import BAD, GOOD


@pytest.mark.parametrize("name", GOOD)
def test_good_fits(name: str) -> None:
    fit = GOOD[name]()
    report = diagnose(fit.model, fit.guide, fit.args, seed=0, progress=False)
    print(report)
    # Float32 log densities of a hundred terms are right to 1e-5 each.
    assert abs(report.log_evidence - fit.log_evidence) < 4 * report.log_evidence_se + 1e-3
    assert report.elbo == pytest.approx(report.expected_log_likelihood - report.kl_to_prior, rel=1e-9, abs=1e-9)
    assert report.trustworthy, str(report)


@pytest.mark.parametrize("name", BAD)
def test_bad_fits(name: str) -> None:
    fit = BAD[name]()
    report = diagnose(fit.model, fit.guide, fit.args, seed=0, progress=False)
    print(report)
    assert not report.trustworthy, str(report)
    assert report.advice and report.reason
