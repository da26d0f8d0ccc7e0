# SPDX-License-Identifier: Apache-2.0
"""L6. Log importance weights of a guide's draws, Pareto smoothing and resampling."""

from pyro_flows.importance.psis import Smoothed, khat_threshold, pareto_smooth
from pyro_flows.importance.resample import importance_resample
from pyro_flows.importance.weights import log_weights

__all__ = ["Smoothed", "importance_resample", "khat_threshold", "log_weights", "pareto_smooth"]
