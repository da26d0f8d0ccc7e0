# SPDX-License-Identifier: Apache-2.0
"""L1. A step of inference as one graph, and its compilation: a library of its own, for any Pyro model and guide."""

from pyro_flows.compiled.svi import CompiledSVI

__all__ = ["CompiledSVI"]
