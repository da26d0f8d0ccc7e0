# SPDX-License-Identifier: Apache-2.0
"""L4. Training guides: :func:`fit` chooses what a user would have to tune, :class:`CompiledSVI` makes steps cheap."""

from pyro_flows.inference.compiled import CompiledSVI
from pyro_flows.inference.elbo import VectorizedTrace_ELBO
from pyro_flows.inference.fit import FitResult, fit

__all__ = ["CompiledSVI", "FitResult", "VectorizedTrace_ELBO", "fit"]
