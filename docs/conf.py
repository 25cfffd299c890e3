"""Sphinx's configuration. The site is built from the root of the checkout, so that links hold here and there.

``make docs`` builds it without the network, and it is read without: no script or font comes from elsewhere, and
formulas are MathML, which browsers draw themselves.
"""

import re
import shutil
import sys
from pathlib import Path

from docutils.nodes import SkipNode, math, math_block
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project, author, copyright = "bnkernels", "the bnkernels authors", "the bnkernels authors, MIT licence"
release = re.search(r'"(.+)"', (ROOT / "bnkernels/_version.py").read_text(encoding="utf-8").splitlines()[-1])[1]
extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "dist", "runs", "bnkernels", "benchmarks", "tests", "tools"]

nb_execution_mode = "off"  # the tests execute the notebooks
nb_ipywidgets_js = {}  # scripts from the network, which no notebook here needs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
default_role = "py:obj"  # names in docstrings are links
numpydoc_show_class_members = False
autodoc_mock_imports = ["bnkernels.compat.torch_autograd", "cupy", "dezero", "thinc", "torch"]  # are not installed
autodoc_typehints = "none"  # the descriptions name the types
autodoc_member_order = "bysource"

html_theme = "pydata_sphinx_theme"
html_title = "bnkernels"
html_context = {"default_mode": "auto"}
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "default",
    "pygments_dark_style": "monokai",
}


def inline(self: HTML5Translator, node: math) -> None:
    """Write a formula in a line of text."""
    self.body.append(convert(node.astext()))
    raise SkipNode  # its text is written


def display(self: HTML5Translator, node: math_block) -> None:
    """Write a formula of its own."""
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def copy_page(app: Sphinx, error: Exception | None) -> None:
    """Copy the page with sliders to where it is in the checkout, for the links of pages and notebooks."""
    if error is None:
        page = Path("docs/pictures/step_through.html")
        (app.outdir / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, app.outdir / page)


def setup(app: Sphinx) -> None:
    """Let browsers draw formulas, and serve a page that is none of Sphinx's."""
    app.connect("build-finished", copy_page)
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
