# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # For families.py.

project = "pyro_flows"
author = "the pyro_flows developers"
copyright = author
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "myst_nb",
    "families",
]
# Tables are included in pages.
exclude_patterns = ["jupyter_execute", "_build", "tables", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "pyro_flows"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Shape", ("Attributes", "params_style")]

# Tutorials come with their outputs; tests/run_notebooks.py runs them.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|pyro)\..*"),  # Their indices would have to be fetched.
    (r"py:class", r"pyro_flows\..*"),  # Base classes that the reference shows, but does not describe.
]


def resolve_short_name(app, env, node, contnode):
    """A link to ``pyro_flows.diagnose`` or ``FitSettings``: to the one object of that name, wherever that is."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or target.startswith(("torch.", "pyro.")):
        return None
    domain = env.get_domain("py")
    name = target.removeprefix("pyro_flows.")
    found = [full for full, entry in domain.objects.items() if full.endswith(f".{name}") and not entry.aliased]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode)


def setup(app):
    app.connect("missing-reference", resolve_short_name)
