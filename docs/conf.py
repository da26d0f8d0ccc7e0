# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

project = "pyro_flows"
author = "the pyro_flows developers"
copyright = author
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Shape", ("Attributes", "params_style")]
