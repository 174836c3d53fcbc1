"""What the documentation shows is run, and its generated parts are those of today."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

from custom_ops import library
from custom_ops.examples import autograd_tour, rank_mslr
from custom_ops.registry import REGISTRY
from custom_ops.verify import capabilities

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


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
    monkeypatch.setattr("custom_ops.triton_kernels.common.KERNELS", [])  # that of an example isn't for others to see
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize(
    "name", [name for name, value in PUBLIC.items() if isinstance(value, type | types.FunctionType)]
)
def test_every_public_function_and_class_has_an_example(name):
    documented = PUBLIC[name]
    assert documented.__module__ in MODULES  # where it is run
    assert ">>> " in documented.__doc__


def test_the_api_pages_have_every_public_name_and_no_link_to_nothing(tmp_path):
    spec = importlib.util.spec_from_file_location("apidocs", ROOT / "docs" / "apidocs.py")
    apidocs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(apidocs)
    apidocs.main(tmp_path)
    index = (tmp_path / "index.html").read_text()
    for path in [*apidocs.FAMILIES, *apidocs.TOOLS]:
        page = f"{path.replace('.', '/')}.html"
        html = (tmp_path / page).read_text()
        for name in importlib.import_module(path).__all__:
            assert f'id="{name}"' in html, name
            assert f'href="{page}#{name}"' in index, name
    anchors = set(re.findall(r'href="[^"]*#(\w+)"', index))
    assert {name.rpartition(".")[2] for name in PUBLIC} <= anchors
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file()


def test_examples_of_the_readme(monkeypatch):
    # In a module of their own, in which torch.compile looks up the names that it guards.
    module = types.ModuleType("readme_examples")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    test = doctest.DocTestParser().get_doctest(README, {}, "README.md", "README.md", 0)
    test.globs = module.__dict__
    result = doctest.DocTestRunner().run(test, clear_globs=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_of_the_tour():
    page = ROOT / "docs" / "autograd_tour.md"
    assert page.read_text() == autograd_tour.markdown(), "python -m custom_ops.examples.autograd_tour --markdown"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_page_on_ranking_losses_names_each_and_its_examples_hold():
    page = ROOT / "docs" / "choosing_a_ranking_loss.md"
    text = page.read_text()
    assert all(f"| `{name}` |" in text for name in rank_mslr.LIST_LOSSES if name in REGISTRY)
    assert (page.parent / "ranking_gradients.png").stat().st_size < 150_000
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


IN_README = README.split("## Your own op")[1].split("```python\n")[1].split("```")[0]
IN_DOCSTRING = textwrap.dedent("\n".join(re.findall(r"^(?: {4}.*)?$", library.__doc__, re.MULTILINE)))


@pytest.mark.parametrize("source", [IN_README, IN_DOCSTRING.replace("mylib", "docs")], ids=["README", "docstring"])
def test_what_shows_how_to_define_an_op_works(source):
    names: dict = {}
    # The schema is inferred from annotations, which need a module of their own to be looked up in.
    exec(compile(source, "README.md", "exec"), names)
    x = names["torch"].ones(3, requires_grad=True)
    assert names["torch"].func.grad(lambda x: names["Scale"].apply(x, 2.0).sum())(x).tolist() == [2, 2, 2]


def test_generated_parts_of_the_readme_are_current():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.ops() in README, "run `make docs`"
    assert update.fastest() in README, "run `make docs`"
    assert update.speed() == update.SPEED.read_text(), "run `make docs`"
    assert update.networks() in README, "run `make docs`"
    table = README.split("<!-- matrix")[1].split("<!-- /matrix")[0]
    matrix = update.MATRIX.read_text()
    assert all(f"| {capability} |" in text for capability in capabilities(quick=True) for text in (table, matrix))
    assert all(f"`{op}`" in matrix for op in REGISTRY), "run `make docs`"
    assert "✗" not in table + matrix


def test_every_public_name_is_documented():
    for name, value in PUBLIC.items():
        assert getattr(value, "fn", value).__doc__, name  # Triton's functions hold ours
