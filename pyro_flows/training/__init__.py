# SPDX-License-Identifier: Apache-2.0
"""L7. Training guides: :func:`fit` chooses what a user would have to tune."""

from pyro_flows.training.elbo import VectorizedTrace_ELBO
from pyro_flows.training.fit import FitResult, fit

__all__ = ["FitResult", "VectorizedTrace_ELBO", "fit"]
