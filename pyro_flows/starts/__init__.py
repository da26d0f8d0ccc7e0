# SPDX-License-Identifier: Apache-2.0
"""L4. Warm starts: initialize a guide at one or several Gaussians that are fitted to the model."""

from pyro_flows.starts.plates import warm_start

__all__ = ["warm_start"]
