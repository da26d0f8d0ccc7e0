# SPDX-License-Identifier: Apache-2.0
"""L8. Draws of a guide as ArviZ data, for its summaries, plots and model comparison."""

from pyro_flows.export.inference_data import to_inference_data

__all__ = ["to_inference_data"]
