"""Settings of the documentation."""

import sys
from pathlib import Path

from sphinx_gallery.sorting import FunctionSortKey

import skood

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import api_page  # noqa: E402
import results_page  # noqa: E402
import speed_page  # noqa: E402
from gallery_order import demo_first  # noqa: E402

api_page.write(HERE / "api")
results_page.write(HERE / "results")
speed_page.write(HERE / "speed")

project = "skood"
author = "The skood developers"
copyright = f"2026, {author}"
version = release = skood.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
# In docstrings, single backquotes mark parameters and attributes.
default_role = "literal"
nitpicky = True

# Types are stated in the docstrings, with their shapes.
autodoc_typehints = "none"
# What torch and scikit-learn say of a method is theirs to document.
autodoc_inherit_docstrings = False
# The template of classes lists their members.
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "within_subsection_order": FunctionSortKey(demo_first, "the demo first"),
    "image_srcset": ["2x"],
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
}

# Without a table of contents beside them: code and what it prints need the room.
WIDE_PAGES = ["index", *(f"gallery/{path.stem}" for path in HERE.parent.glob("examples/*.py"))]

html_title = "skood"
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "show_prev_next": False,
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": {"**": ["page-toc"]} | {page: [] for page in WIDE_PAGES},
}
html_static_path = ["_static"]
html_css_files = ["skood.css"]
# Pages without others below them.
html_sidebars = {page: [] for page in ("changelog", "index", "installation")}
html_show_sourcelink = False
