# SPDX-License-Identifier: Apache-2.0
"""L3. Guides: the only layer that knows a model."""

from pyro_flows.guides.auto import AutoFlowGuide
from pyro_flows.guides.initialization import init_to_prior_median

__all__ = ["AutoFlowGuide", "init_to_prior_median"]
