# SPDX-License-Identifier: Apache-2.0
"""L7. Training guides: :func:`fit`, which chooses the options that a user would have to tune."""

from pyro_flows.training.convergence import Convergence, ConvergenceSettings, until_converged
from pyro_flows.training.cycles import ScheduleSettings
from pyro_flows.training.elbo import VectorizedTrace_ELBO
from pyro_flows.training.estimates import EstimateSettings
from pyro_flows.training.fit import fit
from pyro_flows.training.monitor import FitProgress
from pyro_flows.training.recording import RecordingSettings
from pyro_flows.training.result import FitResult, WeightedResult, Widening
from pyro_flows.training.settings import FitSettings
from pyro_flows.training.trainer import TrainerSettings
from pyro_flows.training.verdict import VerdictSettings
from pyro_flows.training.weighted_objective import WeightedSettings
from pyro_flows.training.wider import WiderSettings

__all__ = [
    "Convergence",
    "ConvergenceSettings",
    "EstimateSettings",
    "FitProgress",
    "FitResult",
    "FitSettings",
    "RecordingSettings",
    "ScheduleSettings",
    "TrainerSettings",
    "VectorizedTrace_ELBO",
    "VerdictSettings",
    "WeightedResult",
    "WeightedSettings",
    "Widening",
    "WiderSettings",
    "fit",
    "until_converged",
]
