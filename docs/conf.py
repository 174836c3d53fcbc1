"""The site: ``make site`` builds it in build/site, with warnings as errors and without the network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx import addnodes

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import generated  # noqa: E402

import custom_ops  # noqa: E402

# Browsers typeset the formulas as MathML themselves, but not every system has a font for it.
MATH_FONT = str(
    Path(importlib.util.find_spec("ziamath").submodule_search_locations[0], "fonts", "STIXTwoMath-Regular.ttf")
)

project = "custom_ops"
html_title = "custom_ops"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["generated"]

html_theme = "furo"
html_static_path = ["static", MATH_FONT]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "  # outputs and prompts aren't copied
copybutton_prompt_is_regexp = True

# A name in single backticks in a docstring is a reference. A reference without a target is an error.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|contextlib|numpy)\..*|[a-z]\w*(\[.*)?|Any|Tensor|OpOverload|None|.*Exception")
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def _fill(app: Any, docname: str, source: list[str]) -> None:
    source[0] = generated.fill(source[0])


def _link_names(app: Any, doctree: nodes.document) -> None:
    """Link each public name in the running text of a page to its place in the API."""
    theirs = set()  # names of another library, even if one of ours is spelled alike
    for table in doctree.findall(nodes.table):
        rows = list(table.findall(nodes.row))
        if rows[0][0].astext() == "theirs":
            theirs |= {literal for row in rows for literal in row[0].findall(nodes.literal)}
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        inside = isinstance(literal.parent, nodes.reference | addnodes.pending_xref | nodes.title)
        if name in custom_ops.__all__ and not inside and literal not in theirs:
            target = {"refdomain": "py", "reftype": "obj", "reftarget": f"custom_ops.{name}", "refexplicit": True}
            link = addnodes.pending_xref("", literal.deepcopy(), refwarn=True, refdoc=app.env.docname, **target)
            literal.replace_self(link)


def _public_name(app: Any, env: Any, node: addnodes.pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Resolve a reference from one module to another's public name by its last part."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    last = node["reftarget"].rpartition(".")[2]
    found = [name for name in domain.objects if name.rpartition(".")[2] == last and name.count(".") <= 3]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def _mathml(self: Any, node: nodes.Element, block: bool) -> None:
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _mathml(self, node, False), None),
        block_renderers=(lambda self, node: _mathml(self, node, True), None),
    )
    app.connect("builder-inited", lambda app: generated.draw())
    app.connect("source-read", _fill)
    app.connect("doctree-read", _link_names)
    app.connect("missing-reference", _public_name)
