# SPDX-License-Identifier: Apache-2.0
"""L7. Diagnostics of a guide: accuracy, lost modes and advice, from importance weights and a search for modes."""

from pyro_flows.diagnostics.calibration import Calibration, SiteCalibration, check_calibration
from pyro_flows.diagnostics.compare import Comparison, Row, compare
from pyro_flows.diagnostics.diagnose import diagnose
from pyro_flows.diagnostics.modes import LostMode
from pyro_flows.diagnostics.report import Diagnosis, Items
from pyro_flows.diagnostics.sites import SiteSummary
from pyro_flows.importance import Smoothed, importance_resample, khat_threshold, log_weights, pareto_smooth

__all__ = [
    "Calibration",
    "Comparison",
    "Diagnosis",
    "Items",
    "LostMode",
    "Row",
    "SiteCalibration",
    "SiteSummary",
    "Smoothed",
    "check_calibration",
    "compare",
    "diagnose",
    "importance_resample",
    "khat_threshold",
    "log_weights",
    "pareto_smooth",
]
