"""The API's pages, from its docstrings, and the other pages beside them, as HTML in build/docs: ``make apidocs``.

pdoc's warnings are errors here, and so are a reference in single backticks to a name that isn't public, and a link
to what isn't there.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import warnings
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pdoc
from pdoc import doc, render, render_helpers

import custom_ops
from custom_ops.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = [f"custom_ops.{family}" for family in dict.fromkeys(info.family for info in REGISTRY.values())]
TOOLS = [
    "custom_ops.library",
    "custom_ops.shards",
    "custom_ops.verify",
    "custom_ops.registry",
    "custom_ops.triton_kernels.common",
]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(target: Path = ROOT / "build" / "docs") -> None:
    shutil.rmtree(target, ignore_errors=True)
    modules = {name: doc.Module(importlib.import_module(name)) for name in [*FAMILIES, *TOOLS]}
    places = {name: f"{page.replace('.', '/')}.html" for page, module in modules.items() for name in module.obj.__all__}
    pages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render.configure(docformat="google", show_source=False, template_directory=ROOT / "docs" / "templates")
        for name, module in modules.items():
            _prepare(module, places)
            pages[f"{name.replace('.', '/')}.html"] = render.html_module(module, modules)
        render.env.globals["texts"] = {f"{text.stem}.html": _title(text) for text in TEXTS}
        for text in TEXTS:
            pages[f"{text.stem}.html"] = _page(_title(text), text.read_text(), modules, places)
        pages["index.html"] = _page("custom_ops", _index(modules), modules, places)
        pages["search.js"] = render.search_index(modules)
    for page, html in pages.items():
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(html)
    for image in (ROOT / "docs").rglob("*.png"):
        copied = target / image.relative_to(ROOT / "docs")
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(image, copied)
    _check_links(target)


def _prepare(module: doc.Module, places: dict[str, str]) -> None:
    """Leaves what is public and has words of its own, with links where a name stands in single backticks."""
    for name, member in list(module.members.items()):
        if name not in module.obj.__all__:
            del module.members[name]
        elif isinstance(member, doc.Variable):
            value = getattr(module.obj, name)
            if hasattr(value, "fn"):  # made by triton.jit
                module.members[name] = doc.Function(module.modulename, name, value.fn, member.taken_from)
            elif isinstance(value, dict):
                member.default_value_str = ""  # addresses of functions, or all that was registered
        elif isinstance(member, doc.Class):
            member.bases = [base for base in member.bases if "._" not in f".{base[2]}"]
            for inner, own in list(member.members.items()):
                constructor = inner == "__init__" and own.taken_from[0].startswith("custom_ops.")
                own.docstring = "" if constructor else _words(own)
                if not (constructor or own.docstring) or own.name == "function":
                    del member.members[inner]
            member.own_members = list(member.members.values())  # those of private bases too
            member.inherited_members = {}
    up = "../" * module.modulename.count(".")

    top = {name: name for name in module.members}
    for member in [module, *module.members.values()]:
        own = member.own_members if isinstance(member, doc.Class) else []
        here = top | {inner.name: inner.qualname for inner in own}
        for each in [member, *own]:
            each.docstring = re.sub(r"(?<!`)`([\w.]+)`(?!`)", partial(_link, here, places, up), each.docstring)


def _link(here: dict[str, str], places: dict[str, str], up: str, found: re.Match[str]) -> str:
    name = found[1].rpartition(".")[2]
    if name in here:
        return f"[`{found[1]}`](#{here[name]})"
    if name not in places:
        raise ValueError(f"`{found[1]}` is no public name")
    return f"[`{found[1]}`]({up}{places[name]}#{name})"


def _words(member: Any) -> str:
    """A docstring that isn't inherited."""
    owner = member.obj.fget if isinstance(member.obj, property) else member.obj
    ours = str(getattr(owner, "__module__", "")).startswith("custom_ops.")
    return member.docstring if ours and getattr(owner, "__doc__", None) else ""


def _index(modules: dict[str, doc.Module]) -> str:
    lines = ["# custom_ops", custom_ops.__doc__ or ""]
    for name, module in modules.items():
        page = f"{name.replace('.', '/')}.html"
        summary = module.docstring.splitlines()[0]
        lines += [f"## [{name.removeprefix('custom_ops.')}]({page})", "", summary, "", "| name | |", "|---|---|"]
        for member in module.members.values():
            words = re.split(r"\n\n|(?<=[.:;])\n", member.docstring)[0].replace("\n", " ").replace("|", "\\|")
            words = re.sub(r"\]\(#", f"]({page}#", words.replace("](../", "]("))
            lines.append(f"| [`{member.name}`]({page}#{member.name}) | {words} |")
    return "\n".join(lines)


def _title(text: Path) -> str:
    return "README" if text.stem == "README" else text.read_text().splitlines()[0].removeprefix("# ")


def _page(title: str, text: str, modules: dict[str, doc.Module], places: dict[str, str]) -> str:
    def link(found: re.Match[str]) -> str:
        path, _, anchor = found[2].partition("#")
        if Path(path).suffix == ".md":
            return f"[{found[1]}]({Path(path).stem}.html{'#' * bool(anchor)}{anchor})"
        return found[0] if re.search(r"\.html$|\.png$|^https?:|^#", path) or not path else found[1]

    text = re.sub(r"\[([^]\n]+)\]\(([^)\s]*)\)", link, text)
    text = re.sub(r"<!--.*?-->", "", text)
    known = "|".join(custom_ops.__all__)
    text = re.sub(rf"(?<![`\[])`({known})`(?![`\]])", lambda m: f"[`{m[1]}`]({places[m[1]]}#{m[1]})", text)
    return render.env.get_template("page.html.jinja2").render(
        title=title, text=render_helpers.to_html(text), all_modules=modules, root_module_name=None
    )


class _Links(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.add(values.get("id") or "")
        if tag in ("a", "img"):
            self.links.append(values.get("href") or values.get("src") or "")


def _check_links(target: Path) -> None:
    pages = {page.resolve(): _Links(page) for page in target.rglob("*.html")}
    for page, found in pages.items():
        for link in found.links:
            path, _, anchor = link.partition("#")
            to = (page.parent / path).resolve() if path else page
            outside = re.match(r"(https?|data|mailto):", link)
            if not outside and (not to.exists() or (to in pages and anchor not in pages[to].anchors)):
                raise ValueError(f"{page.relative_to(target.resolve())}: nothing is at {link!r}")


if __name__ == "__main__":
    print(f"pdoc {pdoc.__version__}")
    main(*map(Path, sys.argv[1:]))
