# SPDX-License-Identifier: Apache-2.0
"""L3. The guide's distribution q as a module: a joint block, a block for each set of local plates, and encoders."""

from pyro_flows.posterior.posterior import Latents, Posterior

__all__ = ["Latents", "Posterior"]
