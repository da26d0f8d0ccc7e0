# SPDX-License-Identifier: Apache-2.0
"""Every setting of diagnostics and importance weights does what it says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import check_calibration, diagnose, importance_resample
from pyro_flows.diagnostics import pareto_smooth
from pyro_flows.diagnostics.calibration import CalibrationSettings
from pyro_flows.diagnostics.evidence import LostMassSettings, estimate_evidence, lost_mass
from pyro_flows.diagnostics.modes import RidgeSettings, lost_modes
from pyro_flows.diagnostics.moves import MoveSettings, measure_drift
from pyro_flows.diagnostics.reference import ReferenceSettings, sample_reference
from pyro_flows.diagnostics.search import Regions, SearchResult, SearchSettings, search_regions
from pyro_flows.diagnostics.sites import SiteSettings, SiteTally
from pyro_flows.diagnostics.verdict import Thresholds, judge
from pyro_flows.export.runs import ExportSettings, ModelRuns
from pyro_flows.importance.psis import PsisSettings
from pyro_flows.importance.resample import ResampleSettings
from pyro_flows.importance.weights import ImportanceSampler, SamplerSettings
from pyro_flows.plots.draws import HistogramSettings, _smooth_histogram
from tests.fits import mixture, mixture_guide, normal_fit, one_mode

LOST_A_MODE = partial(one_mode, 5.0)


def sampler(guide: Any = mixture_guide, **settings: int) -> ImportanceSampler:
    return ImportanceSampler("test", mixture, guide, (), None, SamplerSettings(**settings))


def search(**settings: Any) -> SearchResult:
    return search_regions(sampler(), mixture, (), {}, enabled=True, progress=False, settings=SearchSettings(**settings))


def test_search() -> None:
    found = search(max_regions=1, num_mass_draws=50)
    assert found.regions is not None and len(found.regions.log_mass) == 1
    assert search(max_dim=0).why_none == "it has 1 dimensions, more than 0"
    reduced = SearchSettings(num_starts=27).reduced()
    assert (reduced.num_starts, reduced.num_ranking_draws, reduced.num_mass_draws) == (3, 8, 200)


def test_a_region_that_could_not_be_measured_is_no_mass() -> None:
    """In float32 a negative binomial likelihood of an immense size is nonsense, with a thousand nats too many at single
    draws: the evidence was minus infinity."""
    log_weights = torch.zeros(1000, 1, dtype=torch.double)
    nonsense = (torch.tensor([[1e4]]).double(), torch.ones(1, 1).double())
    found = lost_mass(*nonsense, torch.ones(1000, 1).long(), log_weights, torch.ones(1, 1).double())
    assert found.share.item() == 0.0 and found.log_evidence.item() == 0.0 and found.error.item() == 0.0


def test_lost_mass() -> None:
    """A region with as much mass as the guide has, in which it never draws."""
    region = torch.zeros(1, 1, dtype=torch.double), torch.full((1, 1), 0.01, dtype=torch.double)
    draws = torch.ones(1000, 1, dtype=torch.int8), torch.zeros(1000, 1, dtype=torch.double)
    near, far = torch.zeros(1, 1), torch.full((1, 1), 5.0)
    assert lost_mass(*region, *draws, near).share.item() == pytest.approx(0.5)
    for settings in (LostMassSettings(min_share=0.6), LostMassSettings(min_z_score=1e3), LostMassSettings(max_drawn=0)):
        assert lost_mass(*region, *draws, near, settings).share.item() == 0
    assert lost_mass(*region, *draws, far, LostMassSettings(min_share=0.6)).share.item() == pytest.approx(0.5)
    unmoved = LostMassSettings(min_share=0.6, max_change=10.0)
    assert lost_mass(*region, *draws, far, unmoved).share.item() == 0


def test_reference() -> None:
    regions = search().regions
    drawn = sampler().draw(500)
    assert regions is not None
    found = sample_reference(sampler(), drawn, regions)
    assert found is not None and found.reliable.all()
    assert abs(found.evidence.log_evidence).item() < 4 * found.evidence.error.item()
    strict = sample_reference(sampler(), drawn, regions, ReferenceSettings(min_ess=1e9))
    assert strict is not None and not strict.reliable.any()
    for settings in (ReferenceSettings(max_dim=0), ReferenceSettings(max_coordinates=0)):
        assert sample_reference(sampler(), drawn, regions, settings) is None
    # Of a guide of one mode all weights are as large as they should be, but for the mass of the other mode.
    own = estimate_evidence(sampler(LOST_A_MODE).draw(4000).log_weights)
    assert found.correct(own, 0.7, is_noise=False).missing.item() == pytest.approx(0.3, abs=0.05)
    lax = found._replace(settings=ReferenceSettings(min_z_score=1e3))
    assert lax.correct(own, 0.7, is_noise=False).missing.item() == 0
    taken = lax.correct(own, -10.0, is_noise=False)  # a k-hat that is too large for its limit
    assert taken.log_evidence == found.evidence.log_evidence
    assert lax.correct(own, -10.0, is_noise=True).log_evidence == own.log_evidence


def test_moves() -> None:
    few = sampler().draw(300)
    assert measure_drift(sampler(), few) is None
    drift = measure_drift(sampler(), few, settings=MoveSettings(min_draws=200))
    assert drift is not None and drift.z_score < drift.critical < 4.5
    rare = measure_drift(sampler(), few, settings=MoveSettings(min_draws=200, false_alarms=1e-9))
    assert rare is not None and rare.critical > 6.0


def test_limits_of_sites() -> None:
    """Upper limits grow with the z-score, and where a standard deviation is not determined, it is that of the bulk."""
    tally = SiteTally(sampler().structure)
    draws = sampler(LOST_A_MODE).draw(1000)
    tally.add(draws, draws.log_weights)
    near, far = (tally.summaries(settings=SiteSettings(z_score=z))["z"] for z in (1.0, 5.0))
    assert 0 < near.max_shift < far.max_shift and near.max_sd_error < far.max_sd_error
    assert near.has_sd
    assert not tally.summaries(settings=SiteSettings(max_log_sd_se=0.0))["z"].has_sd


def test_ridges() -> None:
    ones = torch.ones(1, 1, 1, dtype=torch.double)
    regions = Regions(-5 * ones, ones.unsqueeze(-1), 2.0, ones[0], ones[0])
    share = torch.tensor([[0.3]])
    assert lost_modes(sampler(LOST_A_MODE), regions, share)[0].separate
    assert not lost_modes(sampler(LOST_A_MODE), regions, share, RidgeSettings(min_dip=1e3))[0].separate


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        (Thresholds(), "trust it"),
        (Thresholds(min_ess=1e9), "use importance_resample"),  # no more than half of the draws are asked for
        (Thresholds(small_gap=-1.0), "use importance_resample"),
        (Thresholds(max_shift=-1.0), "use importance_resample"),
        (Thresholds(max_gap_se=0.0), "use importance_resample"),
        (Thresholds(max_shift=-1.0, min_ess_to_resample=1e9), "train longer"),  # no more than a quarter is asked for
        (Thresholds(max_missing=-1.0), "train longer"),
    ],
    ids=["default", "min_ess", "small_gap", "max_shift", "max_gap_se", "min_ess_to_resample", "max_missing"],
)
def test_verdict(limits: Thresholds, verdict: str) -> None:
    fit = normal_fit(3, scale=1.05)
    report = diagnose(fit.model, fit.guide, fit.args, search=False, seed=0, progress=False)
    evidence = estimate_evidence(report.log_weights.unsqueeze(-1))
    if limits.min_ess > report.num_samples:  # a quarter of the draws is enough by default
        evidence = evidence._replace(ess=evidence.ess / 4)
    if limits.min_ess_to_resample > report.num_samples:
        evidence = evidence._replace(ess=evidence.ess / 8)
    assert judge(report, evidence, SearchResult(None, "search is off"), fit.guide, limits).verdict == verdict


def test_calibration() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def narrow(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(y / 2, 0.1))

    check = partial(check_calibration, model, narrow, (torch.tensor(0.0),), num_samples=20, progress=False, seed=0)
    report = check(settings=CalibrationSettings(num_items=50))
    assert len(report.ranks["loc"]) == 50 and not report.calibrated
    assert check(num_datasets=50, settings=CalibrationSettings(level=0.0)).calibrated


def test_weights() -> None:
    assert [len(draws.log_guide) for draws in sampler(max_chunk=40).chunks(100, progress=False)] == [40, 40, 20]
    log_weights = torch.randn(1000)
    assert pareto_smooth(log_weights).khat < 1
    assert pareto_smooth(log_weights, PsisSettings(max_short_tail=1000)).khat == float("inf")
    assert pareto_smooth(log_weights, PsisSettings(rounding=100.0)).khat == 0
    resample = partial(importance_resample, mixture, partial(mixture_guide, 0.4), 10, progress=False)
    with pytest.raises(RuntimeError, match="expected weights with a mean"):
        resample(settings=ResampleSettings(max_khat=-1.0, min_draws=100))


def test_export() -> None:
    """One draw a run gives what many at once give."""
    one_by_one, many = (
        ModelRuns(sampler().score.model, sampler().structure, settings)
        for settings in (ExportSettings(max_elements=1), ExportSettings())
    )
    values = {"z": torch.randn(5)}
    assert one_by_one._chunk == 1 and many._chunk > 5
    for found, expected in zip(one_by_one.on_data(values), many.on_data(values), strict=True):
        assert found.keys() == expected.keys()


def test_histograms() -> None:
    x = torch.randn(2, 500).numpy()
    assert _smooth_histogram(*x, HistogramSettings(num_bins=20))[1].shape == (20, 20)
