# SPDX-License-Identifier: Apache-2.0
"""L5. Guides in Pyro's sense: parameters in its store, plates and sample statements."""

from pyro_flows.guides.auto import AutoFlowGuide
from pyro_flows.guides.initialization import init_to_prior_median

__all__ = ["AutoFlowGuide", "init_to_prior_median"]
