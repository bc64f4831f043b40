"""How the documentation is built: `sphinx-build -W --keep-going docs docs/_build/html`. Needs no network."""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here / "_ext"))
os.environ.setdefault("PYRO_GEN_SMOKE", "1")  # the gallery shows every step of the examples, but takes few of each

project = "pyro_gen"
author = "The pyro_gen developers"
copyright = "The pyro_gen developers"
version = release = installed_version("pyro-gen")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "figures",  # docs/figures/
    "public_api",  # docs/api/, from pyro_gen.__all__
    "plain_docstrings",
]
exclude_patterns = ["_build", "_ext", "**/GALLERY_HEADER.rst"]
html_theme = "furo"
html_title = "pyro_gen"
html_static_path: list[str] = []

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

sphinx_gallery_conf = {
    "examples_dirs": str(here.parent / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": False,  # build on: a failed example is a warning, and warnings are errors
    "download_all_examples": False,
    "show_signature": False,
    "reset_modules": ("matplotlib",),
    "remove_config_comments": True,
    "min_reported_time": 5,
    "nested_sections": False,
}
