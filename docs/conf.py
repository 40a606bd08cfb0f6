"""Builds the pages of this folder into a site: `make docs`."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "fedsplit"
copyright = "the authors of fedsplit, Apache-2.0"  # Sphinx's name
version = release = version_of("fedsplit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["site"]
html_theme = "furo"
html_title = "fedsplit"
html_static_path: list[str] = []

# Headings can be linked to, as on a code host.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Docstrings are in Google style and in Markdown's words: a name in backticks is code.
default_role = "code"
napoleon_include_init_with_doc = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
"""A link to a file of the repository that is no page of the site."""


def _name_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Replaces links that leave this folder by the path in the repository: the site holds the pages alone."""
    source[0] = _OUTSIDE.sub(r"\1 (`\2`)", source[0])


def setup(app: Sphinx) -> None:
    """Registers the handler of sources."""
    app.connect("source-read", _name_files)
