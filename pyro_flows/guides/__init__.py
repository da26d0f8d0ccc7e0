# SPDX-License-Identifier: Apache-2.0
"""L3. Guides: the only layer that knows a model."""

from pyro_flows.guides.auto import AutoFlowGuide

__all__ = ["AutoFlowGuide"]
