# SPDX-License-Identifier: Apache-2.0
"""L1. Recording an inference step as one graph, and compiling it; independent of flows, for any model and guide."""

from pyro_flows.compiled.svi import CompiledSVI

__all__ = ["CompiledSVI"]
