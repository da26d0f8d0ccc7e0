# SPDX-License-Identifier: Apache-2.0
"""L4. Where a guide starts if it may look at the model first: find a Gaussian, or several, and write it into q."""

from pyro_flows.starts.plates import warm_start

__all__ = ["warm_start"]
