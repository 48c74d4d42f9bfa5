"""Sphinx configuration; `make docs` builds with warnings as errors, and runs every notebook."""

from __future__ import annotations

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import widerf

project = "widerf"
project_copyright = "the authors of widerf"
author = "The widerf developers"
version = release = widerf.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "remove"
html_theme = "furo"
html_title = "widerf"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Turn every public name in running text, such as ``widerf.summary(model)``, into a link to its reference."""
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().partition("(")[0]
        linked = isinstance(literal.parent, nodes.reference | pending_xref)
        if linked or not name.startswith("widerf.") or not name.replace(".", "").isidentifier():
            continue
        link = pending_xref(
            "", refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refwarn=False, refdoc=app.env.docname
        )
        literal.replace_self(link)
        link += literal


def setup(app: Sphinx) -> None:
    """Connect what is done to each page."""
    app.connect("doctree-read", link_names)
