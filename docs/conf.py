"""Sphinx's configuration. The build needs no network: nothing outside this repository is read."""

import inspect
import warnings

from vqad import __version__

project = "vqad"
author = "The vqad developers"
copyright = "The vqad developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_templates", "gallery/**/*.ipynb", "gallery/*.ipynb"]
templates_path = ["_templates"]
# In docstrings `name` means the object of that name, if there is one, and is code otherwise.
default_role = "py:obj"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "pydata_sphinx_theme"
html_title = "vqad"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "vqad"},
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
html_sidebars = {"changelog": [], "choices": []}

sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery"],
    "within_subsection_order": "FileNameSortKey",
    "doc_module": ("vqad",),
    "reference_url": {"vqad": None},
    "backreferences_dir": "generated/backreferences",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "capture_repr": (),
    "plot_gallery": "True",
    "copyfile_regex": r"",
}
# joblib, torch and their like warn about the machine that builds, which is nothing to show to readers.
warnings.filterwarnings("ignore", category=FutureWarning)

# Inherited from elsewhere: documented there, and linked from there to pages that are not here.
FOREIGN = ("sklearn.", "torch.", "builtins")
REQUESTS = ("get_metadata_routing", "set_fit_request", "set_partial_fit_request", "set_score_request",
            "set_split_request", "get_params", "set_params", "set_output", "fit_transform")  # fmt: skip


def skip_foreign(app, what, name, obj, skip, options):
    """Leave out members that other packages give to our classes, and the fields of named tuples."""
    module = getattr(inspect.unwrap(obj) if callable(obj) else obj, "__module__", None) or ""
    if name in REQUESTS or module.startswith(FOREIGN):
        return True
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    return None


def setup(app):
    app.connect("autodoc-skip-member", skip_foreign)
