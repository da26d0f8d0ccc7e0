# SPDX-License-Identifier: Apache-2.0
"""L8. Figures. Each function takes data and returns Axes; none calls ``show``, and matplotlib is imported at the first
figure."""

from pyro_flows.plots.draws import marginals, pairs, posterior_predictive
from pyro_flows.plots.images import latent_traversal, prior_samples, reconstructions
from pyro_flows.plots.quality import calibration, flow_grid, training, weights

__all__ = [
    "calibration",
    "flow_grid",
    "latent_traversal",
    "marginals",
    "pairs",
    "posterior_predictive",
    "prior_samples",
    "reconstructions",
    "training",
    "weights",
]
