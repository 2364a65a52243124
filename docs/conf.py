"""Sphinx settings; pages are Markdown that also reads well unbuilt."""

from importlib.metadata import version as installed

project = "Esper"
author = "the Esper authors"
version = release = installed("esper-morph")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute may be a documented property too

html_theme = "furo"
html_title = f"Esper {version}"
html_copy_source = False
