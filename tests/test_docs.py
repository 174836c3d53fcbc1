"""The code of the documentation runs, its links have targets, and its generated parts are up to date."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

from custom_ops import library
from custom_ops.registry import FUNCTIONS, REGISTRY
from custom_ops.verify import capabilities
from examples import autograd_tour, rank_mslr

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(DOCS))

import generated  # noqa: E402
import update_readme  # noqa: E402

PAGES = {str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]}

MODULES = ["custom_ops.triton_kernels.common"]
for path in sorted((ROOT / "custom_ops").rglob("*.py")):
    if path.name != "__main__.py":
        MODULES.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
PUBLIC = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module in (
        "custom_ops",
        "custom_ops.library",
        "custom_ops.registry",
        "custom_ops.shards",
        "custom_ops.verify",
        MODULES[0],
    )
    for name in importlib.import_module(module).__all__
}


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module, monkeypatch):
    # An example's kernel must not stay in the list of kernels that other tests compile.
    monkeypatch.setattr("custom_ops.triton_kernels.common.KERNELS", [])
    if module.startswith("custom_ops.adapters."):
        pytest.importorskip(module.rpartition(".")[2])  # the package that it is for
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize(
    "name", [name for name, value in PUBLIC.items() if isinstance(value, type | types.FunctionType)]
)
def test_every_public_function_and_class_has_an_example(name):
    documented = PUBLIC[name]
    assert documented.__module__ in MODULES  # the modules whose examples are run
    assert ">>> " in documented.__doc__


BLOCK = re.compile(
    r"(?<!-->\n)```python\n(.*?)```", re.DOTALL
)  # a block after a comment is a file, which test_packaging.py builds


def run(blocks: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in order: those with prompts must print what they show, the others must not raise."""
    # The code runs in a module of its own, where torch.compile looks up guarded names and typing looks up annotations.
    module = types.ModuleType(re.sub(r"\W", "_", name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, {}, name, name, 0)
            test.globs = module.__dict__
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
        else:
            exec(compile(block, name, "exec"), module.__dict__)


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if BLOCK.search(path.read_text())])
def test_code_of_the_pages(page, monkeypatch, tmp_path):
    # Several pages define the same example op, but an operator's name can be registered only once.
    text = re.sub(r"\bmylib(?=::|, CPU)", Path(page).stem.lower(), PAGES[page].read_text())
    for name, file in re.findall(r"<!-- file: (\w+\.\w+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(file)
        monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run(BLOCK.findall(text), page, monkeypatch)


def test_code_of_the_tour(monkeypatch):
    blocks = BLOCK.findall(autograd_tour.markdown())
    assert blocks
    run(blocks, "autograd_tour", monkeypatch)


def test_how_the_docstring_of_the_bridge_defines_an_op(monkeypatch):
    source = textwrap.dedent("\n".join(re.findall(r"^(?: {4}.*)?$", library.__doc__, re.MULTILINE)))
    check = "assert torch.func.grad(lambda x: Scale.apply(x, 2.0).sum())(torch.ones(3)).tolist() == [2, 2, 2]"
    run([source.replace("mylib", "docs"), check], "docstring", monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page].read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not re.match(r"https?:", link):
            to = (PAGES[page].parent / path).resolve() if path else PAGES[page]
            assert to.exists(), link
            assert not anchor or anchor in _anchors(to.read_text()), link


def _anchors(text: str) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for path in DOCS.rglob("*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.DOTALL):
            for entry in re.findall(r"^[a-z_/]+$", block, re.MULTILINE):
                page = path.parent / f"{entry}.md"
                assert page.exists(), entry
                listed.add(page)
    assert listed | {DOCS / "index.md"} == set(DOCS.rglob("*.md"))


def test_the_blocks_and_pictures_of_the_site_can_be_made():
    text = "".join(path.read_text() for path in DOCS.rglob("*.md"))
    blocks = re.findall(r"<!-- generated: (\w+) ?([\w.]*) -->", text)
    assert {name for name, _ in blocks} == generated.BLOCKS.keys()
    assert {argument for name, argument in blocks if name == "ops"} == {info.family for info in REGISTRY.values()}
    api = generated.fill(
        "".join(f"<!-- generated: {name} {argument} -->" for name, argument in blocks if name == "api")
    )
    assert all(re.search(rf"[.:] (?:[\w.]+\.)?{name.rpartition('.')[2]}\b", api) for name in PUBLIC)
    assert set(re.findall(r"generated/(\w+\.png)", text)) == generated.pictures.PICTURES.keys()


def test_the_guide_to_ranking_losses_names_each():
    headings = re.findall(r"^### .*$", PAGES["docs/guides/ranking.md"].read_text(), re.MULTILINE)
    assert {
        name for heading in headings for name in re.findall(r"`(\w+)`", heading)
    } >= rank_mslr.LIST_LOSSES.keys() & {*FUNCTIONS}


def test_the_readme_is_short_and_begins_with_code():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert "```python" in lines[:20]


@pytest.mark.full  # a new op needs no page made anew until the next release
def test_generated_parts_of_the_readme_are_current():
    assert update_readme.timings() in README, "run `make docs`"
    totals = README.split("<!-- matrix")[1].split("<!-- /matrix")[0]
    matrix = update_readme.MATRIX.read_text()
    rows = capabilities(quick=True)
    assert f"{len(REGISTRY)} ops, {len(rows)} rows" in totals, "run `make docs`"
    assert " 0 fail" in totals and "✗" not in matrix
    assert all(f"| {row} |" in matrix for row in rows), "run `make docs`"
    assert all(f"`{op}`" in matrix for op in REGISTRY), "run `make docs`"


def test_every_public_name_is_documented():
    for name, value in PUBLIC.items():
        assert getattr(value, "fn", value).__doc__, name  # triton.jit wraps our functions
