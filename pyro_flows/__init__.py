# SPDX-License-Identifier: Apache-2.0
"""Normalizing-flow guides for Pyro: swap ``AutoNormal(model)`` for ``AutoFlowGuide(model)``."""

from pyro_flows import flows, plots
from pyro_flows.compiled import CompiledSVI
from pyro_flows.diagnostics import (
    Calibration,
    Comparison,
    Diagnosis,
    check_calibration,
    compare,
    diagnose,
)
from pyro_flows.export import to_inference_data
from pyro_flows.flows import Flow, FlowSpec
from pyro_flows.guides import AutoFlowGuide, init_to_prior_median
from pyro_flows.importance import importance_resample
from pyro_flows.prediction import predict, prior_predictive
from pyro_flows.training import Convergence, FitProgress, FitResult, VectorizedTrace_ELBO, fit, until_converged

__version__ = "0.1.0"

__all__ = [
    "AutoFlowGuide",
    "Calibration",
    "Comparison",
    "CompiledSVI",
    "Convergence",
    "Diagnosis",
    "FitProgress",
    "FitResult",
    "Flow",
    "FlowSpec",
    "VectorizedTrace_ELBO",
    "check_calibration",
    "compare",
    "diagnose",
    "fit",
    "flows",
    "importance_resample",
    "init_to_prior_median",
    "plots",
    "predict",
    "prior_predictive",
    "to_inference_data",
    "until_converged",
]
