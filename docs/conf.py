"""Sphinx's settings: ``make docs`` makes the pages of this folder a site, in ``build/docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cupybn

project = "cupybn"
author = "the authors of cupybn"
version = release = cupybn.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
suppress_warnings = ["ref.python"]  # a name that two classes have, in a list of attributes
nitpicky = True  # a role that leads nowhere is a warning, and a warning an error

# Documents: Markdown, whose headings can be linked to.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Docstrings are Google's; types stand in the signatures.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"ArrayLike": "cupybn.typing.ArrayLike"}
python_use_unqualified_type_names = True

# The site is one of files: no fonts, scripts or styles from elsewhere.
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"cupybn {version}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # excerpts are fetched, which pages opened as files cannot do
pygments_style = "friendly"

# Other projects' names are links where their lists of names can be had, and plain text elsewhere.
_LISTS = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "mpi4py": "https://mpi4py.readthedocs.io/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_timeout = 10


def _reachable(url: str) -> bool:
    try:
        with urlopen(url + "objects.inv", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


# One list that cannot be had says that there is no network: the others are not tried.
_online = all(map(_reachable, _LISTS.values()))
intersphinx_mapping = {name: (url, None) for name, url in _LISTS.items()} if _online else {}

# Types that signatures and "Raises" name are checked where they are this library's own, and public.
nitpick_ignore_regex = [
    ("py:(class|exc)", r"(?!cupybn).*"),
    ("py:class", r".*\._\w+"),
    ("py:class", r"cupybn\..*\.(BatchNorm|Bound|Layout|Transform)"),
    ("py:class", r"cupybn\.typing\.ArrayLike"),  # a union, which Sphinx before 9 does not find
]


def _readable(app, what, name, obj, options, signature, returns):
    """A signature with the names of aliases, which Sphinx 9 spells as what stands for them."""
    alias = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
    return signature and alias.sub(r"\1", signature), returns and alias.sub(r"\1", returns)


def _linked(app, docname, source):
    """Files outside of this folder are no pages: the site has copies of those that pages name."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", r"{download}`\1 <\2>`", source[0])


def setup(app):
    app.connect("autodoc-process-signature", _readable)
    app.connect("source-read", _linked)
